"""Clients of others work unchanged, and bad ones end nothing: over real connections."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import openai
import pytest
from drawn import make_adapter
from langchain_openai import ChatOpenAI
from launching import PROJECT, environment, script
from served import ASKED, CHAT, KEYS, listening, make_gateway, until

from carelm.errors import UserError
from carelm.models.batcher import Batcher
from carelm.serving import completions, server, turn, wire

KEY = "a-key-of-the-tests"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_adapter(tmp_path_factory.mktemp("run"), *KEYS)


@pytest.fixture(scope="module")
def gateway(run):
    return make_gateway(run, "base", "adapter")


@pytest.fixture(scope="module")
def port(gateway):
    with listening(gateway, KEY) as port:
        yield port


@pytest.fixture(scope="module")
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def send(port, body, path=CHAT):
    """A connection with a request on its way."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def test_openais_client_asks_streams_and_lists(client):
    assert [model.id for model in client.models.list()] == ["base", "adapter"]
    whole = client.chat.completions.create(model="adapter", messages=ASKED, temperature=0, n=1)
    with client.chat.completions.create(
        model="adapter", messages=ASKED, stream=True, stream_options={"include_usage": True}, user="me"
    ) as stream:
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content != ""
    assert chunks[-1].usage == whole.usage and whole.usage.completion_tokens <= 24
    # What comes back as history is what was given, with all that the client writes beside it.
    messages = [*ASKED, whole.choices[0].message.model_dump(), {"role": "user", "content": "And now?"}]
    assert client.chat.completions.create(model="adapter", messages=messages).choices


def test_openais_client_raises_its_own_errors(client, port, gateway, monkeypatch):
    with pytest.raises(openai.NotFoundError, match="base, adapter"):
        client.chat.completions.create(model="gpt-4", messages=ASKED)
    with pytest.raises(openai.BadRequestError, match="temperature") as caught:
        client.chat.completions.create(model="base", messages=ASKED, temperature=9)
    assert caught.value.param == "temperature" and caught.value.type == "invalid_request_error"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="no").models.list()
    monkeypatch.setattr(gateway, "in_flight", gateway.recipe.max_queue)
    with pytest.raises(openai.RateLimitError) as full:
        client.chat.completions.create(model="base", messages=ASKED)
    assert full.value.response.headers["retry-after"] == "2"


def test_a_break_in_mid_answer_is_an_error_of_openais_client(client, monkeypatch):
    step, steps = Batcher.step, iter(range(9**9))

    def breaks(batcher):
        if next(steps) == 6:
            raise RuntimeError
        return step(batcher)

    monkeypatch.setattr(Batcher, "step", breaks)
    pieces = []
    with pytest.raises(openai.APIError, match="ask again"):
        for chunk in client.chat.completions.create(model="base", messages=ASKED, stream=True):
            pieces.append(chunk)
    assert len(pieces) > 3
    assert client.chat.completions.create(model="base", messages=ASKED).choices


def test_langchain_asks_and_streams(port):
    model = ChatOpenAI(
        model="adapter", base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, temperature=0, max_retries=0
    )
    messages = [("system", "Be brief."), ("human", "Where is my order?")]
    whole = model.invoke(messages)
    assert whole.content and whole.usage_metadata["output_tokens"] <= 24
    assert "".join(chunk.text for chunk in model.stream(messages)) == whole.content
    assert model.bind(stop=["a"], max_tokens=5, seed=3).invoke(messages).response_metadata["finish_reason"]


OPEN_WEBUI = [  # what its backend sends on (backend/open_webui/routers/openai.py): a chat, its title, its tags
    {"stream": True, "model": "adapter", "messages": [{"role": "system", "content": "Be brief."}, *ASKED]},
    {"stream": True, "model": "adapter", "stream_options": {"include_usage": True}, "temperature": 0.8, "seed": 1,
     "stop": ["User:"], "messages": [{"role": "user", "content": [{"type": "text", "text": "Where is it?"}]}]},
    {"model": "adapter", "messages": [{"role": "user", "content": "### Task: a title as JSON"}], "stream": False,
     "max_completion_tokens": 1000 - 200},
    {"model": "adapter", "messages": [{"role": "user", "content": "### Task: tags as JSON"}], "stream": False},
]  # fmt: skip


@pytest.mark.parametrize("body", OPEN_WEBUI)
def test_open_webuis_requests_are_answered(port, body):
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}", "X-OpenWebUI-User-Name": "anna"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{CHAT}", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request) as reply:
        text = reply.read().decode()
    assert text.endswith("data: [DONE]\n\n") if body["stream"] else json.loads(text)["choices"][0]["message"]


def test_tokens_come_one_by_one(client, monkeypatch):
    step = Batcher.step
    monkeypatch.setattr(Batcher, "step", lambda batcher: time.sleep(0.05) or step(batcher))
    times = [time.monotonic() for _ in client.chat.completions.create(model="base", messages=ASKED, stream=True)]
    assert times[-1] - times[0] > 0.5


