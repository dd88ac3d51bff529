"""The API gives what the evaluation measures, in OpenAI's shapes, and names what it does not take."""

import json
import re

import pytest
from drawn import make_adapter
from starlette.testclient import TestClient

from carelm.evaluation import candidates
from carelm.models.generation import generate_all
from carelm.serving import gateway as rooms
from carelm.serving.engine import BatcherEngine
from carelm.serving.gateway import Gateway
from carelm.talk.speaker import Speaker

KEYS = ["--max_new_tokens", "24", "--max_length", "96", "--load_in_4bit", "false"]
ASKED = [{"role": "user", "content": "Where is my order?"}]
CHAT = "/v1/chat/completions"


def make_gateway(recipe, *names):
    speakers = [Speaker(recipe, candidates.find(recipe, name)) for name in names]
    return Gateway(recipe, speakers, BatcherEngine(recipe, speakers))


def make_client(gateway, key=None):
    return TestClient(gateway.app(key), base_url="http://127.0.0.1", raise_server_exceptions=False)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    return make_gateway(make_adapter(tmp_path_factory.mktemp("run"), *KEYS), "base", "adapter")


@pytest.fixture(scope="module")
def client(gateway):
    return make_client(gateway)


def ask(client, messages=ASKED, model="base", **more):
    return client.post(CHAT, json={"model": model, "messages": messages, **more})


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
    assert client.get("/v1/models/other").status_code == 404
    assert client.get("/health").json() == {"status": "ok"}


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
    assert reply.status_code == 429 and reply.headers["retry-after"] == str(rooms.AGAIN_SECONDS)
    monkeypatch.undo()
    assert ask(client).status_code == 200 and gateway.in_flight == 0
