"""Which passages answer a test row: those that have the value of one of its columns, as `gold_passages` names them."""

import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from carelm.data.example import NoAnswer
from carelm.data.rows import to_example
from carelm.data.sources import load_splits
from carelm.data.splits import make_examples
from carelm.data.values import cell_text
from carelm.errors import UserError
from carelm.recipe import Recipe
from carelm.retrieval.passages import Passage


@dataclass
class Asked:
    """A question and what is known of the passages behind it.

    Attributes:
        gold: ids of the passages that answer it.
        also: ids of others that may answer it, which are neither right nor wrong.
        filters: what its rows say of the index's filters.
    """

    id: str
    text: str
    gold: set[str] = field(default_factory=set)
    filters: dict[str, str] = field(default_factory=dict)
    also: set[str] = field(default_factory=set)


def ask(recipe: Recipe, passages: Iterable[Passage]) -> tuple[list[Asked], int]:
    """The test split's questions that have a gold passage, and how many have none. Rows that ask the same are one question,
    whose gold is that of all of them.

    Raises:
        UserError: where the recipe does not say what is gold, there is no test row, or none has a gold passage.
    """
    if not recipe.gold_passages:
        raise UserError(
            "gold_passages: it is empty; write {passage column: test row's column}, whose values are the same where a passage "
            "answers a row: {page: page}, {intent: intent}"
        )
    gold_of = gold_by_row(recipe, passages)
    asked: dict[str, Asked] = {}
    first = ""
    for source, row in _test_rows(recipe):
        wanted, gold = gold_of(source, row)
        first = first or f"{source} has {', '.join(map(repr, wanted))}"
        try:
            example = to_example(recipe, source, row, "test", recipe.reference_columns)
        except NoAnswer:
            continue
        text = next(message["content"] for message in reversed(example.prompt) if message["role"] == "user")
        question = asked.setdefault(text, Asked(example.id, text, filters=_filters(recipe, source, row)))
        question.gold |= gold
    having = [question for question in asked.values() if question.gold]
    if not having:
        names = ", ".join(recipe.gold_passages)
        raise UserError(f"gold_passages: no passage has in '{names}' what a test row has ({first}); mend the key")
    if recipe.max_eval_samples and recipe.max_eval_samples < len(having):
        having = random.Random(recipe.split_seed).sample(having, recipe.max_eval_samples)
    return having, len(asked) - sum(bool(question.gold) for question in asked.values())


def gold_by_row(
    recipe: Recipe, passages: Iterable[Passage]
) -> Callable[[str, dict[str, Any]], tuple[tuple[str, ...], set[str]]]:
    """A function of a row and its source: what it has in the columns that `gold_passages` names, and the ids of the passages
    that have the same."""
    with_value = defaultdict(set)
    for passage in passages:
        with_value[tuple(_value_of(passage, name) for name in recipe.gold_passages)].add(passage.id)

    def gold_of(source: str, row: dict[str, Any]) -> tuple[tuple[str, ...], set[str]]:
        wanted = tuple((cell_text(row, column, source) or "").strip() for column in recipe.gold_passages.values())
        return wanted, with_value.get(wanted, set()) if all(wanted) else set()

    return gold_of


def _test_rows(recipe: Recipe) -> list[tuple[str, dict[str, Any]]]:
    splits, _ = load_splits(recipe)
    if "test" in splits:
        return splits["test"]
    examples, _ = make_examples(recipe)  # a share of the training rows
    held_out = {example.source for example in examples.get("test", [])}
    rows = [pair for of_split in splits.values() for pair in of_split if pair[0] in held_out]
    if not rows:
        raise UserError(
            f"dataset_test_split: {recipe.dataset_name} has no test rows; give a file, or set test_fraction"
        )
    return rows


def _value_of(passage: Passage, name: str) -> str:
    value = passage.columns.get(name, getattr(passage, name, None))
    return "" if value is None else str(value).strip()


def _filters(recipe: Recipe, source: str, row: dict[str, Any]) -> dict[str, str]:
    columns = {"product": recipe.product_column} if recipe.product_column else {}
    columns |= {name: name for name in recipe.filter_columns}
    values = {name: cell_text(row, column, source) for name, column in columns.items()}
    return {name: value.strip() for name, value in values.items() if value}
