"""What orders the messages of a conversation: the values of `order_column` as numbers to sort by."""

import calendar
import datetime
import email.utils
import math
import re
from dataclasses import replace
from typing import Any

from carelm.data.readers import Rows
from carelm.data.values import is_empty, is_missing
from carelm.errors import UserError
from carelm.recipe import Recipe

_MERIDIEM = re.compile(
    r"\b(?P<hour>0?[1-9]|1[0-2])(?P<minutes>:\d\d(?::\d\d)?)\s*(?P<half>[aApP])\.?\s?[mM]\b\.?"
)  # 1:30 PM
# 13.02.2026 08:20, 2/13/2026, 13-02-26, 2026/02/13, Fr., 13.02.2026, 8:20 Uhr, [13.02.2026, 8:20:07]
_IN_NUMBERS = re.compile(
    r"\[?(?:[^\W\d_]{2,10}[.,]{0,2}\s+)?"
    r"(?P<first>\d{4}|\d{1,2})(?P<sign>[./-])[ ]?(?P<second>\d{1,2})(?P=sign)[ ]?(?P<third>\d{4}|\d{1,2})"
    r"(?:(?:,|T|\s-)?\s*(?:um\s|at\s)?(?P<hour>\d{1,2}):(?P<rest>\d\d(?::\d\d(?:\.\d+)?)?)"
    r"\s?(?P<zone>Z|[+-]\d\d:?\d\d)?(?:\s?Uhr)?)?\]?"
)
_IN_DATES = {*"utc gmt".split(), *(name.lower() for names in (
    calendar.month_name, calendar.month_abbr, calendar.day_name, calendar.day_abbr) for name in names)}  # fmt: skip
MOST_COMPARED = 1_000  # messages that are looked at for a date that runs backwards


def with_date_order(recipe: Recipe, rows: Rows) -> tuple[Recipe, str]:
    """The recipe with the `date_order` that its `order_column` has in these rows, and a note that says it; "" where no date
    needs one.

    A number above 12 tells day from month. Dates with dots have the day first in every country that writes them so. A year of
    two digits may be anything, and needs the key.

    Raises:
        UserError: where the rows do not tell, or tell two things.
    """
    column, found = recipe.order_column, _dates_in_numbers(recipe.order_column, rows)
    forms: dict[tuple[bool, str], str] = {}
    seen: dict[str, str] = {}
    two_digits = ""
    for source, text, match in found:
        shown, is_year_first = f"{text!r:.60} ({source})", len(match["first"]) == 4
        forms.setdefault((is_year_first, match["sign"]), shown)
        if not is_year_first:
            seen.setdefault(_shown_order(match), shown)
            two_digits = two_digits or shown * (len(match["third"]) == 2)
    if len(forms) > 1:
        raise UserError(
            f"order_column: column '{column}' holds dates in two forms, {' and '.join([*forms.values()][:2])}; export it "
            "in one, as a spreadsheet that knows only some of them may have put days for months"
        )
    ambiguous = seen.pop("", "")
    if len(seen) > 1:
        first = " and ".join(f"{shown}: {order}" for order, shown in seen.items())
        raise UserError(
            f"order_column: column '{column}' holds dates of two orders, {first}; export it with the year first"
        )
    told, given = next(iter(seen), ""), recipe.date_order
    if told and given and told != given:
        raise UserError(f"date_order: {given} does not fit column '{column}', which holds {seen[told]}; set {told}")
    if not (seen or ambiguous):
        return recipe, ""
    choose = "set date_order: day_first, or month_first"
    if two_digits and not given:
        raise UserError(f"order_column: column '{column}' holds {two_digits}, a year of two digits; {choose}")
    order = given or told or ("day_first" if next(iter(forms))[1] == "." else "")
    if not order:
        raise UserError(
            f"order_column: column '{column}' holds {ambiguous}, and no row tells whether the day or the month is first; "
            f"{choose}"
        )
    why = " as date_order says" if given else ""
    note = f"dates of column '{column}' are read {order.replace('_', ' ')}{why}, such as {seen.get(told, ambiguous)}"
    return replace(recipe, date_order=order), note


def places(recipe: Recipe, rows: Rows) -> list[float]:
    """The column as numbers to sort by: numbers as they are, dates as seconds since 1970 (UTC where they name no zone).

    Raises:
        UserError: for a value that is neither number nor date, and for both in one column.
    """
    column, found, kinds = recipe.order_column, [], {}
    for source, row in rows:
        value = row.get(column)
        place = _number(value)
        kind = "numbers" if place is not None else "dates"
        place = _seconds(value, recipe.date_order) if place is None else place
        if place is None:
            what = (
                "is empty"
                if is_empty(value)
                else f"holds {value!r:.60}, neither a number nor a date (2024-05-01 12:30, 13.02.2026 8:20, 2/13/2026 8:20 PM)"
            )
            raise UserError(
                f"order_column: {source}: column '{column}' {what}; sort the rows and leave order_column out"
            )
        found.append(place)
        kinds.setdefault(kind, source)
    if len(kinds) > 1:
        raise UserError(
            f"order_column: column '{column}' holds a number in {kinds['numbers']} and a date in {kinds['dates']}"
        )
    return found


