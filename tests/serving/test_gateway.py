"""The API gives what the evaluation measures, in OpenAI's shapes, and names what it does not take."""

import asyncio
import dataclasses
import json
import re
import runpy
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import PROJECT
from drawn import make_adapter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from served import ASKED, CHAT, KEYS, ask, make_client, make_gateway

from carelm.chat.chat import Chat
from carelm.chat.tokenizer import load_tokenizer
from carelm.evaluation import candidates
from carelm.models.batcher import Batcher
from carelm.models.generation import generate_all
from carelm.recipe import FEEDBACK
from carelm.serving.feedback import Feedback
from carelm.serving.gateway import Gateway
from carelm.serving.requests import ChatRequest
from carelm.serving.security import AGAIN_SECONDS
from carelm.talk.speaker import Speaker


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    return make_gateway(make_adapter(tmp_path_factory.mktemp("run"), *KEYS), "base", "adapter")


@pytest.fixture(scope="module")
def client(gateway):
    return make_client(gateway)


def evaluated(gateway, model, messages):
    """What the evaluation answers, by a model of its own in memory."""
    speaker = Speaker(gateway.recipe, candidates.find(gateway.recipe, model))
    speaker.load()
    prompt, found = speaker.chat.fit_prompt(messages, speaker.limit), {}
    generate_all(speaker.model, speaker.chat, [prompt.ids], speaker.decoding, device=speaker.device, max_batch_tokens=1,
                 done=found.__setitem__)  # fmt: skip
    return prompt.ids, found[0]


