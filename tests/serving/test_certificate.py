"""The certificate says of what is served whether it is what was evaluated, and of nothing else."""

import dataclasses
import json

import pytest
from drawn import make_adapter
from launching import script
from served import KEYS, make_gateway

from carelm.evaluation import candidates
from carelm.evaluation.questions import Question
from carelm.models.decoding import Decoding
from carelm.recipe import CERTIFIED
from carelm.serving import certificate, server
from carelm.serving.gateway import Gateway
from carelm.serving.requests import ChatRequest, parse


def asked(recipe, gateway, messages, tools=None):
    """The messages that the server makes of a certificate's request for this question."""
    question = Question("q", "q", "none", messages, ["x"], tools)
    body = certificate.to_body(Gateway(recipe, list(gateway.speakers.values()), gateway.engine), question)
    return body and parse(ChatRequest, json.dumps(body).encode())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("run"), *KEYS, "--max_eval_samples", "12")


@pytest.fixture(scope="module")
def gateway(run):
    return make_gateway(run, "base")


def test_in_fp32_all_answers_that_are_served_are_the_evaluations_and_the_report_says_so(run):
    keys = ["--output_dir", run.output_dir, "--load_in_4bit", "false", "--max_eval_samples", "12", "--max_length", "96"]
    done = script(*keys, "--max_new_tokens", "24", "--certify", "4", "--port", "0", file="serve/run.py", check=True)
    found = json.loads((run.output_dir / CERTIFIED).read_text())
    assert found["questions"] == 4 and [*found["models"]] == ["base", "adapter"] and found["engine"] == "batcher"
    for name, of_model in found["models"].items():
        assert (of_model["equal_prompts"], of_model["equal_answers"], of_model["share"]) == (4, 4, 1.0), of_model
        assert (
            f"{name} as served: 4 of 4 prompts and 4 of 4 answers are the evaluation's, token for token (fp32"
            in done.stderr
        )
    found_models = [candidates.find(run, name) for name in ("base", "adapter")]
    assert candidates.as_served(run, found_models) == {"base": "4 of 4 (batcher)", "adapter": "4 of 4 (batcher)"}
    others = dataclasses.replace(run, precision="bf16")
    assert candidates.as_served(others, [candidates.find(others, "base")]) == {}


def test_an_answer_that_is_another_is_counted_and_its_first_other_token_named(run, monkeypatch):
    gateway = make_gateway(run, "base")
    decoding = ChatRequest.decoding
    shorter = lambda self, *rest: Decoding(decoding(self, *rest).max_new_tokens - 20)  # noqa: E731
    monkeypatch.setattr(ChatRequest, "decoding", shorter)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # nothing is there, and this machine is asked without it
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    recipe = dataclasses.replace(run, certify=3, port=0, max_queue=1)  # no more is asked at once than it holds
    gateway.recipe = recipe
    found = certificate.certify(recipe, list(gateway.speakers.values()), gateway, None, server.bind(recipe))
    of_base = found["models"]["base"]
    assert of_base["equal_prompts"] == 3 and of_base["failed"] == 0 and of_base["share"] < 1
    assert of_base["first_divergence"]["token"] == 4 and of_base["first_divergence"]["served"] == []
    assert "; the first other token is number 5 of question" in certificate.sentences(found)[0]


def test_a_question_is_asked_as_a_client_would_and_comes_to_the_same_messages(gateway, make, tmp_path):
    keys = {"completion_template": "{answer}", "tag_column": "question", "urgent_words": ["urgent"]}
    recipe = make(
        tmp_path, prompt_template="[{priority}] {topic}: {question} ({topic})", system_prompt="Be brief.", **keys
    )
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "[HIGH] Refund (2): urgent: when? (Refund (2))"},
    ]
    sent = asked(recipe, gateway, messages)
    assert [m["role"] for m in sent.messages] == ["user"]
    assert json.loads(sent.messages[0]["content"]) == {"topic": "Refund (2)", "question": "urgent: when?"}
    untold = [messages[0], {"role": "user", "content": "[NORMAL] Refund: urgent! (Refund)"}]  # no words have that tag
    assert asked(recipe, gateway, untold) is None


def test_tool_calls_of_a_question_are_sent_as_openai_writes_them(gateway):
    call = {"id": "a", "type": "function", "function": {"name": "find", "arguments": {"number": 7}}}
    messages = [
        {"role": "user", "content": "Where is 7?"},
        {"role": "assistant", "content": "", "tool_calls": [call], "train": False},
        {"role": "tool", "content": "on its way", "tool_call_id": "a"},
    ]
    tools = [{"type": "function", "function": {"name": "find"}}]
    sent = asked(gateway.recipe, gateway, messages, tools)
    assert sent.messages[1]["tool_calls"] == [call] and sent.tools == tools


def test_a_question_whose_template_has_columns_that_a_conversation_lacks_is_not_asked(gateway, make, tmp_path):
    recipe = make(tmp_path, prompt_template="{question} | {context}", completion_template="{answer}",
                  optional_columns=["context"])  # fmt: skip
    assert asked(recipe, gateway, [{"role": "user", "content": "When? | in May"}]) is None
