"""Templates with {columns}, and how a row fills them in."""

import json
from string import Formatter
from typing import Any

from carelm.data.example import NoAnswer
from carelm.errors import UserError


def template_columns(template: str, key: str) -> list[str]:
    """The columns that a template names, e.g. ["instruction"] for "{instruction}"; raises UserError on a bad one."""
    return [column for _, column in template_pieces(template, key) if column is not None]


def template_pieces(template: str, key: str) -> list[tuple[str, str | None]]:
    """A template as pieces of text, each with the column that follows it, or None; raises UserError on a bad one.

    A column is taken by its whole name, dots, brackets and colons included.
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{key}: {error}; write {{column}} for a column and {{{{ for a brace") from None
    return [(text, None if name is None else name + (form and f":{form}")) for text, name, form, _ in parsed]


def fill(template: str, row: dict[str, Any], source: str, answer: bool = False) -> str:
    pieces, values = template_pieces(template, "template"), {}
    for _, column in pieces:
        if column is None:
            continue
        value = row.get(column)
        if answer and isinstance(value, (list, dict)):
            raise NoAnswer("answer is not text")
        if answer and value is None:
            raise NoAnswer("empty answer")
        values[column] = (
            "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        )
    if answer and values and not any(value.strip() for value in values.values()):
        raise NoAnswer("empty answer")
    return "".join(text + values.get(column, "") for text, column in pieces)
