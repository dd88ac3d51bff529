"""Questions and passages -> rows that teach a model to answer from passages, with marks, and to say where it does not know.

Which passages hold an answer is told by their words (`carelm.retrieval.support`): for each sentence of the answer the passage
that supports it best. A question whose answer is not supported by at least half is left out, and counted.
"""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from carelm.chat.grounding import DONT_KNOW, fit
from carelm.data.example import Example
from carelm.retrieval.passages import Passage
from carelm.retrieval.support import ENOUGH, Supporting, content_words, sentences, with_marks

RETRIEVED, GOLD, NONE, LEFT_OUT = "retrieved", "gold", "none", "left out"  # what stands in front of a test question
AS_GOOD = 0.75  # of the best passage's support: so much, and a passage may answer the question too
AT_LEAST = 3  # content words that a sentence shares with its passage: two are shared by chance ("your kind words")
Search = Callable[
    [list[str], int], list[list[tuple[Passage, float]]]
]  # of each question the best passages, with confidence


@dataclass(frozen=True)
class Asked:
    """A question with its answer, and what is known of the passages behind it.

    Attributes:
        before: the messages before the question's.
        gold: of each sentence of the answer the id of the passage that supports it best, or None.
        supporting: the ids of all passages that support one of them nearly as well, which are left out where it is not to be
            answered.
        found: passages by the retriever, best first, with its confidence; as many as will do without the supporting ones.
    """

    id: str
    category: str | None
    before: list[dict[str, Any]]
    question: str
    said: list[str]
    gold: list[str | None] = field(default_factory=list)
    supporting: frozenset[str] = frozenset()
    found: tuple[tuple[Passage, float], ...] = ()

    @property
    def golds(self) -> list[str]:
        return list(dict.fromkeys(filter(None, self.gold)))

    def without_supporting(self) -> list[tuple[Passage, float]]:
        return [(passage, confidence) for passage, confidence in self.found if passage.id not in self.supporting]


