"""Whether what an answer says stands in the passages that it names: by words, without a model.

A sentence is supported where at least half of its content words stand in the passages that it marks, as [1]. That sees no
negation and no order of words, so that it says how often an answer keeps to its passage, not how often it is right. English
words that carry no content are left out, and a plural counts as its singular; of other languages every word counts.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import regex

from carelm.chat.grounding import MARK, marks

ENOUGH = 0.5  # of a sentence's content words
WORD = regex.compile(r"\p{N}+(?:[.,:]\p{N}+)*|\p{L}[\p{L}\p{M}\p{N}'’-]*")
WITHOUT_CONTENT = frozenset(
    "a about after again all also am an and any are as at be because been before being both but by can cannot could did do "
    "does doing down each either else few for from further get had has have having he her here hers him his how i if in into "
    "is it its itself just let may me might more most much must my no nor not now of off on once only or other our out over "
    "own per please same shall she should so some such than that the their them then there these they this those through to "
    "too under until up us very was we were what when where which while who whom whose why will with within would yes yet "
    "you your i'm i'll don't it's can't won't".split()
)


@dataclass(frozen=True)
class Claim:
    """A sentence of an answer.

    Attributes:
        text: the sentence with its marks.
        marks: the passages that it names.
        share: of its content words that stand in these, 0 where it names none; None where it has no content words.
    """

    text: str
    marks: list[int]
    share: float | None

    @property
    def is_supported(self) -> bool:
        return self.share is not None and self.share >= ENOUGH


def content_words(text: str) -> set[str]:
    """The words of a text that carry content, folded; a plural as its singular (the S stemmer of Harman 1991)."""
    words = (word.casefold().replace("’", "'") for word in WORD.findall(MARK.sub(" ", text)))
    return {_singular(word) for word in words if word not in WITHOUT_CONTENT}


def sentences(answer: str) -> list[str]:
    """An answer's sentences; a mark behind a full stop belongs to the sentence before it."""
    answer = regex.sub(rf"([.!?])((?:\s*{MARK.pattern})+)", r"\2\1", answer)
    return [part.strip() for part in regex.split(r"(?<=[.!?])\s+|\n+", answer) if part.strip()]


def claims(answer: str, passages: Sequence[str]) -> list[Claim]:
    """The answer's sentences with their support by these passages, which it numbers from 1."""
    of_passage = [content_words(text) for text in passages]
    found = []
    for sentence in sentences(answer):
        words, named = content_words(sentence), marks(sentence)
        there = set().union(*(of_passage[n - 1] for n in named if 1 <= n <= len(of_passage)))
        found.append(Claim(sentence, named, len(words & there) / len(words) if words else None))
    return found


def with_marks(sentence: str, numbers: Iterable[int]) -> str:
    """The sentence with marks before the sign that ends it."""
    text = sentence.rstrip(".!?")
    return f"{text} {''.join(f'[{n}]' for n in numbers)}{sentence[len(text) :]}"


class Supporting:
    """Finds the passages that support a sentence, among many."""

    def __init__(self, passages: Sequence[str]):
        self._of_word: dict[str, list[int]] = defaultdict(list)
        for place, text in enumerate(passages):
            for word in content_words(text):
                self._of_word[word].append(place)

    def find(self, sentence: str) -> dict[int, float]:
        """The places of the passages that hold at least half of the sentence's content words, with that share, best first."""
        words = content_words(sentence)
        number: dict[int, int] = defaultdict(int)
        for word in words:
            for place in self._of_word.get(word, ()):
                number[place] += 1
        enough = {place: count / len(words) for place, count in number.items() if count / len(words) >= ENOUGH}
        return dict(sorted(enough.items(), key=lambda item: (-item[1], item[0])))


def _singular(word: str) -> str:
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y"
    if word.endswith("es") and not word.endswith(("aes", "ees", "oes")):
        return word[:-1]
    return word[:-1] if word.endswith("s") and not word.endswith(("us", "ss")) and len(word) > 2 else word
