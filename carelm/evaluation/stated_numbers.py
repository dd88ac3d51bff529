"""Numbers that an answer states and nobody gave it: neither the prompt nor an expected reply holds them. No score sees them.

Compared are numbers in digits, of every script, by what they are worth: "1,299.00", "1.299,00" and "1299" are one number, and
"29.50" is "29.5". A date is its parts, a telephone number its digits. What counts lines or steps ("1. Open it", "step 2"), what
stands in for text ({{Order 1}}, [PHONE]), "24/7", and a digit or two in a word (B12, COVID-19) state nothing.
"""

import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import regex

from carelm.evaluation.questions import Question

MOST_KEPT = 20  # answers of a model, in results.json
NO_NUMBER = regex.compile(r"\{\{?[^{}:\"]*\}?\}|\[\p{L}[^\[\]:\"]*\]|</?\p{L}[^<>]*>|\b24\s?/\s?7\b|(?i:\bstep\s+\d+)")
LINE = regex.compile(
    r"^\W*\d{1,3}\s?[.):](?=\s|\*|$)|^\W*\d{1,2}\Z", regex.MULTILINE
)  # "3. Open", "- 3)", "3" at a cut
BULLET = regex.compile(
    r"(?<![\w.,])(\d{1,2})(?:[.):](?=\s+\S)|[.):]?\s*\Z)"
)  # in one line: "do this: 1. Open it. 2. Click"
DATE = regex.compile(r"(?<![\w./-])(\d{1,4})([./-])(\d{1,2})\2(\d{2,4})(?![\w/-])")
RUN = regex.compile(r"(?<![\w.,])\+?\(?\d[\d()]*(?:[ ./-]{1,2}\(?\d[\d()]*)+")
PHONE_DIGITS, AFTER_ZERO = 9, 7  # and more, in groups: a telephone number, an account, a card
NUMBER = regex.compile(
    r"(?<!\p{L}[-–]?)(?<!\d)(?:\d{1,3}(?:[,.'’\u00a0\u202f ]\d{3})+(?!\d)|\d+)(?:[.,]\d+)?|(?<!\d)\d{3,}"
)


def count(questions: Sequence[Question], predictions: Sequence[str]) -> dict[str, Any]:
    """`answers`, how many state a number that neither their prompt nor an expected reply has, and `first`, such numbers of the
    first of them by question id."""
    found = {}
    for question, prediction in zip(questions, predictions):
        if not any(c.isdecimal() for c in prediction):
            continue
        said = (m.get("content") or json.dumps(m.get("tool_calls", ""), ensure_ascii=False) for m in question.messages)
        given = [*said, *question.references, json.dumps(question.tools or "", ensure_ascii=False)]
        if numbers := unfounded(prediction, given):
            found[question.id] = numbers
    return {"answers": len(found), "first": dict([*found.items()][:MOST_KEPT])}


def unfounded(answer: str, given: Sequence[str]) -> list[str]:
    """The numbers of an answer, as they are written there, that none of the texts that were given has."""
    values, runs, has_dates = set[str](), list[str](), False
    for text in map(_plain, given):
        has_dates |= DATE.search(text) is not None
        text = DATE.sub(r"\1; \3; \4", text)
        values.update(_values(text))
        runs += [_digits(match[0]) for pattern in (RUN, NUMBER) for match in pattern.finditer(text)]
    text, found = _without_bullets(_plain(answer, LINE)), dict[str, None]()
    for match in [*DATE.finditer(text)]:
        unknown = {str(int(match[k])) for k in (1, 3, 4)} - values
        is_month = len(unknown) == 1 and int(*unknown) <= 12 and not has_dates  # "March 5, 2024" names it
        if unknown and not is_month:
            found[match[0]] = None
        text = _blank(text, match)
    for match in [*RUN.finditer(text)]:
        if len(digits := _digits(match[0])) < AFTER_ZERO:
            continue
        is_given = any(digits in run for run in runs)
        if is_given or match[0][0] in "0+(" or len(digits) >= PHONE_DIGITS:
            if not is_given and not values.issuperset(_values(match[0])):
                found[match[0]] = None
            text = _blank(text, match)
    return [*found, *dict.fromkeys(m[0] for m in NUMBER.finditer(text) if _value(m[0]) not in values)]


def _plain(text: str, *more: regex.Pattern) -> str:
    """The text with ASCII digits, and without what states nothing; `more` of it may be taken out."""
    text = "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in unicodedata.normalize("NFC", text))
    for pattern in (NO_NUMBER, *more):
        text = pattern.sub(" ", text)
    return regex.sub(r"(?<=\d):00\b", "", text)


def _without_bullets(text: str) -> str:
    """Numbers that count up within a line are left out: the number at the end of a sentence does not."""
    bullets = [(int(match[1]), match) for match in BULLET.finditer(text)]
    for k, (number, match) in enumerate(bullets):
        beside = [value for value, _ in bullets[max(0, k - 1) : k + 2]]
        if number - 1 in beside[:1] or number + 1 in beside[-1:]:
            text = _blank(text, match)
    return text


def _blank(text: str, match: regex.Match) -> str:
    return text[: match.start()] + " " * len(match[0]) + text[match.end() :]


def _digits(text: str) -> str:
    return regex.sub(r"\D", "", text)


def _values(text: str) -> list[str]:
    return [_value(match[0]) for match in NUMBER.finditer(text)]


def _value(number: str) -> str:
    """The number as it is compared: without thousands separators, leading zeros, and zeros behind the decimal point."""
    parts, marks = regex.split(r"\D", number), {*regex.findall(r"\D", number)}
    is_grouped = len(marks) == 1 and parts[0] != "0" and all(len(part) == 3 for part in parts[1:])
    whole, decimals = ("".join(parts), "") if is_grouped or not marks else ("".join(parts[:-1]), parts[-1].rstrip("0"))
    whole = whole.lstrip("0") or "0"  # no int(): Python reads no more than 4,300 digits
    return f"{whole}.{decimals}" if decimals else whole
