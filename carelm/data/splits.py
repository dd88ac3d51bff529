"""All rows -> examples by split: cleaned, cut where the data names no split, and kept apart."""

import hashlib
import json
import random
from collections import Counter
from itertools import chain

from carelm.data.comparison import Comparison, first_words, last_words
from carelm.data.example import Example, NoAnswer, SameAnswers
from carelm.data.groups import draw_groups, largest_group
from carelm.data.masking import PersonalCount
from carelm.data.messages import UnknownRole, unknown_roles
from carelm.data.near_duplicates import NearQuestions
from carelm.data.readers import Rows
from carelm.data.report import SplitReport, list_counts, number_of
from carelm.data.rows import to_example, used_columns
from carelm.data.sources import load_splits, reference_columns
from carelm.data.values import is_empty
from carelm.errors import UserError
from carelm.recipe import Recipe

SHORT = 12  # characters of an answer that says little where several rows have it


def make_examples(recipe: Recipe) -> tuple[dict[str, list[Example]], dict[str, SplitReport]]:
    """All splits as examples: answers that are empty, duplicates and questions of two splits are out, and counted.

    Raises:
        UserError: where too many rows have no answer, or a split has none left.
    """
    splits, reports = load_splits(recipe)
    examples: dict[str, list[Example]] = {}
    for split in splits:
        columns = reference_columns(recipe, split, splits)
        try:
            examples[split] = _clean(recipe, split, splits[split], columns, reports[split])
        except UnknownRole:
            raise unknown_roles(recipe, chain(*splits.values())) from None
        splits[split] = []  # rows need more room than examples
    compare = Comparison(e for of_split in examples.values() for e in of_split)
    loose = _cut_splits(recipe, examples, reports, compare)
    keep_apart(recipe, examples, reports, compare, loose)
    find_near_duplicates(recipe, examples, reports, compare)
    for split in ("train", "validation", "test"):
        key = "max_samples" if split == "train" else "max_eval_samples"
        limit = getattr(recipe, key)
        if split in examples and limit is not None and limit < len(examples[split]):
            reports[split].dropped[f"beyond {key}"] = len(examples[split]) - limit
            chosen = sorted(random.Random(recipe.split_seed).sample(range(len(examples[split])), limit))
            examples[split] = [examples[split][i] for i in chosen]
    if not examples["train"]:
        held_out = sum(len(examples[s]) for s in examples if "held out of train" in reports[s].notes)
        drawn = f", {held_out} held out" if held_out else ""
        way = "; set validation_fraction: 0 and test_fraction: 0" if held_out else ""
        train = reports["train"]
        raise UserError(
            f"dataset_name: nothing is left to train on ({list_counts(train.dropped, train.first_dropped)}{drawn}){way}"
        )
    return examples, reports


def _clean(recipe: Recipe, split: str, rows: Rows, reference_columns: list[str], report: SplitReport) -> list[Example]:
    kept, seen = [], set()
    dropped: Counter = Counter()
    unused: Counter = Counter()
    used = used_columns(recipe)
    personal = PersonalCount(recipe)
    without_answer = 0
    for source, row in rows:
        personal.add(source, row)
        try:
            example = to_example(recipe, source, row, split, reference_columns)
        except SameAnswers as reason:
            dropped[str(reason)] += 1
            report.first_dropped.setdefault(str(reason), source)
            continue
        except NoAnswer as reason:
            dropped[str(reason)] += 1
            without_answer += 1
            report.first_dropped.setdefault(str(reason), source)
            continue
        parts = [example.prompt, example.completion, example.tools, example.references, example.rejected]
        content = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        try:
            digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
        except UnicodeEncodeError as error:
            half = content[error.start].encode("unicode_escape").decode()
            raise UserError(f"{source}: the text holds {half}, half of a character; mend the row") from None
        if digest in seen:
            dropped["duplicate"] += 1
            report.first_dropped.setdefault("duplicate", source)
        else:
            seen.add(digest)
            kept.append(example)
            unused.update(example.unused)
            unused.update(
                f"column {column}" for column, value in row.items() if column not in used and not is_empty(value)
            )
    report.dropped = dict(dropped)
    report.personal_data = personal.describe()
    report.unused = dict(sorted(unused.items()))
    report.notes += _odd_turns(kept, report.unit) + _short_answers(recipe, kept)
    if rows and dropped[str(SameAnswers())] == len(rows):
        key = "rejected_template" if recipe.rejected_template else "rejected_column"
        raise UserError(
            f"{key}: in all {number_of(len(rows), 'row')} of the {split} split the two answers are the same (first: "
            f"{rows[0][0]}); name the column with the worse one"
        )
    if without_answer > recipe.max_empty_share * len(rows):
        doubt = f"the file's order counts, and {report.order_doubt}; else " if report.order_doubt else ""
        optional = "name the columns that may be empty in optional_columns, " if "empty column" in str(dropped) else ""
        raise UserError(
            f"max_empty_share: {without_answer} of {len(rows)} rows of the {split} split have no answer or an empty column "
            f"({list_counts(dropped, report.first_dropped)}); {doubt}mend the rows, {optional}or raise "
            "max_empty_share"
        )
    return kept


def _odd_turns(examples: list[Example], unit: str) -> list[str]:
    """What is done with conversations that the assistant begins, and with two turns of one side in a row."""
    begun, twice = [], []
    for example in examples:
        roles = [turn["role"] for turn in (*example.prompt, *example.completion) if turn["role"] != "system"]
        begun += [example.source] * (roles[0] == "assistant")
        twice += [example.source] * any(a == b in ("user", "assistant") for a, b in zip(roles, roles[1:]))
    notes = []
    if begun:
        what = f"{number_of(len(begun), unit)} begin{'s' * (len(begun) == 1)} with the assistant (first: {begun[0]})"
        notes.append(f"{what}: this turn answers nothing, and is read and not learnt")
    if twice:
        what = f"{number_of(len(twice), unit)} {'has' if len(twice) == 1 else 'have'} two turns of one side in a row"
        notes.append(f"{what} (first: {twice[0]}): they stay two turns")
    return notes


