"""A Hub that does not answer is not waited for."""

import os
import socket

import pytest
from hub_server import serve

from carelm.data import sources
from carelm.recipe_file import load_recipe

NOWHERE = "http://127.0.0.1:9"  # nothing listens there


@pytest.fixture
def asked(monkeypatch, capsys):
    """Whether the Hub's libraries are kept from asking it, for these keys, and what was said."""

    def ask(endpoint, *keys):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        sources.stay_offline(load_recipe(list(keys), usage=""))
        return os.environ.get("HF_HUB_OFFLINE"), capsys.readouterr().err

    return ask


@pytest.mark.parametrize("keys", [("--model_name_or_path", "nobody/nothing"), ("--dataset_name", "nobody/rows")])
def test_a_hub_that_cannot_be_reached_is_said_and_not_asked(asked, keys):
    offline, said = asked(NOWHERE, *keys)
    assert offline == "1" and f"{NOWHERE} cannot be reached (" in said and len(said.splitlines()) == 1


def test_a_hub_that_keeps_silent_is_given_up_after_its_time(asked, monkeypatch):
    monkeypatch.setattr(sources, "HUB_PATIENCE", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        offline, said = asked(f"http://127.0.0.1:{silent.getsockname()[1]}", "--model_name_or_path", "nobody/nothing")
    assert offline == "1" and "cannot be reached (" in said


def test_a_hub_that_answers_is_asked_whatever_it_says(asked, base):
    with serve({"models/shop/base": base}) as hub:  # its front page is a 404
        assert asked(hub, "--model_name_or_path", "shop/base") == (None, "")


def test_what_is_told_to_stay_offline_asks_nothing(asked, monkeypatch):
    monkeypatch.setattr(sources, "urlopen", lambda *_, **__: pytest.fail("it was asked"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert asked(NOWHERE, "--model_name_or_path", "nobody/nothing") == ("1", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert asked(NOWHERE) == ("1", "")  # the demo needs nothing from it
