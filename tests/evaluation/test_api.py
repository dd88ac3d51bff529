"""A model behind an endpoint as a candidate: asked like the others, counted by its own usage, and lost with nothing lost."""

import json
import runpy
import sys

import pytest
from launching import PROJECT
from small_endpoint import Endpoint, completion

from carelm.errors import UserError
from carelm.evaluation import api
from carelm.evaluation import endpoint as client
from carelm.evaluation.pace import Pace
from carelm.evaluation.questions import Question
from carelm.evaluation.results import _cautions
from carelm.recipe_file import load_recipe
from carelm.training.stops import HangWatch

SECRET = "sk-of-a-test-1234567890"
QUESTIONS = [Question(f"q{i}", f"c{i}", "any", [{"role": "system", "content": "Be kind."},
                      {"role": "user", "content": f"Where is order {i}?"}], [f"Order {i} is here."])
             for i in range(6)]  # fmt: skip


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setattr(client, "WAITS_S", (0.01, 0.01))
    monkeypatch.setattr(client, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(client, "PROBE_S", 0.5)
    found = Endpoint()
    yield found
    found.server.shutdown()
    found.server.server_close()


def ask(endpoint, folder, *keys, questions=QUESTIONS):
    recipe = load_recipe(["--api_url", endpoint.url, "--num_latency_prompts", "2", *keys], usage="")
    model = api.find_api(recipe, "api:shop/large")
    asked = api.prepare(recipe, model, questions, folder)
    return api.answer(recipe, asked, folder, HangWatch(0), Pace(recipe, len(asked.questions)))


def error_of(*arguments, **keys) -> str:
    with pytest.raises(UserError) as caught:
        ask(*arguments, **keys)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_questions_go_out_as_messages_and_answers_come_back_in_their_order(endpoint, tmp_path):
    endpoint.say = lambda body, n: completion(f"to {body['messages'][-1]['content']}")
    lines, measured = ask(endpoint, tmp_path, "--max_new_tokens", "7")
    assert [line["prediction"] for line in lines] == [f"to Where is order {i}?" for i in range(6)]
    body = next(b for b in endpoint.bodies if b["messages"][-1] == QUESTIONS[0].messages[-1])
    assert body == {"model": "shop/large", "messages": QUESTIONS[0].messages, "max_tokens": 7, "temperature": 0.0}
    assert set(endpoint.keys) == {f"Bearer {SECRET}"}
    assert measured["usage"] == {"prompt_tokens": 120, "new_tokens": 30}
    assert measured["latency"]["prompts"] == 2 and measured["latency"]["e2e_ms"]["p50"] > 0
    assert [line["wire_ms"] is not None for line in lines] == [True, False, False, True, False, False]


def refusing(*refused):
    """An endpoint that answers, in OpenAI's words, where one of these keys is sent."""

    def say(body, n):
        key = next((key for key in refused if key in body), None)
        if key is None:
            return completion("fine")
        words = {"max_tokens": "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                               "'max_completion_tokens' instead.",
                 "temperature": "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) "
                                "value is supported."}  # fmt: skip
        error = {"message": words.get(key, f"Unsupported parameter: '{key}' is not supported."), "param": key}
        return 400, json.dumps({"error": error | {"type": "invalid_request_error"}}).encode()

    return say


def test_what_a_model_refuses_is_sent_under_its_other_name_or_left_out_and_said_once(endpoint, tmp_path, capsys):
    endpoint.say = refusing("max_tokens", "temperature")
    lines, measured = ask(endpoint, tmp_path, "--max_new_tokens", "7")
    assert [line["prediction"] for line in lines] == ["fine"] * 6
    assert len(endpoint.bodies) == 8 and endpoint.bodies[-1].keys() == {"model", "messages", "max_completion_tokens"}
    assert endpoint.bodies[-1]["max_completion_tokens"] == 7
    said = capsys.readouterr().err
    assert said.count("api:shop-large: it refuses max_tokens and is sent max_completion_tokens") == 1
    assert said.count("api:shop-large: it refuses temperature and is asked without") == 1
    assert "refused" not in measured["throughput"]
    again = ask(endpoint, tmp_path, "--max_new_tokens", "7")[1]
    assert again["conditions"]["refused"] == measured["conditions"]["refused"] == ["max_tokens", "temperature"]
    cautions = _cautions(load_recipe([], usage=""), {"api:shop-large": measured}, pairs=0)
    assert [caution.split(" and is")[0] for caution in cautions] == [
        "api:shop-large: it refuses max_tokens", "api:shop-large: it refuses temperature"]  # fmt: skip


@pytest.mark.parametrize("key", ["model", "max_completion_tokens"])
def test_a_refusal_that_has_no_other_way_ends_it_with_the_endpoints_words(endpoint, tmp_path, key):
    endpoint.say = refusing("max_tokens", key)
    assert f"answers 400: Unsupported parameter: '{key}' is not supported." in error_of(endpoint, tmp_path)
    assert len(endpoint.bodies) == 2  # the one that has another way, and this one


def test_the_throughput_is_of_those_that_go_out_together(endpoint, tmp_path):
    def slow_alone(body, n):
        return 0.3 if n <= 2 else completion("here it is")  # the first two are timed one at a time

    endpoint.say = slow_alone
    throughput = ask(endpoint, tmp_path)[1]["throughput"]
    assert throughput["examples"] == 4 and throughput["batch_size"] == 8 and throughput["seconds"] < 0.5


def test_what_is_answered_is_not_paid_for_again(endpoint, tmp_path, capsys):
    first = ask(endpoint, tmp_path)
    assert ask(endpoint, tmp_path) == first and len(endpoint.bodies) == 6
    assert "api:shop-large: all 6 answers are there; nothing to do" in capsys.readouterr().err
    ask(endpoint, tmp_path, "--max_new_tokens", "9")
    assert len(endpoint.bodies) == 12


def test_an_endpoint_that_fails_midway_loses_nothing(endpoint, tmp_path):
    endpoint.say = lambda body, n: completion("fine") if n <= 3 else (500, b"overloaded")
    problem = error_of(endpoint, tmp_path)
    assert f"models: api:shop-large: {endpoint.url} answers 500: overloaded; 3 of 6 answers are kept" in problem
    asked_before, endpoint.say = len(endpoint.bodies), lambda body, n: completion("fine")
    lines, _ = ask(endpoint, tmp_path)
    assert len(endpoint.bodies) == asked_before + 3 and len(lines) == 6


def test_what_passes_is_tried_again_and_what_does_not_is_not(endpoint, tmp_path):
    flaky = iter([(429, b"slow down"), (503, b""), b"<html>", 0.8])
    endpoint.say = lambda body, n: next(flaky, completion("fine")) if n in (1, 2, 4, 6) else completion("fine")
    assert len(ask(endpoint, tmp_path)[0]) == 6
    endpoint.say, endpoint.bodies = lambda body, n: (400, b'{"error": {"message": "no such model"}}'), []
    assert "answers 400: no such model; 0 of 6" in error_of(endpoint, tmp_path / "other" if (tmp_path / "other").mkdir() else
                                                          tmp_path / "other")  # fmt: skip
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize("said, problem", [
    (b"<html>Welcome to the hotel</html>", "answers what is no chat completion ('<html>Welcome"),
    (b"", "answers what is no chat completion ('')"),
    (b"[]", "answers what is no chat completion"),
    (b'{"choices": []}', "answers what is no chat completion"),
    (b'{"choices": [{"message": "hi"}]}', "answers what is no chat completion"),
    (b'{"choices": [{"message": {"content": ["hi"]}}], "usage": {}}', "answers what is no chat completion"),
    (b'{"choices": [{"message": {"content": "hi"}}], "usage": "many"}', "answers what is no chat completion"),
    (b'{"choices": [{"message": {"content": "hi"}}]}', "answers without `usage`"),
    (b"\xff\xfe\x00" * 50, "answers what is no chat completion"),
    ((302, b"", ), "answers 302"),
    ((401, f"wrong key {SECRET}".encode()), "answers 401 (the key is read from OPENAI_API_KEY): wrong key ***"),
    (0.8, "has not answered within 0.5 s"),
], ids=range(12))  # fmt: skip
def test_an_endpoint_that_answers_nonsense_or_is_slow_is_one_line(endpoint, tmp_path, said, problem):
    endpoint.say = lambda body, n: said
    found = error_of(endpoint, tmp_path)
    assert f"{endpoint.url} {problem}" in found and "0 of 6 answers are kept" in found and SECRET not in found
    assert len(endpoint.bodies) <= 3


def test_a_reply_without_end_is_cut_off(endpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(client, "LARGEST_BYTES", 1000)
    endpoint.say = lambda body, n: b" " * 100_000
    assert "answers with more than" in error_of(endpoint, tmp_path)


def test_an_endpoint_that_is_down_is_found_before_any_weights(endpoint, tmp_path):
    endpoint.server.shutdown()
    endpoint.server.server_close()
    assert "cannot be reached (" in error_of(endpoint, tmp_path) and not any(tmp_path.iterdir())


def test_an_empty_answer_and_tool_calls_are_answers(endpoint, tmp_path):
    calls = [{"function": {"name": "find", "arguments": "{}"}}]
    message = {"message": {"content": None, "tool_calls": calls}}
    endpoint.say = lambda body, n: completion("", **({} if n == 1 else message))
    lines, _ = ask(endpoint, tmp_path)
    assert lines[0]["prediction"] == "" and json.loads(lines[1]["prediction"]) == calls


@pytest.mark.parametrize("name, url, problem", [
    ("api:", "https://x.example/v1", "models: 'api:' names no model"),
    ("api:gpt", None, "models: 'api:gpt' needs api_url"),
    ("api:gpt", "x.example/v1", "api_url: 'x.example/v1' is no address"),
    ("api:gpt", "file:///etc/passwd", "api_url: 'file:///etc/passwd' is no address"),
    ("api:gpt", "http://[::1/v1", "api_url: 'http://[::1/v1' is no address"),
    ("api:gpt", "http://x.example:99999/v1", "api_url: 'http://x.example:99999/v1' is no address"),
    ("api:gpt", "http://x.example /v1", "api_url: 'http://x.example /v1' is no address"),
    ("api:gpt", "https://me:secret@x.example/v1", "api_url: it may hold no password and no query"),
    ("api:gpt", "https://x.example/v1?key=1", "api_url: it may hold no password and no query"),
])  # fmt: skip
def test_an_address_that_is_none_is_one_line(name, url, problem):
    recipe = load_recipe(["--api_url", url] if url else [], usage="")
    with pytest.raises(UserError) as caught:
        api.find_api(recipe, name)
    assert str(caught.value).startswith(problem) and "secret" not in str(caught.value)


def test_a_key_that_cannot_be_sent_is_one_line_without_it(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{SECRET}\nagain")
    problem = error_of(endpoint, tmp_path)
    assert problem.startswith("OPENAI_API_KEY: the environment holds a key with signs") and SECRET not in problem


def test_it_stands_beside_the_base_in_the_report_and_its_key_nowhere(endpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [
        "eval/run.py", "--models", "base", "api:gpt", "--api_url", endpoint.url, "--max_eval_samples", "4", "--precision",
        "fp32", "--max_new_tokens", "4", "--num_latency_prompts", "2", "--num_resamples", "50", "--output_dir",
        str(tmp_path / "run"),
    ])  # fmt: skip
    monkeypatch.chdir(PROJECT)
    runpy.run_path("eval/run.py", run_name="__main__")
    results = json.loads((tmp_path / "run/eval/results.json").read_text())
    assert results["pairs"][0]["models"] == ["base", "api:gpt"] and results["models"]["api:gpt"]["kind"] == "api"
    assert any("not measured in one place" in caution for caution in results["cautions"])
    assert " over the wire |" in (tmp_path / "run/eval/report.md").read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5 and not any(SECRET.encode() in path.read_bytes() for path in files)
    assert SECRET not in "".join(capsys.readouterr())


def test_a_label_that_is_chosen_by_its_probability_cannot_decide_over_an_endpoint(tmp_path):
    keys = ["--labels", "yes", "no", "--primary_metric", "constrained_macro_f1", "--api_url", "http://127.0.0.1:9/v1"]
    recipe = load_recipe(keys, usage="")
    with pytest.raises(UserError, match="api:small, which tells no probabilities of labels; set macro_f1"):
        api.prepare(recipe, api.find_api(recipe, "api:small"), QUESTIONS, tmp_path)
