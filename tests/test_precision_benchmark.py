"""benchmarks/precision.py tells whether bf16 is as good as fp32, and makes no run twice."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import precision  # noqa: E402


def a_run(eval_loss):
    return {"eval_loss_before": 2.0, "eval_loss": eval_loss, "global_step": 100}


@pytest.mark.parametrize("bf16, holds", [(1.004, True), (0.996, True), (1.006, False), (0.994, False)])
def test_a_loss_more_than_half_a_percent_apart_is_called_so(bf16, holds):
    runs = {"fp32": a_run(1.0), "bf16": a_run(bf16)}
    found = precision.compare(runs)
    assert found["holds"] is holds and found["apart"] == pytest.approx(bf16 - 1)
    assert ("holds" in precision.table({"rows": found | {"runs": runs}})) is holds


def test_it_goes_on_with_what_is_left_and_begins_anew_with_other_settings(tmp_path, monkeypatch):
    (tmp_path / "data/medquad").mkdir(parents=True)
    monkeypatch.setenv("CARELM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(precision, "RESULTS", tmp_path)
    write = lambda _, result: (tmp_path / "precision.json").write_text(json.dumps(result))  # noqa: E731
    monkeypatch.setattr(precision, "write_results", write)
    monkeypatch.setattr(sys, "argv", ["precision.py", "--only", "medquad"])
    made = []
    monkeypatch.setattr(precision, "train", lambda name, rows, kind, settings: made.append(kind) or a_run(1.0))
    precision.main()
    precision.main()
    assert made == ["fp32", "bf16"]
    assert json.loads((tmp_path / "precision.json").read_text())["medquad"]["holds"] is True
    monkeypatch.setitem(precision.SETTINGS, "max_steps", 50)
    precision.main()
    assert made == ["fp32", "bf16"] * 2
