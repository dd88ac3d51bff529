"""What `strip_html` and `mask_personal_data` change in rows and messages, and what the data report counts of it."""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from carelm.data.example import NoAnswer
from carelm.data.html_text import plain_text
from carelm.data.messages import column_turns, message_columns
from carelm.data.personal import UNJUDGED, count_unjudged, find_personal, has_html, has_signature
from carelm.data.report import number_of
from carelm.data.tags import used_tags
from carelm.data.templates import template_columns
from carelm.data.values import cell_text
from carelm.errors import UserError

if TYPE_CHECKING:
    from carelm.recipe import Recipe

LIBRARIES = {"phonenumbers": "phonenumbers", "stdnum": "python-stdnum"}  # module: package
MOST_COUNTED = 10_000  # rows of a split that are looked at where nothing is masked
WORDS = {  # of one and of several in the report
    "EMAIL": ("e-mail address", "e-mail addresses"),
    "PHONE": ("phone number", "phone numbers"),
    "CARD": ("card number", "card numbers"),
    "IBAN": ("IBAN", "IBANs"),
}
HTML, SIGNATURE = "HTML", "a signature"


def missing() -> str:
    """What the search needs and is not installed, with the way to it; empty where all is there."""
    absent = [package for module, package in LIBRARIES.items() if not _is_installed(module)]
    return f"{' and '.join(absent)} not installed: pip install -r requirements.txt" if absent else ""


@cache
def personal_versions() -> list[str]:
    """Of the libraries that decide what is found; none of those that are not there."""
    return [importlib.metadata.version(package) for module, package in LIBRARIES.items() if _is_installed(module)]


@cache
def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def check_personal(recipe: "Recipe") -> None:
    """Raises UserError for a region that is none, and for masking without the libraries that find what to mask."""
    if recipe.mask_personal_data and missing():
        raise UserError(f"mask_personal_data: {missing()}")
    if recipe.phone_region is not None and not missing():
        import phonenumbers

        if recipe.phone_region not in phonenumbers.SUPPORTED_REGIONS:
            near = {"UK": "GB", "EN": "GB"}.get(region := recipe.phone_region.strip().upper(), region)
            hint = f"did you mean {near}?" if near in phonenumbers.SUPPORTED_REGIONS else "write DE, US, IN or another"
            raise UserError(f"phone_region: {recipe.phone_region!r} is no country's two letters; {hint}")


def clean(recipe: "Recipe", text: str, column: str = "") -> str:
    """The text as the recipe has it read: without HTML, and with [EMAIL], [PHONE], [CARD] and [IBAN] in the place of such data,
    each where a key says so."""
    return _mask(recipe, plain_text(text) if recipe.strip_html else text, column)


def _mask(recipe: "Recipe", text: str, column: str = "") -> str:
    if not recipe.mask_personal_data:
        return text
    for start, end, kind in reversed(find_personal(text, recipe.phone_region, column)):
        text = f"{text[:start]}[{kind}]{text[end:]}"
    return text


