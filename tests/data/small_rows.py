"""What the tests of data share: small files of rows, and what becomes of them."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from carelm.chat.chat import make_chat
from carelm.data import splits
from carelm.errors import UserError
from carelm.training import prepared

MESSAGES = {"messages_column": "messages"}
ODD_TEXTS = [
    "Line one.\r\nLine two.\r\n\r\n1. Three",
    "Your order {{Order Number}} and {x} cost {0}%s.",
    "Größe 38 – ¿sí? 价格 😀 é e\u0301",
    '  spaces before, "quotes", commas, and a tab\t  ',
    "unix\nline ends\n",
]


def write_jsonl(path, rows):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
    return path


def pairs(number, start=0):
    return [{"question": f"Question {i}?", "answer": f"Answer {i}.", "n": i} for i in range(start, start + number)]


def odd_rows():
    return [{"question": f"Question {i}: {text}", "answer": text} for i, text in enumerate(ODD_TEXTS)]


def turns_of(recipe, split="train"):
    examples, _ = splits.make_examples(recipe)
    return [(e.prompt, e.completion) for e in examples[split]]


def error_of(recipe) -> str:
    with pytest.raises(UserError) as caught:
        splits.make_examples(recipe)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def prepare(recipe):
    return prepared.prepare(recipe, make_chat(recipe))


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def chat(*turns, role="role", content="content", names=("user", "assistant")):
    names = dict(zip(("user", "assistant"), names))
    return [{role: names.get(r, r), content: text} for r, text in turns]


TURNS = (("user", "Hi\r\n{{Name}}"), ("assistant", "Hello."), ("user", "Size 38?"), ("assistant", " Größe 38, yes.\n "))


TOOL_TURNS = [
    {"role": "system", "content": "Use the tools."},
    {"role": "user", "content": "Where is order 7?"},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "find_order", "arguments": '{"order": "7", "ü": 1}'}}]},
    {"role": "tool", "tool_call_id": "c1", "name": "find_order", "content": '{"status": "sent"}'},
    {"role": "assistant", "content": "It is on its way."},
]  # fmt: skip
