"""Scores of answers against references, their confidence intervals, and what differs between two models: pure functions.

Every score is a function of sums over conversations: ROUGE, exact match and accuracy are means over turns, BLEU and chrF
are computed from summed n-gram counts, macro F1 from summed label counts. So one thing serves all of them: a table of
statistics with a row per conversation, whose rows are drawn anew with replacement (Efron & Tibshirani, An Introduction to
the Bootstrap, 1993, ch. 13; for corpus scores Koehn 2004, https://aclanthology.org/W04-3250). Two models are compared on
the same draws, which takes the difficulty of a conversation out of their difference.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from carelm.evaluation.labels import parse_label
from carelm.evaluation.rouge import ROUGE_TYPES, Rouge
from carelm.evaluation.scripts import bleu_tokenizer, unify

TEXT_SCORES = (*ROUGE_TYPES, "bleu", "chrf", "exact_match")
LABEL_SCORES = ("accuracy", "macro_f1")
NAMES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum", "bleu": "BLEU",
         "chrf": "chrF", "exact_match": "exact match", "accuracy": "accuracy", "macro_f1": "macro F1"}  # fmt: skip
UNPARSABLE = "unparsable"
COMPLAINT = re.compile(
    r"\b(complain\w*|angry|furious|upset|unacceptable|terrible|awful|horrible|disappointed|rude|worst|broken|damaged|"
    r"faulty|defective|missing|refund|ridiculous|unhappy|scam|not (working|good enough|happy|satisfied)|"
    r"(does|did|do) ?n[o']t (work|arrive|come)|never (arrived|came))\b",
    re.IGNORECASE,
)
QUESTION = re.compile(
    r"\?|^\W*(who|what|when|where|why|which|how|can|could|may|do|does|did|is|are|was|will|would|should|have|has)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Answers:
    """One model's answers to the test questions, in the order of the questions; all lists have one entry per question.

    Texts are held in NFC and with \\n at line ends, so that every score sees the same of both sides.

    Attributes:
        conversations: the conversation that each question belongs to; several turns may share one.
        predictions: what the model said.
        references: for each question one or more texts, of which the best counts.
    """

    conversations: list[str]
    predictions: list[str]
    references: list[list[str]]

    def __post_init__(self):
        object.__setattr__(self, "predictions", [unify(text) for text in self.predictions])
        object.__setattr__(self, "references", [[unify(text) for text in several] for several in self.references])


@dataclass(frozen=True)
class Statistics:
    """A score as sums: `table` float64 [conversations, k], and `score` from sums [..., k] to values [...]."""

    table: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]


def kind_of_request(text: str) -> str:
    """complaint, question or other, by the words of the request; for data that has no categories of its own."""
    return "complaint" if COMPLAINT.search(text) else "question" if QUESTION.search(text) else "other"


def per_turn(answers: Answers) -> dict[str, np.ndarray]:
    """ROUGE F-measures and exact match of each answer, float64 [questions] by score."""
    rouge = Rouge(keep_in_memory=True).compute(
        predictions=answers.predictions, references=answers.references, use_aggregator=False
    )
    exact = [p.strip() in {r.strip() for r in several} for p, several in zip(answers.predictions, answers.references)]
    return {**{name: np.array(rouge[name]) for name in ROUGE_TYPES}, "exact_match": np.array(exact, float)}


def statistics(
    answers: Answers, labels: Sequence[str] = (), turns: dict | None = None, tokenizer: str | None = None
) -> dict[str, Statistics]:
    """The table of every score.

    Args:
        labels: what answers are read as, for accuracy and macro F1.
        turns: `per_turn(answers)` where it is at hand.
        tokenizer: BLEU's, which parts of a comparison have from the whole; by the script of the references where not given.
    """
    _, owner = np.unique(np.array(answers.conversations, object).astype(str), return_inverse=True)
    turns = per_turn(answers) if turns is None else turns
    found = {name: Statistics(_sum_by(owner, np.stack([v, np.ones(len(v))], 1)), _mean) for name, v in turns.items()}
    for name, metric in _sacrebleu(tokenizer or bleu_tokenizer(answers.references)).items():
        rows = np.array(metric._extract_corpus_statistics(answers.predictions, _streams(answers.references)), float)
        found[name] = Statistics(_sum_by(owner, rows), _corpus_score(metric))
    if labels:
        predicted = [parse_label(text, labels) for text in answers.predictions]
        true = [parse_label(several[0], labels) for several in answers.references]
        right = np.array([[p == t, 1] for p, t in zip(predicted, true)], float)
        found["accuracy"] = Statistics(_sum_by(owner, right), _mean)
        counts = [[(p == t == x, p == x != t, t == x != p) for x in labels] for p, t in zip(predicted, true)]
        found["macro_f1"] = Statistics(_sum_by(owner, np.array(counts, float).reshape(len(true), -1)), _macro_f1)
    return found


def chrf_per_turn(answers: Answers) -> np.ndarray:
    """chrF of each answer by itself, float64 [questions]: to rank answers in scripts that ROUGE cannot read."""
    return np.array([CHRF().sentence_score(p, r).score for p, r in zip(answers.predictions, answers.references)])


def signatures(answers: Answers) -> dict[str, str]:
    """sacrebleu's own description of how its scores were made, by score."""
    described = {}
    for name, metric in _sacrebleu(bleu_tokenizer(answers.references)).items():
        metric.corpus_score(answers.predictions, _streams(answers.references))
        described[name] = str(metric.get_signature())
    return described


