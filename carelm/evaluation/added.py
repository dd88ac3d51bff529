"""A column that a model fills in where rows lack it, such as an explanation or a paraphrase."""

from collections import Counter
from dataclasses import replace
from typing import Any

from carelm.data.readers import Rows
from carelm.data.sources import load_splits
from carelm.data.templates import fill, template_columns
from carelm.data.values import cell_text, plain
from carelm.errors import UserError
from carelm.evaluation.draws import Lines
from carelm.evaluation.questions import Question
from carelm.ranks import say
from carelm.recipe import Recipe


def load_rows(recipe: Recipe, ask: str) -> dict[str, Rows]:
    """The recipe's rows by split; of their columns those have to be there that `ask` names, and not those of its own templates,
    one of which is to be filled in.

    Raises:
        UserError: for data that cannot be read, and a column that is not there.
    """
    ways = dict.fromkeys(("messages_column", "text_column", "role_column", "conversation_column", "order_column",
                          "reply_to_column", "system_prompt", "category_column", "tag_column", "tools_column",
                          "rejected_template", "prompt_column", "rejected_column"))  # fmt: skip
    bare = replace(recipe, **ways, prompt_template=ask, completion_template=ask, reference_columns=[], overlap_columns=[],
                   predicted_columns={}, optional_columns=[])  # fmt: skip
    rows = load_splits(bare)[0]
    if "test" not in rows and recipe.test_fraction:
        say(
            f"{recipe.dataset_name} has no test split: rows that training will hold out to test on are filled in too; give it "
            "one where the column is part of an answer"
        )
    return rows


def ask_for(ask: str, column: str, rows: Rows) -> tuple[list[Question], Counter[str]]:
    """A question for each row that lacks the column, by its place (file:row); rows with nothing to ask of are counted."""
    questions, without = [], Counter[str]()
    for source, row in rows:
        if (cell_text(row, column, source) or "").strip():
            continue
        values = {name: cell_text(row, name, source) or "" for name in template_columns(ask, "--ask")}
        if empty := [name for name, value in values.items() if not value.strip()]:
            without[f"empty column '{empty[0]}'"] += 1
            continue
        asked = [{"role": "user", "content": fill(ask, values)}]
        questions.append(Question(source, source, "none", asked, references=[]))
    return questions, without


def fill_in(column: str, rows: Rows, answers: Lines, model: str) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The rows as JSON has them, with the column and, in COLUMN_source, who wrote it: data, or `model`; null for nobody. An
    answer that is empty or was cut off is left out, and counted."""
    by_source, counts, filled = {line["id"]: line for line in answers}, Counter[str](), []
    for source, row in rows:
        row = {key: plain(value, f"{source}: column '{key}'") for key, value in row.items()}
        own, line = (cell_text(row, column, source) or "").strip(), by_source.get(source)
        whole = line and line["finish_reason"] == "stop" and line["prediction"].strip()
        if line and not whole:
            counts["answer empty or cut off"] += 1
        filled.append(
            row | {column: own or whole or None, source_of(column): "data" if own else model if whole else None}
        )
    return filled, counts


def source_of(column: str) -> str:
    """The column beside it that says who wrote it."""
    return f"{column}_source"


def check(column: str, rows: Rows) -> None:
    """Raises UserError where no row lacks the column, or the rows have one of the name of its source."""
    if any(source_of(column) in row for _, row in rows):
        raise UserError(f"--add: the rows have a column {source_of(column)} already; rename it, or add another column")
    if all((cell_text(row, column, source) or "").strip() for source, row in rows):
        raise UserError(f"--add: every row has the column {column}; nothing is to be added")
