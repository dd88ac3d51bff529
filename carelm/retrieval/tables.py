"""Rows of CSV, JSON and Parquet files as documents: products of a catalogue, entries of a FAQ. Imports no torch."""

from pathlib import Path
from typing import Any

from carelm.data.html_text import plain_text
from carelm.data.readers import read_file
from carelm.data.templates import fill, template_columns
from carelm.data.values import cell_text
from carelm.errors import UserError
from carelm.recipe import Recipe
from carelm.retrieval.content import Document, FileReport, Unreadable, clean, one_line, sections_of

LONGEST_VALUE = (
    1000  # characters of a column that goes with each passage of its row; what is longer is no value to filter by
)


def read_table(path: Path, name: str, recipe: Recipe, report: FileReport) -> list[Document]:
    """A document for each row that says something: `passage_template` filled in, or its columns, one a line.

    Raises:
        Unreadable: for a file that cannot be parsed, and one without a column that the recipe names.
    """
    try:
        read = read_file(path, name)
        rows = [row for of_key in read.by_key.values() for row in of_key]
        report.notes += [f"is read as {read.taken_for}"] if read.taken_for else []
        there = {column for _, row in rows for column in row}
        _check_columns(recipe, there)
        documents = [_document(recipe, source, row, report) for source, row in rows]
    except UserError as error:
        raise Unreadable(str(error).removeprefix("dataset_name: ").removeprefix(f"{path}").lstrip(": ")) from None
    full = [document for document in documents if document.sections]
    report.drop("empty row", len(documents) - len(full))
    if not rows:
        raise Unreadable("has no rows")
    return full


def _check_columns(recipe: Recipe, there: set[str]) -> None:
    named = {"passage_template": template_columns(recipe.passage_template or "", "passage_template"),
             "title_column": [recipe.title_column or ""], "product_column": [recipe.product_column or ""]}  # fmt: skip
    for key, columns in named.items():
        if missing := [column for column in columns if column and column not in there]:
            raise Unreadable(
                f"has no column '{missing[0]}', which {key} names (its columns: {', '.join(sorted(there))[:200]})"
            )


def _document(recipe: Recipe, source: str, row: dict[str, Any], report: FileReport) -> Document:
    values = {column: cell_text(row, column, source) or "" for column in row}
    if recipe.strip_html:
        values = {column: plain_text(value) for column, value in values.items()}
    if recipe.passage_template:
        text = (
            fill(recipe.passage_template, values)
            if any(map(values.get, template_columns(recipe.passage_template, "")))
            else ""
        )
    else:
        text = "\n".join(f"{column}: {value}" for column, value in values.items() if value.strip())
    title, product = (one_line(values.get(column or "")) for column in (recipe.title_column, recipe.product_column))
    columns = {column: value for column, value in values.items() if 0 < len(value) <= LONGEST_VALUE}
    sections = sections_of([([], clean(text), None)], None, report)
    return Document(source, sections, title, product, columns)
