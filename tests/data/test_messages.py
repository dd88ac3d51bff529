"""Every usual shape of messages, tool calls and tools gives the same turns; what is not used is said."""

import csv
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_rows import MESSAGES, TOOL_TURNS, TURNS, chat, error_of, prepare, turns_of, write_jsonl, write_parquet

from carelm.data import splits
from carelm.data.example import NoAnswer
from carelm.data.report import format_report
from carelm.data.rows import to_example
from carelm.errors import UserError
from carelm.recipe import Recipe


def test_a_conversation_that_the_assistant_begins_and_two_turns_of_one_side_are_counted(tmp_path, make):
    hello, hi, size, yes = (("assistant", "Hello."), ("user", "Hi."), ("user", "Size 38?"), ("assistant", "Yes."))
    lists = [[hello, hi, yes], [hi, size, yes], [hello, hi, size, yes], [hi, yes, size, yes]]
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat(*turns)} for turns in lists])
    notes = splits.make_examples(make(path, **MESSAGES))[1]["train"].notes
    assert notes == [
        "2 rows begin with the assistant (first: rows.jsonl:1): this turn answers nothing, and is read and not learnt",
        "2 rows have two turns of one side in a row (first: rows.jsonl:2): they stay two turns",
    ]


@pytest.mark.parametrize(
    ("messages", "keys"),
    [
        (chat(*TURNS), {}),
        (chat(*TURNS, role="from", content="value", names=("human", "gpt")), {}),
        (chat(*TURNS, role="speaker", content="utterance", names=("USER", "SYSTEM")), {"assistant_roles": ["SYSTEM"]}),
        (chat(*TURNS, role="speaker", content="text", names=("customer", "agent")), {}),
        (
            chat(*TURNS, role="IsCustomer", content="Text", names=(True, False)),
            {"role_key": "IsCustomer", "content_key": "Text", "user_roles": ["true"], "assistant_roles": ["false"]},
        ),
        (json.dumps(chat(*TURNS), ensure_ascii=False), {}),
        ({"role": [role for role, _ in TURNS], "content": [text for _, text in TURNS]}, {}),
        ([{"role": None, "from": role, "content": None, "value": text, "tool_calls": []} for role, text in TURNS], {}),
        ([{"role": role, "content": [{"type": "text", "text": text}]} for role, text in TURNS], {}),
    ],
    ids=["role", "from", "speaker-utterance", "speaker-text", "bool", "json-text", "lists", "keys-with-null", "parts"],
)
@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_every_usual_shape_of_messages_gives_the_same_turns(tmp_path, make, messages, keys, suffix):
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, [{"messages": messages}])
    elif suffix == "parquet":
        write_parquet(path, [{"messages": messages}])
    else:
        file = io.StringIO(newline="")
        text = messages if isinstance(messages, str) else json.dumps(messages)
        csv.writer(file).writerows([["messages"], [text]])
        path.write_bytes(file.getvalue().encode())
    ((prompt, completion),) = turns_of(make(path, **MESSAGES, **keys))
    assert [(m["role"], m["content"]) for m in prompt + completion] == list(TURNS)
    assert len(completion) == 1


def test_trained_turns_says_where_the_completion_begins(tmp_path, make):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat(*TURNS)}])
    for trained_turns, prompt_length in (("last", 3), ("all", 1)):
        ((prompt, completion),) = turns_of(make(path, **MESSAGES, trained_turns=trained_turns))
        assert len(prompt) == prompt_length and len(prompt + completion) == 4


def test_turns_after_the_last_answer_are_left_out(tmp_path, make):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat(*TURNS, ("user", "Thanks"), ("user", "Bye"))}])
    for trained_turns in ("last", "all"):
        ((prompt, completion),) = turns_of(make(path, **MESSAGES, trained_turns=trained_turns))
        assert [(m["role"], m["content"]) for m in prompt + completion] == list(TURNS)


def test_a_greeting_that_opens_a_conversation_is_prompt(tmp_path, make):
    rows = [{"messages": chat(("assistant", "Welcome!"), *TURNS)}, {"messages": chat(("assistant", "Welcome!"))}]
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", rows), **MESSAGES, trained_turns="all", max_empty_share=0.5)
    examples, reports = splits.make_examples(recipe)
    (example,) = examples["train"]
    assert [m["content"] for m in example.prompt] == ["Welcome!", "Hi\r\n{{Name}}"]
    assert [m["role"] for m in example.completion] == ["assistant", "user", "assistant"]
    assert reports["train"].dropped == {"no turn before the answer": 1}


