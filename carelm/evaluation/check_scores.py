"""The share of each model's answers that pass the recipe's `checks`, with intervals and paired differences."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex

from carelm import ranks
from carelm.answer_checks import AnswerCheck, Clock, parse_checks
from carelm.errors import UserError
from carelm.evaluation import scores
from carelm.evaluation.questions import Question
from carelm.evaluation.scripts import unify
from carelm.recipe import Recipe

MOST_FAILED = 3  # that are named


@dataclass(frozen=True)
class AskedCheck:
    """A check and the questions that it is about.

    Attributes:
        patterns: what is searched in the answer to a question, by the question's place.
        references: the share of these questions that has a reference which passes.
    """

    check: AnswerCheck
    patterns: dict[int, regex.Pattern]
    references: float


def ask(recipe: Recipe, questions: Sequence[Question], split: str = "test") -> list[AskedCheck]:
    """The recipe's checks for these questions of a split; how many each is about is said.

    Raises:
        UserError: for a pattern that takes too long, and a check that is about no test question. One that is about none of
            another split is left out.
    """
    asked = []
    for check in parse_checks(recipe.checks):
        clock, i = Clock(), 0
        try:
            found = {}
            for i, question in enumerate(questions):
                if (pattern := check.pattern_for(unify(question.last_words()), clock)) is not None:
                    found[i] = pattern
            right = [any([passes(check, found[i], text, clock) for text in questions[i].references]) for i in found]
        except TimeoutError:
            raise UserError(
                f"checks: '{check.name}': its pattern takes too long on {split} row {questions[i].id}; write it without a "
                "repeat inside a repeat, such as (a+)+"
            ) from None
        if not found and split != "test":
            ranks.say(f"check '{check.name}': about none of {len(questions)} questions")
            continue
        if not found:
            raise UserError(
                f"checks: '{check.name}': `when` matches 0 of the {len(questions)} test questions; mend it ((?i) ignores "
                "case), or take the check out"
            )
        asked.append(AskedCheck(check, found, float(np.mean(right))))
        share = f"{len(found)} of {len(questions)} questions, {np.mean(right):.0%} of their references pass"
        ranks.say(f"check '{check.name}': about {share}")
    return asked


def score(
    asked: Sequence[AskedCheck],
    questions: Sequence[Question],
    lines: dict[str, list[dict[str, Any]]],
    resamples: int,
    seed: int,
) -> tuple[dict[str, Any], list[str]]:
    """By check: what it asks, the share that passes of each model with Wilson's interval and the first that fail, and for every
    two models the paired difference, Holm-adjusted over the pairs; then cautions.

    Resamples are drawn of the conversations that the check is about. A check whose pattern takes too long on an answer is
    left out, with a caution.
    """
    results, cautions = {}, []
    for one in asked:
        check, places = one.check, list(one.patterns)
        conversations = [questions[i].conversation for i in places]
        drawn = scores.draws(len(set(conversations)), resamples, seed)
        scored, models, name, i = {}, {}, "", 0
        try:
            for name, predicted in lines.items():
                clock, right = Clock(), []
                for i in places:
                    right.append(passes(check, one.patterns[i], predicted[i]["prediction"], clock))
                turns = {check.name: scores.mean_of(np.array(right, float))}
                scored[name] = scores.resample(scores.by_conversation(turns, conversations), drawn)
                failed = [questions[i].id for i, passed in zip(places, right) if not passed]
                share = scores.wilson_interval(scored[name][check.name].value, len(drawn[0]))
                models[name] = share | {"failed": failed[:MOST_FAILED]}
        except TimeoutError:
            cautions.append(
                f"Check '{check.name}' is left out: its pattern takes too long on the answer of {name} to {questions[i].id}; "
                "write it without a repeat inside a repeat, such as (a+)+."
            )
            continue
        results[check.name] = {
            "pattern": check.pattern,
            "when": check.when and check.when.pattern,
            "must": check.must,
            "questions": len(places),
            "conversations": len(set(conversations)),
            "references": one.references,
            "models": models,
            "pairs": [{"models": pair["models"], **pair["scores"][check.name]} for pair in scores.compare(scored)],
        }
    return results, cautions


def passes(check: AnswerCheck, pattern: regex.Pattern, text: str, clock: Clock) -> bool:
    """Whether an answer has what the check wants, or not what it forbids; raises TimeoutError where that takes too long."""
    return (clock.search(pattern, unify(text)) is not None) == check.must
