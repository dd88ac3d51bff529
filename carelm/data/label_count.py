"""Whether a recipe's `labels` fit the expected answers: counted before training, as the evaluation will read them."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from carelm.data.labels import folded, parse_label
from carelm.data.report import SplitReport, shortened
from carelm.data.templates import around_last_column
from carelm.errors import UserError
from carelm.recipe import Recipe

FEW = 5  # answers without a label that may be most of a small split by chance
LONGEST = 60  # characters of a text that may be a label, and of an example that is shown


def count_labels(recipe: Recipe, answers: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """How a split's expected answers, each with its file:row, hold the recipe's labels.

    Returns `answers`, how many they are; `counts` of each label; `unlisted`, how often a short text that the list lacks stands
    in a label's place; `without`, how many hold none; `first_unlisted` and `first_without`, where the first of these stands;
    `rows`, how many rows they are of, and `last_without`, in how many of these the last answer holds none.
    """
    between, behind = around_last_column(recipe.completion_template)[1:] if recipe.completion_template else ("", "")
    mark, end = between.strip(), behind.strip()
    known = {_plain(label) for label in recipe.labels}
    counts, unlisted = Counter[str](), Counter[str]()
    found = {"answers": 0, "without": 0, "first_without": "", "first_unlisted": {}}
    last_lacks = dict[str, bool]()
    for source, text in answers:
        found["answers"] += 1
        label = parse_label(text, recipe.labels)
        last_lacks[source] = label is None
        if label is None:
            found["without"] += 1
            found["first_without"] = found["first_without"] or f"{source} {text[-LONGEST:].strip()!r}"
        else:
            counts[label] += 1
        place = text.removesuffix(end).rpartition(mark)[2] if mark else text.removesuffix(end)
        if len(place := place.strip()) <= LONGEST and place and _plain(place) not in known:
            unlisted[place] += 1
            found["first_unlisted"].setdefault(place, source)
    # In free sentences ("Yes, we can.") a short text is no label of its own.
    if sum(unlisted.values()) - found["without"] > found["answers"] / 2:
        unlisted.clear()
        found["first_unlisted"].clear()
    rows = {"rows": len(last_lacks), "last_without": sum(last_lacks.values())}
    return found | rows | {"counts": dict(counts), "unlisted": dict(unlisted)}


def _plain(text: str) -> str:
    return " ".join(folded(text).split()).strip(" .!?*`\"'")


def do_not_fit(split: str, without: int, answers: int) -> bool:
    """Whether a split's answers lack the labels for another reason than a few odd rows; a test split needs one that has."""
    return without > answers / 2 and (without >= FEW or split == "test" and without == answers)


def label_sentences(recipe: Recipe, reports: dict[str, SplitReport]) -> list[str]:
    """What the splits' counts say of `labels`, one line each: texts that are none of the list, labels that never occur, answers
    with none.

    Raises:
        UserError: where more than `max_empty_share` of all answers hold no label, or most of a split's (`do_not_fit`).
    """
    counted = {split: report.labels for split, report in reports.items() if report.labels.get("answers")}
    number, without = (sum(found[key] for found in counted.values()) for key in ("answers", "without"))
    unlisted = sum((Counter(found["unlisted"]) for found in counted.values()), Counter())
    first = {text: source for found in reversed(counted.values()) for text, source in found["first_unlisted"].items()}
    texts = [f"{text!r} ({times}, first: {first[text]})" for text, times in unlisted.most_common()]
    example = next((found["first_without"] for found in counted.values() if found["without"]), "")
    worst = [found for split, found in counted.items() if do_not_fit(split, found["without"], found["answers"])]
    if worst or without > recipe.max_empty_share * number:
        refused = worst[:1] or list(counted.values())
        if worst:
            without, number, example = (worst[0][key] for key in ("without", "answers", "first_without"))
        there = f"; such answers end in {shortened(texts, 4)}" if texts else ""
        remedy = "list the labels as the data writes them"
        remedy += "" if worst else ", take these rows out with row_filter, or raise max_empty_share"
        rows, lacking = (sum(found[key] for found in refused) for key in ("rows", "last_without"))
        if rows < number and lacking <= recipe.max_empty_share * rows:
            there, remedy = "", "the last answers of conversations do: set trained_turns: last"
        raise UserError(
            f"labels: {without} of {number} expected answers hold none of {shortened(recipe.labels)} (first: {example}){there}"
            f"; {remedy}"
        )
    counts = sum((Counter(found["counts"]) for found in counted.values()), Counter())
    never = [label for label in recipe.labels if not counts[label]]
    sentences = []
    if texts:
        sentences.append(f"in the answers and not in labels: {shortened(texts)}")
    if never:
        sentences.append(f"in labels and in no answer: {shortened(never)}")
    if without:
        sentences.append(
            f"{without} of {number} answers hold no label (first: {example}): trained on, and left out of the evaluation"
        )
    return sentences
