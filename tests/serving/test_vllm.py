"""vLLM as the engine answers as the engine in this process does, and no process of it is left behind."""

import asyncio
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import aclosing, contextmanager
from pathlib import Path

import httpx
import pytest
import uvicorn
from conftest import PROJECT
from drawn import make_adapter
from served import until
from starlette.testclient import TestClient
from vllm_server import make_app

from carelm.errors import UserError
from carelm.evaluation import candidates
from carelm.files import read_json, write_whole
from carelm.models.decoding import Decoding
from carelm.recipe_file import load_recipe
from carelm.serving import vllm_process
from carelm.serving.engine import BatcherEngine, EngineError
from carelm.serving.gateway import Gateway
from carelm.serving.vllm import VllmEngine
from carelm.serving.vllm_command import servable, why_not
from carelm.talk.speaker import Speaker

KEYS = ["--max_new_tokens", "24", "--max_length", "96", "--load_in_4bit", "false", "--engine", "vllm"]
ASKED = [{"role": "user", "content": "Where is my order?"}]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A recipe with an adapter, its two models, and the engine in this process."""
    recipe = make_adapter(tmp_path_factory.mktemp("run"), *KEYS)
    speakers = [Speaker(recipe, candidates.find(recipe, name)) for name in ("base", "adapter")]
    return recipe, speakers, BatcherEngine(recipe, speakers)


@contextmanager
def served(app):
    """The address of an app in a thread of this process."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def by_batcher(engine, name):
    """The engine in this process, behind vLLM's protocol."""

    async def answers(prompt, body):
        decoding = Decoding(body["max_tokens"], body["temperature"], body["top_p"], body["seed"])
        async with aclosing(engine.answer(name, prompt, decoding)) as tokens:
            async for token in tokens:
                yield token

    return answers


def elsewhere(run, url, *names):
    recipe, speakers, _ = run
    recipe = load_recipe(["--output_dir", str(recipe.output_dir), *KEYS, "--engine_url", url], usage="")
    return VllmEngine(recipe, [speaker for speaker in speakers if speaker.name in (names or ("base", "adapter"))])


def ask(engine, model, prompt, decoding, most=None):
    """The ids of an answer, or the first ones."""

    async def collect():
        got = []
        async with aclosing(engine.answer(model, prompt, decoding)) as tokens:
            async for token in tokens:
                got.append(token)
                if len(got) == most:
                    break
        return got

    return asyncio.run(asyncio.wait_for(collect(), 60))


def closed(engine):
    asyncio.run(engine.close())


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# What is asked and answered


def test_answers_have_the_ids_of_the_engine_in_this_process_and_requests_say_all_that_decides_them(run):
    recipe, speakers, own = run
    asked, models = [], {name: by_batcher(own, name) for name in own.models}
    prompt = speakers[0].chat.prompt_ids(ASKED)
    with served(make_app(models, key=None, asked=asked)) as url:
        engine = elsewhere(run, url + "/v1/")
        assert engine.models == ["base", "adapter"] and asyncio.run(engine.ready())
        for name in engine.models:
            engine._client = None  # each asyncio.run has a loop of its own
            expected = ask(own, name, prompt, speakers[0].decoding)
            assert ask(engine, name, prompt, speakers[0].decoding) == expected and len(expected) > 3
            assert engine._client is not None
        closed(engine)
    body = asked[-1]
    assert body["prompt"] == prompt and body["max_tokens"] == 24 and body["seed"] == recipe.seed and body["stream"]
    assert body["temperature"] == 0 and body["top_p"] == 1 and body["top_k"] == -1 and body["repetition_penalty"] == 1
    assert body["ignore_eos"] and body["stop_token_ids"] == sorted(speakers[1].stops) and body["return_token_ids"]


