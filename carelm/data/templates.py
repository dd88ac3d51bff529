"""Templates with {columns}, and how a row fills them in."""

from string import Formatter

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


def fill(template: str, values: dict[str, str]) -> str:
    """The template with each column's text in its place."""
    return "".join(text + values.get(column, "") for text, column in template_pieces(template, "template"))