def backwards(recipe: Recipe, rows: Rows, groups: list[list[int]]) -> str:
    """The name of a column with dates that mostly fall from one message of a conversation to the next, "" for none: the
    file has the newest message first."""
    pairs: list[tuple[int, int]] = []
    for group in groups:
        pairs += zip(group, group[1:])
        if len(pairs) >= MOST_COMPARED:
            break
    looked_at = sorted({i for pair in pairs for i in pair})
    named = {recipe.text_column, recipe.role_column, recipe.conversation_column}
    for column in [c for c in rows[0][1] if c not in named] if pairs else []:
        dates = {i: rows[i][1].get(column) for i in looked_at}
        orders = [_shown_order(match) for _, _, match in _dates_in_numbers(column, [rows[i] for i in looked_at])]
        order = "month_first" if "month_first" in orders else "day_first"  # of one day, mostly: either does
        seconds = {i: _seconds(value, order) for i, value in dates.items() if _number(value) is None}
        known = [
            (seconds[i], seconds[k]) for i, k in pairs if seconds.get(i) is not None and seconds.get(k) is not None
        ]
        if 2 * len(known) > len(pairs) and sum(a > b for a, b in known) > sum(a < b for a, b in known):
            return column
    return ""


def _dates_in_numbers(column: str, rows: Rows) -> list[tuple[str, str, re.Match]]:
    """The texts of a column that are dates written in numbers alone, each behind its file:row."""
    texts = [(source, row[column]) for source, row in rows if isinstance(row.get(column), str)]
    return [(source, text, match) for source, text in texts if (match := _IN_NUMBERS.fullmatch(_with_hours(text)))]


def _shown_order(match: re.Match) -> str:
    """What a date that does not begin with its year shows of its order; "" where both may be the month."""
    day_first, month_first = int(match["first"]) > 12, int(match["second"]) > 12
    return "" if day_first == month_first else "day_first" if day_first else "month_first"


def _number(value: Any) -> float | None:
    try:
        number = math.nan if isinstance(value, (bool, datetime.date)) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _seconds(value: Any, date_order: str | None) -> float | None:
    if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
        value = datetime.datetime(value.year, value.month, value.day)
    if isinstance(value, str):
        value = _with_hours(value)
    for read in (
        datetime.datetime.fromisoformat,
        lambda text: _read_numbers(text, date_order),
        _read_email_date,
        lambda text: datetime.datetime.strptime(text, "%a %b %d %H:%M:%S %z %Y"),  # Twitter's
    ):
        try:
            value = read(value) if isinstance(value, str) else value
        except (ValueError, TypeError, IndexError, OverflowError):
            continue
    if not isinstance(value, datetime.datetime) or is_missing(value):
        return None
    return (value if value.tzinfo else value.replace(tzinfo=datetime.UTC)).timestamp()


def _with_hours(text: str) -> str:
    """1:30 PM as 13:30, UTC as a number."""
    text = _MERIDIEM.sub(lambda m: f"{int(m['hour']) % 12 + 12 * (m['half'] in 'pP'):02}{m['minutes']}", text.strip())
    return re.sub(r"\bUTC$", "+00:00", text)


def _read_numbers(text: str, date_order: str | None) -> datetime.datetime:
    match = _IN_NUMBERS.fullmatch(text)
    if match is None or len(match["first"]) < 4 and date_order is None:
        raise ValueError(f"{text!r} is no date in numbers, or one of no order")
    year, month, day = (match[name] for name in ("first", "second", "third"))
    if len(year) < 4:
        year, month, day = (day, month, year) if date_order == "day_first" else (day, year, month)
    if len(year) == 2:
        year = str(datetime.datetime.strptime(year, "%y").year)  # 69 is 1969, as POSIX has it
    time = f"T{match['hour']:0>2}:{match['rest']}{match['zone'] or ''}" if match["hour"] else ""
    return datetime.datetime.fromisoformat(f"{year}-{month:0>2}-{day:0>2}{time}")


def _read_email_date(text: str) -> datetime.datetime:
    """As mails write it; a zone that is known by its name alone (CEST) is refused and not taken for UTC."""
    found = email.utils.parsedate_to_datetime(re.sub(r"\b(GMT|UTC)(?=[+-]\d{4}\b)", "", text))
    if found.tzinfo is None and {*re.findall(r"[^\W\d]{2,}", text.lower())} - _IN_DATES:
        raise ValueError(f"{text!r} names a zone that is not known")
    return found