def test_tool_calls_with_null_content_are_answers(tmp_path, make, tokenizer):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": TOOL_TURNS}])
    recipe = make(path, **MESSAGES, trained_turns="all", system_prompt="Not used.")
    ((prompt, completion),) = turns_of(recipe)
    assert [m["role"] for m in prompt] == ["system", "user"] and prompt[0]["content"] == "Use the tools."
    assert completion[0]["content"] == ""
    assert completion[0]["tool_calls"][0]["function"] == {"name": "find_order", "arguments": {"order": "7", "ü": 1}}
    assert completion[1] == {
        "role": "tool",
        "content": '{"status": "sent"}',
        "name": "find_order",
        "tool_call_id": "c1",
    }
    ids, trained = prepare(recipe).train[0]
    assert tokenizer.decode(ids[trained]) == (
        '{"name": "find_order", "arguments": {"order": "7", "ü": 1}}<|eot_id|>It is on its way.<|eot_id|>'
    )


def test_a_call_without_an_answer_yet_is_still_an_answer(tmp_path, make):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": TOOL_TURNS[:4]}])
    ((_, completion),) = turns_of(make(path, **MESSAGES))
    assert [m["role"] for m in completion] == ["assistant"] and completion[0]["tool_calls"]


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([{"who": "user", "content": "a"}], "role_key"),
        ([{"role": "user", "said": "a"}], "content_key"),
        ([{"role": "wizard", "content": "a"}], "'wizard'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}], "'image_url'"),
        ([{"role": "user", "content": {"a": 1}}], "'content'"),
        ([{"role": "user", "content": [{"type": "text", "text": {"value": "a"}}]}], "'content' holds {'value': 'a'}"),
        ('[{"role": "user", "role": "assistant", "content": "a"}]', "the key 'role' stands twice"),
        ([{"role": None, "content": "a"}], "role is empty"),
        ([{"role": "assistant", "content": "a", "weight": 0.5}], "'weight'"),
        ([None], "None"),
        ({"role": ["user"], "content": ["a", "b"]}, "dict"),
        (["hello"], "'hello'"),
        ("hello", "JSON"),
        (7, "int"),
    ],
)
def test_messages_of_an_unknown_shape_are_named_with_the_row(tmp_path, make, messages, named):
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat(*TURNS)}, {"messages": messages}])
    message = error_of(make(path, **MESSAGES))
    assert "rows.jsonl:2" in message and named in message


# Tools


def call(*functions, **message):
    calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": "", "tool_calls": calls, **message}


def conversation(*messages):
    return {"messages": [{"role": "user", "content": "Do it."}, *messages]}


REFUND = {
    "name": "refund",
    "arguments": {"order": "A0", "items": [{"size": 38, "why": {"late": True}}, {"colour": "red"}]},
}
STOCK = {"name": "stock", "arguments": {"id": 1, "shop": {"town": "Ulm"}}}
SAY = {"name": "say", "arguments": {"id": 2.5, "text": "", "to": []}}
NOW = {"name": "now", "arguments": {}}


def as_tool(function):
    kinds = {key: {"type": "string"} for key in function["arguments"]}
    return {"type": "function", "function": {"name": function["name"], "parameters": {"properties": kinds}}}


def test_parquet_and_jsonl_give_the_same_messages_calls_and_tools(tmp_path, make):
    rows = [
        conversation(call(function), {"role": "tool", "name": function["name"], "content": "ok"}, call(NOW, function))
        | {"tools": [as_tool(function)]}
        for function in (
            REFUND,
            STOCK,
            NOW,
            {"name": "stock", "arguments": {"id": 2.5, "of": []}},
            {"name": "say", "arguments": {"text": ""}},
        )
    ]
    parquet, jsonl = (
        splits.make_examples(make(path, **MESSAGES, trained_turns="all"))[0]["train"]
        for path in (write_parquet(tmp_path / "rows.parquet", rows), write_jsonl(tmp_path / "rows.jsonl", rows))
    )
    assert [(e.prompt, e.completion, e.tools) for e in parquet] == [(e.prompt, e.completion, e.tools) for e in jsonl]
    for example, row in zip(parquet, rows):
        assert example.tools == row["tools"]
        assert example.completion[0]["tool_calls"] == row["messages"][1]["tool_calls"]


