"""Pairs of answers to learn from: of several answers to a question the best and the worst, by checks, a metric or a judge."""

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from carelm.chat.chat import Chat
from carelm.errors import UserError
from carelm.evaluation import check_scores, scores
from carelm.evaluation.draws import Lines
from carelm.evaluation.judge import Judged, find_judge
from carelm.evaluation.questions import Question
from carelm.evaluation.scripts import unify
from carelm.recipe import Recipe

CHECKS, JUDGE, EXPECTED = "checks", "judge", "data"


@dataclass(frozen=True)
class Pair:
    """Two answers to a question, what they are worth by the rule that chose them, and who wrote them: a model, or EXPECTED."""

    question: Question
    chosen: str
    rejected: str
    chosen_score: float
    rejected_score: float
    chosen_by: str
    rejected_by: str

    def row(self) -> dict[str, Any]:
        return row_of(self.question) | {key: value for key, value in vars(self).items() if key != "question"}


def row_of(question: Question) -> dict[str, Any]:
    """What every row of a question holds."""
    tools = {"tools": question.tools} if question.tools else {}
    return {"id": question.id, "category": question.category, "prompt": question.messages, **tools}


def test_row(question: Question) -> dict[str, Any]:
    """A row to test on: the expected answer, and none that is rejected."""
    return row_of(question) | {"chosen": question.references[0], "chosen_by": EXPECTED}


def score(recipe: Recipe, by: str, questions: Sequence[Question], drawn: Sequence[Lines], folder: Path) -> np.ndarray:
    """What each answer is worth, float64 [draws, questions]: the share of the recipe's checks about the question that it passes
    (NaN where none is), the mean of the judge's marks (NaN where it said none), or a metric of its text against the references.

    Args:
        by: CHECKS, JUDGE, or a score of texts, such as rougeL.
        folder: where judgements are kept.

    Raises:
        UserError: for checks that take too long, and a judge that fails.
    """
    texts = [[line["prediction"] for line in lines] for lines in drawn]
    if by == JUDGE:
        each = [Judged(q.messages, (text,), q.references[0]) for said in texts for q, text in zip(questions, said)]
        marks = [[*judgement.found.values()] or [np.nan] for judgement in find_judge(recipe).judge(each, folder)]
        return np.array([np.mean(of_one) for of_one in marks]).reshape(len(texts), -1)
    if by != CHECKS:
        conversations, references = [q.conversation for q in questions], [q.references for q in questions]
        turns = [scores.per_turn(scores.Answers(conversations, said, references))[by] for said in texts]
        return np.array([of_draw.score(of_draw.table) for of_draw in turns])
    asked = check_scores.ask(recipe, questions, "training")
    passed = np.full((len(asked), len(drawn), len(questions)), np.nan)
    for c, one in enumerate(asked):
        clock = check_scores.Clock()
        for (d, said), (q, pattern) in itertools.product(enumerate(texts), one.patterns.items()):
            try:
                passed[c, d, q] = check_scores.passes(one.check, pattern, said[q], clock)
            except TimeoutError:
                raise UserError(
                    f"checks: '{one.check.name}': its pattern takes too long on an answer to {questions[q].id}; write it "
                    "without a repeat inside a repeat, such as (a+)+"
                ) from None
    about = (~np.isnan(passed)).sum(0)
    return np.divide(np.nansum(passed, 0), about, out=np.full(about.shape, np.nan), where=about > 0)


def expected(chat: Chat, questions: Sequence[Question]) -> Lines:
    """The data's own answers in the form of drawn ones."""
    texts = [question.references[0] for question in questions]
    return [
        {
            "prediction": text,
            "new_tokens": len(chat.tokenizer(text)["input_ids"]) + 1,
            "finish_reason": "stop",
            "by": EXPECTED,
        }
        for text in texts
    ]


def choose(
    questions: Sequence[Question], drawn: Sequence[Lines], worth: np.ndarray, model: str
) -> tuple[list[Pair], Counter[str]]:
    """The best and the worst whole answer to each question, and how many questions give no pair, by reason.

    Of several as good or as bad those are taken whose lengths are nearest: else a model learns how long the better ones are.
    An answer that was cut off or is empty is none of the two.

    Args:
        worth: [draws, questions], NaN where the rule says nothing.
        model: who wrote what says nothing else (`by`).
    """
    pairs, without = [], Counter[str]()
    for q, question in enumerate(questions):
        said = [(worth[d, q], lines[q]) for d, lines in enumerate(drawn)]
        said = [(w, line) for w, line in said if not np.isnan(w)]
        whole = [(w, line) for w, line in said if line["finish_reason"] == "stop" and line["prediction"].strip()]
        if not said:
            without["the rule says nothing of it"] += 1
        elif len(whole) < 2:
            without["fewer than two whole answers"] += 1
        elif (best := max(w for w, _ in whole)) == (worst := min(w for w, _ in whole)):
            without["all its answers are worth the same"] += 1
        else:
            good, bad = ([line for w, line in whole if w == wanted] for wanted in (best, worst))
            a, b = min(itertools.product(good, bad), key=lambda ab: abs(ab[0]["new_tokens"] - ab[1]["new_tokens"]))
            texts = (unify(a["prediction"]).strip(), unify(b["prediction"]).strip())
            pairs.append(Pair(question, *texts, float(best), float(worst), *(line.get("by", model) for line in (a, b))))
    return pairs, without