def test_a_client_that_goes_frees_its_place(gateway, port, monkeypatch):
    step = Batcher.step
    monkeypatch.setattr(Batcher, "step", lambda batcher: time.sleep(0.05) or step(batcher))
    for stream in (True, False):
        connection = send(port, {"model": "base", "messages": ASKED, "stream": stream, "max_tokens": 500})
        until(lambda: gateway.in_flight == 1 and gateway.engine._served["base"].asked)
        connection.close()
        until(lambda: gateway.in_flight == 0 and not gateway.engine._served["base"].asked)


def test_a_half_closed_connection_and_one_without_a_whole_body_end_nothing(gateway, port, client, monkeypatch):
    connection = send(port, {"model": "base", "messages": ASKED})
    connection.shutdown(socket.SHUT_WR)
    until(lambda: gateway.in_flight == 0)
    monkeypatch.setattr(wire, "BODY_SECONDS", 0.2)
    slow = socket.create_connection(("127.0.0.1", port), timeout=10)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 99\r\n\r\n"
    slow.sendall(head.encode() + b'{"model": ')
    assert slow.recv(9**5).startswith(b"HTTP/1.1 408 ")
    assert client.chat.completions.create(model="base", messages=ASKED).choices
    until(lambda: gateway.in_flight == 0)  # a place is free an instant after the reply has come


def counted(gateway, status):
    return gateway.metrics.requests.labels(CHAT, status)._value.get()


def test_a_client_that_goes_is_counted_as_gone_and_is_no_failure(gateway, port, monkeypatch, capsys):
    step, gone, failed = Batcher.step, counted(gateway, 499), counted(gateway, 500)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\nContent-Length: 99\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=10)
    connection.sendall(head.encode() + b"{")
    time.sleep(0.1)
    assert gateway.in_flight == 0  # a place is taken once the body is there
    connection.close()
    until(lambda: counted(gateway, 499) == gone + 1)
    monkeypatch.setattr(Batcher, "step", lambda batcher: time.sleep(0.05) or step(batcher))
    connection = send(port, {"model": "base", "messages": ASKED, "max_tokens": 500})
    until(lambda: gateway.in_flight == 1 and gateway.engine._served["base"].asked)
    connection.close()
    until(lambda: counted(gateway, 499) == gone + 2)
    assert counted(gateway, 500) == failed and "ClientDisconnect" not in capsys.readouterr().err


def test_a_client_that_reads_nothing_keeps_no_place(gateway, monkeypatch):
    """The connection's buffer is full: what is sent waits without end."""
    monkeypatch.setattr(gateway.recipe, "answer_timeout", 0.2)
    monkeypatch.setattr(turn, "FAREWELL_SECONDS", 0.1)
    body = json.dumps({"model": "base", "messages": ASKED, "stream": True}).encode()

    async def ask_and_read_nothing():
        received, sent = iter([{"type": "http.request", "body": body}]), []

        async def receive():
            return next(received, None) or await asyncio.Event().wait()

        async def send(message):
            sent.append(message)
            if len(sent) > 2:
                await asyncio.Event().wait()

        scope = {"type": "http", "method": "POST", "path": CHAT, "headers": []}
        await asyncio.wait_for(completions.Completions(gateway)(scope, receive, send), 5)
        return sent

    assert b"timeout" in asyncio.run(ask_and_read_nothing())[-1]["body"] and gateway.in_flight == 0


def test_a_connection_on_which_no_whole_head_comes_is_closed(gateway, monkeypatch):
    monkeypatch.setattr(server, "KEEP_ALIVE_SECONDS", 0.3)
    body = json.dumps({"model": "base", "messages": ASKED}).encode()
    with listening(gateway) as port:
        for begun in (b"", b"POST /v1/chat"):
            with socket.create_connection(("127.0.0.1", port), timeout=5) as slow:
                slow.sendall(begun)
                assert slow.recv(9) == b""
        with socket.create_connection(("127.0.0.1", port), timeout=5) as slow:  # after a whole one too
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he")
            assert b"ok" in b"".join(iter(lambda: slow.recv(9**5), b""))
        step = Batcher.step
        monkeypatch.setattr(Batcher, "step", lambda batcher: time.sleep(0.05) or step(batcher))
        with socket.create_connection(("127.0.0.1", port), timeout=5) as asks:  # an answer may take longer
            asks.sendall(
                f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
            )
            assert asks.recv(9**5).startswith(b"HTTP/1.1 200 ")


def test_a_port_that_another_server_has_taken_meanwhile_is_one_line(run):
    first = server.bind(dataclasses.replace(run, port=0))
    recipe = dataclasses.replace(run, port=first.getsockname()[1])
    second = server.bind(recipe)  # both are there while neither listens
    with first, second:
        server.listen(recipe, first)
        with pytest.raises(UserError, match=f"^port: 127.0.0.1 port {recipe.port} cannot be had"):
            server.listen(recipe, second)


def test_a_body_of_ten_megabytes_gets_to_its_413(port):
    connection = send(port, b"x" * 10_000_000)
    assert connection.recv(9**5).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("more", ["", "Expect: 100-continue\r\n"])
