"""Templates with {columns}, and how a row fills them in."""

import re

from carelm.errors import UserError

# A brace that stands for itself ({{, }}), a column by its whole name with whatever signs it has, a brace too many.
_PART = re.compile(r"\{\{|\}\}|\{[^{}]+\}|[{}]")


def template_columns(template: str, key: str) -> list[str]:
    """The columns that a template names, e.g. ["instruction"] for "{instruction}"; raises UserError on a bad one."""
    parts = _PART.findall(template)
    for part in parts:
        if len(part) == 1:
            raise UserError(f"{key}: a single '{part}'; write {{column}} for a column, {{{{ and }}}} for braces")
    return [part[1:-1] for part in parts if len(part) > 2]


def fill(template: str, values: dict[str, str]) -> str:
    """The template with each column's text in its place."""
    return _PART.sub(lambda m: values.get(m[0][1:-1], "") if len(m[0]) > 2 else m[0][0], template)


def around_last_column(template: str) -> tuple[bool, str, str]:
    """Whether another column stands before the template's last one, the text right before that one, and the text behind it."""
    columns = [part for part in _PART.finditer(template) if len(part[0]) > 2]
    before = columns[-2].end() if len(columns) > 1 else 0
    between, behind = template[before : columns[-1].start()], template[columns[-1].end() :]
    return len(columns) > 1, fill(between, {}), fill(behind, {})