def chunks_of(reply):
    lines = [line.removeprefix("data: ") for line in reply.text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"], lines[-1]


def test_models_are_listed_and_the_server_is_well(client):
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list" and [m["id"] for m in listed["data"]] == ["base", "adapter"]
    assert client.get("/v1/models/base").json() == listed["data"][0]
    assert (listed["data"][0]["max_model_len"], listed["data"][0]["max_prompt_len"]) == (1024, 96)
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"} and client.head("/health").status_code == 200


@pytest.mark.parametrize("model", ["base", "adapter"])
def test_an_answer_is_the_evaluations_token_for_token(gateway, client, model):
    prompt, answer = evaluated(gateway, model, ASKED)
    body = ask(client, model=model, return_token_ids=True).json()
    choice = body["choices"][0]
    assert body["prompt_token_ids"] == prompt and body["model"] == model and body["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": answer.text}
    assert choice["finish_reason"] == answer.finish_reason
    assert len(choice["token_ids"]) == answer.new_tokens
    assert body["usage"] == {"prompt_tokens": len(prompt), "completion_tokens": answer.new_tokens,
                             "total_tokens": len(prompt) + answer.new_tokens}  # fmt: skip


def test_a_stream_is_the_whole_answer_in_pieces(client):
    whole = ask(client).json()
    reply = ask(client, stream=True, stream_options={"include_usage": True})
    assert reply.headers["content-type"].startswith("text/event-stream")
    chunks, last = chunks_of(reply)
    assert last == "[DONE]" and chunks[-1]["usage"] == whole["usage"] and chunks[-1]["choices"] == []
    choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    pieces = [choice["delta"].get("content", "") for choice in choices]
    assert "".join(pieces) == whole["choices"][0]["message"]["content"] and sum(map(bool, pieces)) > 5
    assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + [whole["choices"][0]["finish_reason"]]


@pytest.mark.parametrize(
    ("param", "change"),
    [
        ("n", {"n": 2}),
        ("messages", {"messages": []}),
        ("messages", {"messages": None}),
        ("messages", {"messages": [{"role": "system", "content": "Be brief."}]}),
        ("messages", {"messages": [*ASKED, {"role": "assistant", "content": "On its way"}]}),
        ("messages.0", {"messages": [{"role": "user", "content": " "}]}),
        ("messages.0.role", {"messages": [{"role": "robot", "content": "x"}]}),
        ("messages.0.content", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
        ("temperature", {"temperature": 2.5}),
        ("temperature", {"temperature": "0.5"}),
        ("top_p", {"top_p": 0}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 10**6}),
        ("max_completion_tokens", {"max_tokens": 4, "max_completion_tokens": 5}),
        ("seed", {"seed": 2**70}),
        ("stop", {"stop": ["a", ""]}),
        ("stop", {"stop": "a" * 257}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("tools", {"tools": [{"type": "function"}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("response_format", {"response_format": {"type": "json_object"}}),
        ("logprobs", {"logprobs": True}),
        ("grammar", {"grammar": "x"}),
        ("?", {"<img onerror>": 1}),
    ],
)
def test_what_cannot_be_served_is_a_400_that_names_the_field(client, param, change):
    reply = client.post(CHAT, json={"model": "base", "messages": ASKED, **change})
    error = reply.json()["error"]
    assert reply.status_code == 400 and error["param"] == param, error
    assert error["type"] == "invalid_request_error" and re.match(re.escape(param) + ": .", error["message"])


def test_a_number_of_too_many_digits_and_a_list_that_is_too_long_are_called_so(client):
    tool = {"type": "function", "function": {"name": "f", "parameters": {"most": 0}}}
    body = json.dumps({"model": "base", "messages": ASKED, "tools": [tool]}).replace(
        '"most": 0', f'"most": {"1" * 4301}'
    )
    assert "a number has more than the 4,300 digits" in client.post(CHAT, content=body).json()["error"]["message"]
    assert ask(client, ASKED * 1001).json()["error"]["message"] == "messages: at most 1000 of them"
    assert ask(client, parallel_tool_calls=False).status_code == 200  # without tools there is nothing to call


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"\xff", b'{"model": "\\ud800"}', b"[" * 100_000])
def test_what_is_no_request_is_a_400(client, body):
    reply = client.post(CHAT, content=body)
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"


def test_an_unknown_model_is_a_404_that_lists_the_known_ones(client):
    reply = ask(client, model="gpt-4")
    assert reply.status_code == 404 and reply.json()["error"]["code"] == "model_not_found"
    assert "base, adapter" in reply.json()["error"]["message"] and "gpt-4" not in reply.text


def test_a_body_is_counted_as_it_comes(gateway, client):
    piece = b"x" * 2**16
    reply = client.post(CHAT, content=(piece for _ in range(160)))  # chunked: no length is said
    assert reply.status_code == 413 and str(gateway.recipe.max_body_bytes) in reply.json()["error"]["message"]


def test_a_full_queue_says_when_to_come_again(gateway, client, monkeypatch):
    monkeypatch.setattr(gateway, "in_flight", gateway.recipe.max_queue)
    reply = ask(client)
    assert reply.status_code == 429 and reply.headers["retry-after"] == str(AGAIN_SECONDS)
    monkeypatch.undo()
    assert ask(client).status_code == 200 and gateway.in_flight == 0


def test_stop_texts_end_an_answer_and_are_no_part_of_it(client):
    whole = ask(client).json()["choices"][0]["message"]["content"]
    first, stop, _ = whole.partition(whole[10:14])
    for stream in (False, True):
        reply = ask(client, stop=[stop, "never"], stream=stream)
        if stream:
            choices = [chunk["choices"][0] for chunk in chunks_of(reply)[0]]
            text = "".join(choice["delta"].get("content", "") for choice in choices)
        else:
            choices = reply.json()["choices"]
            text = choices[0]["message"]["content"]
        assert (text, choices[-1]["finish_reason"]) == (first, "stop")


def test_a_seed_draws_the_same_answer_again_and_none_draws_another(client):
    def drawn(**more):
        return ask(client, temperature=1.5, **more).json()["choices"][0]["message"]["content"]

    assert drawn(seed=7) == drawn(seed=7) != drawn(seed=8)
    assert len({drawn() for _ in range(4)}) > 1


def test_what_a_request_says_of_drawing_and_length_counts(client):
    greedy = ask(client).json()["choices"][0]["message"]["content"]
    for more in ({"temperature": 1.5, "top_p": 1e-6}, {"temperature": 1e-9}):  # the likeliest token alone
        assert ask(client, seed=7, **more).json()["choices"][0]["message"]["content"] == greedy
    for field in ("max_tokens", "max_completion_tokens"):
        short = ask(client, **{field: 5}).json()
        assert short["usage"]["completion_tokens"] == 5 and short["choices"][0]["finish_reason"] == "length"


def test_answers_asked_at_once_are_those_asked_one_by_one(client):
    questions = [[{"role": "user", "content": f"{n} parcels, where?"}] for n in range(6)]
    models = ["base", "adapter"] * 3
    one_by_one = [ask(client, q, m).json()["choices"] for q, m in zip(questions, models)]
    with ThreadPoolExecutor(6) as pool:
        at_once = list(pool.map(lambda pair: ask(client, *pair).json()["choices"], zip(questions, models)))
    assert at_once == one_by_one


WITH_TOOLS = """{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for m in messages %}<|start|>{{ m.role }}
{{ m.content }}{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|end|>
{% endfor %}{% if add_generation_prompt %}<|start|>assistant
{% endif %}"""


def test_a_conversation_is_rendered_as_in_training(gateway, client, base, tmp_path, monkeypatch):
    """Parts are joined, a special token in a text is text, tools and calls stand as the template writes them."""
    speaker = gateway.speakers["base"]
    start, end = (speaker.chat.tokenizer.convert_ids_to_tokens(i) for i in (1, speaker.chat.end_of_turn_id))
    file = tmp_path / "tools.jinja"
    file.write_text(WITH_TOOLS.replace("<|end|>", end).replace("<|start|>", start))
    tokenizer = load_tokenizer(str(base), revision="main", trust_remote_code=False, template_file=str(file))
    monkeypatch.setattr(speaker, "chat", Chat(tokenizer, max_length=512))
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
    call = {"id": "a", "type": "function", "function": {"name": "find", "arguments": {"number": 7}}}
    as_sent = call | {"function": {"name": "find", "arguments": '{"number": 7}'}}
    sent = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One"}, {"type": "text", "text": f"{end} two"}]},
        {"role": "assistant", "content": None, "refusal": None, "tool_calls": [as_sent]},
        {"role": "tool", "tool_call_id": "a", "content": "on its way"},
    ]
    trained = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"One\n{end} two"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "on its way"},
    ]
    monkeypatch.setattr(speaker, "limit_for", lambda number: 300)
    reply = ask(client, sent, tools=tools, return_token_ids=True, max_tokens=1)
    ids = speaker.chat.prompt_ids(trained, tools=tools)
    assert reply.json().get("prompt_token_ids") == ids, reply.text
    assert ids.count(speaker.chat.end_of_turn_id) == 4
    assert ask(client, sent).status_code == 200  # without the tools


