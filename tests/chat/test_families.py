"""What docs/templates.md says of eight families of templates is what is found with small templates that behave like them."""

import copy
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import PROJECT

from carelm.chat.chat import Chat
from carelm.chat.template import settle
from carelm.data.example import Example
from carelm.errors import UserError
from carelm.training.prepared import prepare

TEMPLATES = Path(__file__).parent / "templates"
FAMILIES = {  # name in the table: file, tokens that are special, what ends a turn
    "Llama 3.2": ("llama-3.2", [], "<|eot_id|>"),
    "Qwen3": ("qwen-3", ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "Gemma 3": ("gemma-3", ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "Mistral": ("mistral", ["[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"], "<|eot_id|>"),
    "Phi-4": ("phi-4", ["<|im_start|>", "<|im_sep|>", "<|im_end|>"], "<|im_end|>"),
    "SmolLM2": ("smollm", ["<|im_start|>", "<|im_end|>"], "<|im_end|>"),
    "gpt-oss": (
        "gpt-oss",
        ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"],
        "<|return|>",
    ),
    "DeepSeek-R1": ("deepseek-r1", ["<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"], "<｜end▁of▁sentence｜>"),
}
COLUMNS = ("a system message", "several turns", "tools", "thinking", "`trained_turns: all`")
REASONS = {  # in the words of the table
    "does not write the row's tools": "leaves tools out",
    "does not write 'tool_calls'": "leaves calls out",
    "does not write 'reasoning_content'": "leaves thoughts out",
    "rewrites earlier turns": "rewrites earlier turns",
    "<think>\\n', which it does not write": "asks with an opened thought",
    "refuses this conversation": "the template's own refusal",
}

TOOLS = [{"type": "function", "function": {"name": "find_order", "description": "Finds it.", "parameters": {}}}]
CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "find_order", "arguments": {"number": "K-38"}}}


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "You sell shoes."}
TURNS = [user("Good day."), answer("Hello!"), user("Is 38 there?"), answer("Yes, it is.")]
CALLED = [user("Where is K-38?"), answer("", tool_calls=[CALL])]
RETURNED = [*CALLED, {"role": "tool", "name": "find_order", "tool_call_id": "a1b2c3d4e", "content": '["on its way"]'}]
CONVERSATIONS = {
    "a system message": [([SYSTEM, *TURNS[:2]], None)],
    "several turns": [(TURNS, None)],
    "tools": [(CALLED, TOOLS), ([*RETURNED, answer("It is on its way.")], TOOLS)],
    "thinking": [([TURNS[0], answer("Hello!", reasoning_content="A customer. I greet.")], None)],
    "`trained_turns: all`": [(TURNS, None)],
}


@pytest.fixture
def family(tokenizer):
    """The demo's tokenizer with a family's template and special tokens."""

    def family(name):
        file, special, end = FAMILIES[name]
        own = copy.deepcopy(tokenizer)
        own.add_special_tokens({"additional_special_tokens": special})
        own.chat_template = settle((TEMPLATES / f"{file}.jinja").read_text(encoding="utf-8"), file)
        return own, end

    return family


def check(chat, end, messages, tools):
    """The conversation is rendered right, or the words of the table for why it is refused."""
    tokenizer = chat.tokenizer
    example = Example(messages[:1], messages[1:], id="1", category=None, source="rows.jsonl:1", tools=tools)
    if chat.trained_turns == "last":
        example = Example(messages[:-1], messages[-1:], id="1", category=None, source="rows.jsonl:1", tools=tools)
    try:
        (rendered,), _ = chat.render([example])
    except UserError as error:
        return "refused: " + next(words for reason, words in REASONS.items() if reason in str(error))
    ids, trained = rendered.input_ids.tolist(), rendered.trained
    starts = np.flatnonzero(trained & ~np.concatenate([[False], trained[:-1]])).tolist()
    ends = (np.flatnonzero(trained & ~np.concatenate([trained[1:], [False]])) + 1).tolist()
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    answers = answers if chat.trained_turns == "all" else answers[-1:]
    assert len(starts) == len(answers)
    for i, start, stop in zip(answers, starts, ends):
        assert ids[:start] == chat.prompt_ids(messages[:i], tools=tools)
        said = tokenizer.decode(ids[start:stop])
        if messages[i].get("tool_calls"):
            assert "find_order" in said and "K-38" in said
            assert ids[stop - 1] in chat.end_of_turn_ids
        else:
            assert said.endswith(messages[i]["content"] + end) and ids[stop - 1] == chat.end_of_turn_id
        assert messages[i].get("reasoning_content", "") in said
        # What is read from the model's answer is what it is compared with.
        assert chat.spoken(ids[start:stop]) == chat.answer_text(messages[:i], messages[i], tools=tools)
        if messages[i]["content"]:
            assert chat.spoken(ids[start:stop]) == messages[i]["content"]
    served = tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
    assert ids == served[: len(ids)]
    return "right"


def test_a_system_message_of_the_familys_own_is_said_with_the_rows_that_have_none(family, tmp_path, make):
    own = {name: Chat(family(name)[0], max_length=4096).own_system for name in FAMILIES}
    assert {name: text for name, text in own.items() if text} == {
        "SmolLM2": "You are a small assistant.", "Mistral": "Today is 2024-07-26.",
    }  # fmt: skip
    rows = [[SYSTEM, *TURNS[:2]], TURNS[2:], [user("Open?"), answer("Yes.")]]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in rows))
    recipe, chat = make(path, messages_column="messages"), Chat(family("SmolLM2")[0], max_length=4096)
    (note,) = [n for n in prepare(recipe, chat).report["train"]["notes"] if "system message" in n]
    assert note.startswith("2 rows have no system message, and the chat template writes its own there: 'You are")
    assert "system_prompt sets yours" in note
    recipe = make(path, messages_column="messages", system_prompt="You sell shoes.")
    assert not [n for n in prepare(recipe, chat).report["train"]["notes"] if "system message" in n]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_table_in_the_docs_is_what_is_found(family, name):
    tokenizer, end = family(name)
    found = []
    for column in COLUMNS:
        chat = Chat(tokenizer, trained_turns="all" if column.startswith("`") else "last", max_length=4096)
        cells = [check(chat, end, *conversation) for conversation in CONVERSATIONS[column]]
        found.append(next((cell for cell in cells if cell != "right"), "right"))
    table = (PROJECT / "docs/templates.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {re.escape(name)} \|(.*)\|$", table, flags=re.M)
    assert row and [cell.strip() for cell in row[1].split("|")] == found
