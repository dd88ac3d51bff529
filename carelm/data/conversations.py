"""Rows that hold one message each (ticket exports, threads of replies) -> rows that hold a conversation."""

import dataclasses
import re
from collections import Counter, defaultdict
from typing import Any

from carelm.data.messages import to_turns
from carelm.data.order import backwards, places
from carelm.data.readers import Rows, series
from carelm.data.report import SplitReport, list_counts, shortened
from carelm.data.values import cell_text, is_empty
from carelm.errors import UserError
from carelm.recipe import Recipe


def join_messages(recipe: Recipe, rows: Rows, report: SplitReport) -> Rows:
    """A split's rows, one message each, as one row a conversation: `text_column` holds its turns, every other column the
    first value that one of its messages has there.

    Messages of one `conversation_column` in one file (or its parts) are a conversation, in the order of `order_column`, or as
    they stand. With `reply_to_column` a message follows the one whose `id_column` it names; where one has several replies,
    each end is a conversation of its own. Messages of one side in a row are one turn, with a blank line between them; one that
    says the same at the same place of the order is there twice, and counts once. What was joined, left out or is not there is
    counted in the report's notes.

    Raises:
        UserError: for a message without a role, an order that is neither number nor date, an id that is there twice, and
            messages that reply to one another in a circle.
    """
    counts: Counter[str] = Counter()
    as_named = dataclasses.replace(recipe, role_key=None, content_key=None)
    turns, roles = [], defaultdict(dict)
    for source, row in rows:
        if is_empty(row.get(recipe.role_column)):
            raise UserError(f"{source}: column '{recipe.role_column}' is empty; say who wrote the message")
        message = {"role": row[recipe.role_column], "content": cell_text(row, recipe.text_column, source) or ""}
        turns += to_turns(as_named, source, [message])[0]
        roles[turns[-1]["role"]][str(row[recipe.role_column]).strip()] = None
    paths = _threads(recipe, rows, counts) if recipe.reply_to_column else _groups(recipe, rows, turns, counts)
    conversations = []
    for path in paths:
        joined: dict[str, Any] = {}
        for i in path:
            joined |= {column: value for column, value in rows[i][1].items() if is_empty(joined.get(column))}
        said = [turns[i] for i in path if turns[i]["content"].strip() or turns[i].get("tool_calls")]
        counts["messages without text"] += len(path) - len(said)
        counts["conversations whose end has no reply, left out"] += {"user", "assistant"} <= {
            t["role"] for t in said
        } and (said[-1]["role"] == "user")
        conversations.append((rows[path[0]][0], joined | {recipe.text_column: _join_sides(said, counts)}))
    found = {what: number for what, number in counts.items() if number}
    report.notes.append(
        f"{len(rows)} messages are {len(conversations)} conversations" + (f"; {list_counts(found)}" if found else "")
    )
    counted = [
        f"{shortened(list(names))} count{'s' * (len(names) == 1)} as {role}" for role, names in sorted(roles.items())
    ]
    report.notes.append("; ".join(counted))
    if not recipe.order_column and not recipe.reply_to_column:
        report.order_doubt = _order_doubt(recipe, rows, paths, [row[recipe.text_column] for _, row in conversations])
        said = "order_column is not set: the messages of a conversation are taken in the order of the file"
        report.notes.append(f"{said}, and {report.order_doubt}" if report.order_doubt else said)
    report.rows, report.unit = len(conversations), "conversation"
    return conversations


def _order_doubt(recipe: Recipe, rows: Rows, groups: list[list[int]], conversations: list[list[dict]]) -> str:
    """What speaks against the file's order, "" for nothing: help desks often export the newest message first."""
    if column := backwards(recipe, rows, groups):
        return f"column '{column}' runs backwards in it: set order_column: {column}"
    spoken = [[turn["role"] for turn in turns if turn["role"] in ("user", "assistant")] for turns in conversations]
    both = [roles for roles in spoken if len({*roles}) == 2]
    if 2 * (number := sum(roles[0] == "assistant" for roles in both)) > len(both):
        return f"{number} of {len(both)} begin with the assistant: is the newest message first?"
    return ""