@pytest.mark.parametrize(
    "message",
    [
        call(STOCK),
        call(STOCK, tool_calls=json.dumps([{"function": STOCK}])),
        call(STOCK, tool_calls={"type": "function", "function": STOCK}),
        call(STOCK, tool_calls=STOCK),
        call(STOCK, tool_calls=[{"name": "stock", "args": STOCK["arguments"]}]),
        call(STOCK, tool_calls=[{"type": "tool_use", "name": "stock", "input": STOCK["arguments"]}]),
        call(STOCK, tool_calls={"type": ["function"], "function": [STOCK]}),
        call({"name": "stock", "arguments": json.dumps(STOCK["arguments"])}),
        call({"name": "stock", "arguments": json.dumps(json.dumps(STOCK["arguments"]))}),
        {"role": "assistant", "content": None, "function_call": STOCK, "tool_calls": []},
        {"role": "assistant", "function_call": {"name": "stock", "arguments": json.dumps(STOCK["arguments"])}},
        {"from": "function_call", "value": json.dumps(STOCK)},
    ],
)
def test_every_shape_of_a_tool_call_is_the_same_call(tmp_path, make, message):
    path = write_jsonl(tmp_path / "rows.jsonl", [conversation(message)])
    ((_, completion),) = turns_of(make(path, **MESSAGES))
    assert completion == [call(STOCK)]


@pytest.mark.parametrize("arguments", [None, "", "null", {}, "{}", [], " "])
def test_a_call_without_arguments_has_an_empty_object(tmp_path, make, arguments):
    rows = [conversation(call({"name": "now", "arguments": arguments})), conversation(call({"name": "soon"}))]
    found = turns_of(make(write_jsonl(tmp_path / "rows.jsonl", rows), **MESSAGES))
    assert [c[0]["tool_calls"][0]["function"]["arguments"] for _, c in found] == [{}, {}]


def test_null_in_arguments_that_are_json_text_is_what_the_call_says(tmp_path, make):
    texts = ['{"reason": null, "price": 1.0}', '{"reason": null}']
    rows = [conversation(call({"name": "refund", "arguments": text})) for text in texts]
    found = turns_of(make(write_jsonl(tmp_path / "rows.jsonl", rows), **MESSAGES))
    assert [json.dumps(c[0]["tool_calls"][0]["function"]["arguments"]) for _, c in found] == texts


@pytest.mark.parametrize(
    ("message", "named"),
    [
        (call(None), "names no function"),
        (call({"name": None, "arguments": {}}), "names no function"),
        (call(STOCK, tool_calls="soon"), "no JSON"),
        (call(STOCK, tool_calls=[7]), "7"),
        (call({"name": "stock", "arguments": "id=1"}), "'stock'"),
        (call({"name": "stock", "arguments": [1]}), "'stock'"),
        (call({"name": "stock", "arguments": "0"}), "'stock'"),
        (call({"name": "stock", "kwargs": {"id": 1}}), "'kwargs'"),
        (call({"name": "stock", "arguments": '{"id": 1, "id": 2}'}), "the key 'id' stands twice"),
        ({"role": "assistant", "function_call": "auto"}, "no JSON"),
        ({"from": "function_call", "value": "stock(1)"}, "no JSON"),
        ({"from": "function_call", "value": ""}, "no call"),
    ],
)
def test_a_tool_call_of_no_known_shape_is_named_with_the_row(tmp_path, make, message, named):
    path = write_jsonl(tmp_path / "rows.jsonl", [conversation(call(NOW)), conversation(message)])
    message = error_of(make(path, **MESSAGES))
    assert message.startswith("rows.jsonl:2: ") and named in message


def test_the_old_function_call_and_its_result_are_a_tool_call_and_a_tools_turn(tmp_path, make):
    turns = [
        {"role": "assistant", "content": None, "function_call": {"name": "stock", "arguments": '{"id": 0}'}},
        {"role": "function", "name": "stock", "content": '{"left": 3}'},
        {"role": "assistant", "content": "Three are left."},
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [conversation(*turns)])
    ((_, completion),) = turns_of(make(path, **MESSAGES, trained_turns="all"))
    assert completion == [call({"name": "stock", "arguments": {"id": 0}}), turns[1] | {"role": "tool"}, turns[2]]


