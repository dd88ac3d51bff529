"""What answers are like without any reference: how much they repeat themselves, and how long they are."""

from collections.abc import Sequence

import numpy as np
import regex

from carelm.data.letters import NO_SPACES
from carelm.evaluation.scores import Statistics, mean_of, share_of

ORDER = 4
LETTER = r"[\p{L}\p{M}\p{N}]"
# Scripts without spaces count each character as a word.
WORD = regex.compile(
    rf"[{NO_SPACES}]\p{{M}}*|[{LETTER}--[{NO_SPACES}]]+(?:['\u2019][{LETTER}--[{NO_SPACES}]]+)*", regex.V1
)


def per_turn(predictions: Sequence[str], new_tokens: Sequence[int]) -> dict[str, Statistics]:
    """The share of the answers' runs of four words that stood in the same answer before (1 - unique / all, as seq-rep-4 of
    Welleck et al. 2020, https://arxiv.org/abs/1908.04319, here over all answers together), words and tokens an answer."""
    words, runs = [], []
    for text in predictions:
        parted = WORD.findall(text.casefold())
        own = list(zip(*(parted[k:] for k in range(ORDER))))
        words.append(len(parted))
        runs.append([len(own) - len(set(own)), len(own)])
    return {
        "repeated_4grams": share_of(np.array(runs, float)),
        "answer_words": mean_of(np.array(words, float)),
        "answer_tokens": mean_of(np.array(new_tokens, float)),
    }
