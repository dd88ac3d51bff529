"""eval/grounding.py: what passages change, whether marks are true, and what is refused, from rows and answers alone."""

import json
import runpy
import sys

import pytest
from conftest import PROJECT

from carelm.chat.grounding import DONT_KNOW, ground
from carelm.errors import UserError
from carelm.retrieval.grounded_results import for_all
from carelm.retrieval.passages import Passage

CONDITIONS = ("retrieved", "gold", "none", "left out")


def row(k, condition):
    other = Passage("o#1", "other.md", None, None, None, None, "Lamps are made of brass.")
    gold = Passage(f"g#{k}", "shop.md", None, None, None, None, f"The mat {k} costs {k} euros.")
    shown = {"retrieved": [other, gold], "gold": [gold], "none": [], "left out": [other]}[condition]
    mark = {"retrieved": " [2]", "gold": " [1]"}.get(condition, "")
    answer = DONT_KNOW if condition == "left out" else f"The mat {k} costs {k} euros{mark}."
    return {
        "id": f"{k}/{condition}",
        "question_id": str(k),
        "condition": condition,
        "gold": [f"g#{k}"],
        "passages": [p.id for p in shown],
        "confidence": {"retrieved": 0.3 + 0.01 * k, "left out": 0.02 * k}.get(condition),
        "messages": [
            {"role": "user", "content": ground(f"What does the mat {k} cost?", shown)},
            {"role": "assistant", "content": answer},
        ],
    }


def said(row):
    """Repeats what it is shown, marks it wrongly for odd questions, and refuses every third that it cannot know."""
    k, answer = int(row["question_id"]), row["messages"][-1]["content"]
    if row["condition"] == "none":
        return "I like mats."
    if row["condition"] == "left out":
        return answer if k % 3 == 0 else "Mats are made of brass [1]. The mat is blue [4]."
    return answer.replace("[2]", "[1]") if k % 2 else answer


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    def run(*words):
        (tmp_path / "shop.yaml").write_text("{messages_column: messages, id_column: id, num_resamples: 200}")
        keys = [
            "--config",
            tmp_path / "shop.yaml",
            "--dataset_name",
            tmp_path / "rows",
            "--output_dir",
            tmp_path / "out",
        ]
        monkeypatch.setattr(sys, "argv", [str(PROJECT / "eval/grounding.py"), *map(str, keys), *words])
        runpy.run_path(sys.argv[0])["main"]()
        return capsys.readouterr()

    return run


def test_what_passages_change_what_is_supported_and_what_is_refused_stands_in_the_report(run, tmp_path):
    rows = [row(k, c) for k in range(1, 21) for c in CONDITIONS]
    write(tmp_path / "rows/test.jsonl", rows)
    write(tmp_path / "rows/validation.jsonl", [row(k, c) for k in range(1, 31) for c in ("retrieved", "left out")])
    told = run()
    assert "No model has answered" in told.err and json.loads(told.out)["models"] == {}
    write(tmp_path / "out/eval/predictions-tuned.jsonl", [{"id": r["id"], "prediction": said(r)} for r in rows])
    write(tmp_path / "out/eval/predictions-half.jsonl", [{"id": r["id"], "prediction": "No."} for r in rows[:7]])
    told = run("--false_refusals", "0.2")
    assert "half is left out: it has not answered 73 rows (first: 3/none)" in told.err
    found = json.loads((tmp_path / "out/eval/grounding/results.json").read_text())
    assert found["questions"] == 20 and found["retrieved"] == 1.0 and [*found["models"]] == ["tuned"]
    tuned = found["models"]["tuned"]
    assert tuned["scores"]["retrieved"]["rougeL"]["value"] == 1.0  # marks do not count
    none, retrieved = (tuned["scores"][c]["rougeL"]["value"] for c in ("none", "retrieved"))
    (pair,) = [p["scores"]["rougeL"] for p in tuned["pairs"] if p["models"] == ["none", "retrieved"]]
    assert pair["difference"] == pytest.approx(retrieved - none) and pair["low"] > 0
    support = tuned["support"]["retrieved"]
    assert (support["supported"]["value"], support["marked"]["value"], support["false_marks"]["value"]) == (
        0.5,
        1.0,
        0.0,
    )
    assert tuned["refused"]["left out"] | {"low": 0, "high": 0} == {
        "value": 0.3, "low": 0, "high": 0, "refused": 6, "questions": 20,
    }  # fmt: skip
    assert "retrieved, no gold passage among them" not in tuned["refused"]
    assert tuned["refused"]["retrieved, a gold passage among them"]["questions"] == 20
    by = found["refusals"]["by"]
    assert by["retriever, by validation"]["threshold"] == pytest.approx(
        0.365
    )  # of validation's 30 answerable six lie below
    assert by["retriever, by validation"]["retrieved"]["refused"] == 6  # of test's 20
    assert by["retriever"]["threshold"] == pytest.approx(0.345)  # of these four
    alone, both = (by[name]["left out"]["refused"] for name in ("retriever", "tuned"))
    assert 20 > both > alone  # those that it says it cannot know too
    report = (tmp_path / "out/eval/grounding/report.md").read_text()
    assert "| tuned | retrieved passages less no passages |" in report and "retriever and tuned" in report
    assert (tmp_path / "out/eval/grounding/refusals.svg").read_text().startswith("<svg")


def test_a_row_that_asks_what_another_one_asks_has_its_answer():
    rows = [row(1, "retrieved"), row(1, "gold"), row(2, "gold")]
    rows[0]["messages"][0] = rows[1]["messages"][0]
    assert for_all(rows, {"1/gold": "Yes."}) == {"1/retrieved": "Yes.", "1/gold": "Yes."}


def test_other_rows_are_refused_in_one_line(run, tmp_path):
    with pytest.raises(UserError, match="has no validation.jsonl; make the rows first: python train/make_rows.py"):
        run()
    write(tmp_path / "rows/validation.jsonl", [{"messages": []}])
    with pytest.raises(UserError, match="holds no rows of train/make_rows.py"):
        run()
    with pytest.raises(UserError, match="--false_refusals: 1.5 is no share between 0 and 1"):
        run("--false_refusals", "1.5")
    with pytest.raises(UserError, match="id_column: it is no, and the rows of train/make_rows.py have theirs in id"):
        run("--id_column", "no")
