"""train/add_column.py: rows that lack a column get it from a model, with who wrote it beside it."""

import json
import runpy
import sys

import pytest
from conftest import PROJECT
from small_endpoint import Endpoint, completion

from carelm.data.readers import Rows
from carelm.errors import UserError
from carelm.evaluation.added import ask_for, fill_in, load_rows


@pytest.fixture
def rows(tmp_path):
    """A recipe whose answers need a column that some rows lack."""
    own = [
        {"q": f"Where is parcel {k}?", "a": "On its way.", "reason": "It left." if k == 0 else None} for k in range(3)
    ]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))
    (tmp_path / "test.jsonl").write_text(json.dumps({"q": "And mine?", "a": "Soon."}) + "\n")
    keys = {
        "model_name_or_path": "demo/base", "precision": "fp32", "dataset_name": str(tmp_path / "*.jsonl"),
        "prompt_template": "{q}", "completion_template": "{a} {reason}", "max_new_tokens": 200, "system_prompt": "Be kind.",
        "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "shop.yaml").write_text(json.dumps(keys))
    return tmp_path


@pytest.fixture
def run(rows, monkeypatch, capsys):
    def run(*words, file="add_column.py"):
        argv = [str(PROJECT / "train" / file), "--config", str(rows / "shop.yaml"), *words]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(argv[0])["main"]()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_model_fills_in_what_is_missing_and_the_test_rows_stay_as_they_are(rows, run):
    told = run("--add", "reason", "--ask", "{q} {a} Why?", file="make_rows.py")
    first, *others = read(rows / "out-reason/train.jsonl")
    assert (first["reason"], first["reason_source"]) == ("It left.", "data")
    assert all(row["reason"] and row["reason_source"] == "base" and row["a"] == "On its way." for row in others)
    assert read(rows / "out-reason/test.jsonl") == [
        {"q": "And mine?", "a": "Soon.", "reason": None, "reason_source": None}
    ]
    assert told["rows"] == {"train": 3, "test": 1} and told["counts"] == {"train rows filled in": 2}


def test_an_endpoint_fills_it_in_and_what_it_has_said_is_not_asked_again(rows, run):
    endpoint = Endpoint()
    endpoint.say = lambda body, _: completion(f"Because of {body['messages'][-1]['content']}")
    words = ("--add", "reason", "--ask", "{q}", "--model", "api:big", "--api_url", endpoint.url)
    run(*words)
    found = [(row["reason"], row["reason_source"]) for row in read(rows / "out-reason/train.jsonl")]
    assert found == [("It left.", "data"), *((f"Because of Where is parcel {k}?", "api:big") for k in (1, 2))]
    run(*words)
    assert len(endpoint.bodies) == 2


def test_the_model_is_asked_by_the_columns_alone_and_an_answer_cut_off_is_nobodys():
    rows: Rows = [
        ("r.jsonl:1", {"q": "Where?", "n": 7.0}),
        ("r.jsonl:2", {"q": " ", "n": 8}),
        ("r.jsonl:3", {"q": "x", "n": 1}),
    ]
    questions, without = ask_for("{q} ({n}) {{why}}", "why", rows)
    assert [q.messages for q in questions] == [
        [{"role": "user", "content": "Where? (7) {why}"}], [{"role": "user", "content": "x (1) {why}"}],
    ]  # fmt: skip
    assert without == {"empty column 'q'": 1}
    answers = [
        {"id": "r.jsonl:1", "prediction": " So. ", "finish_reason": "stop"},
        {"id": "r.jsonl:3", "prediction": "It goes on", "finish_reason": "length"},
    ]
    filled, counts = fill_in("why", rows, answers, "api:big")
    assert [(row["why"], row["why_source"]) for row in filled] == [("So.", "api:big"), (None, None), (None, None)]
    assert counts == {"answer empty or cut off": 1}


def test_the_worse_answer_of_pairs_can_be_filled_in(tmp_path, make):
    (tmp_path / "train.jsonl").write_text('{"q": "Where?", "a": "Here."}\n')
    keys = {"prompt_template": "{q}", "completion_template": "{a}", "rejected_template": "{worse}"}
    recipe = make(tmp_path / "train.jsonl", objective="preferences", **keys)
    assert load_rows(recipe, "{q}")["train"][0][1] == {"q": "Where?", "a": "Here."}


def test_that_rows_are_filled_in_which_are_tested_on_later_is_said(rows, make, capsys):
    load_rows(make(rows / "*.jsonl", test_fraction=0.2), "{q}")
    assert "no test split" not in capsys.readouterr().err
    load_rows(make(rows / "train.jsonl", test_fraction=0.2), "{q}")
    assert "rows that training will hold out to test on are filled in too" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, line",
    [
        (["--ask", "{q}"], "--add is missing"),
        (["--add", "reason", "--ask", "Why?"], "--ask: it names no column"),
        (["--add=reason", "--ask", "Why?"], "--ask: it names no column"),
        (["--add", "reason", "--ask", "{question}"], "has no column 'question'"),
        (["--add", "q", "--ask", "{a}"], "--add: every row has the column q"),
        (["--add", "reason", "--ask", "{q}", "--to", "{rows}"], "--to: .* holds other data"),
    ],
)
def test_what_cannot_be_added_is_one_line_before_any_weights(rows, run, words, line):
    for file in (
        ("add_column.py", "make_rows.py") if any(word.startswith("--add") for word in words) else ("add_column.py",)
    ):
        with pytest.raises(UserError, match=line):
            run(*[word.replace("{rows}", str(rows)) for word in words], file=file)