def test_the_api_gives_the_same_answers_with_either_engine(run):
    recipe, speakers, own = run
    bodies = []
    with served(make_app({name: by_batcher(own, name) for name in own.models}, key=None)) as url:
        for engine in (own, elsewhere(run, url)):
            with TestClient(Gateway(recipe, speakers, engine).app(None), base_url="http://127.0.0.1") as client:
                asked = {"model": "adapter", "messages": ASKED, "return_token_ids": True}
                bodies.append(client.post("/v1/chat/completions", json=asked).json())
    for body in bodies:
        body.pop("id"), body.pop("created")
    assert bodies[0] == bodies[1] and bodies[0]["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": "other"}, "refuses the key of VLLM_API_KEY"),
        ({"key": None, "tells_ids": False}, "0.10.2"),
        ({"key": None, "reads": lambda prompt: [0, *prompt]}, "reads other token ids"),
        ({"key": None, "models": {"shop": None}}, "no model called base but shop; python train/export.py"),
    ],
)
def test_what_is_wrong_with_an_engine_elsewhere_is_one_line_before_anybody_asks(run, options, message):
    models = {name: by_batcher(run[2], name) for name in run[2].models}
    with served(make_app(**{"models": models} | options)) as url, pytest.raises(UserError, match=message) as raised:
        elsewhere(run, url)
    assert str(raised.value).startswith("engine: vLLM at http://") and "\n" not in str(raised.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "gpu-box:8000", "http://me:secret@gpu-box:8000"])
def test_an_address_that_is_none_or_where_nothing_answers_is_one_line(run, url):
    with pytest.raises(UserError, match="^(engine: vLLM at|engine_url: )") as raised:
        elsewhere(run, url)
    assert "secret" not in str(raised.value)


def test_an_answer_to_another_prompt_than_was_sent_is_none(run):
    models, read = {"base": by_batcher(run[2], "base")}, []
    with served(make_app(models, key=None, reads=lambda prompt: prompt + read)) as url:
        engine = elsewhere(run, url, "base")
        read.append(7)
        with pytest.raises(EngineError, match="another prompt"):
            ask(engine, "base", [1, 2, 3], Decoding(4))
        engine._client = None
        closed(engine)


def test_a_key_of_the_environment_is_sent(run, monkeypatch):
    models = {name: by_batcher(run[2], name) for name in run[2].models}
    monkeypatch.setenv("VLLM_API_KEY", "right")
    with served(make_app(models, key="right")) as url:
        closed(elsewhere(run, url, "adapter"))


# The process


@pytest.fixture
def program(tmp_path):
    """A program that starts as vLLM does."""
    path = tmp_path / "vllm"
    path.write_text(f'#!/bin/sh\nexec {sys.executable} {PROJECT / "tests/serving/vllm_server.py"} "$@"\n')
    path.chmod(0o755)
    return path


def started(run, tmp_path, command, names=("base", "adapter")):
    recipe, speakers, _ = run
    keys = ["--output_dir", str(tmp_path / "out"), *KEYS, "--engine_command", str(command)]
    return VllmEngine(load_recipe(keys, usage=""), [speaker for speaker in speakers if speaker.name in names])


def test_a_process_that_is_killed_ends_its_answers_with_an_error_and_is_started_again(run, tmp_path, program, capsys,
                                                                                      monkeypatch):  # fmt: skip
    monkeypatch.setattr(vllm_process, "LOOK_S", 0.1)
    prompt = [7, 8, 9]
    engine = started(run, tmp_path, f"{program} --seconds-to-start 0.2")
    try:
        server = engine._server
        pid = int(httpx.get(f"{server.url}/pid").text)
        assert server.key not in Path(f"/proc/{pid}/cmdline").read_text()

        async def broken():
            async for token in engine.answer("adapter", prompt, Decoding(10**6)):
                if token == 8:
                    os.kill(pid, signal.SIGKILL)

        with pytest.raises(EngineError, match="middle of this answer"):
            asyncio.run(asyncio.wait_for(broken(), 30))
        engine._client = None
        until(lambda: asyncio.run(once_ready(engine)), 20)
        assert ask(engine, "base", prompt, Decoding(4)) == [9, 8, 7, 9]
        assert "is started again" in capsys.readouterr().err
    finally:
        engine._client = None
        closed(engine)
    assert not is_alive(pid) and server._process.poll() is not None


async def once_ready(engine):
    try:
        return await engine.ready()
    finally:
        await engine._client.aclose()
        engine._client = None


