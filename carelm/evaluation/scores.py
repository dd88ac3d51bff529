"""Scores of answers against references, their confidence intervals, and what differs between two models: pure functions.

Every score is a function of sums over conversations: ROUGE, exact match and accuracy are means over turns, BLEU and chrF
are computed from summed n-gram counts, macro F1 from summed label counts. So one thing serves all of them: a table of
statistics with a row per conversation, whose rows are drawn anew with replacement (Efron & Tibshirani, An Introduction to
the Bootstrap, 1993, ch. 13; for corpus scores Koehn 2004, https://aclanthology.org/W04-3250). Two models are compared on
the same draws, which takes the difficulty of a conversation out of their difference.
"""

import itertools
import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from carelm.data.labels import parse_label
from carelm.evaluation.ngrams import in_parts, lengths, matches, spell
from carelm.evaluation.rouge_measures import ROUGE_TYPES, rouge
from carelm.evaluation.scripts import bleu_tokenizer, unify

TEXT_SCORES = (*ROUGE_TYPES, "bleu", "chrf", "exact_match")
CONSTRAINED = "constrained_"
LABEL_SCORES = ("accuracy", "macro_f1", f"{CONSTRAINED}accuracy", f"{CONSTRAINED}macro_f1")
UNREFERENCED = ("repeated_4grams", "answer_words", "answer_tokens")  # no score: neither more nor less is better
NAMES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "rougeLsum": "ROUGE-Lsum", "bleu": "BLEU",
         "chrf": "chrF", "exact_match": "exact match", "accuracy": "accuracy", "macro_f1": "macro F1",
         "constrained_accuracy": "accuracy, constrained", "constrained_macro_f1": "macro F1, constrained",
         "repeated_4grams": "repeated 4-grams", "answer_words": "answer length, words",
         "answer_tokens": "answer length, tokens"}  # fmt: skip
UNPARSABLE = "unparsable"
AT_A_TIME_BYTES = 2**26  # of draws as float64
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
    """A score as sums: `table` float64 [questions or conversations, k], and `score` from sums [..., k] to values [...]."""

    table: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Scored:
    """A score of the whole test set, and of each of its resamples, float64 [resamples]."""

    value: float
    resampled: np.ndarray


def kind_of_request(text: str) -> str:
    """complaint, question or other, by the words of the request; for data that has no categories of its own."""
    return "complaint" if COMPLAINT.search(text) else "question" if QUESTION.search(text) else "other"


def per_turn(answers: Answers, labels: Sequence[str] = (), tokenizer: str | None = None) -> dict[str, Statistics]:
    """Every score with a row for each question, in the order of the questions.

    Args:
        labels: what answers are read as, for accuracy and macro F1.
        tokenizer: BLEU's; by the script of the references where not given.
    """
    predictions, references = answers.predictions, answers.references
    means = rouge(predictions, references)
    exact = [p.strip() in {r.strip() for r in several} for p, several in zip(predictions, references)]
    means["exact_match"] = np.array(exact, float)
    found = {name: mean_of(values) for name, values in means.items()}
    words = _bleu_words(tokenizer or bleu_tokenizer(references))
    found["bleu"] = Statistics(_in_parts(answers, lambda p, r: _bleu_rows(words, p, r)), _bleu)
    found["chrf"] = Statistics(_in_parts(answers, _chrf_rows), _chrf)
    if labels:
        given, true = (
            [parse_label(text, labels) for text in texts]
            for texts in (predictions, [several[0] for several in references])
        )
        found |= label_scores(given, true, labels)
    return found


def label_scores(
    given: Sequence[str | None], true: Sequence[str], labels: Sequence[str], prefix: str = ""
) -> dict[str, Statistics]:
    """Accuracy and macro F1 of the labels given (None: none) with a row for each question, named with `prefix` in front."""
    columns = np.array(labels, object)
    given, true = (np.array([*several], object)[:, None] == columns for several in (given, true))
    right = (given & true).any(1)
    counts = np.stack([given & true, given & ~true, true & ~given], 2).astype(float)
    return {
        f"{prefix}accuracy": mean_of(right.astype(float)),
        f"{prefix}macro_f1": Statistics(counts.reshape(len(right), -1), macro_f1),
    }


def by_conversation(turns: dict[str, Statistics], conversations: Sequence[str]) -> dict[str, Statistics]:
    """The sums over each conversation's questions, in the order of the conversations' names."""
    place = {name: k for k, name in enumerate(sorted(set(conversations)))}
    owner = np.array([place[name] for name in conversations])
    return {
        name: Statistics(np.stack([np.bincount(owner, column) for column in turn.table.T], 1), turn.score)
        for name, turn in turns.items()
    }


def statistics(answers: Answers, labels: Sequence[str] = (), tokenizer: str | None = None) -> dict[str, Statistics]:
    """Every score with a row for each conversation."""
    return by_conversation(per_turn(answers, labels, tokenizer), answers.conversations)


