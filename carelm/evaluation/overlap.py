"""What needs no model: two texts belong together where they share enough words; validation rows choose how many."""

from collections.abc import Sequence

import numpy as np

from carelm.evaluation.questions import Question
from carelm.evaluation.repetition import WORD
from carelm.evaluation.scores import macro_f1

MEASURES = {
    "word overlap, of both texts": lambda a, b: len(a & b) / max(1, len(a | b)),  # Jaccard
    "word overlap, of the shorter text": lambda a, b: len(a & b) / max(1, min(len(a), len(b))),  # Szymkiewicz-Simpson
}


def overlaps(questions: Sequence[Question], measure: str) -> np.ndarray:
    """The overlap, 0 to 1, of the words of each question's two texts (`overlap_columns`), case not told apart."""
    pairs = ([set(WORD.findall(text.casefold())) for text in question.compared] for question in questions)
    return np.array([MEASURES[measure](a, b) for a, b in pairs])


def choose_threshold(overlap: np.ndarray, positive: np.ndarray) -> float:
    """The overlap from which on the first label is given, for the best macro F1: halfway between two that occur.

    Args:
        overlap: of each validation row.
        positive: whether the first label is its true one.
    """
    order = np.argsort(-overlap, kind="stable")
    found = overlap[order]
    ends = np.flatnonzero(np.append(np.diff(found) < 0, True))
    hit = positive[order].cumsum()[ends]
    wrong, missed = ends + 1 - hit, positive.sum() - hit
    sums = np.stack([hit, wrong, missed, len(order) - positive.sum() - wrong, missed, wrong], 1)
    best = ends[macro_f1(sums).argmax()]
    return float((found[best] + found[best + 1]) / 2) if best + 1 < len(found) else float(found[best])