def test_one_that_dies_again_and_again_is_given_up_and_answers_end_with_an_error(
    run, tmp_path, program, capsys, monkeypatch
):
    monkeypatch.setattr(vllm_process, "LOOK_S", 0.1)
    monkeypatch.setattr(vllm_process, "MOST_STARTS", 2)
    engine = started(run, tmp_path, f"{program} --seconds-to-live 1.5", ["base"])
    until(lambda: engine._server.given_up, 20)
    with pytest.raises(EngineError, match="died too often"):
        ask(engine, "base", [1], Decoding(1))
    assert not asyncio.run(engine.ready())
    engine._client = None
    closed(engine)
    said = capsys.readouterr().err
    assert "exit status 3" in said and "not started again: that was 2 times" in said


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/nowhere/vllm", "engine: vllm needs vLLM, and there is no program /nowhere/vllm"),
        ("{program} --port 1", "engine_command: --port is set here"),
        ("{program} --no-such-option", "exit status 2 while it started .*unrecognized arguments"),
        ("{program} --forget-ids", "0.10.2"),
    ],
)
def test_one_that_cannot_be_started_is_one_line_and_leaves_no_process(run, tmp_path, program, command, message):
    with pytest.raises(UserError, match=message) as raised:
        started(run, tmp_path, command.format(program=program))
    assert "\n" not in str(raised.value)
    assert str(program.parent) not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_one_that_started_it_however_that_ends(tmp_path, program, stop):
    """The command has a child of its own, as vLLM has, which leaves its group."""
    command = tmp_path / "with_child"
    command.write_text(f'#!/bin/sh\nsetsid sleep 987 &\nexec {program} "$@"\n')
    command.chmod(0o755)
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom carelm.serving.vllm_process import VllmProcess\n"
        "one = VllmProcess(sys.argv[1:], Path('log'))\none.wait_until_ready()\nprint(one.url, flush=True)\ntime.sleep(99)"
    )
    words = [sys.executable, "-c", code, str(command), "serve", "MODEL", "--served-model-name", "base"]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(PROJECT)}
    ) as us:
        pid = int(httpx.get(f"{us.stdout.readline().strip()}/pid").text)
        (child,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        us.send_signal(stop)
    until(lambda: not is_alive(pid) and not is_alive(int(child)), 20)


# What can be served


def test_what_vllm_computes_otherwise_is_left_out_aloud_or_refused_where_it_is_named(run, tmp_path, capsys):
    recipe, speakers, _ = run
    base, adapter = (speaker.candidate for speaker in speakers)
    assert servable(recipe, [base, adapter]) == [base, adapter]
    for key, what in (
        ("use_dora", "DoRA"),
        ("modules_to_save", "whole modules"),
        ("rank_pattern", "ranks that differ"),
    ):
        config = read_json(recipe.output_dir / "adapter_config.json") | {key: {"head": 4}}
        other = tmp_path / key
        make_folder(other, recipe.output_dir, config)
        changed = candidates.find(recipe, str(other))
        assert what in why_not(changed)
        assert servable(recipe, [base, changed]) == [base]
        assert f"{key} is left out: it has {what}" in capsys.readouterr().err
        whole = dataclasses.replace(candidates.find(recipe, str(PROJECT / "demo/base")), name="merged")
        assert servable(recipe, [base, changed, whole]) == [whole] and servable(recipe, [base, adapter, whole]) == [
            base,
            adapter,
        ]
        named = load_recipe([*KEYS, "--models", str(other)], usage="")
        with pytest.raises(UserError, match=f"^models: {key} cannot .*merge it first: python train/merge.py --adapter"):
            servable(named, [changed])


def make_folder(target, source, config):
    target.mkdir()
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    write_whole(target / "adapter_config.json", json.dumps(config))


def test_a_trained_prompt_a_rounded_base_and_a_second_base_are_refused(run, tmp_path):
    recipe, (base, adapter), _ = run
    make_folder(tmp_path / "prompt", recipe.output_dir, {"peft_type": "PROMPT_TUNING"})
    prompt = candidates.find(recipe, str(tmp_path / "prompt"))
    with pytest.raises(UserError, match="none of them; set engine: batcher"):
        servable(recipe, [prompt])
    with pytest.raises(UserError, match="none of them; merge it first"):
        servable(recipe, [candidates.find(recipe, "base@4bit"), candidates.find(recipe, "adapter@4bit")])
    other = candidates.find(recipe, "base@bf16")
    named = load_recipe([*KEYS, "--models", "adapter", "base@bf16"], usage="")
    with pytest.raises(UserError, match="base@bf16 cannot .* another base than adapter, and one vLLM holds one"):
        servable(named, [adapter.candidate, other])