def _join_sides(turns: list[dict], counts: Counter[str]) -> list[dict]:
    joined: list[dict] = []
    for turn in turns:
        before = joined[-1] if joined else {}
        if "tool_calls" in turn and "tool_calls" in before:  # calls in a row are made at once, as in a list of messages
            joined[-1] = before | {"tool_calls": before["tool_calls"] + turn["tool_calls"]}
        elif turn["role"] == before.get("role") in ("user", "assistant") and "tool_calls" not in {**turn, **before}:
            joined[-1] = before | {"content": f"{before['content']}\n\n{turn['content']}"}
            counts[f"{turn['role']} messages joined to the one before"] += 1
        else:
            joined.append(turn)
    return joined


def _groups(recipe: Recipe, rows: Rows, turns: list[dict], counts: Counter[str]) -> list[list[int]]:
    """The indices of each conversation's messages, in order."""
    groups: dict[tuple[str, str], list[int]] = {}
    for i, (source, row) in enumerate(rows):
        conversation = cell_text(row, recipe.conversation_column, source)
        if conversation is None or not conversation.strip():
            counts["messages without a conversation, left out"] += 1
        else:
            groups.setdefault((series(source), conversation), []).append(i)
    if rows and not groups:
        column, first = recipe.conversation_column, rows[0][0].rpartition(":")[0]
        raise UserError(f"conversation_column: column '{column}' is empty in all rows of {first} and its split")
    times = Counter(name for _, name in groups)
    counts["conversations of one name in several files, kept apart"] = sum(n for n in times.values() if n > 1)
    if not recipe.order_column:
        return list(groups.values())
    place = places(recipe, rows)
    steps = [place[i] - place[k] for group in groups.values() for i, k in zip(group, group[1:])]
    falls = sum(step > 0 for step in steps) > sum(step < 0 for step in steps)  # newest first, also those of one minute
    ordered = []
    for group in groups.values():
        first = {(place[i], repr(turns[i])): i for i in reversed(group)}
        counts["messages that are there twice, left out"] += len(group) - len(first)
        ordered.append(sorted(first.values(), key=lambda i: (place[i], -i if falls else i)))
    firsts = Counter(place[group[0]] for group in ordered)
    starts = [start for start in (0, 1) if 2 * firsts[start] > len(ordered)]
    if starts:  # the column numbers each conversation's messages, so that a number may be missing
        counts["conversations where a number of the order is missing or twice"] = sum(
            [place[i] for i in group] != [starts[0] + n for n in range(len(group))] for group in ordered
        )
    return ordered


def _threads(recipe: Recipe, rows: Rows, counts: Counter[str]) -> list[list[int]]:
    """The indices from the first message to each one that has no reply."""
    by_id: dict[tuple, int] = {}
    keys = []
    for i, (source, row) in enumerate(rows):
        conversation = cell_text(row, recipe.conversation_column, source) if recipe.conversation_column else None
        own, parent = (_id(row, column, source) for column in (recipe.id_column, recipe.reply_to_column))
        keys.append(((conversation, own), (conversation, parent) if parent and parent != own else None))
        if own and by_id.setdefault((conversation, own), i) != i:
            other = rows[by_id[conversation, own]][0]
            raise UserError(f"id_column: {other} and {source} are both called {own!r}; remove one")
    parents = [by_id.get(parent) if parent else None for _, parent in keys]
    counts["replies to a message that is not here"] = sum(
        parent is not None and found is None for (_, parent), found in zip(keys, parents)
    )
    roots: list[int | None] = [None] * len(rows)  # of each message whose way to its first message is known
    for i in range(len(rows)):
        way, at = [], i
        while roots[at] is None and parents[at] is not None and len(way) <= len(rows):
            way.append(at)
            at = parents[at]
        if len(way) > len(rows):
            raise UserError(f"reply_to_column: {rows[i][0]} replies to itself by way of its replies; mend the row")
        root = at if roots[at] is None else roots[at]
        for step in (*way, at):
            roots[step] = root
    ends = sorted(set(range(len(rows))) - set(parents))
    counts["branches, each a conversation of its own"] = len(ends) - len(set(roots))
    paths = []
    for at in ends:
        path = [at]
        while (at := parents[at]) is not None:
            path.append(at)
        paths.append(path[::-1])
    return sorted(paths)


def _id(row: dict[str, Any], column: str, source: str) -> str | None:
    """An id as text; pandas writes a column of whole numbers as 7.0 where a value is missing."""
    return re.sub(r"^(-?\d+)\.0+$", r"\1", (cell_text(row, column, source) or "").strip()) or None
