"""Past tickets are found by their questions, with what resolved them, and a finished run says which of them are the same."""

import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("lancedb")
from drawn import make_adapter

from carelm.errors import UserError
from carelm.recipe_file import load_recipe
from carelm.retrieval.matcher import Matcher
from carelm.retrieval.tickets import Tickets, update_tickets

PAST = [
    ("T1", "lamp", "My lamp flickers when I turn it on.", "We sent another bulb."),
    ("T2", "kettle", "The kettle does not switch itself off.", "Please descale it with vinegar."),
    ("T3", "lamp", "The lamp came with a broken shade.", "A new shade is on its way."),
]
PAIRS = {"prompt_template": "A: {new}\nB: {past}\nSame?", "completion_template": "Reason: {why}\nLabel: {label}"}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Past tickets with a recipe, and a run that matches pairs."""
    folder = tmp_path_factory.mktemp("tickets")
    (folder / "past").mkdir()
    write(folder / "past/train.jsonl",
          [{"id": i, "product": p, "asked": q, "answered": a} for i, p, q, a in PAST])  # fmt: skip
    keys = {
        "dataset_name": str(folder / "past"), "prompt_template": "Ticket: {asked}", "completion_template": "{answered}",
        "id_column": "id", "product_column": "product", "validation_fraction": 0, "test_fraction": 0,
        "model_name_or_path": "demo/base",
    }  # fmt: skip
    (folder / "past.yaml").write_text(json.dumps(keys))
    pairs = [{"new": "a", "past": "b", "why": "It is.", "label": label} for label in ("same", "other")]
    write(folder / "pairs.jsonl", pairs)
    words = [word for key, text in PAIRS.items() for word in (f"--{key}", text)]
    make_adapter(
        folder / "matcher", *words, "--dataset_name", str(folder / "pairs.jsonl"), "--labels", "same", "other",
        "--load_in_4bit", "false", "--max_new_tokens", "8", "--max_length", "128",
    )  # fmt: skip
    return folder


def shop(folder, *more):
    keys = ["--tickets", str(folder / "past.yaml"), "--index", str(folder / "index"), "--retriever", "bm25", *more]
    return load_recipe(["--config", "recipes/demo.yaml", *keys], usage="")


@pytest.fixture(scope="module")
def index(folder):
    return update_tickets(shop(folder))


def test_past_questions_are_found_with_what_resolved_them(folder, index):
    assert index.passages == 3 and not update_tickets(shop(folder)).changed
    found = Tickets(shop(folder)).match("The lamp flickers", 2)
    assert [(m.ticket_id, m.resolution) for m in found] == [
        ("T1", "We sent another bulb."),
        ("T3", "A new shade is on its way."),
    ]
    assert "My lamp flickers" in found[0].question and found[0].score > found[1].score
    assert (found[0].same, found[0].probability, found[0].reason) == (None, None, None)
    kettle = Tickets(shop(folder)).match("It flickers and the kettle does not switch off", 5, "kettle")
    assert [m.ticket_id for m in kettle] == ["T2"]


def test_a_matcher_says_which_are_the_same_with_reason_and_calibrated_probability(folder, index, capsys):
    recipe = shop(folder, "--matcher", str(folder / "matcher"))
    tickets = Tickets(recipe)
    assert "is not calibrated" in capsys.readouterr().err
    tickets.matcher.load()
    found = tickets.match("The lamp flickers", 2)
    assert all(isinstance(m.reason, str) and 0 < m.probability < 1 and m.same == (m.probability > 0.5) for m in found)
    (folder / "matcher/eval").mkdir()
    (folder / "matcher/eval/results.json").write_text('{"models": {"adapter": {"calibration": {"temperature": 4.0}}}}')
    calibrated = Tickets(recipe)
    assert "is not calibrated" not in capsys.readouterr().err
    calibrated.matcher.load()
    odds = [np.log(m.probability / (1 - m.probability)) for m in found]
    of_calibrated = [np.log(m.probability / (1 - m.probability)) for m in calibrated.match("The lamp flickers", 2)]
    assert np.allclose(of_calibrated, np.array(odds) / 4, rtol=1e-4)


def test_a_pair_too_long_for_the_window_loses_the_end_of_the_longer_ticket(folder):
    matcher = Matcher(str(folder / "matcher"))
    (message,) = matcher._messages("lamp " * 20_000, "It flickers.")
    assert message["content"].endswith("\nB: It flickers.\nSame?") and message["content"].startswith("A: lamp lamp")
    assert matcher._limit - 4 <= len(matcher.chat.prompt_ids([message])) <= matcher._limit


def test_what_is_no_matcher_and_no_tickets_is_one_line(folder, tmp_path):
    with pytest.raises(UserError, match="matcher: .* is no folder of a finished run"):
        Matcher(str(tmp_path))
    make_adapter(tmp_path / "run")
    with pytest.raises(UserError, match="matcher: .* does not match tickets .*0 columns, and there are 0 labels"):
        Matcher(str(tmp_path / "run"))
    with pytest.raises(UserError, match="tickets: .*nowhere"):
        update_tickets(dataclasses.replace(shop(folder), tickets="nowhere.yaml"))
    with pytest.raises(UserError, match=r"index: .*tickets is not there yet; make it: python serve/index.py"):
        Tickets(dataclasses.replace(shop(folder), index=str(tmp_path / "none")))