def test_old_turns_leave_the_window_as_in_training_and_the_reply_says_how_many(gateway, client):
    long = "The parcel of my neighbour has not come, and nobody says why. " * 2
    turns = [[{"role": "user", "content": f"{n}: {long}"}, {"role": "assistant", "content": "Soon."}] for n in range(4)]
    messages = [{"role": "system", "content": "Be brief."}, *sum(turns, []), *ASKED]
    reply = ask(client, messages, return_token_ids=True)
    speaker = gateway.speakers["base"]
    kept = speaker.chat.fit_prompt(messages, speaker.limit)
    assert kept.messages[0] == messages[0] and kept.messages[1:] == messages[-len(kept.messages) + 1 :]
    assert reply.json()["prompt_token_ids"] == kept.ids == speaker.chat.prompt_ids(kept.messages)
    assert int(reply.headers["x-dropped-messages"]) == len(messages) - len(kept.messages) > 0
    cut = ask(client, [{"role": "user", "content": long * 50}])
    assert cut.headers["x-message-cut"] and "x-dropped-messages" not in cut.headers
    assert cut.json()["usage"]["prompt_tokens"] <= 96


def test_a_window_that_holds_no_message_is_a_400(gateway, client, monkeypatch):
    monkeypatch.setattr(gateway.speakers["base"], "limit", 3)
    error = ask(client).json()["error"]
    assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")


def test_templates_tags_system_message_and_masks_are_those_of_training(gateway, monkeypatch, make, tmp_path):
    recipe = make(
        tmp_path, prompt_template="[{priority}] {question}", completion_template="{answer}", tag_column="question",
        urgent_words=["urgent"], system_prompt="Priority {priority}.", mask_personal_data=True, strip_html=True,
    )  # fmt: skip
    served = Gateway(recipe, list(gateway.speakers.values()), gateway.engine)
    sent = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "<p>Urgent: write to anna&#64;example.org</p>"},
        {"role": "assistant", "content": "To<br>anna@example.org?"},
        {"role": "user", "content": "Yes"},
    ]
    limit = gateway.speakers["base"].limit
    trained = [
        {"role": "system", "content": "Priority HIGH."},
        {"role": "user", "content": "[HIGH] Urgent: write to [EMAIL]"},
        {"role": "assistant", "content": "To\n[EMAIL]?"},
        {"role": "user", "content": "[NORMAL] Yes"},
    ]
    ids = gateway.speakers["base"].chat.fit_prompt(trained, limit).ids
    assert ask(make_client(served), sent, return_token_ids=True).json()["prompt_token_ids"] == ids