def test_a_body_that_is_said_to_be_far_too_large_is_refused_before_it_comes(port, more):
    length = 2 * 10**6 if more else 2 * 10**9  # one who waits to be told to go on sends nothing before
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n{more}Content-Length: {length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(head.encode())
        assert connection.recv(9**5).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(("length", "status"), [(10_000, b"200"), (30_000, b"431"), (200_000, b"4")])
def test_headers_have_a_largest_size(port, length, status):
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        connection.sendall(f"GET /health HTTP/1.1\r\nHost: localhost\r\nX-More: {'x' * length}\r\n\r\n".encode())
        assert connection.recv(9**5).startswith(b"HTTP/1.1 " + status)


def test_where_too_many_connections_are_open_those_that_wait_make_room_and_the_server_can_be_watched(
    gateway, monkeypatch
):
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 3)
    monkeypatch.setattr(Batcher, "step", lambda batcher: time.sleep(0.02) or [])

    def connect(path):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", path)
        reply = connection.getresponse()
        return connection.sock, reply.status, reply.headers, reply.read()

    with listening(gateway) as port:
        waiting = [connect("/health")[0] for _ in range(3)]
        assert connect("/v1/models")[1] == 200 and waiting[0].recv(9) == b""
        asking = [send(port, {"model": "base", "messages": ASKED, "max_tokens": 500}) for _ in range(3)]
        until(lambda: gateway.in_flight == 3)
        assert waiting[1].recv(9) == waiting[2].recv(9) == b""
        closed, status, headers, _ = connect("/v1/models")
        assert (closed, status, headers["retry-after"]) == (None, 503, "2")
        for path in ("/health", "/metrics"):
            connection, status, *_ = connect(path)
            assert status == 200
            connection.close()
        for connection in asking:
            connection.close()
        until(lambda: gateway.in_flight == 0)


def test_those_who_send_slowly_keep_nobody_out(gateway, monkeypatch):
    monkeypatch.setattr(server, "MOST_CONNECTIONS", 3)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 500\r\n\r\n{{".encode()
    with listening(gateway) as port:
        slow = [socket.create_connection(("127.0.0.1", port), timeout=5) for _ in range(80)]
        for connection in slow:
            connection.sendall(head)
        for path in ("/health", "/v1/models"):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as reply:
                assert reply.status == 200
        with contextlib.suppress(ConnectionResetError):  # what it had sent was not all read
            assert slow[0].recv(9) == b""
        for connection in slow:
            connection.close()


def test_a_server_finishes_what_runs_once_it_is_told_to_stop(run):
    keys = ["--output_dir", str(run.output_dir), "--load_in_4bit", "false", "--port", "0", "--max_new_tokens", "900"]
    process = subprocess.Popen(
        [sys.executable, "serve/run.py", *keys], cwd=PROJECT, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        said = ""
        while "try: curl" not in said:
            assert (line := process.stderr.readline()), said
            said += line
        port = int(re.search(r"http://127.0.0.1:(\d+)", said)[1])
        body = {"model": "adapter", "messages": ASKED, "stream": True, "temperature": 1}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{CHAT}", json.dumps(body).encode())
        with urllib.request.urlopen(request) as reply:
            first = reply.readline()
            process.send_signal(signal.SIGTERM)
            rest = reply.read()
        assert first.startswith(b"data: {") and rest.endswith(b"data: [DONE]\n\n")
        assert process.wait(20) == 0 and process.stderr.read().endswith("carelm: stopped\n")
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        (["--host", "0.0.0.0"], "error: host: others reach 0.0.0.0, so a key is needed"),
        (["--api_key_file", "/nowhere"], "error: api_key_file: /nowhere cannot be read (No such file or directory)"),
        (
            ["--output_dir", "/tmp/no such run"],
            "error: models: 'adapter': there is no folder /tmp/no such run; train first",
        ),
        (["--models", "api:gpt"], "error: models: api:gpt is for the evaluation alone"),
        (["--port", "70000"], "error: port: 70000 is above 65535"),
        (
            ["--models", "base", "--port", "0", "--system_prompt", "word " * 400],
            "error: max_length: base reads 384 tokens, and the system message with a turn of one letter takes",
        ),
        (
            ["--cors_origins", "*"],
            "error: cors_origins: '*' is no web page's origin; write each as https://shop.example",
        ),
    ],
)
def test_what_cannot_be_served_is_one_line_before_any_weights(keys, line):
    done = script(*keys, file="serve/run.py")
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(line), done.stderr


def test_a_taken_port_is_one_line_before_any_weights(port, run):
    done = script("--output_dir", run.output_dir, "--port", port, file="serve/run.py")
    assert done.returncode == 2 and "Loading" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(
        f"error: port: 127.0.0.1 port {port} cannot be had (Address already in use)"
    )


def test_a_missing_extra_is_one_line_with_its_command(monkeypatch, capsys):
    import importlib.util
    import runpy

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "fastapi" else find(name, *rest)
    )
    monkeypatch.setattr(sys, "argv", ["serve/run.py"])
    main = runpy.run_path(str(PROJECT / "serve/run.py"))["main"]
    with pytest.raises(Exception, match=r"^fastapi not installed: pip install -e '\.\[serve\]'$"):
        main()