def _short_answers(recipe: Recipe, examples: list[Example]) -> list[str]:
    """How many answers are a word that says little, such as "ok"; none where labels or most answers are as short."""
    texts = [e.completion[-1]["content"].strip() for e in examples if not e.completion[-1].get("tool_calls")]
    counts = Counter(text.casefold() for text in texts if len(text) <= SHORT)
    short = {text: n for text, n in counts.items() if n > 1 or not any(map(str.isalnum, text))}
    number = sum(short.values())
    if recipe.labels or not number or 2 * number > len(examples):
        return []
    most = max(short, key=short.__getitem__)
    first = next(e.source for e in examples if e.completion[-1]["content"].strip().casefold() == most)
    what = f"{number} answers are" if number > 1 else "1 answer is"
    return [
        f"{what} as short as {most!r} ({number_of(short[most], 'time')}, first: {first}): the model learns to say so"
    ]


def _cut_splits(
    recipe: Recipe, examples: dict[str, list[Example]], reports: dict[str, SplitReport], compare: Comparison
) -> set[bytes]:
    """Holds out the splits that the data does not have by name; what belongs together is on one side.

    Returns the beginnings of conversations that are too common to keep together.
    """
    shares = [("test", recipe.test_fraction), ("validation", recipe.validation_fraction)]
    shares = [(split, share) for split, share in shares if split not in examples and share > 0]
    if not shares:
        return set()
    groups = draw_groups(recipe, examples["train"], compare)
    reports["train"].notes += groups.notes[:5]
    if len(groups.notes) > 5:
        reports["train"].notes.append(f"and {len(groups.notes) - 5} more groups of rows that are not kept on one side")
    parts: dict[str, list[Example]] = {"train": [], **{split: [] for split, _ in shares}}
    for example, draw in zip(examples["train"], groups.draws):
        target = "train"
        for split, share in shares:
            if draw < share:
                target = split
                break
            draw -= share
        parts[target].append(example)
    for split, _ in shares:
        examples[split] = parts[split]
        reports[split] = SplitReport(unit=reports["train"].unit, rows=len(parts[split]), notes=["held out of train"])
    examples["train"] = parts["train"]
    held_out = sum(len(parts[split]) for split, _ in shares)
    reports["train"].rows -= held_out
    if held_out:
        reports["train"].notes.insert(
            0,
            f"less {number_of(held_out, reports['train'].unit)} held out for {' and '.join(s for s, _ in reversed(shares))}",
        )
    return groups.loose


def keep_apart(
    recipe: Recipe,
    examples: dict[str, list[Example]],
    reports: dict[str, SplitReport],
    compare: Comparison,
    loose: set[bytes],
) -> None:
    """Takes out of train what also stands in validation or test: a question, a conversation or its beginning."""
    held_out = [e for split in ("validation", "test") for e in examples.get(split, [])]
    questions = {compare.question(e) for e in held_out}
    wholes: set[bytes] = set()
    beginnings: set[bytes] = set()
    for so_far in map(compare.so_far, held_out if compare.have_turns else []):
        *before, whole = so_far
        wholes.add(whole)
        beginnings.update(before)
    asked, ties = set(), {}
    for row, example in enumerate(examples["train"]):
        if compare.question(example) in questions:
            asked.add(row)
        elif compare.have_turns:
            *before, whole = compare.so_far(example)
            if shared := [d for d in before if d in wholes] + [whole] * (whole in beginnings):
                ties[row] = shared
    limit = largest_group(sum(map(len, examples.values())))
    counts = Counter(digest for shared in ties.values() for digest in shared)
    loose = loose | {digest for digest, count in counts.items() if count > limit}
    continued = {row for row, shared in ties.items() if not loose.issuperset(shared)}
    if passed := len(ties) - len(continued):
        reports["train"].notes.append(
            f"{passed} rows share a beginning with validation or test that is too common to take them out"
        )
    report, found = reports["train"], sorted(asked | continued)
    report.first_in_other_split = [f"{e.source} {last_words(e)}" for e in (examples["train"][row] for row in found[:3])]
    for rows, what in (
        (asked, "question also in validation or test"),
        (continued, "conversation also in validation or test"),
    ):
        if rows and not recipe.keep_test_questions:
            report.dropped[what] = len(rows)
        elif rows:
            report.fitted[f"{what}, kept"] = len(rows)
    if not recipe.keep_test_questions:
        examples["train"] = [e for row, e in enumerate(examples["train"]) if row not in asked and row not in continued]


def find_near_duplicates(
    recipe: Recipe, examples: dict[str, list[Example]], reports: dict[str, SplitReport], compare: Comparison
) -> None:
    """Names the rows of train whose question is nearly one of validation or test, and takes them out on demand."""
    held_out = [e for split in ("validation", "test") for e in examples.get(split, [])]
    if not held_out:
        return
    index, report, found = NearQuestions(held_out, compare.text), reports["train"], set()
    for row, example in enumerate(examples["train"]):
        if match := index.find(example):
            found.add(row)
            if len(found) <= 3:
                report.first_near_duplicates.append(
                    f"{example.source} and {match[0].source} ({match[1]:.2f} alike): {first_words(compare.text(example))!r}"
                )
    report.near_duplicates = len(found)
    if recipe.drop_near_duplicates and found:
        report.dropped["near-duplicates of validation or test"] = len(found)
        examples["train"] = [e for row, e in enumerate(examples["train"]) if row not in found]
