"""A Hub that does not answer is not waited for."""

import contextlib
import os
import socket
import subprocess
import sys

import pytest
from hub_server import serve
from launching import PROJECT

from carelm.data import sources
from carelm.recipe_file import load_recipe

NOWHERE = "http://127.0.0.1:9"  # nothing listens there
MESSAGES = ("--messages_column", "messages")
ROWS = ("--dataset_name", "shop/rows", *MESSAGES)


@pytest.fixture
def asked(monkeypatch, capsys):
    """Whether the Hub's libraries are kept from asking it, for these keys, and what was said."""

    def ask(endpoint, *keys):
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
        recipe = load_recipe(list(keys), usage="")
        capsys.readouterr()
        sources.stay_offline(recipe)
        return os.environ.get("HF_HUB_OFFLINE"), capsys.readouterr().err

    return ask


@pytest.mark.parametrize(
    "keys", [("--model_name_or_path", "nobody/nothing"), ("--dataset_name", "nobody/rows", *MESSAGES)]
)
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


@pytest.mark.parametrize("keys", [("--model_name_or_path", "shop/base"), ROWS])
def test_a_hub_that_answers_with_an_error_of_its_own_is_not_asked_again_and_again(asked, keys):
    with serve({}, (503, "")) as hub:
        offline, said = asked(hub, *keys)
    assert offline == "1"
    assert said.endswith(f"{hub} cannot be reached (it answers 503 Service Unavailable): there is only what an earlier run has "
                         "fetched from it\n")  # fmt: skip


def test_what_searches_documents_needs_the_embedder_too(monkeypatch, capsys):
    monkeypatch.setenv("HF_ENDPOINT", NOWHERE)
    for words, is_needed in (
        ([], False),
        (["--embedder", "nobody/e5"], True),
        (["--embedder", "nobody/e5", "--retriever", "bm25"], False),
    ):
        recipe = load_recipe(words, usage="")
        sources.stay_offline(recipe)
        assert "cannot be reached" not in capsys.readouterr().err and os.environ.pop("HF_HUB_OFFLINE") == "1"
        sources.stay_offline(recipe, and_embedder=True)
        assert ("cannot be reached" in capsys.readouterr().err) == is_needed and os.environ.pop("HF_HUB_OFFLINE") == "1"


def test_what_is_told_to_stay_offline_asks_nothing(asked, monkeypatch):
    monkeypatch.setattr(sources, "urlopen", lambda *_, **__: pytest.fail("it was asked"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert asked(NOWHERE, "--model_name_or_path", "nobody/nothing") == ("1", "")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert asked(NOWHERE) == ("1", "")  # the demo needs nothing from it


@pytest.mark.parametrize(
    "refusal, keys, said",
    [
        ((403, "GatedRepo"), ("--model_name_or_path", "shop/base"), "shop/base is gated; accept its licence on HUB/shop/base"),
        ((401, "RepoNotFound"), ROWS, "the Hub knows none or does not show it; mend the name, or "
         "accept its licence on HUB/datasets/shop/rows"),
        ((503, ""), ROWS, "no earlier run has fetched it, and the Hub is not asked (offline)"),
        (None, ("--model_name_or_path", "shop/base"), "no earlier run has fetched it, and the Hub is not asked (offline)"),
    ],
)  # fmt: skip
def test_what_the_hub_does_not_give_is_one_line_with_licence_and_login_as_likely_causes(tmp_path, refusal, keys, said):
    with serve({}, refusal) if refusal else contextlib.nullcontext(NOWHERE) as hub:
        done = subprocess.run([sys.executable, "train/sft.py", *keys, "--output_dir", tmp_path / "out"], cwd=PROJECT,
                              env={**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path)}, capture_output=True,
                              text=True, timeout=60)  # fmt: skip
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and line.startswith(f"error: {keys[0][2:]}: {keys[1]} is ")
    assert said.replace("HUB", hub) in line and line.rstrip(")").endswith("log in here: hf auth login")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("BuilderConfig 'xx' not found. Available: ['de', 'en']"),
        Exception("data did not match any variant of untagged enum ModelWrapper at line 1 column 20"),
    ],
)
def test_what_is_fetched_and_cannot_be_read_is_told_as_its_library_tells_it_offline_too(monkeypatch, error):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = str(sources.why_not_had("dataset_name", "shop/rows", error))
    assert str(error) in said and "no earlier run" not in said


def test_a_folder_of_nearly_that_name_is_a_hint_and_no_reason_not_to_ask_the_hub(make, tmp_path, monkeypatch):
    for folder in ("rows-v1", "gemma-2-2b-it"):
        (tmp_path / "shop" / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    asked, rows = [], {name: [{"question": "Open?", "answer": "Yes."}] for name in ("train", "test")}
    monkeypatch.setattr("datasets.load_dataset", lambda *names: asked.append(names) or rows)
    assert len(sources.load_splits(make("shop/rows-v2"))[0]["train"]) == 1 and asked == [("shop/rows-v2", None)]
    assert load_recipe(["--model_name_or_path", "shop/gemma-2-2b"], usage="").base == "shop/gemma-2-2b"
    for key, name, like in (
        ("dataset_name", "shop/rows-v2", "rows-v1"),
        ("model_name_or_path", "shop/gemma-2-2b", "gemma-2-2b-it"),
    ):
        said = str(sources.why_not_had(key, name, OSError("not there")))
        assert said.endswith(f"(not there); did you mean shop/{like}?")
