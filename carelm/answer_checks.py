"""`checks` of a recipe: what every answer must or must not hold, as regular expressions. Imports no torch."""

import difflib
import time
import unicodedata
from dataclasses import dataclass
from typing import Any

import regex

from carelm.errors import UserError

KEYS = ("name", "pattern", "when", "must", "must_not")
SECONDS_PER_TEXT, SECONDS = 1.0, 60.0  # that a pattern may take: on one text, and on all texts of a model
REFERENCE = regex.compile(r"(?<!\\)(?:\\\\)*+\K\(\?P=(\w+)\)")
OWN_GROUP = regex.compile(r"\(\?P?<(\w+)>")


@dataclass(frozen=True)
class AnswerCheck:
    """One check.

    Attributes:
        pattern: is searched in the answer; `(?P=name)` stands for what the group of that name in `when` matched.
        when: is searched in the question; the check is about the questions where it matches, or about all.
        must: whether the pattern is to match, or not to.
    """

    name: str
    pattern: str
    when: regex.Pattern | None
    must: bool

    def pattern_for(self, question: str, clock: "Clock") -> regex.Pattern | None:
        """What is searched in the answer to this question; None where the check is not about it: `when` does not match, or the
        group that the pattern refers to took no part in the match."""
        match = clock.search(self.when, question) if self.when else None
        if self.when and not match:
            return None
        said = match.groupdict() if match else {}
        wanted = self.of_question()
        if any(said[group] is None for group in wanted):
            return None
        return regex.compile(
            REFERENCE.sub(lambda m: f"(?:{regex.escape(said[m[1]])})" if m[1] in wanted else m[0], self.pattern)
        )

    def of_question(self) -> set[str]:
        """The groups of `when` that the pattern refers to."""
        return set(REFERENCE.findall(self.pattern)) - set(OWN_GROUP.findall(self.pattern))


class Clock:
    """Bounds the time of the processor that patterns take on many texts: nested repeats can need longer than anyone waits."""

    def __init__(self) -> None:
        self.end = time.process_time() + SECONDS

    def search(self, pattern: regex.Pattern, text: str) -> regex.Match | None:
        """The first match; raises TimeoutError where it takes too long, or all together have."""
        return pattern.search(text, timeout=max(1e-3, min(SECONDS_PER_TEXT, self.end - time.process_time())))


def parse_checks(values: list[Any]) -> list[AnswerCheck]:
    """The recipe's `checks`.

    Raises:
        UserError: for a check without name or pattern, one with a key that is unknown, a pattern that is none, and a reference
            to a group that is not there.
    """
    checks: list[AnswerCheck] = []
    for number, value in enumerate(values, 1):
        where = f"checks: number {number}"
        if not isinstance(value, dict):
            raise UserError(f"{where} is {value!r:.60}; write name and pattern: - {{name: ..., pattern: ...}}")
        for key in value:
            if key not in KEYS:
                near = difflib.get_close_matches(str(key), KEYS, n=1)
                hint = f"; did you mean '{near[0]}'?" if near else f" (known are {', '.join(KEYS)})"
                raise UserError(f"{where}: unknown key '{key}'{hint}")
        texts = {key: _text(value, key, where) for key in ("name", "pattern", "when")}
        for key in ("name", "pattern"):
            if not texts[key]:
                raise UserError(f"{where} has no {key}")
        name = " ".join(texts["name"].split())
        where = f"checks: '{name}'"
        if name in [check.name for check in checks]:
            raise UserError(f"{where} stands there twice; rename one")
        if "must" in value and "must_not" in value:
            raise UserError(f"{where}: must and must_not: set only one of them")
        for key in ("must", "must_not"):
            if not isinstance(value.get(key, True), bool):
                raise UserError(
                    f"{where}: {key}: {value[key]!r} is neither true nor false; the expression is `pattern`"
                )
        must = not value["must_not"] if "must_not" in value else value.get("must", True)
        when = _compile(texts["when"], f"{where}: when") if texts["when"] else None
        check = AnswerCheck(name, texts["pattern"], when, must)
        for group in sorted(check.of_question()):
            if group not in (when.groupindex if when else {}):
                raise UserError(
                    f"{where}: pattern: (?P={group}) refers to no group; name it in `when`, as in order (?P<{group}>\\d+)"
                )
        _compile(REFERENCE.sub("x", texts["pattern"]) if check.of_question() else texts["pattern"], f"{where}: pattern")
        checks.append(check)
    return checks


def _text(value: dict[str, Any], key: str, where: str) -> str | None:
    text = value.get(key)
    if isinstance(text, int) and not isinstance(text, bool):
        return str(text)  # pattern: 112
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}: {key}: {text!r:.60} is no text; write it in quotes")
    return text and unicodedata.normalize("NFC", text)  # as answers and questions are


def _compile(pattern: str, where: str) -> regex.Pattern:
    try:
        return regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise UserError(f"{where}: {pattern!r:.80} is no regular expression ({error})") from None
