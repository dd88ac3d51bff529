"""Nobody asks who may not, and what is served to a browser runs nothing of others."""

import dataclasses
import re

import pytest
from drawn import make_adapter
from served import ASKED, CHAT, KEYS, ask, make_client, make_gateway

from carelm.errors import UserError
from carelm.serving.gateway import Gateway
from carelm.serving.security import is_loopback, read_key


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    return make_gateway(make_adapter(tmp_path_factory.mktemp("run"), *KEYS), "base")


def test_without_the_key_no_route_but_health_and_the_page_answers(gateway):
    client = make_client(gateway, "secret-key")
    for headers in (
        {},
        {"authorization": "Bearer wrong"},
        {"authorization": "secret-key"},
        {"authorization": "Bearer secret-ke"},
        {"authorization": "Bearer secret-keys"},
        {"authorization": "Bearer é"},
    ):
        raw = {name: value.encode("latin-1") for name, value in headers.items()}
        for path in ("/v1/models", "/metrics", "/v1/models/base", "/nothing"):
            reply = client.get(path, headers=raw)
            assert reply.status_code == 401 and reply.json()["error"]["code"] == "invalid_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"
        for path in (CHAT, "/v1/feedback"):
            assert client.post(path, json={}, headers=raw).status_code == 401
    assert client.get("/health").status_code == client.get("/").status_code == 200
    assert client.get("/v1/models", headers={"authorization": "Bearer secret-key"}).status_code == 200


def test_every_reply_has_the_headers_and_the_page_may_ask_its_own_server_alone(gateway):
    client = make_client(gateway)
    for path in ("/", "/page.js", "/page.css", "/health", "/v1/models", "/nothing"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'") and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff" and "server" not in headers
        assert not [name for name in headers if name.startswith("access-control")]


def test_an_engines_own_routes_and_the_documentation_pages_are_not_there(gateway):
    client = make_client(gateway)
    for path in (
        "/docs",
        "/openapi.json",
        "/redoc",
        "/load_model",
        "/v1/completions",
        "/page/page.html",
        "/..%2Frun.py",
    ):
        assert client.get(path).status_code == 404


def test_web_pages_elsewhere_ask_only_where_they_are_named(gateway):
    shop = {"origin": "https://shop.example"}
    assert make_client(gateway).post(CHAT, json={"model": "base", "messages": ASKED}, headers=shop).status_code == 403
    assert make_client(gateway).get("/health", headers={"host": "evil.example"}).status_code == 403
    assert (
        make_client(gateway).get("/health", headers={"origin": "http://127.0.0.1", "host": "127.0.0.1"}).status_code
        == 200
    )
    recipe = dataclasses.replace(gateway.recipe, cors_origins=["https://Shop.example/"])  # as an address bar has it
    named = make_client(Gateway(recipe, list(gateway.speakers.values()), gateway.engine))
    asked = named.options(CHAT, headers={**shop, "access-control-request-method": "POST"})
    assert asked.headers["access-control-allow-origin"] == "https://shop.example"
    answered = named.post(CHAT, json={"model": "base", "messages": ASKED}, headers=shop)
    assert answered.status_code == 200 and answered.headers["access-control-allow-origin"] == "https://shop.example"
    assert named.get("/health", headers={"origin": "https://other.example"}).status_code == 403
    told = {name.strip() for name in answered.headers["access-control-expose-headers"].split(",")}
    assert told == {"x-request-id", "x-dropped-messages", "x-message-cut", "retry-after"}


def test_who_is_refused_is_a_line_without_a_text_of_theirs(gateway, monkeypatch, capsys):
    elsewhere = {"origin": "https://secret.example", "access-control-request-method": "POST"}
    client = make_client(gateway)
    client.options(CHAT, headers=elsewhere)
    client.post("/secret", json={})
    assert CHAT in client.post("/v1/responses", json={}).json()["error"]["message"]
    client.get("/v1/models/secret")
    client.post(CHAT, json={"model": "secret", "messages": ASKED})
    client.get("/health", headers={"host": "secret.example"})
    recipe = dataclasses.replace(gateway.recipe, cors_origins=["https://shop.example"])
    make_client(Gateway(recipe, list(gateway.speakers.values()), gateway.engine)).options(CHAT, headers=elsewhere)
    make_client(gateway, "key").get("/v1/models", headers={"authorization": "Bearer secret"})
    monkeypatch.setattr(gateway, "in_flight", gateway.recipe.max_queue)
    ask(client)
    said = capsys.readouterr().err
    times, lines = zip(*re.findall(r"^carelm: (\S+ \S+) (.*?),", said, re.M))
    assert "secret" not in said and all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", time) for time in times)
    assert list(lines) == [
        f"{CHAT}: 403", "another path: 404", "/v1/responses: 404", "/v1/models/...: 404", f"{CHAT}: 404", "/health: 403",
        "preflight: 400", "/v1/models: 401", f"{CHAT}: 429",
    ]  # fmt: skip
    assert said.count("cors_origins") == 2 and "Host: 127.0.0.1" in said


def test_a_key_is_one_word_of_a_file_or_of_the_environment(gateway, tmp_path, monkeypatch):
    file = tmp_path / "key.txt"
    with_file = dataclasses.replace(gateway.recipe, api_key_file=str(file))
    file.write_bytes(b"\xef\xbb\xbf  from-the-file\r\n")  # as Windows writes it
    assert read_key(gateway.recipe) is None and read_key(with_file) == "from-the-file"
    monkeypatch.setenv("CARELM_API_KEY", "from-the-environment")
    assert read_key(gateway.recipe) == "from-the-environment" and read_key(with_file) == "from-the-file"
    for text in ("", "two words", "ключ"):
        file.write_text(text)
        with pytest.raises(UserError, match="key.txt holds no key"):
            read_key(with_file)


@pytest.mark.parametrize(
    ("host", "is_local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True), ("0.0.0.0", False),
     ("::", False), ("192.168.1.5", False), ("localhost.evil.example", False), ("", False)],
)  # fmt: skip
def test_an_address_that_others_reach_is_told_apart(host, is_local):
    assert is_loopback(host) == is_local


def test_what_fails_inside_is_a_500_without_text_and_the_server_goes_on(gateway, monkeypatch, capsys):
    def fails(*_, **__):
        raise RuntimeError("what the user wrote")

    client = make_client(gateway)
    monkeypatch.setattr(gateway.speakers["base"].chat, "fit_prompt", fails)
    reply = ask(client)
    assert reply.status_code == 500 and reply.json()["error"]["type"] == "engine_error"
    assert "wrote" not in reply.text + capsys.readouterr().err
    monkeypatch.undo()
    assert ask(client).status_code == 200 and gateway.in_flight == 0