def draws(number: int, resamples: int, seed: int) -> np.ndarray:
    """How often each conversation is in each resample, float64 [resamples, number]; every row sums to `number`."""
    random = np.random.default_rng(seed)
    return np.stack([np.bincount(random.integers(0, number, number), minlength=number) for _ in range(resamples)]) * 1.0


def interval(statistics: Statistics, drawn: np.ndarray) -> dict[str, float]:
    """The score and its 95 % percentile interval over the resamples."""
    low, high = np.percentile(statistics.score(drawn @ statistics.table), (2.5, 97.5))
    return {"value": float(statistics.score(statistics.table.sum(0))), "low": float(low), "high": float(high)}


def difference(a: Statistics, b: Statistics, drawn: np.ndarray) -> dict[str, float]:
    """Score of b less score of a on the same draws: difference, 95 % percentile interval, two-sided p-value.

    The p-value is twice the share of resamples on the far side of zero, with one added to both counts so that it is
    never zero (Davison & Hinkley, Bootstrap Methods and their Application, 1997, sec. 4.2).
    """
    resampled = b.score(drawn @ b.table) - a.score(drawn @ a.table)
    low, high = np.percentile(resampled, (2.5, 97.5))
    tail = min((resampled <= 0).sum(), (resampled >= 0).sum())
    return {
        "difference": float(b.score(b.table.sum(0)) - a.score(a.table.sum(0))),
        "low": float(low),
        "high": float(high),
        "p_value": float(min(1.0, 2 * (tail + 1) / (len(drawn) + 1))),
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number (Holm 1979, https://www.jstor.org/stable/4615733)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = largest
    return adjusted


def compare(tables: dict[str, dict[str, Statistics]], drawn: np.ndarray) -> list[dict[str, Any]]:
    """Every two models: for each score the paired difference (second less first), Holm-adjusted over the pairs."""
    pairs = [{"models": [a, b], "scores": {}} for a, b in itertools.combinations(tables, 2)]
    for name in next(iter(tables.values())) if pairs else ():
        for pair in pairs:
            a, b = pair["models"]
            pair["scores"][name] = difference(tables[a][name], tables[b][name], drawn)
        adjusted = holm([pair["scores"][name]["p_value"] for pair in pairs])
        for pair, p_value in zip(pairs, adjusted):
            pair["scores"][name]["p_value_holm"] = p_value
    return pairs


def confusion(answers: Answers, labels: Sequence[str]) -> dict[str, dict[str, int]]:
    """How often each true label was answered with each label, or with nothing that is one."""
    table = {true: dict.fromkeys((*labels, UNPARSABLE), 0) for true in labels}
    for prediction, several in zip(answers.predictions, answers.references):
        table[parse_label(several[0], labels)][parse_label(prediction, labels) or UNPARSABLE] += 1
    return table


def _sum_by(owner: np.ndarray, rows: np.ndarray) -> np.ndarray:
    table = np.zeros((owner.max() + 1, rows.shape[1]))
    np.add.at(table, owner, rows)
    return table


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def _macro_f1(sums: np.ndarray) -> np.ndarray:
    """Mean of 2 tp / (2 tp + fp + fn) over the labels that occur or are predicted, as scikit-learn's f1_score has it."""
    tp, fp, fn = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    weight = 2 * tp + fp + fn
    return (2 * tp / np.maximum(weight, 1)).sum(-1) / np.maximum((weight > 0).sum(-1), 1)


def _sacrebleu(tokenizer: str) -> dict[str, BLEU | CHRF]:
    return {"bleu": BLEU(tokenize=tokenizer), "chrf": CHRF()}


def _streams(references: list[list[str]]) -> list[list[str | None]]:
    """sacrebleu's shape: the first references of all, then the second ones ..., None where there is none."""
    return [list(stream) for stream in itertools.zip_longest(*references)]


def _corpus_score(metric: BLEU | CHRF) -> Callable[[np.ndarray], np.ndarray]:
    def score(sums: np.ndarray) -> np.ndarray:
        flat = sums.reshape(-1, sums.shape[-1]).astype(int)
        return np.array([metric._compute_score_from_stats(row.tolist()).score for row in flat]).reshape(sums.shape[:-1])

    return score