def test_calls_in_a_row_are_one_turn_and_other_names_of_roles_are_known(tmp_path, make):
    turns = [
        ("developer", "Be brief."), ("human", "Both?"), ("function_call", json.dumps(STOCK)), ("tool_call", json.dumps(NOW)),
        ("ipython", "1"), ("observation", "2"), ("gpt", "Done."),
    ]  # fmt: skip
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat(*turns, role="from", content="value")}])
    ((prompt, completion),) = turns_of(make(path, **MESSAGES, trained_turns="all", system_prompt="Not used."))
    assert [m["role"] for m in prompt + completion] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert completion[0] == call(STOCK, NOW)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("tools", [as_tool(STOCK)]),
        ("tools", [as_tool(STOCK)["function"]]),
        ("tools", json.dumps([as_tool(STOCK)])),
        ("tools", [json.dumps(as_tool(STOCK))]),
        ("tools", as_tool(STOCK)),
        ("tools", [{"name": "stock", "input_schema": as_tool(STOCK)["function"]["parameters"]}]),
        ("tools", [{"name": "stock", "parameters": None, "inputSchema": as_tool(STOCK)["function"]["parameters"]}]),
        ("functions", [as_tool(STOCK)["function"]]),
        (
            "my tools",
            [as_tool(STOCK)["function"] | {"parameters": json.dumps(as_tool(STOCK)["function"]["parameters"])}],
        ),
    ],
)
def test_a_rows_tools_come_in_one_shape(tmp_path, make, column, value):
    rows = [conversation(call(STOCK)) | {column: value}, conversation(call(NOW)) | {column: None}]
    keys = {"tools_column": column} if column == "my tools" else {}
    examples, _ = splits.make_examples(make(write_jsonl(tmp_path / "rows.jsonl", rows), **MESSAGES, **keys))
    assert [e.tools for e in examples["train"]] == [[as_tool(STOCK)], None]


def test_a_column_called_tools_that_holds_none_is_named_and_can_be_left_alone(tmp_path, make):
    path = write_jsonl(tmp_path / "rows.jsonl", [conversation(call(NOW)) | {"tools": "hammer, saw"}])
    assert "rows.jsonl:1: column 'tools'" in error_of(make(path, **MESSAGES))
    assert splits.make_examples(make(path, **MESSAGES, tools_column=""))[0]["train"][0].tools is None
    write_jsonl(path, [conversation(call(NOW)) | {"tools": [{"type": "web_search"}]}])
    assert "tools_column" in error_of(make(path, **MESSAGES))


# Other keys


def test_a_turn_of_weight_0_is_prompt_or_carries_no_loss(tmp_path, make):
    answers = ("Bad.", "Good.", "Bad.", "Good.", "Bad.")
    turns = [turn for answer in answers for turn in (("user", "Well?"), ("assistant", answer))]
    for key, no, yes in (("weight", 0, 1), ("train", False, True), ("weight", 0.0, None), ("loss", False, 1.0)):
        messages = [
            m | ({key: no if m["content"] == "Bad." else yes} if m["role"] == "assistant" else {}) for m in chat(*turns)
        ]
        path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": messages}])
        ((prompt, completion),) = turns_of(make(path, **MESSAGES, trained_turns="all"))
        assert prompt == chat(*turns[:3])
        assert completion == [m | ({"train": False} if m["content"] == "Bad." else {}) for m in chat(*turns[3:8])]
        ((prompt, completion),) = turns_of(make(path, **MESSAGES))
        assert (prompt, completion) == (chat(*turns[:7]), chat(turns[7]))


def test_a_row_whose_answers_all_have_weight_0_is_counted(tmp_path, make):
    rows = [{"messages": chat(*TURNS)}, {"messages": [m | {"weight": 0} for m in chat(*TURNS)]}]
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", rows), **MESSAGES, max_empty_share=0.5)
    assert splits.make_examples(recipe)[1]["train"].dropped == {"no trained turn": 1}


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_stays_beside_the_answer(tmp_path, make, key):
    rows = [
        {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2", key: "I count."}]}
    ]
    ((_, completion),) = turns_of(make(write_jsonl(tmp_path / "rows.jsonl", rows), **MESSAGES))
    assert completion == [{"role": "assistant", "content": "2", "reasoning_content": "I count."}]


def test_text_parts_are_joined_and_what_a_tool_returned_may_be_any_value(tmp_path, make):
    parts = [{"type": "text", "text": "Hello."}, {"type": "text", "text": "Size 38?", "image_url": None}]
    found = {"left": 3, "at": [1.0, None], "none": None}
    turns = [{"role": "user", "content": parts}, call(STOCK), {"role": "tool", "content": found},
             {"role": "tool", "content": parts}, {"role": "assistant", "content": 3}]  # fmt: skip
    ((prompt, completion),) = turns_of(make(write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}]), **MESSAGES))
    contents = [m["content"] for m in prompt + completion]
    assert contents == ["Hello.\nSize 38?", "", '{"left": 3, "at": [1, null]}', "Hello.\nSize 38?", "3"]