def test_a_template_of_several_columns_takes_a_message_of_json_and_says_how(
    gateway, make, tmp_path, monkeypatch, capsys
):
    recipe = make(tmp_path, prompt_template="{topic}: {question}", completion_template="{answer}")
    client = make_client(Gateway(recipe, list(gateway.speakers.values()), gateway.engine))
    assert client.get("/v1/models").json()["data"][0]["columns"] == ["topic", "question"]
    error = ask(client).json()["error"]
    content = json.loads("{" + error["message"].split(" is sent as ")[1] + "}")["content"]
    assert error["param"] == "messages" and json.loads(content) == {"topic": "...", "question": "..."}
    assert ask(client, [{"role": "user", "content": content}]).status_code == 200
    for columns, said in (
        ({"topic": "x"}, "question is missing"),
        ({"topic": 5, "question": "x"}, "topic is no text; write it in quotes"),
        ({"topic": "x", "question": "x", "secret": "x"}, "prompt_template has no place for 1 of the columns"),
    ):
        error = ask(client, [{"role": "user", "content": json.dumps(columns)}]).json()["error"]
        assert error["message"].startswith(f"messages: {said}") and "secret" not in error["message"]
    error = ask(client, [{"role": "user", "content": {"topic": "Refund", "question": "When?"}}]).json()["error"]
    assert error["message"].startswith("messages.0.content: it is text") and '"{\\"column' in error["message"]

    monkeypatch.chdir(PROJECT)
    runpy.run_path("serve/run.py")["say_address"](recipe, "http://127.0.0.1:8000", ["base"], None)
    printed = shlex.split(capsys.readouterr().err.split("try: ")[1])
    assert client.post(CHAT, content=printed[-1]).status_code == 200  # the line that is printed works as it stands


def test_a_server_without_a_shop_needs_nothing_of_the_extra_retrieval():
    code = (
        "import runpy, sys; runpy.run_path('serve/run.py'); import carelm.serving.gateway; "
        "print({'lancedb', 'sentence_transformers', 'pypdfium2', 'docx'} & sys.modules.keys())"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert shown.stdout.strip() == "set()", shown.stderr


def test_a_max_tokens_that_is_too_large_is_told_the_one_that_leaves_the_window_whole(gateway, client):
    speaker = gateway.speakers["adapter"]
    assert (
        speaker.positions == 1024 and "window: 96 tokens of a conversation are read (max_length, as" in speaker.window()
    )
    recipe = dataclasses.replace(gateway.recipe, training=gateway.recipe.training | {"max_length": 200})
    assert "are read (max_length; trained with 96)" in Speaker(recipe, candidates.find(recipe, "adapter")).window()
    for number in (1024, 1020):
        error = ask(client, model="adapter", max_tokens=number).json()["error"]
        assert (
            error["code"] == "context_length_exceeded" and "with 928 or less the whole window of 96" in error["message"]
        )
    reply = ask(
        client, [{"role": "user", "content": "word " * 200}], "adapter", max_tokens=928, stop=["e", "o", "a", " "]
    )
    assert reply.status_code == 200 and reply.json()["usage"]["prompt_tokens"] > 90


def test_no_request_sets_more_memory_aside_than_a_batch_may_have(gateway):
    for most, positions in ((200, 200), (64, 96 + 24)):  # the recipe's own window stays
        small = make_gateway(dataclasses.replace(gateway.recipe, max_batch_tokens=most), "base")
        client = make_client(small)
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == positions
        assert ask(client, max_tokens=1000).json()["error"]["code"] == "context_length_exceeded"
        assert ask(client, max_tokens=24).status_code == 200
        asyncio.run(small.engine.close())


def test_tools_for_a_template_without_them_and_a_wrong_method_are_named(client):
    tools = [{"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}]
    error = ask(client, tools=tools).json()["error"]
    assert (error["param"], error["code"]) == ("tools", "chat_template") and error["message"].startswith("tools: ")
    reply = client.get(CHAT)
    assert reply.status_code == 405 and reply.json()["error"]["message"] == "this route is asked by POST"


def test_an_engine_that_breaks_in_mid_answer_ends_it_with_an_error_and_the_next_one_works(
    gateway, client, monkeypatch, capsys
):
    steps, step = iter(range(100)), Batcher.step
    broken, well = (gateway.metrics.requests.labels(CHAT, status)._value.get() for status in (503, 200))

    def breaks(batcher):
        if next(steps) == 5:
            raise RuntimeError("secret text")
        return step(batcher)

    monkeypatch.setattr(Batcher, "step", breaks)
    reply = ask(client, stream=True)
    chunks, last = chunks_of(reply)
    assert last != "[DONE]" and chunks[-1]["error"]["type"] == "engine_error"
    assert sum("content" in chunk["choices"][0]["delta"] for chunk in chunks[:-1]) > 2
    said = capsys.readouterr().err
    assert "RuntimeError" in said and "secret" not in said and "secret" not in reply.text
    counted = gateway.metrics.requests.labels
    assert (counted(CHAT, 503)._value.get(), counted(CHAT, 200)._value.get()) == (
        broken + 1,
        well,
    )  # it is counted once
    assert ask(client).json()["choices"][0]["message"]["content"]
    steps = iter([5])
    failed = ask(client)
    assert failed.status_code == 503 and failed.json()["error"]["code"] == "engine_error"
    assert gateway.in_flight == 0


def test_an_answer_that_takes_too_long_is_ended(gateway, client, monkeypatch):
    monkeypatch.setattr(gateway.recipe, "answer_timeout", 0.15)
    monkeypatch.setattr(Batcher, "step", lambda batcher: time.sleep(0.05) or [])
    reply = ask(client)
    assert reply.status_code == 503 and reply.json()["error"]["code"] == "timeout"


def test_what_the_server_says_and_counts_holds_no_text(client, capsys):
    ask(client, [{"role": "user", "content": "Platypus?"}])
    counted = client.get("/metrics").text
    said = capsys.readouterr().err
    assert re.search(r"^carelm: \S+ \S+ chatcmpl-\w+: base, answered: \d+ \+ \d+ tokens, first after", said, re.M)
    assert "latypus" not in said + counted
    for name in (
        "requests_total",
        "prompt_tokens_total",
        "answer_tokens_total",
        "first_token_seconds_count",
        "answer_seconds_count",
        "queue",
    ):
        assert re.search(rf"^carelm_{name}\S* [\d.]+$", counted, re.M), name


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(-1, 1)
    | st.text(max_size=8)
    | st.sampled_from(["user", "a"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "type", "x"]), inner)
    ),
    max_leaves=6,
)
fields = st.sampled_from([*ChatRequest.model_fields, "user", "fnord"])
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool"]), "content": st.text(max_size=40) | values},
        optional={"tool_calls": values, "name": values},
    ),
    max_size=4,
)


