"""Rows that belong on one side of a split: one question, one id, a conversation and its beginning."""

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from carelm.data.comparison import Comparison, last_words
from carelm.data.example import Example
from carelm.data.readers import series
from carelm.recipe import Recipe


def largest_group(rows: int) -> float:
    """The most rows, of so many, that are held together: more are no conversation, but a greeting or an id that says nothing.

    5 %, or five rows where that is fewer: a conversation of a small file is one, too.
    """
    return max(0.05 * rows, 5)


@dataclass
class Groups:
    """A number in [0, 1) for each row, drawn by split_seed, one for all rows of a group; what was found too large."""

    draws: list[float]
    notes: list[str] = field(default_factory=list)
    loose: set[bytes] = field(default_factory=set)  # beginnings (`Comparison.so_far`) that hold no group together


def draw_groups(recipe: Recipe, examples: list[Example], compare: Comparison) -> Groups:
    """Rows of one question, rows of one id in one file, and a conversation with its beginning, as groups.

    A group is drawn by its shortest question. What would tie more than `largest_group` together ties none, and is reported;
    but one question is on one side, however often it is asked.
    """
    numbers: dict[str, int] = {}
    question_of = [numbers.setdefault(compare.question(e), len(numbers)) for e in examples]
    drawn = []  # for each question what chooses among those of a group, and its draw
    for question in numbers:
        digest = hashlib.sha256(f"{recipe.split_seed} {question}".encode()).digest()
        drawn.append((len(question), digest[8:], int.from_bytes(digest[:8], "big") / 2**64))
    del numbers
    groups, limit = Groups([]), largest_group(len(examples))
    for question, count in Counter(question_of).items():
        if count > limit:
            words = last_words(examples[question_of.index(question)])
            groups.notes.append(f"{count} of {len(examples)} rows ask the same, and are on one side ({words})")

    head = list(range(len(drawn)))  # of each question another one of its group, or itself

    def first(question: int) -> int:
        while head[question] != question:
            head[question] = question = head[head[question]]
        return question

    tied = []
    for (kind, value), rows in _ties(recipe, examples, compare).items():
        if len({question_of[row] for row in rows}) == 1:
            continue
        if len(rows) > limit:
            what = f"have the id {value[1]}" if kind == "id" else f"begin as {examples[rows[0]].source} does"
            groups.notes.append(f"{len(rows)} of {len(examples)} rows {what}: too many to keep on one side")
            groups.loose |= {value} if kind == "beginning" else set()
            continue
        tied.append((kind, value, rows[0]))
        for row in rows:
            head[first(question_of[row])] = first(question_of[rows[0]])
    sizes, members = Counter(first(question) for question in question_of), Counter(map(first, range(len(head))))
    large = {group for group, size in sizes.items() if size > limit and members[group] > 1}
    for group in large:
        source = examples[next(row for row, question in enumerate(question_of) if first(question) == group)].source
        groups.notes.append(
            f"{sizes[group]} of {len(examples)} rows hang together by ids and beginnings, first {source}: too many to keep on "
            "one side"
        )
    groups.loose |= {value for kind, value, row in tied if kind == "beginning" and first(question_of[row]) in large}
    shortest: dict[int, tuple] = {}
    for question, draw in enumerate(drawn):
        if first(question) not in large:
            shortest[first(question)] = min(draw, shortest.get(first(question), draw))
    groups.draws = [shortest.get(first(question), drawn[question])[2] for question in question_of]
    return groups


def _ties(recipe: Recipe, examples: list[Example], compare: Comparison) -> dict[tuple[str, Any], list[int]]:
    """The rows that have one id, and those that one conversation begins (with itself), by what they share."""
    ties: dict[tuple[str, Any], list[int]] = defaultdict(list)
    for row, example in enumerate(examples):
        if recipe.id_column and example.id != example.source:
            ties["id", (series(example.source), example.id)].append(row)
    if compare.have_turns:
        wholes = {list(compare.so_far(example))[-1] for example in examples}
        for row, example in enumerate(examples):
            for digest in compare.so_far(example):
                if digest in wholes:
                    ties["beginning", digest].append(row)
    return {key: rows for key, rows in ties.items() if len(rows) > 1}