def clean_turns(recipe: "Recipe", turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same of what turns say and think; what is handed to tools is masked too, and theirs is no HTML for people. Names, ids
    and roles stay."""
    if recipe.strip_html:
        turns = [turn if turn["role"] == "tool" else _without_html(turn) for turn in turns]
    return [_with_texts(turn, partial(_mask, recipe)) for turn in turns] if recipe.mask_personal_data else turns


def _without_html(turn: dict[str, Any]) -> dict[str, Any]:
    return turn | {key: plain_text(turn[key]) for key in ("content", "reasoning_content") if key in turn}


def _with_texts(turn: dict[str, Any], change: Callable[[str, str], str]) -> dict[str, Any]:
    """The turn with each of its texts changed, `change(text, column)`; the rest of it, such as names and ids, stays."""
    own = {key: change(turn[key], "") for key in ("content", "reasoning_content") if key in turn}
    if calls := turn.get("tool_calls"):
        arguments = [_with_values(call["function"]["arguments"], change) for call in calls]
        own["tool_calls"] = [c | {"function": c["function"] | {"arguments": a}} for c, a in zip(calls, arguments)]
    return turn | own


def _with_values(value: Any, change: Callable[[str, str], str], column: str = "") -> Any:
    if isinstance(value, dict):
        return {key: _with_values(member, change, key) for key, member in value.items()}
    if isinstance(value, list):
        return [_with_values(v, change, column) for v in value]
    if isinstance(value, str):
        return change(value, column)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value if (changed := change(str(value), column)) == str(value) else changed
    return value


class PersonalCount:
    """Counts the personal data of a split's rows: of the first `MOST_COUNTED`, or of all where it is masked."""

    def __init__(self, recipe: "Recipe"):
        self.found: dict[str, dict[str, Any]] = {}
        self.rows = 0
        self._unit = "conversation" if recipe.text_column else "row"
        self._recipe, self._region = recipe, recipe.phone_region
        self._is_masked, self._missing = recipe.mask_personal_data, missing()
        self._counts_all = recipe.mask_personal_data or recipe.strip_html
        templates = (recipe.system_prompt, recipe.prompt_template, recipe.completion_template,
                     recipe.rejected_template)  # fmt: skip
        named = [c for template in templates for c in template_columns(template or "", "prompt_template")]
        named += [*message_columns(recipe), recipe.text_column, *recipe.reference_columns, *recipe.overlap_columns]
        self._columns = [c for c in dict.fromkeys(filter(None, named)) if c not in used_tags(recipe)]

    def add(self, source: str, row: dict[str, Any]) -> None:
        """A row, `source` its file:row."""
        if self._missing or self.rows >= MOST_COUNTED and not self._counts_all:
            return
        self.rows += 1
        numbers: dict[str, int | None] = {}

        def count(text: str, column: str) -> str:
            if has_html(text):
                numbers[HTML] = None
            read = plain_text(text) if self._recipe.strip_html else text
            for _, _, kind in find_personal(read, self._region, column):
                numbers[kind] = (numbers.get(kind) or 0) + 1
            if self._region is None and (unjudged := count_unjudged(read, column)):
                numbers[UNJUDGED] = (numbers.get(UNJUDGED) or 0) + unjudged
            if has_signature(read):
                numbers[SIGNATURE] = None
            return text

        for column in self._columns:
            with contextlib.suppress(UserError, NoAnswer):  # said where the row is read
                if column == self._recipe.text_column:
                    turns = row[column]
                elif column in message_columns(self._recipe):
                    turns = column_turns(self._recipe, source, row, column)[0]
                else:
                    count(cell_text(row, column, source, self._recipe.labels) or "", column)
                    continue
                for turn in turns:
                    _with_texts(turn, count)
        for kind, number in numbers.items():
            so_far = self.found.setdefault(kind, {"number": number and 0, "rows": 0, "first": source})
            so_far["rows"] += 1
            if number:
                so_far["number"] += number

    def describe(self) -> dict[str, Any]:
        """`found`: for each kind `{"number", "rows", "first"}`, the number None where rows alone are counted; `rows`: how many
        were looked at; `sentence`: both in words; `unjudged`: what is to be said of numbers that only `phone_region` would tell
        from phone numbers. The last two are empty where there is nothing to say."""
        if self._missing:
            return {
                "found": {},
                "rows": 0,
                "unjudged": "",
                "sentence": f"personal data is not looked for: {self._missing}",
            }
        parts, unjudged = [], ""
        found = {kind: of_kind for kind, of_kind in self.found.items() if kind != UNJUDGED}
        if of_kind := self.found.get(UNJUDGED):
            of_rows = number_of(of_kind["rows"], self._unit)
            what = (
                "number without + may be a phone number"
                if of_kind["number"] == 1
                else "numbers without + may be phone numbers"
            )
            stays = ", left as they are" if self._is_masked else ""
            unjudged = (
                f"{of_kind['number']:,} {what} in {of_rows}{stays} (first: {of_kind['first']}): set phone_region (DE, US, "
                "IN ...) to tell them apart"
            )
        for kind, of_kind in found.items():
            number, rows = of_kind["number"], of_kind["rows"]
            what = f"{number:,} {WORDS[kind][number != 1]} in" if kind in WORDS else f"{kind} in"
            parts.append(f"{what} {number_of(rows, self._unit)} (first: {of_kind['first']})")
        masked = [part for part, kind in zip(parts, found) if kind in WORDS]
        others = [part for part, kind in zip(parts, found) if kind not in WORDS]
        sentences = []
        if self._is_masked:
            sentences.append(
                f"mask_personal_data replaces {', '.join(masked) or f'nothing in {number_of(self.rows, self._unit)}'}"
            )
        elif masked:
            where = f" in the first {number_of(self.rows, self._unit)}" if self.rows == MOST_COUNTED else ""
            sentences.append(f"personal data{where}: {', '.join(masked)}")
        sentences += [", ".join(others)] if others else []
        if HTML in found:
            stripped = self._recipe.strip_html
            sentences.append(
                "strip_html makes plain text of it" if stripped else "strip_html: true makes plain text of HTML"
            )
        said = f"mask_personal_data: {unjudged}" if unjudged and self._is_masked else unjudged
        return {"found": found, "rows": self.rows, "sentence": "; ".join(sentences), "unjudged": said}