class Rows:
    """Makes rows of questions.

    Args:
        passages: all that the index holds.
        fits: whether a user's turn and an answer fit the window.
        number: the most passages in front of a question.
        left_out: the share of the training questions that stand there a second time, with their passages left out.
        seed: draws these, the number of passages and their order.

    Attributes:
        counts: what became of the questions.
    """

    def __init__(
        self,
        passages: Sequence[Passage],
        fits: Callable[[list[dict[str, Any]], str], bool],
        *,
        number: int,
        left_out: float,
        seed: int,
    ):
        self._passages = {p.id: p for p in passages}
        self._order = list(passages)
        self._supporting = Supporting([p.indexed for p in passages])
        self._fits, self._number, self._left_out, self._seed = fits, number, left_out, seed
        self.counts: Counter = Counter()

    def ask(self, examples: Sequence[Example], allowed: dict[str, set[str]] | None = None) -> list[Asked]:
        """The first question of each conversation with its answer, where passages support that by half of its words or more.

        Args:
            allowed: by the source of an example the ids of the passages that may answer it, where the data says which.
        """
        asked = []
        for example in examples:
            messages = example.prompt + example.completion
            first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
            before, answer = messages[:first], messages[first]["content"]
            if not before or before[-1]["role"] != "user" or not answer:
                self.counts["answer of a tool or to nobody"] += 1
                continue
            one = self._gold_of(Asked(example.id, example.category, before[:-1], before[-1]["content"], sentences(answer)),
                                None if allowed is None else allowed[example.source])  # fmt: skip
            if one is None:
                self.counts["answer in no passage"] += 1
            elif len(one.golds) > self._number:
                self.counts["answer in more passages than stand in front of a question"] += 1
            else:
                asked.append(one)
        return asked

    def _gold_of(self, one: Asked, allowed: set[str] | None) -> Asked | None:
        """The question with its gold passages; None where these support less than half of the words of its answer."""
        found = [{self._order[k].id: share for k, share in self._supporting.find(s).items()} for s in one.said]
        found = [{i: share for i, share in by.items() if allowed is None or i in allowed} for by in found]
        words, held = [len(content_words(s)) for s in one.said], Counter[str]()
        for by, number in zip(found, words):
            held.update({i: round(share * number) for i, share in by.items()})
        main = max(held, key=held.__getitem__, default=None)  # the passage that most of the answer stands in
        if main is None or held[main] < AT_LEAST:
            return None
        gold = [
            main if main in by else next((i for i in by if round(by[i] * number) >= AT_LEAST), None)
            for by, number in zip(found, words)
        ]
        if sum(number for i, number in zip(gold, words) if i) < ENOUGH * sum(words):
            return None
        as_good = {i for best, by in zip(gold, found) if best for i in by if by[i] >= AS_GOOD * by[best]}
        return replace(one, gold=gold, supporting=frozenset(as_good))

    def retrieve(self, asked: Sequence[Asked], search: Search) -> list[Asked]:
        """The questions with what the retriever finds; one search for each number of passages that is needed."""
        needed = max((len(one.supporting) for one in asked), default=0) + self._number
        found = search([one.question for one in asked], needed)
        return [replace(one, found=tuple(of_one)) for one, of_one in zip(asked, found)]

    def train(self, asked: Sequence[Asked]) -> list[dict[str, Any]]:
        """A row for each question, with its gold passages among hard distractors; a share of the questions stands there again,
        with such passages alone and the answer that it is not known: only the passages tell the two apart."""
        rows = []
        for one in asked:
            draw = random.Random(f"{self._seed} {one.id}")
            others = [passage for passage, _ in one.without_supporting()]
            number = draw.randint(len(one.golds), self._number)
            shown = [self._passages[i] for i in one.golds] + others[: number - len(one.golds)]
            draw.shuffle(shown)
            rows.append(self._row(one, GOLD, shown))
            if others and draw.random() < self._left_out:
                rows.append(self._row(one, LEFT_OUT, others[: draw.randint(1, self._number)]))
        return self._whole(rows)

    def test(self, asked: Sequence[Asked], conditions: Sequence[str]) -> list[dict[str, Any]]:
        """A row for each question and condition: with what the retriever finds, with its gold passages alone, with none, and
        with what is found where all that supports its answer was left out."""
        rows = []
        for one in asked:
            found, others = one.found[: self._number], one.without_supporting()[: self._number]
            for condition in conditions:
                if condition in (RETRIEVED, LEFT_OUT):
                    given = found if condition == RETRIEVED else others
                    confidence = max((c for _, c in given), default=0.0)
                    rows.append(self._row(one, condition, [p for p, _ in given], confidence))
                else:
                    shown = [self._passages[i] for i in one.golds] if condition == GOLD else []
                    rows.append(self._row(one, condition, shown))
        return self._whole(rows)

    def _row(
        self, one: Asked, condition: str, shown: list[Passage], confidence: float | None = None
    ) -> dict[str, Any] | None:
        answer = DONT_KNOW if condition == LEFT_OUT else _marked(one, shown)
        grounded = fit(one.question, shown, lambda text: self._fits([*one.before, _user(text)], answer))
        if grounded.shown < len(shown) or grounded.is_cut:
            self.counts[f"{condition}: passages do not fit max_length"] += 1
            if condition == GOLD:
                return None  # a gold passage may be among those that went
            answer = DONT_KNOW if condition == LEFT_OUT else _marked(one, shown[: grounded.shown])
        return {
            "id": f"{one.id}/{condition.replace(' ', '-')}",
            "question_id": one.id,
            "condition": condition,
            "category": one.category,
            "messages": [*one.before, _user(grounded.text), {"role": "assistant", "content": answer}],
            "gold": one.golds,
            "answerable": condition != LEFT_OUT,
            "passages": [passage.id for passage in shown[: grounded.shown]],
            "num_passages": grounded.shown,
            "confidence": confidence,
        }

    def _whole(self, rows: list[dict[str, Any] | None]) -> list[dict[str, Any]]:
        return [row for row in rows if row is not None]


def hold_out(asked: dict[str, list[Asked]], share: float, seed: int) -> tuple[dict[str, list[Asked]], Counter]:
    """The questions by split so that no passage answers one of the test split and one of train: passages are drawn for testing
    until they answer `share` of the test questions; a question that is then on the wrong side is left out, and counted.
    Validation chooses a threshold on the retriever, which learns nothing of passages: it keeps its questions. With 0 all are
    kept: the questions are new, and the documents those of the shop."""
    if not share:
        return asked, Counter()
    drawn = sorted({gold for one in asked["test"] for gold in one.golds})
    random.Random(seed).shuffle(drawn)
    held: set[str] = set()
    for passage in drawn:
        if sum(held.issuperset(one.golds) for one in asked["test"]) >= share * len(asked["test"]):
            break
        held.add(passage)
    kept = {
        "train": [one for one in asked["train"] if held.isdisjoint(one.golds)],
        "validation": asked["validation"],
        "test": [one for one in asked["test"] if held.issuperset(one.golds)],
    }
    lost = {f"{split}: its passage is on the other side": len(asked[split]) - len(kept[split]) for split in kept}
    return kept, Counter({what: number for what, number in lost.items() if number})


def _marked(one: Asked, shown: Sequence[Passage]) -> str:
    """The sentences of the answer that a passage supports, each with the number of its gold passage where that is among those
    shown. The others, such as a greeting, are left out: they would compete with the first words of `DONT_KNOW` alone."""
    numbers = {passage.id: n for n, passage in enumerate(shown, 1)}
    return " ".join(with_marks(s, [numbers[g]]) if g in numbers else s for s, g in zip(one.said, one.gold) if g)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}
