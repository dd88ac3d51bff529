"""What a model's answers to grounded test rows (`carelm.retrieval.grounded_rows`) show: whether passages help, whether what it
says stands in the passages that it names, and whether it refuses what it cannot know."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from carelm.chat.grounding import passages_in, says_unknown, without_false_marks
from carelm.evaluation import scores
from carelm.evaluation.scores import Answers
from carelm.retrieval import refusals
from carelm.retrieval.grounded_rows import GOLD, LEFT_OUT, NONE, RETRIEVED
from carelm.retrieval.support import Claim, claims

SCORES = ("rouge1", "rougeL")
VALIDATION, RETRIEVER = "retriever, by validation", "retriever"  # what refuses, beside the models
FOUND, MISSED = "retrieved, a gold passage among them", "retrieved, no gold passage among them"
Row = dict[str, Any]


def whole(rows: Sequence[Row], conditions: Sequence[str]) -> dict[str, list[Row]]:
    """The rows by condition, each in the order of the same questions: those that have a row in every condition."""
    by = {c: {row["question_id"]: row for row in rows if row["condition"] == c} for c in conditions}
    shared = [question for question in by[conditions[0]] if all(question in by[c] for c in conditions)]
    return {c: [by[c][question] for question in shared] for c in conditions}


def for_all(rows: Sequence[Row], said: dict[str, str]) -> dict[str, str]:
    """The answers by row id, also of rows that eval/run.py has not asked since another one asks the same, as where the one
    passage that is found is the right one."""
    of_prompt = {str(row["messages"][:-1]): said[row["id"]] for row in rows if row["id"] in said}
    return {row["id"]: of_prompt[prompt] for row in rows if (prompt := str(row["messages"][:-1])) in of_prompt}


def of_model(rows: dict[str, list[Row]], said: dict[str, str], resamples: int, seed: int) -> dict[str, Any]:
    """A model's scores by condition with the paired differences, its support, and what it refuses by itself: also of the
    answerable questions those whose passages the retriever has found, and has not.

    Args:
        rows: of each condition, in the order of the same questions (`whole`).
        said: the model's answers by row id.
    """
    questions = [row["question_id"] for row in rows[RETRIEVED]]
    drawn = scores.draws(len(questions), resamples, seed)

    def resample(statistics: dict[str, scores.Statistics]) -> dict[str, scores.Scored]:
        return scores.resample(scores.by_conversation(statistics, questions), drawn)

    scored, supported = {}, {}
    for condition in (NONE, RETRIEVED, GOLD):
        answers = [said[row["id"]] for row in rows[condition]]
        references = [[without_false_marks(row["messages"][-1]["content"], 0)] for row in rows[condition]]
        turns = scores.per_turn(Answers(questions, [without_false_marks(a, 0) for a in answers], references))
        scored[condition] = resample({name: turns[name] for name in SCORES})
        if condition != NONE:
            shown = [passages_in(row["messages"][-2]["content"]) for row in rows[condition]]
            found = resample(_support([claims(*pair) for pair in zip(answers, shown)], list(map(len, shown))))
            supported[condition] = {name: scores.interval(one) for name, one in found.items()}
    says = {c: np.array([says_unknown(said[row["id"]]) for row in rows[c]]) for c in (RETRIEVED, LEFT_OUT)}
    found = np.array([bool({*row["gold"]} & {*row["passages"]}) for row in rows[RETRIEVED]])
    by_found = {
        name: refusals.refused(says[RETRIEVED][own]) for name, own in ((FOUND, found), (MISSED, ~found)) if own.any()
    }
    return {
        "scores": {c: {name: scores.interval(one) for name, one in own.items()} for c, own in scored.items()},
        "pairs": scores.compare(scored),
        "support": supported,
        "refused": {c: refusals.refused(own) for c, own in says.items()} | by_found,
    }


def _support(answers: Sequence[list[Claim]], shown: Sequence[int]) -> dict[str, scores.Statistics]:
    """By answer: of its sentences with content that have a mark, those that are supported; of those with content, those that
    have a mark; of its marks, those that name no passage."""

    def share(part: Callable[[Claim], bool], of: Callable[[Claim], bool]) -> scores.Statistics:
        counts = [[sum(of(c) and part(c) for c in answer), sum(map(of, answer))] for answer in answers]
        return scores.share_of(np.array(counts, float))

    false = [[sum(n > number or n < 1 for c in answer for n in c.marks), sum(len(c.marks) for c in answer)]
             for answer, number in zip(answers, shown)]  # fmt: skip
    return {
        "supported": share(lambda c: c.is_supported, lambda c: bool(c.marks) and c.share is not None),
        "marked": share(lambda c: bool(c.marks), lambda c: c.share is not None),
        "false_marks": scores.share_of(np.array(false, float)),
    }


def share_retrieved(rows: Sequence[Row]) -> float:
    """The share of the gold passages that are among those retrieved."""
    golds = [(gold, row["passages"]) for row in rows for gold in row["gold"]]
    return sum(gold in passages for gold, passages in golds) / max(1, len(golds))


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """What decides, in one line: by model ROUGE-L of retrieved passages less that of none, support, refusals."""
    models = {}
    for name, model in found["models"].items():
        pair = next(p for p in model["pairs"] if p["models"] == [NONE, RETRIEVED])
        keys = ("difference", "low", "high")
        models[name] = {
            "rougeL_retrieved_less_none": {key: pair["scores"]["rougeL"][key] for key in keys},
            "supported": model["support"][RETRIEVED]["supported"],
        }
    kinds = {"answerable": RETRIEVED, "unanswerable": LEFT_OUT}
    by = {
        name: {"threshold": own["threshold"]} | {kind: own[c]["value"] for kind, c in kinds.items()}
        for name, own in found["refusals"]["by"].items()
    }
    return {"questions": found["questions"], "models": models, "refused": by}


def refusals_of(
    rows: dict[str, list[Row]],
    validation: dict[str, list[Row]],
    models: dict[str, dict[str, str]],
    false_refusals: float,
    seed: int,
) -> dict[str, Any]:
    """What a threshold on the retriever's confidence refuses that costs so many false refusals: alone, and together with what
    each model refuses by itself. It is chosen on other questions than it is reported on: validation's, or nine tenths of the
    test's for the other tenth; `threshold` is then what all of these choose.

    Args:
        models: of each model its answers by row id.
    """

    def confidence(of: dict[str, list[Row]], said: dict[str, str] | None = None) -> list[np.ndarray]:
        return [np.array([_sure(row, said) for row in of[c]]) for c in (RETRIEVED, LEFT_OUT)]

    answerable, unanswerable = confidence(rows)
    threshold = refusals.choose(confidence(validation)[0], false_refusals)
    below = {RETRIEVED: refusals.refused(answerable < threshold), LEFT_OUT: refusals.refused(unanswerable < threshold)}
    by = {VALIDATION: {"threshold": threshold, **below}}
    for name, said in {RETRIEVER: None, **models}.items():
        both = confidence(rows, said)
        told = refusals.by_folds(*both, false_refusals, seed)
        by[name] = {
            "threshold": refusals.choose(both[0], false_refusals),
            RETRIEVED: told["answerable"],
            LEFT_OUT: told["unanswerable"],
            "curve": refusals.curve(*both),
        }
    about = {"validation_questions": len(validation[RETRIEVED]), "wanted_false_refusals": false_refusals}
    return about | {"by": by}


def _sure(row: Row, said: dict[str, str] | None) -> float:
    return 0.0 if said and says_unknown(said[row["id"]]) else row["confidence"]