@pytest.mark.parametrize("nothing", ["", None, " "])
def test_a_system_message_that_says_nothing_leaves_its_place_to_the_recipes(tmp_path, make, nothing):
    turns = chat(("system", nothing), ("user", "Hi"), ("assistant", "Hello."))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}])
    ((prompt, _),) = turns_of(make(path, **MESSAGES, system_prompt="Be kind."))
    assert [m["content"] for m in prompt] == ["Be kind.", "Hi"]


@pytest.mark.parametrize(
    ("found", "text"), [([], "[]"), ({}, "{}"), ([[]], "[[]]"), (None, ""), ("", ""), (False, "false")]
)
def test_what_a_tool_returned_is_said_where_it_found_nothing(tmp_path, make, found, text):
    turns = [*chat(("user", "Stock?")), call(STOCK), {"role": "tool", "content": found}, *chat(("assistant", "None."))]
    ((prompt, _),) = turns_of(make(write_jsonl(tmp_path / "rows.jsonl", [{"messages": turns}]), **MESSAGES))
    assert prompt[-1] == {"role": "tool", "content": text}


def test_an_answer_to_nothing_is_counted(tmp_path, make):
    rows = [
        {"messages": chat(("system", "Be kind."), ("user", nothing), ("assistant", "Hello."))}
        for nothing in (None, " ")
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"messages": chat(*TURNS)}])
    examples, reports = splits.make_examples(make(path, **MESSAGES, max_empty_share=0.9))
    assert len(examples["train"]) == 1 and reports["train"].dropped == {"empty question": 2}


def test_keys_that_are_not_used_are_said_in_one_line_with_their_rows(tmp_path, make):
    rows = [{"messages": [m | {"id": i, "mood": mood} for m in chat(("user", f"{i}?"), ("assistant", "Yes."))], "n": i}
            for i, mood in enumerate(("calm", None))]  # fmt: skip
    rows.append({"messages": [m | {"mood": None, "id": ""} for m in chat(*TURNS)], "n": 3, "system": "Be kind."})
    prepared = prepare(make(write_jsonl(tmp_path / "rows.jsonl", rows), **MESSAGES, id_column="n"))
    (line,) = [line for line in format_report(prepared.report).splitlines() if "not used" in line]
    assert (
        line.strip()
        == "not used: column system (in 1 row), key id of messages (in 2 rows), key mood of messages (in 1 row)"
    )


def test_a_question_that_is_marked_not_to_be_trained_is_as_it_says(tmp_path, make):
    for mark, said in ((False, {}), (0, {}), (True, {"key train of messages": 1})):
        (question, answer) = chat(("user", "Hi"), ("assistant", "Yes."))
        path = write_jsonl(
            tmp_path / "rows.jsonl", [{"messages": [question | {"train": mark}, answer | {"train": True}]}]
        )
        assert splits.make_examples(make(path, **MESSAGES))[1]["train"].unused == said


WORDS = st.sampled_from(["user", "name", "type", "text", "{}", "[1]", '{"a": 1}', "null"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text() | WORDS, inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(
    ["role", "from", "content", "value", "tool_calls", "function_call", "weight", "reasoning", "name", "x"]
)
ROLE = st.sampled_from(["user", "assistant", "tool", "function_call", "system"]) | VALUES
MESSAGE = (
    st.builds(lambda message, role: message | {"role": role}, st.dictionaries(KEYS, VALUES, max_size=4), ROLE) | VALUES
)


@settings(max_examples=400, deadline=None)
@given(messages=st.lists(MESSAGE, max_size=4) | VALUES, tools=VALUES, text=st.booleans())
def test_no_messages_or_tools_whatever_they_hold_end_in_a_traceback(messages, tools, text):
    recipe = Recipe(messages_column="messages", trained_turns="all", training={}, model={})
    row = {"messages": json.dumps(messages) if text else messages, "tools": tools}
    try:
        example = to_example(recipe, "rows.jsonl:1", row)
    except NoAnswer:
        return
    except UserError as error:
        assert str(error).startswith("rows.jsonl:1: ") and "\n" not in str(error)
        return
    json.dumps([example.prompt, example.completion, example.tools], allow_nan=False)
    assert all(isinstance(m["content"], str) for m in example.prompt + example.completion)
