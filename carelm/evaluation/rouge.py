"""ROUGE-1, -2, -L and -Lsum by rouge_score's definition, many pairs at a time.

The figures are those of `rouge_score.rouge_scorer.RougeScorer(..., use_stemmer=False)` (Google's reference in Python of
Lin 2004, https://aclanthology.org/W04-1013): its tokenizer, its choice among equally long common subsequences, F-measures.
ROUGE-L takes the length of the longest common subsequence from rapidfuzz; ROUGE-Lsum needs its members too, which are
found for all pairs of sentences of all texts at once. `evaluate.load("carelm/evaluation/rouge.py")` works offline.
"""

from collections import Counter
from collections.abc import Sequence

import datasets
import evaluate
import numpy as np
from rapidfuzz.distance import LCSseq
from rouge_score.tokenize import tokenize

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


class Rouge(evaluate.Metric):
    """`compute(predictions=, references=)`; each reference is a text or several, of which the best counts."""

    def _info(self):
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Chin-Yew Lin. ROUGE: A Package for Automatic Evaluation of Summaries. 2004.",
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, predictions, references, use_aggregator=True):
        scores = rouge(predictions, [[r] if isinstance(r, str) else r for r in references])
        return {name: float(values.mean()) if use_aggregator else values.tolist() for name, values in scores.items()}


def rouge(
    predictions: Sequence[str], references: Sequence[Sequence[str]], types: Sequence[str] = ROUGE_TYPES
) -> dict[str, np.ndarray]:
    """F-measures, float64 [number of predictions] for each of the types.

    Args:
        predictions: the texts to score.
        references: for each its references; the one with the best F-measure counts, for each type by itself.
    """
    pairs = [(i, reference) for i, several in enumerate(references) for reference in several]
    lines = {
        text: [tokenize(line, None) for line in text.split("\n")] for text in {*predictions, *(r for _, r in pairs)}
    }
    words = {text: [word for line in lines[text] for word in line] for text in lines}
    measures = {name: np.zeros(len(pairs)) for name in types}
    for n, name in enumerate(("rouge1", "rouge2")):
        if name in types:
            grams = {text: Counter(zip(*(words[text][k:] for k in range(n + 1)))) for text in words}
            for k, (i, reference) in enumerate(pairs):
                a, b = sorted((grams[predictions[i]], grams[reference]), key=len)
                hits = sum(min(count, b[gram]) for gram, count in a.items() if gram in b)
                measures[name][k] = _f_measure(hits, len(words[predictions[i]]) - n, len(words[reference]) - n)
    if "rougeL" in types:
        for k, (i, reference) in enumerate(pairs):
            have, want = words[predictions[i]], words[reference]
            measures["rougeL"][k] = _f_measure(LCSseq.similarity(have, want), len(have), len(want))
    if "rougeLsum" in types:
        for k, hits in enumerate(_union_hits([(lines[predictions[i]], lines[r]) for i, r in pairs])):
            i, reference = pairs[k]
            measures["rougeLsum"][k] = _f_measure(hits, len(words[predictions[i]]), len(words[reference]))
    best = {name: np.zeros(len(predictions)) for name in types}
    owner = np.array([i for i, _ in pairs], int)
    for name in types:
        np.maximum.at(best[name], owner, measures[name])
    return best


def _f_measure(hits: int, predicted: int, wanted: int) -> float:
    precision, recall = hits / max(predicted, 1), hits / max(wanted, 1)
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _union_hits(pairs: list[tuple[list[list[str]], list[list[str]]]]) -> list[int]:
    """For each (lines of a prediction, lines of a reference): the words of all lines' union LCS, each counted once."""
    vocabulary: dict[str, int] = {}
    sentences: dict[tuple[int, ...], int] = {}

    def number(line: list[str]) -> int:
        ids = tuple(vocabulary.setdefault(word, len(vocabulary)) for word in line)
        return sentences.setdefault(ids, len(sentences))

    wanted: dict[tuple[int, int], None] = {}  # the (reference line, predicted line) whose LCS is needed
    numbered = []
    for prediction, reference in pairs:
        have, want = ([number(line) for line in lines if line] for lines in (prediction, reference))
        numbered.append((have, want))
        wanted.update(dict.fromkeys((r, p) for r in set(want) for p in set(have)))
    texts = list(sentences)
    sets = [frozenset(ids) for ids in texts]
    members = {(r, p): _lcs_places(texts[r], texts[p]) for r, p in wanted if not sets[r].isdisjoint(sets[p])}
    hits = []
    for have, want in numbered:
        left_have = Counter(word for s in have for word in texts[s])
        left_want = Counter(word for s in want for word in texts[s])
        total = 0
        for r in want:
            union = set().union(*(members[r, p] for p in set(have) if (r, p) in members))
            for place in sorted(union):
                word = texts[r][place]
                if left_have[word] > 0 and left_want[word] > 0:
                    total += 1
                    left_have[word] -= 1
                    left_want[word] -= 1
        hits.append(total)
    return hits


def _lcs_places(want: tuple[int, ...], have: tuple[int, ...]) -> list[int]:
    """The places in `want` of the longest common subsequence that rouge_score would read out.

    The table t[i][j] of lengths is kept by rows as bits (Hyyro 2004, "Bit-parallel LCS-length computation revisited"): a
    zero bit j of `row` says that t grows from column j to j + 1. What a row adds to the one above it is then a set of
    intervals, each from a zero bit that is new to the one that it replaces: all of them in one subtraction.
    """
    columns = {}
    for j, word in enumerate(have):
        columns[word] = columns.get(word, 0) | 1 << j
    full = (1 << len(have)) - 1
    row, grown = full, []
    for word in want:
        match = columns.get(word, 0)
        above, hit = row, row & match
        row = (row + hit | row - hit) & full
        changed = row ^ above
        new, old = changed & above, changed & row
        grown.append(old - new & full)
    places = []
    i, j = len(want) - 1, len(have) - 1
    while i >= 0 and j >= 0:
        if want[i] == have[j]:
            places.append(i)
            i, j = i - 1, j - 1
        elif grown[i] >> j & 1:
            j -= 1
        else:
            i -= 1
    return places
