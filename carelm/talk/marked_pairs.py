"""What people marked and edited on the server's page, as pairs of answers. Imports no torch."""

import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from carelm.data.comparison import Comparison
from carelm.data.example import Example
from carelm.data.readers import read_file
from carelm.errors import UserError


def pairs_of(file: Path, held_out: Sequence[Example]) -> tuple[list[dict[str, Any]], Counter[str]]:
    """The pairs of a file of marks (carelm.serving.feedback) as rows, and how many conversations give none, by reason.

    Each answer that was marked good makes a pair with each bad one to the same conversation; an edited answer makes one with
    its draft. Of texts that were marked both ways neither counts.

    Args:
        held_out: validation and test rows; what they ask is not learnt.

    Raises:
        UserError: for a file that is not there or holds other rows.
    """
    if not file.exists():
        raise UserError(
            f"--feedback: there is no {file}; people write it on the page of serve/run.py, or name another file"
        )
    said: dict[str, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    for source, row in itertools.chain(*read_file(file, file.name).by_key.values()):
        messages = row.get("messages")
        if not (isinstance(messages, list) and messages and {"mark", "model"} <= row.keys()):
            raise UserError(
                f"--feedback: {source} is no mark of an answer; name a {file.name} as serve/run.py writes it"
            )
        said[json.dumps([_bare(messages[:-1]), row.get("tools")], sort_keys=True)].append((source, row))
    pairs, without = [], Counter[str]()
    tested = {_asked(example.prompt, example.tools) for example in held_out}
    for of_one in said.values():
        rows = [row for _, row in of_one]
        prompt, tools = _bare(rows[0]["messages"][:-1]), rows[0].get("tools")
        if _asked(prompt, tools) in tested:
            without["asked in validation or test"] += 1
            continue
        texts = {mark: dict.fromkeys(_text(row) for row in rows if row["mark"] == mark) for mark in ("good", "bad")}
        both = texts["good"].keys() & texts["bad"].keys()
        found = [(_text(row), row["draft"]) for row in rows if row.get("draft")]
        found += itertools.product(*([t for t in texts[mark] if t not in both] for mark in ("good", "bad")))
        found = [(a, b) for a, b in dict.fromkeys(found) if a.strip() != b.strip()]
        if not found:
            without["marked both ways" if both else "no good answer beside a bad one, and none edited"] += 1
        for number, (chosen, rejected) in enumerate(found, 1):
            row = {
                "id": f"{of_one[0][0]}/{number}",
                "category": None,
                "prompt": prompt,
                "chosen": chosen,
                "rejected": rejected,
                "chosen_by": "people",
            }
            pairs.append(row | ({"tools": tools} if tools else {}))
    return pairs, without


def _bare(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without what says which of them is trained."""
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


def _text(row: dict[str, Any]) -> str:
    return row["messages"][-1]["content"]


def _asked(prompt: list[dict[str, Any]], tools: list | None) -> str:
    """What a conversation asks, without its system message."""
    example = Example(
        [m for m in prompt if m["role"] != "system"], [{"role": "assistant", "content": ""}], "", None, "", tools=tools
    )
    return Comparison([example]).question(example)
