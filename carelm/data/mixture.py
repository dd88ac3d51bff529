"""Rows of other recipes beside a recipe's own (`also_train`): each mapped by its own recipe, none that is tested on here."""

import json
import random
from collections import defaultdict
from dataclasses import replace

from carelm.data.comparison import Comparison, asked, last_words, without_template
from carelm.data.example import Example
from carelm.data.report import SplitReport
from carelm.data.splits import find_near_duplicates, keep_apart, make_examples
from carelm.errors import UserError
from carelm.recipe import Recipe


def draw_mixed(recipe: Recipe, examples: dict[str, list[Example]]) -> dict[str, tuple[list[Example], SplitReport]]:
    """The rows that `also_train` adds, by the recipe that maps them, with what became of that one's training rows.

    Only its own training split is drawn from, by this recipe's `split_seed`. Questions of this recipe's validation and test are
    out and near-duplicates of them named, as within one recipe and whatever the templates put around them; rows that are here
    already are out too.

    Args:
        examples: this recipe's own, by split.

    Raises:
        UserError: for data that cannot be read, and fewer rows than are asked for.
    """
    mixed: dict[str, tuple[list[Example], SplitReport]] = {}
    if not recipe.mixed:
        return mixed
    # Those beyond max_eval_samples too: a later evaluation may ask them.
    whole = make_examples(replace(recipe, max_eval_samples=None))[0] if recipe.max_eval_samples else examples
    apart = [e for split in ("validation", "test") for e in whole.get(split, [])]
    held_out = {"test": without_template(apart)}
    here = {_content(e) for of_split in examples.values() for e in of_split}
    for name, other in recipe.mixed.items():
        try:
            found, reports = make_examples(other)
        except UserError as error:
            raise UserError(f"also_train: {name}: {error}") from None
        report, across = reports["train"], SplitReport()
        compare = Comparison.of_two(_all(examples), _all(found))
        parts = {"train": without_template(found["train"]), **held_out}
        keep_apart(recipe, parts, {"train": across}, compare, set())
        if not recipe.keep_test_questions:
            parts["train"] = _without_columns(parts["train"], _all(held_out), across)
        find_near_duplicates(recipe, parts, {"train": across}, compare)
        rows = [e for e in parts["train"] if _content(e) not in here]
        if twice := len(parts["train"]) - len(rows):
            across.dropped["there already"] = twice
        number = recipe.also_train[name]
        if isinstance(number, str):  # all, or 3 times
            rows = rows * int(number.removesuffix("times").replace("all", "1"))
        else:
            if number > len(rows):
                raise UserError(
                    f"also_train: {name}: {number} rows are asked for, and {len(rows)} can be trained on; all takes them"
                )
            chosen = sorted(random.Random(recipe.split_seed).sample(range(len(rows)), number))
            across.dropped |= {"not drawn": len(rows) - number} if number < len(rows) else {}
            rows = [rows[i] for i in chosen]
        here.update(map(_content, rows))
        for what, number in across.dropped.items():
            report.dropped[what] = report.dropped.get(what, 0) + number
        report.fitted |= across.fitted
        report.first_in_other_split += across.first_in_other_split
        report.near_duplicates += across.near_duplicates
        report.first_near_duplicates += across.first_near_duplicates
        mixed[name] = rows, report
    return mixed


def _without_columns(rows: list[Example], held_out: list[Example], report: SplitReport) -> list[Example]:
    """The rows whose question is none held out where one of two templates names more columns, such as an intent, or in another
    order."""
    having, by_longest = defaultdict(list), defaultdict(list)
    for texts in filter(None, map(_texts, held_out)):
        by_longest[max(texts, key=len)].append(texts)
        for text in texts:
            having[text].append(texts)

    def is_held_out(own: frozenset[str]) -> bool:
        wider = any(own <= texts for texts in having.get(max(own, key=len, default=""), ()))
        return wider or any(texts <= own for text in own for texts in by_longest.get(text, ()))

    found = [e for e in rows if is_held_out(_texts(e))]
    if found:
        what = "question also in validation or test"
        report.dropped[what] = report.dropped.get(what, 0) + len(found)
        first = [f"{e.source} {last_words(e)}" for e in found]
        report.first_in_other_split = [*report.first_in_other_split, *first][:3]
    gone = set(map(id, found))
    return [e for e in rows if id(e) not in gone]


def _texts(example: Example) -> frozenset[str]:
    return frozenset(text.strip() for text in example.columns or (asked(example),)) - {""}


def _all(examples: dict[str, list[Example]]) -> list[Example]:
    return [e for of_split in examples.values() for e in of_split]


def _content(example: Example) -> str:
    return json.dumps([example.prompt, example.completion, example.tools], sort_keys=True)
