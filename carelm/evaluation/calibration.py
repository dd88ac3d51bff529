"""How far a label's probability can be trusted, and what it decides alone: pure functions of log-probabilities."""

from collections.abc import Sequence

import numpy as np

from carelm.evaluation.scores import AT_A_TIME_BYTES, Scored

BINS = 15
WIDEST_TEMPERATURE = 100.0
RECALLS = np.arange(1, 21) / 20


def probabilities(log_probabilities: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """The labels' probabilities, [questions, labels], of their answers' log-probabilities: softmax at this temperature."""
    scaled = log_probabilities / temperature
    grown = np.exp(scaled - scaled.max(1, keepdims=True))
    return grown / grown.sum(1, keepdims=True)


def log_odds(log_probabilities: np.ndarray, label: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Of one label (its number) for each question, [questions]. They rise with its probability, and still tell questions apart
    where a low temperature makes that 1."""
    rows, others = np.arange(len(label)), log_probabilities / temperature
    own = others[rows, label]
    others[rows, label] = -np.inf
    return own - np.logaddexp.reduce(others, axis=1)


def negative_log_likelihood(probability: np.ndarray, true: np.ndarray) -> float:
    """Of the true labels (their numbers, [questions]), in nats per question."""
    return float(-np.log(np.maximum(probability[np.arange(len(true)), true], 1e-300)).mean())


def fit_temperature(log_probabilities: np.ndarray, true: np.ndarray) -> float:
    """The temperature that makes the true labels likeliest (Guo et al. 2017, https://arxiv.org/abs/1706.04599, sec. 4.2).

    The negative log-likelihood is convex in 1/T; its slope there, the mean of the expected less the true log-probability, is
    brought to zero by bisection, within 1/100 to 100.
    """
    low, high = -np.log(WIDEST_TEMPERATURE), np.log(WIDEST_TEMPERATURE)  # of 1/T
    own = log_probabilities[np.arange(len(true)), true]
    while high - low > 1e-9:
        middle = (low + high) / 2
        expected = (probabilities(log_probabilities, np.exp(-middle)) * log_probabilities).sum(1)
        low, high = (low, middle) if (expected - own).mean() > 0 else (middle, high)
    return float(np.exp(-(low + high) / 2))


def reliability(confidence: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """At most 15 bins of as many questions each, by rising confidence: its mean, the share that is right, the number. Equal
    confidences are in one bin, so that the order of the questions does not count."""
    below = np.searchsorted(np.sort(confidence), confidence)
    bins = below * BINS // len(confidence)
    return [
        {"confidence": float(confidence[own].mean()), "accuracy": float(right[own].mean()), "questions": int(own.sum())}
        for own in (bins == k for k in np.unique(bins))
    ]


def expected_calibration_error(bins: Sequence[dict[str, float]]) -> float:
    """The mean distance of confidence and accuracy over the bins, by their questions (Naeini et al. 2015; with bins of equal
    counts Nixon et al. 2019, https://arxiv.org/abs/1904.01685)."""
    number = sum(b["questions"] for b in bins)
    return sum(b["questions"] * abs(b["confidence"] - b["accuracy"]) for b in bins) / number


def precision_recall(
    score: np.ndarray, positive: np.ndarray, owner: np.ndarray, drawn: np.ndarray
) -> tuple[Scored, np.ndarray, np.ndarray]:
    """Average precision, the sum of precision times gained recall over the thresholds (as scikit-learn's), with its resamples;
    and the precision where recall first comes to 0.05, 0.10 ... 1: [20], and of each resample [resamples, 20].
    Resamples without a positive question have no recall and are left out.

    Args:
        score: of each question, higher for the positive label.
        positive: whether that is its true label.
        owner: the number of the question's conversation.
        drawn: how often each conversation is in each resample, [resamples, conversations].
    """
    order = np.argsort(-score, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(score[order]) < 0, True))  # equal scores are decided together
    owner, positive = owner[order], positive[order].astype(float)
    if positive.any():
        drawn = drawn[drawn.astype(float) @ np.bincount(owner, positive, drawn.shape[1]) > 0]
    averages, precisions = [], []
    at_a_time = max(1, AT_A_TIME_BYTES // (8 * len(score)))
    drawn = np.concatenate([np.ones((1, drawn.shape[1]), drawn.dtype), drawn])  # first the questions as they are
    for k in range(0, len(drawn), at_a_time):
        weight = drawn[k : k + at_a_time, owner].astype(float)
        hits, taken = (w.cumsum(1)[:, ends] for w in (weight * positive, weight))
        precision, recall = hits / np.maximum(taken, 1), hits / np.maximum(hits[:, -1:], 1)
        averages.append((np.diff(recall, axis=1, prepend=0) * precision).sum(1))
        at = np.array([np.searchsorted(row, RECALLS - 1e-12) for row in recall]).clip(max=len(ends) - 1)
        precisions.append(np.take_along_axis(precision, at, 1))
    average, precision = np.concatenate(averages), np.concatenate(precisions)
    return Scored(float(average[0]), average[1:]), precision[0], precision[1:]


def threshold_for(precision: float, score: np.ndarray, right: np.ndarray) -> float | None:
    """The lowest score from which on at least this share of the questions is right; None where there is none."""
    order = np.argsort(-score, kind="stable")
    share = right[order].cumsum() / np.arange(1, len(order) + 1)
    ends = np.flatnonzero(np.append(np.diff(score[order]) < 0, True))
    good = ends[share[ends] >= precision]
    return float(score[order][good[-1]]) if len(good) else None
