"""A row -> an example."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from carelm.data.example import Example, NoAnswer, SameAnswers
from carelm.data.masking import clean, clean_turns
from carelm.data.messages import row_turns, said, split_turns
from carelm.data.tags import used_tags
from carelm.data.templates import fill, template_columns
from carelm.data.tools import to_tools
from carelm.data.values import cell_text
from carelm.recipe import Recipe


def to_example(
    recipe: Recipe, source: str, row: dict[str, Any], split: str = "train", reference_columns: Sequence[str] = ()
) -> Example:
    """One row as an example; rows of the test split may have several references instead of a completion.

    Where a row is one message, `row` is what `join_messages` makes of all rows of its conversation.

    Raises:
        NoAnswer: for a row whose answer is empty, not text or not there, and for an empty column of a template, unless it is
            one of `optional_columns`.
        UserError: for a message of an unknown shape or role, and for a value that cannot be text.
    """
    if split == "test" and recipe.predicted_columns:
        recipe = _with_optional(recipe, recipe.predicted_columns)
    is_pair = recipe.objective == "preferences" and split != "test"  # a test compares answers with the better one
    references = [text for c in reference_columns if (text := _reference(recipe, source, row, c)).strip()]
    instead = reference_columns and split == "test"
    if instead and not references:
        raise NoAnswer("no reference")
    unused: set[str] = set()
    rejected = None
    if recipe.text_column:
        prompt, completion = split_turns(clean_turns(recipe, row[recipe.text_column]), recipe.trained_turns)
    elif recipe.messages_column:
        turns, left = row_turns(recipe, source, row, recipe.messages_column)
        unused = {f"key {key} of messages" for key in left}
        prompt, completion = split_turns(clean_turns(recipe, turns), recipe.trained_turns)
        if is_pair:
            turns, _ = row_turns(recipe, source, row, recipe.rejected_column)
            rejected = _rejected_turns(clean_turns(recipe, turns), prompt)
    else:
        answer = references[0] if instead else _answer(recipe, source, row)
        question = _fill(recipe, "prompt_template", source, row)
        if not question.strip():
            raise NoAnswer("empty question")
        prompt = [{"role": "user", "content": question}]
        completion = [{"role": "assistant", "content": answer}]
        if is_pair:
            rejected = [{"role": "assistant", "content": _answer(recipe, source, row, "rejected_template")}]
    if rejected and [*map(said, rejected)] == [*map(said, completion)]:
        raise SameAnswers
    has_place = prompt[0]["role"] == "system"  # which may be empty: exports fill it in for every row
    if recipe.system_prompt and not (has_place and prompt[0]["content"].strip()):
        system = _fill(recipe, "system_prompt", source, row)
        prompt = [{"role": "system", "content": system}, *prompt[has_place:]] if system.strip() else prompt
    id_column = recipe.conversation_column or recipe.id_column
    columns = _columns(recipe, source, row)
    return Example(
        prompt=prompt,
        completion=completion,
        id=(cell_text(row, id_column, source) if id_column else None) or source,
        category=cell_text(row, recipe.category_column, source, recipe.labels) if recipe.category_column else None,
        source=source,
        references=tuple(references),
        compared=tuple(_text(recipe, source, row, column, labels=()) for column in recipe.overlap_columns),
        tools=_tools(recipe, source, row),
        columns=columns,
        words="\n".join(columns)
        if recipe.prompt_template and (recipe.tag_column or recipe.predicted_columns)
        else None,
        row=row if recipe.predicted_columns else None,
        unused=frozenset(unused),
        rejected=rejected,
    )


def _rejected_turns(turns: list[dict], prompt: list[dict]) -> list[dict]:
    """The worse answer, which must stand behind the prompt of the better one."""
    try:
        before, rejected = split_turns(turns, "last")
    except NoAnswer as reason:
        raise NoAnswer(f"rejected: {reason}") from None
    if before != prompt:
        raise NoAnswer("the two answers have different prompts")
    return rejected


def question_of(recipe: Recipe, source: str, row: dict[str, Any], values: dict[str, str] | None = None) -> str:
    """The question that the recipe's template makes of a row, with these values in place of its columns'; they may be empty.

    Raises:
        NoAnswer: where another column is empty or not there.
    """
    values = values or {}
    return _fill(_with_optional(recipe, values), "prompt_template", source, row | values)


def _with_optional(recipe: Recipe, columns: Iterable[str]) -> Recipe:
    return replace(recipe, optional_columns=[*recipe.optional_columns, *columns])


def _columns(recipe: Recipe, source: str, row: dict[str, Any]) -> tuple[str, ...]:
    """The columns of the question that a customer gives: with other tags or predictions, or none, it is the same question in
    the same split."""
    columns = template_columns(recipe.prompt_template or "", "prompt_template")
    columns = [column for column in columns if column not in (*used_tags(recipe), *recipe.predicted_columns)]
    return tuple(_text(recipe, source, row, column, recipe.labels) for column in columns)


def _answer(recipe: Recipe, source: str, row: dict[str, Any], key: str = "completion_template") -> str:
    columns, which = template_columns(getattr(recipe, key), key), "rejected " * (key == "rejected_template")
    if any(isinstance(row.get(column), (list, dict)) for column in columns):
        raise NoAnswer(f"{which}answer is not text")
    if not any((cell_text(row, column, source, recipe.labels) or "").strip() for column in columns):
        raise NoAnswer(f"empty {which}answer")
    return _fill(recipe, key, source, row)


def _reference(recipe: Recipe, source: str, row: dict[str, Any], column: str) -> str:
    """The column's text; where `completion_template` names one of `reference_columns`, the template with it in that place."""
    text = _text(recipe, source, row, column, recipe.labels)
    columns = template_columns(recipe.completion_template or "", "completion_template")
    named = next((c for c in columns if c in recipe.reference_columns), None)
    if named is None or not text.strip():
        return text
    return _fill(recipe, "completion_template", source, row | {named: row[column]})


