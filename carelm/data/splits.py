"""All rows -> examples by split: cleaned, cut where the data names no split, and kept apart."""

import hashlib
import json
import random
from collections import Counter

from carelm.data.example import Example, NoAnswer
from carelm.data.readers import Rows
from carelm.data.report import SplitReport, list_counts
from carelm.data.rows import to_example
from carelm.data.sources import load_splits, reference_columns
from carelm.errors import UserError
from carelm.recipe import Recipe


def make_examples(recipe: Recipe) -> tuple[dict[str, list[Example]], dict[str, SplitReport]]:
    """All splits as examples: answers that are empty, duplicates and questions of two splits are out, and counted.

    Raises:
        UserError: where too many rows have no answer, or a split has none left.
    """
    splits, reports = load_splits(recipe)
    examples: dict[str, list[Example]] = {}
    for split in splits:
        columns = reference_columns(recipe, split, splits)
        examples[split] = _clean(recipe, split, splits[split], columns, reports[split])
        splits[split] = []  # rows need more room than examples
    _cut_splits(recipe, examples, reports)
    _keep_apart(recipe, examples, reports)
    for split, limit in (
        ("train", recipe.max_samples),
        ("validation", recipe.max_eval_samples),
        ("test", recipe.max_eval_samples),
    ):
        if split in examples and limit is not None and limit < len(examples[split]):
            reports[split].dropped["beyond max_samples"] = len(examples[split]) - limit
            chosen = sorted(random.Random(recipe.split_seed).sample(range(len(examples[split])), limit))
            examples[split] = [examples[split][i] for i in chosen]
    if not examples["train"]:
        raise UserError(f"dataset_name: nothing is left to train on ({list_counts(reports['train'].dropped)})")
    return examples, reports


def _clean(recipe: Recipe, split: str, rows: Rows, reference_columns: list[str], report: SplitReport) -> list[Example]:
    kept, seen = [], set()
    dropped: Counter = Counter()
    unused: Counter = Counter()
    without_answer = 0
    for source, row in rows:
        try:
            example = to_example(recipe, source, row, split, reference_columns)
        except NoAnswer as reason:
            dropped[str(reason)] += 1
            without_answer += 1
            report.first_without_answer = (report.first_without_answer + [source])[:3]
            continue
        content = json.dumps([example.prompt, example.completion, example.tools], sort_keys=True, ensure_ascii=False)
        try:
            content.encode()
        except UnicodeEncodeError as error:
            half = content[error.start].encode("unicode_escape").decode()
            raise UserError(f"{source}: the text holds {half}, half of a character; mend the row") from None
        if content in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(content)
            kept.append(example)
            unused.update(example.unused_keys)
    report.dropped, report.unused_keys = dict(dropped), dict(sorted(unused.items()))
    if without_answer > recipe.max_empty_share * len(rows):
        optional = "name the columns that may be empty in optional_columns, " if "empty column" in str(dropped) else ""
        raise UserError(
            f"max_empty_share: {without_answer} of {len(rows)} rows of the {split} split have no answer or an empty column "
            f"({list_counts(dropped)}; {', '.join(report.first_without_answer)}); mend the rows, {optional}or raise "
            "max_empty_share"
        )
    return kept


def _cut_splits(recipe: Recipe, examples: dict[str, list[Example]], reports: dict[str, SplitReport]) -> None:
    """Holds out the splits that the data does not have by name, by a hash of the question: no question on two sides."""
    shares = [("test", recipe.test_fraction), ("validation", recipe.validation_fraction)]
    shares = [(split, share) for split, share in shares if split not in examples and share > 0]
    parts: dict[str, list[Example]] = {"train": [], **{split: [] for split, _ in shares}}
    for example in examples["train"]:
        digest = hashlib.sha256(f"{recipe.split_seed} {example.question}".encode()).digest()
        draw, target = int.from_bytes(digest[:8], "big") / 2**64, "train"
        for split, share in shares:
            if draw < share:
                target = split
                break
            draw -= share
        parts[target].append(example)
    for split, _ in shares:
        examples[split] = parts[split]
        reports[split] = SplitReport(rows=len(parts[split]))
    examples["train"] = parts["train"]
    reports["train"].rows -= sum(len(parts[split]) for split, _ in shares)


def _keep_apart(recipe: Recipe, examples: dict[str, list[Example]], reports: dict[str, SplitReport]) -> None:
    held_out = {e.question for split in ("validation", "test") for e in examples.get(split, [])}
    shared = [e for e in examples["train"] if e.question in held_out]
    reports["train"].first_in_other_split = [f"{e.source} {e.question[:80]}" for e in shared[:3]]
    if shared and not recipe.keep_test_questions:
        reports["train"].dropped["question also in validation or test"] = len(shared)
        examples["train"] = [e for e in examples["train"] if e.question not in held_out]
    elif shared:
        reports["train"].fitted["question also in validation or test, kept"] = len(shared)