quietly = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True, max_examples=80
)
SECRET = "Zq7secretq7Z"  # in every body: no error says it
more_fields = st.dictionaries(fields, values, max_size=4)
with_secret = messages.map(lambda found: [*found, {"role": "user", "content": SECRET}])


def is_said_well(reply, *well):
    assert reply.status_code in (*well, 400, 404), reply.text
    if reply.status_code not in well:
        assert reply.json()["error"]["type"] == "invalid_request_error" and SECRET not in reply.text


@quietly
@given(with_secret, more_fields)
def test_no_body_ends_in_a_500_and_no_error_says_what_was_sent(client, messages, more):
    body = {"model": "base", "messages": messages, "max_tokens": 1, **more, "stream": False}
    is_said_well(client.post(CHAT, json=body), 200)


@quietly
@given(with_secret, more_fields, st.booleans())
def test_no_stream_ends_without_an_end_or_an_error(client, messages, more, usage):
    options = {"stream_options": {"include_usage": usage}} if usage else {}
    reply = client.post(
        CHAT, json={"model": "base", "messages": messages, "max_tokens": 2, **options, **more, "stream": True}
    )
    is_said_well(reply, 200)
    if reply.status_code == 200:
        chunks, last = chunks_of(reply)
        assert last == "[DONE]" and not any("error" in chunk for chunk in chunks)


@quietly
@given(with_secret, st.dictionaries(st.sampled_from([*Feedback.model_fields, "fnord"]), values, max_size=3))
def test_no_feedback_ends_in_a_500_and_what_is_kept_is_a_row(gateway, client, messages, more):
    file = gateway.recipe.output_dir / FEEDBACK
    file.unlink(missing_ok=True)
    reply = client.post("/v1/feedback", json={"model": "base", "messages": messages, "answer": SECRET, **more})
    is_said_well(reply, 201)
    assert file.exists() == (reply.status_code == 201)
    if file.exists():
        (row,) = map(json.loads, file.read_text().splitlines())
        assert row["messages"][-1]["role"] == "assistant" and row["mark"] in ("good", "bad", None)
