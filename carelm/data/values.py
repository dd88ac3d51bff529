"""What a cell or member of a row is as text: one rule for every file format.

- Text stays as it is. A value that is missing is None: null, NaN, NaT, and in a column the text that pandas and Python
  write for them ("nan", "NaN", "NaT", "<NA>", in CSV also "None", "null", "NULL"), unless it is one of the labels.
- A number that is whole is written without a fraction (1.0 is 1: a missing value makes an integer column float), any
  other as Python writes it; true and false in small letters; a Decimal with the digits that it has.
- Dates and times as in 2024-05-01 12:30:00, a date alone as in 2024-05-01, a duration as in 2:00:00 or 1 day, 2:00:00.
- Lists and objects as JSON. Members that are null are left out of objects: Parquet and Hub datasets give every object of
  a column the members of all the others, with null.
- Anything else (bytes, an infinite number, a picture) is refused, with its column and row.
"""

import datetime
import json
import re
import uuid
from collections.abc import Collection
from decimal import Decimal
from typing import Any

from carelm.errors import UserError

MISSING_TEXTS = {"nan", "NaN", "NaT", "<NA>"}
MISSING_CSV_TEXTS = {"None", "null", "NULL"}
CSV_SOURCE = re.compile(r"\.[ct]sv(\.gz)?:", re.IGNORECASE)
EXACT_WHOLE = 1e16  # from there on Python writes an exponent, and not all digits are the number's own


def as_text(value: Any, where: str) -> str | None:
    """A value as text, None where it is missing; `where` names it in the UserError for one that cannot be text."""
    value = plain(value, where)
    return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def cell_text(row: dict[str, Any], column: str, source: str, labels: Collection[str] = ()) -> str | None:
    """The text of a row's column, None where it is empty or not there; `source` is file:row."""
    text = None if is_empty(row.get(column)) else as_text(row[column], f"{source}: column '{column}'")
    bare = text and text.strip()
    is_missing_text = bare in MISSING_TEXTS or bare in MISSING_CSV_TEXTS and CSV_SOURCE.search(source)
    return None if is_missing_text and bare not in labels else text


def as_word(text: str | None) -> str | None:
    """Text to compare with a recipe's words: true of a JSON file is True or TRUE in a CSV file."""
    text = text and text.strip()
    return text.lower() if text and text.lower() in ("true", "false") else text


def plain(value: Any, where: str) -> Any:
    """A value as JSON has it: None, text, bool, number, list or object; what is missing is None and no member."""
    if hasattr(value, "tolist"):  # numpy's numbers and arrays
        value = value.tolist()
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        members = {str(key): plain(member, where) for key, member in value.items()}
        return {key: member for key, member in members.items() if member is not None}
    if isinstance(value, (list, tuple)):
        return [plain(item, where) for item in value]
    if is_missing(value):
        return None
    if isinstance(value, float) and abs(value) != float("inf"):
        return int(value) if value.is_integer() and abs(value) < EXACT_WHOLE else value
    if isinstance(value, Decimal) and value.is_finite():
        return format(value, "f")
    if isinstance(value, datetime.timedelta) and not getattr(value, "nanoseconds", 0):  # pandas' own: 0 days 02:00:00
        return str(datetime.timedelta(value.days, value.seconds, value.microseconds))
    if isinstance(value, (datetime.date, datetime.time, datetime.timedelta, uuid.UUID)):  # a datetime is a date
        return str(value)
    what = "an infinite number" if isinstance(value, (float, Decimal)) else f"a value of type {type(value).__name__}"
    raise UserError(f"{where} holds {what}, which is no text; write it into the file as text")


def is_missing(value: Any) -> bool:
    """Null, NaN and NaT: what equals nothing."""
    return value is None or (isinstance(value, (float, Decimal, datetime.datetime)) and value != value)


def is_empty(value: Any) -> bool:
    """Missing, empty text, an empty list, or an object without members that are there."""
    return value in ("", [], ()) if isinstance(value, (str, list, tuple)) else _is_hollow(value)


def _is_hollow(value: Any) -> bool:
    return all(map(_is_hollow, value.values())) if isinstance(value, dict) else is_missing(value)