def signatures(answers: Answers) -> dict[str, str]:
    """sacrebleu's own description of how its scores are made, by score."""
    of_each_number = list({len(several): several for several in answers.references}.values())
    described = {}
    for name, metric in (("bleu", BLEU(tokenize=bleu_tokenizer(answers.references))), ("chrf", CHRF())):
        metric.corpus_score([""] * len(of_each_number), list(itertools.zip_longest(*of_each_number)))
        described[name] = str(metric.get_signature())
    return described


def draws(number: int, resamples: int, seed: int) -> np.ndarray:
    """How often each conversation is in each resample, uint8 [resamples, number]; every row sums to `number`.

    A byte is enough: none of up to 255 conversations is drawn more often, and of more the chance is below 1e-500.
    """
    random = np.random.default_rng(seed)
    drawn = np.empty((resamples, number), np.uint8)
    for row in drawn:
        row[:] = np.bincount(random.integers(0, number, number), minlength=number)
    return drawn


def resample(tables: dict[str, Statistics], drawn: np.ndarray) -> dict[str, Scored]:
    """Each score of all conversations and of each resample: the sums of all scores are one product of matrices."""
    stacked = np.concatenate([t.table for t in tables.values()], 1)
    at_a_time = max(1, AT_A_TIME_BYTES // stacked[:, 0].nbytes)
    sums = np.concatenate([drawn[k : k + at_a_time].astype(float) @ stacked for k in range(0, len(drawn), at_a_time)])
    ends = np.cumsum([t.table.shape[1] for t in tables.values()])[:-1]
    return {
        name: Scored(float(t.score(t.table.sum(0))), t.score(own))
        for (name, t), own in zip(tables.items(), np.split(sums, ends, axis=1))
    }


def interval(scored: Scored) -> dict[str, float]:
    """The score and its 95 % percentile interval over the resamples."""
    low, high = np.percentile(scored.resampled, (2.5, 97.5))
    return {"value": scored.value, "low": float(low), "high": float(high)}


def wilson_interval(share: float, number: int) -> dict[str, float]:
    """A share of so many conversations and its 95 % score interval (Wilson 1927, https://doi.org/10.2307/2276774). Where there
    are few of them or all are right it is wide, and resamples are all alike there, or hold none at all."""
    z = 1.959964
    middle, width = share + z * z / (2 * number), z * math.sqrt(share * (1 - share) / number + (z / (2 * number)) ** 2)
    low, high = ((middle + side * width) / (1 + z * z / number) for side in (-1, 1))
    return {"value": share, "low": max(0.0, low), "high": min(1.0, high)}


def difference(a: Scored, b: Scored) -> dict[str, float]:
    """Score of b less score of a on the same draws: difference, standard error, 95 % percentile interval, two-sided p-value.

    The p-value is twice the share of resamples on the far side of zero, with one added to both counts so that it is
    never zero (Davison & Hinkley, Bootstrap Methods and their Application, 1997, sec. 4.2).
    """
    resampled = b.resampled - a.resampled
    low, high = np.percentile(resampled, (2.5, 97.5))
    tail = min((resampled <= 0).sum(), (resampled >= 0).sum())
    return {
        "difference": b.value - a.value,
        "standard_error": float(resampled.std(ddof=1)),
        "low": float(low),
        "high": float(high),
        "p_value": float(min(1.0, 2 * (tail + 1) / (len(resampled) + 1))),
    }


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for their number (Holm 1979, https://www.jstor.org/stable/4615733)."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = largest
    return adjusted


def compare(models: dict[str, dict[str, Scored]], baselines: Collection[str] = ()) -> list[dict[str, Any]]:
    """Every two models, and every one with each of the `baselines` among them (those stand first): for each score that both
    have the paired difference (second less first), Holm-adjusted over these pairs, and `comparisons`, how many they are."""
    pairs = [{"models": [a, b], "scores": {}} for a, b in itertools.combinations(models, 2) if b not in baselines]
    for name in dict.fromkeys(score for scored in models.values() for score in scored):
        having = [pair for pair in pairs if all(name in models[model] for model in pair["models"])]
        for pair in having:
            a, b = pair["models"]
            pair["scores"][name] = difference(models[a][name], models[b][name])
        adjusted = holm([pair["scores"][name]["p_value"] for pair in having])
        for pair, p_value in zip(having, adjusted):
            pair["scores"][name] |= {"p_value_holm": p_value, "comparisons": len(having)}
    return pairs


def confusion(turns: dict[str, Statistics], labels: Sequence[str], prefix: str = "") -> dict[str, dict[str, int]]:
    """How often each true label was answered with each label, or with nothing that is one; from `label_scores(...)`."""
    hit, wrong, missed = np.moveaxis(turns[f"{prefix}macro_f1"].table.reshape(-1, len(labels), 3), -1, 0)
    given, true = hit + wrong, hit + missed
    table = true.T @ np.column_stack([given, 1 - given.sum(1)])
    return {label: dict(zip((*labels, UNPARSABLE), map(int, row))) for label, row in zip(labels, table)}


def commonest(confusion: dict[str, dict[str, int]]) -> tuple[str, int]:
    """The label that is right most often, and in how many questions."""
    return max(((label, sum(row.values())) for label, row in confusion.items()), key=lambda pair: pair[1])


def mean_of(values: np.ndarray) -> Statistics:
    """The mean of one value a question, float64 [questions]."""
    return share_of(np.stack([values, np.ones(len(values))], 1))


def share_of(counts: np.ndarray) -> Statistics:
    """The sum of the first column, float64 [questions, 2], over that of the second; 0 where that is none."""
    return Statistics(counts, lambda sums: sums[..., 0] / np.maximum(sums[..., 1], 1))


def macro_f1(sums: np.ndarray) -> np.ndarray:
    """Mean of 2 tp / (2 tp + fp + fn) over the labels that occur or are predicted, as scikit-learn's f1_score has it."""
    tp, fp, fn = np.moveaxis(sums.reshape(*sums.shape[:-1], -1, 3), -1, 0)
    weight = 2 * tp + fp + fn
    return (2 * tp / np.maximum(weight, 1)).sum(-1) / np.maximum((weight > 0).sum(-1), 1)


def _in_parts(answers: Answers, rows: Callable[[Sequence[str], Sequence[list[str]]], np.ndarray]) -> np.ndarray:
    return np.concatenate([rows(*zip(*part)) for part in in_parts(list(zip(answers.predictions, answers.references)))])


@lru_cache(4)
def _bleu_words(tokenizer: str) -> Callable[[str], list[str]]:
    """What parts a text into words as sacrebleu does."""
    whole = BLEU(tokenize=tokenizer)._preprocess_segment
    one = lru_cache(2**17)(lambda word: whole(word).split())

    def words(text: str) -> list[str]:
        # 13a looks no further than a character's neighbours: what stands between spaces is parted once, however often it comes.
        if tokenizer != "13a" or "-\n" in text or "<skipped>" in text:
            return whole(text).split()
        return [token for word in text.split() for token in one(word)]

    return words


def _bleu_rows(
    parted: Callable[[str], list[str]], predictions: Sequence[str], references: Sequence[list[str]]
) -> np.ndarray:
    """sacrebleu's counts, float64 [predictions, 10]: words, words of the reference nearest in length, then for n from 1 to 4
    the n-grams that the references have, and all."""
    words = iter(spell(parted(text) for p, several in zip(predictions, references) for text in (p, *several)))
    spelled = [(next(words), [next(words) for _ in several]) for several in references]
    have, want = zip(*spelled)
    nearest = [min(map(len, several), key=lambda n: (abs(n - len(p)), n)) for p, several in spelled]
    sizes = lengths(have, 4)
    return np.column_stack([sizes[:, 0], nearest, matches(have, want, 4), sizes]).astype(float)


def _bleu(sums: np.ndarray) -> np.ndarray:
    """sacrebleu's BLEU with its exponential smoothing: the k-th order without any match counts as 1 / 2^k of a match."""
    have, want, right, total = np.split(sums, (1, 2, 6), axis=-1)
    smoothed = np.where(right > 0, right, 0.5 ** np.cumsum(right == 0, axis=-1)) / np.maximum(total, 1)
    brevity = np.exp(np.minimum(0, 1 - want / np.maximum(have, 1)))[..., 0]
    return np.where((right > 0).any(-1) & (total > 0).all(-1), 100 * brevity * np.exp(np.log(smoothed).mean(-1)), 0)


def _chrf_rows(predictions: Sequence[str], references: Sequence[list[str]]) -> np.ndarray:
    """sacrebleu's counts, float64 [predictions, 18]: for n from 1 to 6 the prediction's n-grams of characters, the reference's
    and those in both, of the reference with which chrF is best."""
    bare = {text: "".join(text.split()) for text in {*predictions, *(r for several in references for r in several)}}
    owner = np.repeat(np.arange(len(predictions)), [len(several) for several in references])
    have = [bare[predictions[i]] for i in owner]
    want = [bare[reference] for several in references for reference in several]
    wanted = lengths(want, 6)
    counts = [lengths(have, 6) * (wanted > 0), wanted, matches(have, [[text] for text in want], 6)]
    rows = np.stack(counts, 2).reshape(len(have), 18).astype(float)
    best_first = np.lexsort((-_chrf(rows), owner))
    return rows[best_first[np.unique(owner, return_index=True)[1]]]


def _chrf(sums: np.ndarray) -> np.ndarray:
    """sacrebleu's chrF: F2 of the precision and recall that are means over the orders which both sides have."""
    have, want, both = np.moveaxis(sums.reshape(*sums.shape[:-1], 6, 3), -1, 0)
    orders = np.maximum(((have > 0) & (want > 0)).sum(-1), 1)
    precision, recall = ((both / np.maximum(side, 1)).sum(-1) / orders for side in (have, want))
    return 100 * (5 * precision * recall / np.maximum(4 * precision + recall, 1e-300))
