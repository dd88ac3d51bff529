"""Which label an answer gives."""

import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache

import regex

from carelm.data.letters import NO_SPACES

# Dashes and apostrophes of typography are those of ASCII.
PLAIN = str.maketrans(dict.fromkeys("\u2010\u2011\u2012\u2013\u2212", "-") | dict.fromkeys("\u2018\u2019\u02bc", "'"))
SPACED = rf"[[\p{{L}}\p{{M}}\p{{N}}]--[{NO_SPACES}]]"  # letters of scripts with spaces between words
IN_NUMBER = r"[.,:/'^\u00b7\u066b\u066c\u2044]"  # 1.0 1,000 1:30 4/5 1'000 10^6, the signs of Arabic numbers, 1⁄2
TENS = "十百千万萬億亿兆십백천만억조"
# What is written onto a Korean word, and onto or before a single character of Chinese or Japanese, without being part of it.
KOREAN_ENDS = "입니다|이다|이에요|예요|임|으로|로|은|는|이|가|을|를|의|에|도|만"
ENDS = "です|だ|である|的|了"
COPULAS = "是|为|為|は"
NOT = "[不非未无無没沒]|ไม่|ບໍ່|មិន"  # that is written onto the word it denies


def parse_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that the text ends up with: the last one that stands in it as a whole word; None where none does.

    Case is not told apart (ACİL is acil, GROSS is groß, ΕΠΕΙΓΩΝ is επείγων), nor full width, NFC and NFD, kinds of digits,
    dashes and apostrophes, or a space, hyphen, underscore or formatting between a label's words, unless two labels would
    become one. Of labels that begin at the same place the longest counts: "not urgent" before "not".

    - A letter, mark or digit beside the label, or a hyphen, underscore or @ with one behind it, makes it part of a longer word:
      unhappy, non-urgent, urgent_case. An apostrophe does so behind it (can't) and not before it (l'urgence).
    - A label that begins or ends with a digit is no part of a number, with its sign, point, separators, fraction, currency,
      percent: -1, 1.0, .5, 1,000, 10 000, 4/5, 1:30, $1, 1 %, 1万. So 1.0 is not the label 1, and 1. at a sentence's end is.
    - Han, kana, Thai, Lao, Khmer, Burmese and Tibetan have no spaces: 紧急 stands in 这是紧急情况. It does not in 不紧急 or
      ไม่ด่วน, where the syllable in front denies it. A label in katakana is no part of a longer run of katakana. One of a single
      character (高, 对) stands alone, but for 是高 and 对的: in 高兴 and 对不起 it is another word.
    - Korean particles and copulas (긴급입니다) are not part of the word; articles of Arabic and Hebrew that are written onto a
      word are, and such a word is no label.
    - What the words mean is not read: "it is not urgent" ends up with urgent, as long as "not urgent" is no label.
    """
    fold, pattern = _pattern(tuple(labels))
    last = None
    for last in pattern.finditer(fold(text)):  # noqa: B007 - the last one counts
        pass
    return labels[int(last.lastgroup[1:])] if last else None


def folded(text: str) -> str:
    """One form of a label and of all that is not told apart from it."""
    return _words(_fold(text))


def _fold(text: str) -> str:
    """One form of all that a label may look like. Turkish dots go (its capital i has one, and one of its small i has none), and
    Greek accents, which capitals lack."""
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text).casefold())
    folded = unicodedata.normalize("NFKC", regex.sub(r"(?<=\p{Greek})\u0301", "", folded))
    folded = regex.sub(r"\p{Nd}", lambda digit: str(unicodedata.digit(digit[0])), folded)
    folded = regex.sub(r"\p{Default_Ignorable_Code_Point}", "", folded).translate(PLAIN)
    return folded.replace("i\u0307", "i").replace("\u0131", "i")


def _exact(text: str) -> str:
    return unicodedata.normalize("NFC", text)


@lru_cache(maxsize=64)
def _pattern(labels: tuple[str, ...]) -> tuple[Callable[[str], str], regex.Pattern]:
    """How texts are folded for these labels, and what finds one in such a text; its group's name is the label's number."""
    fold = _fold if len({_words(_fold(label)) for label in labels}) == len(set(labels)) else _exact
    longest_first = sorted(range(len(labels)), key=lambda k: -len(fold(labels[k])))
    found = "|".join(f"(?P<l{k}>{_whole(fold(labels[k]), fold is _fold)})" for k in longest_first)
    return fold, regex.compile(found, regex.V1)


def _words(label: str) -> str:
    return regex.sub(r"(?<=\p{L})[\s_-]+(?=\p{L})", " ", label)


def _whole(label: str, loose: bool) -> str:
    """The pattern of one label as a whole word."""
    parts = _words(label).split(" ") if loose else [label]
    inner = r"(?:[\s*`]+|[\s*`]*[_-]+[\s*`]*)".join(regex.escape(part, literal_spaces=True) for part in parts)
    before, after = rf"(?<!{SPACED})(?<!{SPACED}[-_@])", rf"(?!\p{{M}}|[-_@]{SPACED}|'\p{{L}})"
    hangul = regex.search(r"\p{Hangul}\Z", label)
    ends = rf"(?=(?:{KOREAN_ENDS})(?!{SPACED}))"
    after += rf"(?:(?!{SPACED})|{ends})" if hangul else rf"(?:(?![{SPACED}--\p{{Hangul}}]))"
    if regex.match(r"\p{Nd}", label):
        before += rf"(?<!\p{{Nd}}(?:{IN_NUMBER}|\s?/\s?))(?<![-+])(?<!(?<![\p{{L}}.])\.)(?<!\p{{Sc}}\s?)"
    if regex.search(r"\p{Nd}\Z", label):
        after += rf"(?!(?:{IN_NUMBER}|\s?/\s?)\p{{Nd}}|\s?[%‰\p{{Sc}}]|[{TENS}])"
        after += r"(?!\s\p{Nd}(?:\p{Nd}{2}(?!\p{Nd})|\p{Nd}*[/\u2044]))"  # 10 000, 1 1/2
    if regex.match(rf"[{NO_SPACES}]", label):
        before += rf"(?<!{NOT})"
    if regex.fullmatch(rf"[{NO_SPACES}]\p{{M}}*", label):
        before += rf"(?:(?<![{NO_SPACES}])|(?<={COPULAS}))"
        after += rf"(?:(?![{NO_SPACES}])|(?=(?:{ENDS})(?![{NO_SPACES}])))"
    if regex.match(r"\p{Katakana}", label):
        before += r"(?<![\p{Katakana}\u30fc])"
    if regex.search(r"[\p{Katakana}\u30fc]\Z", label):
        after += r"(?![\p{Katakana}\u30fc])"
    return before + inner + after
