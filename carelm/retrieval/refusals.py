"""Which questions are left to a colleague: by how sure the retriever is, by what the model says, by both.

A question is answerable where the index holds a passage that answers it. Of the answerable ones a threshold refuses some by
mistake (false refusals); of the others it is to refuse as many as it can. It is chosen on other questions than those that it
is reported on.
"""

from typing import Any

import numpy as np

from carelm.evaluation.scores import wilson_interval

FOLDS = 10


def curve(answerable: np.ndarray, unanswerable: np.ndarray) -> list[dict[str, float]]:
    """For every threshold that decides differently, rising, the share of the answerable and of the unanswerable questions that
    are refused: `threshold`, `false_refusals`, `refused`.

    Args:
        answerable, unanswerable: how sure we are of each question; below the threshold it is refused, with 0 by every one.
    """
    points: list[dict[str, float]] = []
    thresholds = np.unique(np.concatenate([answerable, unanswerable]))
    for threshold in thresholds[thresholds > 0]:
        shares = [float((own < threshold).mean()) for own in (answerable, unanswerable)]
        point = {"threshold": float(threshold), "false_refusals": shares[0], "refused": shares[1]}
        if points and points[-1]["false_refusals"] == shares[0]:
            points.pop()  # of equal costs the best
        points.append(point)
    return points


def at(points: list[dict[str, float]], false_refusals: float) -> dict[str, float] | None:
    """The point of a curve that refuses most at no more than this share of false refusals; None where there is none."""
    return next((p for p in reversed(points) if p["false_refusals"] <= false_refusals + 1e-9), None)


def choose(answerable: np.ndarray, false_refusals: float) -> float:
    """The highest threshold that refuses at most this share of the answerable questions: halfway between two that occur; the
    lowest above 0 where more of them have none.

    Only answerable questions are needed, as a shop has them: its past questions with their resolutions.
    """
    ordered = np.sort(answerable)
    most = min(int(np.floor(false_refusals * len(ordered) + 1e-9)), len(ordered) - 1)  # so many may lie below it
    return max(float((ordered[most - 1] + ordered[most]) / 2 if most else ordered[0]), np.finfo(float).tiny)


def refused(which: np.ndarray) -> dict[str, Any]:
    """The share of the questions of one kind that are refused, with Wilson's interval."""
    return wilson_interval(float(which.mean()), len(which)) | {"refused": int(which.sum()), "questions": len(which)}


def by_folds(answerable: np.ndarray, unanswerable: np.ndarray, false_refusals: float, seed: int) -> dict[str, Any]:
    """For questions that there are no others to choose by: each tenth by the threshold that the other nine have chosen.

    Args:
        answerable, unanswerable: of the same questions in the same order, with and without their passages.
        seed: draws the tenths.
    """
    fold = np.random.default_rng(seed).permutation(len(answerable)) % FOLDS
    thresholds = np.array([choose(answerable[fold != k], false_refusals) for k in range(FOLDS)])
    return {
        "thresholds": thresholds.tolist(),
        "answerable": refused(answerable < thresholds[fold]),
        "unanswerable": refused(unanswerable < thresholds[fold]),
    }