def _fill(recipe: Recipe, key: str, source: str, row: dict[str, Any]) -> str:
    """The template of this key with the row's columns."""
    values = {}
    for column in template_columns(getattr(recipe, key), key):
        values[column] = _text(recipe, source, row, column, recipe.labels)
        if not values[column].strip() and column not in recipe.optional_columns:
            raise NoAnswer(f"empty column '{column}'")
    return fill(getattr(recipe, key), values)


def _text(recipe: Recipe, source: str, row: dict[str, Any], column: str, labels: Sequence[str]) -> str:
    """A column's text for a prompt, an answer or a comparison, with what the recipe masks in it."""
    return clean(recipe, cell_text(row, column, source, labels) or "", column)


def _tools(recipe: Recipe, source: str, row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The tools of `tools_column`; beside messages also those of a column with OpenAI's name, `tools` or `functions`."""
    for column in _tools_columns(recipe):
        if tools := to_tools(source, column, _cell(row, column, source)):
            return tools
    return None


def _tools_columns(recipe: Recipe) -> list[str]:
    if recipe.tools_column is not None:
        return [recipe.tools_column]
    return ["tools", "functions"] if recipe.messages_column else []


def _cell(row: dict[str, Any], column: str, source: str) -> Any:
    """A value of any kind; of text, what `cell_text` makes of it."""
    return cell_text(row, column, source) if isinstance(row.get(column), str) else row.get(column)


def used_columns(recipe: Recipe) -> set[str]:
    """The columns that the recipe names; what else a row holds is not read, such as a system message beside its messages."""
    used = {recipe.messages_column, recipe.text_column, recipe.role_column, recipe.conversation_column}
    used |= {recipe.order_column, recipe.reply_to_column, recipe.category_column, recipe.id_column, recipe.tag_column}
    used |= {*_tools_columns(recipe), *used_tags(recipe), *(recipe.row_filter or {})}
    used |= {*recipe.reference_columns, *recipe.overlap_columns, recipe.prompt_column, recipe.rejected_column}
    for key in ("system_prompt", "prompt_template", "completion_template", "rejected_template"):
        used |= set(template_columns(getattr(recipe, key) or "", key))
    return used - {None}
