"""How many n-grams texts share, for many texts at a time: what ROUGE-1 and -2, BLEU and chrF are made of.

A text is a string and an n-gram a run of n of its characters. Words are counted in the same way once they are spelled as
characters of their own.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import reduce
from itertools import count
from operator import or_
from typing import TypeVar

import numpy as np

AT_A_TIME = 256  # texts: their n-grams stay in the processor's cache
Item = TypeVar("Item")


def in_parts(items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """The items, AT_A_TIME by AT_A_TIME."""
    return (items[first : first + AT_A_TIME] for first in range(0, len(items), AT_A_TIME))


def spell(texts: Iterable[Iterable[str]]) -> list[str]:
    """Each sequence of words as a string with one character a word, the same for the same word of all these texts."""
    number = count(1)
    letters: dict[str, str] = defaultdict(lambda: chr(next(number)))
    return ["".join([letters[word] for word in words]) for words in texts]


def lengths(texts: Sequence[str], order: int) -> np.ndarray:
    """How many n-grams each text has, int64 [texts, order] for n from 1 to `order`."""
    return np.maximum(np.array([len(text) for text in texts], int)[:, None] - np.arange(order), 0)


def matches(predictions: Sequence[str], references: Sequence[Sequence[str]], order: int) -> np.ndarray:
    """How many n-grams of each prediction its references have, int64 [predictions, order] for n from 1 to `order`.

    An n-gram counts at most as often as in the reference that has it most often (Papineni et al. 2002,
    https://aclanthology.org/P02-1040).

    All runs of `order` characters are packed into whole numbers of 64 bits, with the number of the prediction in front and that
    of the text (0 the prediction, 1 its first reference ...) behind, and sorted once: what begins alike stands together, for
    every n. Where 64 bits are too few, half as many texts are taken at a time.
    """
    texts = [text for prediction, several in zip(predictions, references) for text in (prediction, *several)]
    characters = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    if not characters.size:
        return np.zeros((len(predictions), order), int)
    numbers = np.cumsum(np.bincount(characters) > 0)  # those that occur, from 1; 0 stands behind the end of a text
    bits, sides = int(numbers[-1]).bit_length(), 1 + max(map(len, references))
    side_bits = (sides - 1).bit_length()
    if bits * order + side_bits + (len(predictions) - 1).bit_length() > 64:
        half = len(predictions) // 2
        if not half:
            return _count(predictions[0], references[0], order)[None]
        parts = (slice(half), slice(half, None))
        return np.concatenate([matches(predictions[part], references[part], order) for part in parts])
    size = np.array([len(text) for text in texts])
    side = np.concatenate([np.arange(1 + len(several)) for several in references])
    prediction = np.repeat(np.arange(len(predictions)), [1 + len(several) for several in references])
    place = np.arange(len(characters)) + np.repeat(np.arange(len(texts)) * (order - 1), size)
    padded = np.zeros(len(characters) + len(texts) * (order - 1), np.uint64)
    padded[place] = numbers[characters]
    keys = np.repeat(prediction.astype(np.uint64), size)
    for k in range(order):
        keys = keys << bits | padded[place + k]
    keys = keys << side_bits | np.repeat(side.astype(np.uint64), size)
    keys.sort()
    before = [np.concatenate([[0], np.cumsum(keys & (1 << side_bits) - 1 == k)]) for k in range(sides)]
    grams, starts, found = keys >> side_bits, np.arange(len(keys)), np.zeros((len(predictions), order), int)
    for n in range(order, 0, -1):
        first = np.flatnonzero(np.concatenate([[True], grams[1:] != grams[:-1]]))
        grams, starts = grams[first], starts[first]
        had, *wanted = (np.diff(b[starts], append=b[-1]) for b in before)
        hits = np.minimum(had, reduce(np.maximum, wanted)) * (grams & (1 << bits) - 1 > 0)
        found[:, n - 1] = np.bincount((grams >> bits * n).astype(int), hits, len(predictions))
        grams = grams >> bits
    return found


def _count(prediction: str, references: Sequence[str], order: int) -> np.ndarray:
    """The same of one prediction with too many different characters to be packed, int64 [order]."""

    def grams(text: str, n: int) -> Counter[str]:
        return Counter(text[i : i + n] for i in range(len(text) - n + 1))

    every = range(1, order + 1)
    return np.array([(grams(prediction, n) & reduce(or_, [grams(r, n) for r in references])).total() for n in every])
