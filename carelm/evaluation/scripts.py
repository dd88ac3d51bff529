"""The scripts that texts are written in: what of them a score can read, and which tokenizer BLEU needs."""

import itertools
import unicodedata
from collections.abc import Iterable

import numpy as np
import regex

from carelm.data.letters import BY_LETTER, NO_SPACES

# What each of sacrebleu's tokenizers takes for one word however long it is; those of Japanese and Korean words need packages.
UNREAD = {"char": None, "zh": BY_LETTER, "intl": NO_SPACES, "13a": NO_SPACES}
ROUGE_READS = "a-z0-9"  # rouge_score.tokenize
LINE_END = regex.compile(r"\r\n|[\r\x85\u2028\u2029]")
FEW = 0.01  # of a corpus' letters: a name, a loan word
MANY = 0.1


def unify(text: str) -> str:
    r"""The text in NFC with \n at its line ends: what looks the same is the same."""
    return unicodedata.normalize("NFC", LINE_END.sub("\n", text))


def share(texts: Iterable[str], letters: str) -> float:
    """Which part of the letters, marks and digits of all texts is of this set."""
    counts = np.zeros(0x110000, int)
    texts = iter(texts)
    while some := list(itertools.islice(texts, 10_000)):
        counts += np.bincount(np.frombuffer("".join(some).lower().encode("utf-32-le", "surrogatepass"), np.uint32),
                              minlength=len(counts))  # fmt: skip
    every = {chr(k): int(counts[k]) for k in np.flatnonzero(counts) if regex.match(r"[\p{L}\p{M}\p{N}]", chr(k))}
    among = regex.compile(f"[{letters}]", regex.V1)
    return sum(n for letter, n in every.items() if among.match(letter)) / max(1, sum(every.values()))


def bleu_tokenizer(references: list[list[str]]) -> str:
    """The tokenizer of sacrebleu that reads the references, one for all models and categories of a comparison.

    Characters for Japanese, Thai, Lao, Khmer, Burmese and Tibetan; words with each Han character apart where there are some;
    Unicode's punctuation apart for other scripts than Latin; else mteval's 13a, by which English is compared elsewhere.
    """
    texts = [text for several in references for text in several]
    if share(texts, BY_LETTER) >= MANY:
        return "char"
    if share(texts, r"\p{Han}") >= FEW:
        return "zh"
    return "intl" if share(texts, r"\p{L}--\p{Latin}") >= MANY else "13a"


def unread_by_rouge(references: list[list[str]]) -> float:
    """The share of the references' letters that ROUGE does not see."""
    return 1 - share((text for several in references for text in several), ROUGE_READS)


def unread_by_bleu(references: list[list[str]]) -> float:
    """The share of the references' letters that stand in words which BLEU's tokenizer does not part."""
    unread = UNREAD[bleu_tokenizer(references)]
    return share((text for several in references for text in several), unread) if unread else 0.0
