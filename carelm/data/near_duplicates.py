"""Questions that are nearly the same: at least 0.9 of their character 5-grams are shared.

Exact: the similarity is Jaccard's over sets of 5-grams, and no pair is missed. Two sets that share at least k of their grams
share l of the first |x| - k + l grams of each, when both are sorted by rarity (prefix filtering: Chaudhuri et al., "A
Primitive Operator for Similarity Joins in Data Cleaning", ICDE 2006; longer prefixes: Wang et al., "Can We Beat the Prefix
Filtering?", SIGMOD 2012): only those who do are compared.
"""

import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

from carelm.data.example import Example

TENTHS = 9  # least similarity, in tenths: whole numbers, so that 0.9 is exact
GRAM_LENGTH = 5


def normalise(text: str) -> str:
    """NFKC, case folded, every run of blanks one space; punctuation stays."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def grams(text: str) -> set[str]:
    """The 5-grams of a text, normalised; the whole text where it is shorter."""
    text = normalise(text)
    return {text[i : i + GRAM_LENGTH] for i in range(max(1, len(text) - GRAM_LENGTH + 1))}


class NearDuplicates:
    """Held-out questions, to find near-duplicates of: these are in memory, the questions of train pass by."""

    def __init__(self, texts: Iterable[str]):
        sets = [grams(text) for text in texts]
        counts = Counter(gram for found in sets for gram in found)
        self._rank = {gram: i for i, gram in enumerate(sorted(counts, key=lambda gram: (counts[gram], gram)))}
        self._sets = [array("i", sorted(self._rank[gram] for gram in found)) for found in sets]
        self._by_rank: dict[int, list[int]] = defaultdict(list)
        for number, ranks in enumerate(self._sets):
            largest = 10 * len(ranks) // TENTHS  # of a set that can be this similar
            for rank in ranks[: len(ranks) - _least(len(ranks)) + _asked_of_prefix(largest)]:
                self._by_rank[rank].append(number)

    def find(self, text: str) -> tuple[int, float] | None:
        """A held-out question (its number) that the text is a near-duplicate of, and their similarity."""
        found = grams(text)
        size, known = len(found), [self._rank[gram] for gram in found if gram in self._rank]
        unknown, least, asked = size - len(known), _least(size), _asked_of_prefix(size)
        if len(known) < least:
            return None
        known.sort()
        shared: Counter = Counter()
        for rank in known[: size - least + asked - unknown]:  # grams that no held-out question has are the rarest
            shared.update(self._by_rank.get(rank, ()))
        own = set(known)
        for number, count in shared.items():
            other = self._sets[number]
            if count >= asked and 10 * min(size, len(other)) >= TENTHS * max(size, len(other)):
                both = len(own.intersection(other))
                either = size + len(other) - both
                if 10 * both >= TENTHS * either:
                    return number, both / either
        return None


class NearQuestions:
    """Held-out questions, to find the rows whose question is nearly one of them, as a whole or without the other's further
    columns (`Example.alone`)."""

    def __init__(self, held_out: Iterable[Example], text: Callable[[Example], str]):
        """`text` is that of a whole question."""
        self._text, self._held_out = text, [e for e in held_out if text(e)]
        self._alone = [(e, part) for e in self._held_out for part in e.alone]
        self._wholes, self._parts = NearDuplicates(map(text, self._held_out)), NearDuplicates(p for _, p in self._alone)

    def find(self, example: Example) -> tuple[Example, float] | None:
        """A held-out question that the row's is a near-duplicate of, and their similarity."""
        text = self._text(example)
        for part in filter(None, (text, *example.alone)):
            if match := self._wholes.find(part):
                return self._held_out[match[0]], match[1]
        if text and (match := self._parts.find(text)):
            return self._alone[match[0]][0], match[1]
        return None


def _least(size: int) -> int:
    """The grams that a set of this size shares at least with one that is so similar: 0.9 of it, rounded up."""
    return -(-TENTHS * size // 10)


def _asked_of_prefix(size: int) -> int:
    """The grams that two prefixes must share: more for long texts, which share common grams by chance."""
    return min(_least(size), 1 + size // 32)
