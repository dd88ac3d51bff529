"""A row -> an example."""

from collections.abc import Sequence
from typing import Any

from carelm.data.example import Example, NoAnswer
from carelm.data.messages import split_turns, to_turns
from carelm.data.templates import fill
from carelm.data.tools import to_tools
from carelm.recipe import Recipe


def to_example(
    recipe: Recipe, source: str, row: dict[str, Any], split: str = "train", reference_columns: Sequence[str] = ()
) -> Example:
    """One row as an example; rows of the test split may have several references instead of a completion.

    Raises:
        NoAnswer: for a row whose answer is empty, not text or not there.
        UserError: for a message of an unknown shape or role.
    """
    references = [text for c in reference_columns if isinstance(text := row.get(c), str) and text.strip()]
    instead = reference_columns and split == "test"
    if instead and not references:
        raise NoAnswer("no reference")
    unused: set[str] = set()
    if recipe.messages_column:
        turns, unused = to_turns(recipe, source, row.get(recipe.messages_column))
        prompt, completion = split_turns(turns, recipe.trained_turns)
    else:
        answer = references[0] if instead else fill(recipe.completion_template, row, source, answer=True)
        if not answer.strip():
            raise NoAnswer("empty answer")
        prompt = [{"role": "user", "content": fill(recipe.prompt_template, row, source)}]
        completion = [{"role": "assistant", "content": answer}]
    if recipe.system_prompt and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": fill(recipe.system_prompt, row, source)}, *prompt]
    category = row.get(recipe.category_column) if recipe.category_column else None
    return Example(
        prompt=prompt,
        completion=completion,
        id=str(row[recipe.id_column]) if recipe.id_column and row.get(recipe.id_column) is not None else source,
        category=None if category is None else str(category),
        source=source,
        references=tuple(references),
        tools=_tools(recipe, source, row),
        unused_keys=frozenset(unused),
    )


def _tools(recipe: Recipe, source: str, row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools of `tools_column`; beside messages also those of a column with OpenAI's name, `tools` or `functions`."""
    columns = ["tools", "functions"] if recipe.messages_column else []
    if recipe.tools_column is not None:
        columns = [recipe.tools_column]
    return next((tools for column in columns if (tools := to_tools(source, column, row.get(column)))), None)
