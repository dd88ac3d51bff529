"""ROUGE-1, -2, -L and -Lsum by rouge_score's definition, many pairs at a time.

The figures are those of `rouge_score.rouge_scorer.RougeScorer(..., use_stemmer=False)` (Google's reference in Python of
Lin 2004, https://aclanthology.org/W04-1013): its tokenizer, its choice among equally long common subsequences, F-measures.
ROUGE-L takes the length of the longest common subsequence from rapidfuzz; ROUGE-Lsum needs its members too where a text has
several lines.
"""

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from rapidfuzz.distance import LCSseq

from carelm.evaluation.ngrams import in_parts, lengths, matches, spell

WORD = re.compile("[a-z0-9]+")  # of the text in lower case: rouge_score.tokenize, without its detours
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL", "rougeLsum")


def rouge(
    predictions: Sequence[str], references: Sequence[Sequence[str]], types: Sequence[str] = ROUGE_TYPES
) -> dict[str, np.ndarray]:
    """F-measures, float64 [number of predictions] for each of the types.

    Args:
        predictions: the texts to score.
        references: for each its references; the one with the best F-measure counts, for each type by itself.
    """
    best = {name: np.zeros(len(predictions)) for name in types}
    for part in in_parts([(i, reference) for i, several in enumerate(references) for reference in several]):
        texts = list(dict.fromkeys([*(predictions[i] for i, _ in part), *(reference for _, reference in part)]))
        words = [[WORD.findall(line) for line in text.lower().split("\n")] for text in texts]
        spelled = iter(spell(line for lines in words for line in lines))
        lines = {text: [next(spelled) for _ in own] for text, own in zip(texts, words)}
        have, want = [lines[predictions[i]] for i, _ in part], [lines[reference] for _, reference in part]
        owner = np.array([i for i, _ in part])
        for name, measures in _f_measures(have, want, types).items():
            np.maximum.at(best[name], owner, measures)
    return best


def _f_measures(have: list[list[str]], want: list[list[str]], types: Sequence[str]) -> dict[str, np.ndarray]:
    """Of pairs of a predicted and a wanted text, each given as its lines with one character a word."""
    predicted, wanted = ["".join(lines) for lines in have], ["".join(lines) for lines in want]
    sizes = [lengths(texts, 2) for texts in (predicted, wanted)]
    hits = {}
    if "rouge1" in types or "rouge2" in types:
        hits["rouge1"], hits["rouge2"] = matches(predicted, [[text] for text in wanted], 2).T
    if "rougeL" in types:
        hits["rougeL"] = np.array([LCSseq.similarity(p, w) for p, w in zip(predicted, wanted)])
    if "rougeLsum" in types:
        members: dict[tuple[str, str], list[int]] = {}
        hits["rougeLsum"] = np.array([_union_hits(p, w, members) for p, w in zip(have, want)])
    measures = {}
    for name in types:
        precision, recall = (hits[name] / np.maximum(size[:, int(name == "rouge2")], 1) for size in sizes)
        both = precision + recall
        measures[name] = np.divide(2 * precision * recall, both, out=np.zeros(len(both)), where=both > 0)
    return measures


def _union_hits(have: list[str], want: list[str], members: dict[tuple[str, str], list[int]]) -> int:
    """The words of the union of each wanted line's LCS with all predicted lines, each counted once; `members` keeps what is
    found, because texts share lines."""
    have, want = [line for line in have if line], [line for line in want if line]
    if len(have) <= 1 and len(want) <= 1:
        return LCSseq.similarity("".join(have), "".join(want))
    left = Counter("".join(have)) & Counter("".join(want))
    total = 0
    for line in want:
        union = set()
        for other in set(have):
            if (line, other) not in members:
                members[line, other] = _lcs_places(line, other) if not set(line).isdisjoint(other) else []
            union.update(members[line, other])
        for place in sorted(union):
            if left[line[place]] > 0:
                total += 1
                left[line[place]] -= 1
    return total


def _lcs_places(want: str, have: str) -> list[int]:
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
