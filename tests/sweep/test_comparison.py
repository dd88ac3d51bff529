"""The comparison of runs: their answers joined by question, the same draws for all, and what cannot be compared refused."""

import json
import re

import pytest

from carelm.errors import UserError
from carelm.evaluation import scores
from carelm.evaluation.comparison import Compared, compare
from carelm.recipe_file import load_recipe

TIMES = {"p50": 9.0, "p95": 11.0, "p99": 12.0}
MEASURED = {
    "kind": "adapter", "folder": "run", "precision": "fp32", "bits": None, "load_seconds": 1.0, "total_parameters": 100,
    "trained_parameters": 1,
    "unused_generation_config": {}, "peak_memory_bytes": 2**30, "prompt_tokens": {"p50": 7, "p95": 8, "max": 9},
    "conditions": {"device": "CPU"}, "latency": {"prompts": 2, "ttft_ms": TIMES, "tpot_ms": TIMES, "e2e_ms": TIMES},
    "throughput": {"examples": 20, "of_examples": 20, "examples_per_second": 3.0, "tokens_per_second": 9.0, "batch_size": 4},
}  # fmt: skip
TRAINED = {
    "eval_loss": 2.5, "eval_loss_before": 4.0, "global_step": 7, "num_train_tokens": 700, "tokens_per_second": 50.0,
    "wall_seconds": 14.0, "peak_memory_bytes": 2**31, "trainable_parameters": 1, "total_parameters": 100,
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run as training and evaluation leave it: `answers` and `references` for 20 questions, and those of the base."""

    def run(name, answer, *words, reference="Lamp {0} is in aisle {0}.", base=None, order=1, **keys) -> Compared:
        recipe = load_recipe(["--output_dir", str(tmp_path / name), *words], usage="")
        folder = recipe.output_dir / "eval"
        folder.mkdir(parents=True)
        for model, text in (("base", base), ("adapter", answer)):
            lines = [
                {"id": f"q{i}", "conversation": f"c{i // 2}", "category": "lamps", "question": f"Where is lamp {i}?",
                 "prediction": text.format(i), "references": [reference.format(i)], "new_tokens": 6, "prompt_tokens": 5,
                 "finish_reason": "stop", "made_by": text}
                for i in range(20)
            ][::order] if text else []  # fmt: skip
            (folder / f"predictions-{model}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        models = {"base": MEASURED, "adapter": MEASURED} if base else {"adapter": MEASURED}
        test = {"questions": 20, "conversations": 10, "split": "test", "dataset": "rows"}
        (folder / "results.json").write_text(json.dumps({"models": models, "test": test, "conditions": {}}))
        (recipe.output_dir / "train_metrics.json").write_text(json.dumps(TRAINED))
        state = {"state": "finished", "error": "", "is_trained": True, "is_evaluated": True}
        return Compared(name=name, recipe=recipe, axes={"lora_r": 4}, **{**state, **keys})

    return run


def compared(tmp_path, *runs) -> dict:
    assert compare(tmp_path, "lamps", list(runs)) == tmp_path / "comparison.html"
    return json.loads((tmp_path / "comparison.json").read_text())


def test_answers_are_joined_by_question_whatever_their_order(run, tmp_path):
    found = compared(tmp_path, run("a", "Lamp {0} is in aisle {0}."), run("b", "Lamp {0} is in aisle {0}.", order=-1))
    assert [model["rougeL"]["value"] for model in found["models"].values()] == [1.0, 1.0]
    assert found["pairs"][0]["scores"]["rougeL"]["difference"] == 0


def test_a_base_that_was_asked_the_same_stands_there_once_and_first(run, tmp_path):
    runs = [
        run("a", "Lamp {0}", base="I am a lamp"),
        run("b", "aisle {0}", base="I am a lamp"),
        run("c", "x", base="Lamp?"),
    ]
    assert list(compared(tmp_path, *runs)["models"]) == ["base", "a", "b", "c/base", "c"]


def test_all_pairs_are_compared_on_the_same_draws_with_holm_over_all_of_them(run, tmp_path, monkeypatch):
    drawn = []
    draws = scores.draws
    monkeypatch.setattr(scores, "draws", lambda number, *rest: drawn.append((number, *rest)) or draws(number, *rest))
    texts = ["Lamp {0} is in aisle {0}.", "Lamp {0} is here.", "aisle", "Lamp", "in aisle {0}", "is in aisle {0}."]
    found = compared(tmp_path, *(run(f"r{k}", text) for k, text in enumerate(texts)))
    assert drawn[0] == (10, 1500, 42)  # conversations, 100 for each of 15 pairs, split_seed
    assert len(found["pairs"]) == 15 and found["best"] == "r0"
    adjusted = scores.holm([pair["scores"]["rougeL"]["p_value"] for pair in found["pairs"]])
    assert [pair["scores"]["rougeL"]["p_value_holm"] for pair in found["pairs"]] == adjusted
    assert [v for v in found["verdicts"] if "r0" in v] == found["verdicts"] and len(found["verdicts"]) == 5


def test_the_table_has_the_deciding_score_first_then_the_difference_to_the_best_and_what_it_costs(run, tmp_path):
    runs = [run("a", "Lamp {0} is in aisle {0}."), run("b", "Lamp {0} is here."),
            run("c", "", state="failed", error="error: no rows")]  # fmt: skip
    compared(tmp_path, *runs)
    table = (tmp_path / "comparison.md").read_text().partition("## The runs")[2].partition("##")[0].split("\n")
    head, a, b, c = (re.split(r" *\| *", line)[1:-1] for line in table if line.startswith("|") and "---" not in line)
    assert head[:4] == ["run", "ROUGE-L (decides)", "less a", "validation loss"]
    assert a[2] == "best" and re.fullmatch(r"-0\.4\d\d \(-0\.\d+ to -0\.\d+; p \S+\)", b[2])
    assert b[4:] == ["9.0 (p95 11.0)", "1.00", "1.000% (1)", "14.0 (7 steps)", "2.00", "50"]
    assert c[0] == "c (failed)" and "error: no rows" in (tmp_path / "comparison.html").read_text()


def test_without_answers_the_losses_are_compared(run, tmp_path):
    found = compared(tmp_path, run("a", "x", is_evaluated=False), run("b", "y", is_evaluated=False))
    assert (found["models"], found["best"]) == ({}, "a")
    assert "validation loss (decides)" in (tmp_path / "comparison.html").read_text()


LABELS = ("--labels", "same", "other", "--primary_metric", "rougeL")


def test_other_references_with_the_same_labels_are_compared_by_labels_alone_which_is_said(run, tmp_path):
    runs = [run("with", "It fits: same", *LABELS, reference="Lamp {0} is the lamp: same"),
            run("without", "other", *LABELS, reference="same")]  # fmt: skip
    found = compared(tmp_path, *runs)
    assert found["models"]["with"]["accuracy"]["value"] == 1 and found["models"]["without"]["accuracy"]["value"] == 0
    assert "rougeL" not in found["models"]["with"] and found["primary_metric"] == "macro_f1"
    assert any("only label scores are compared" in caution for caution in found["cautions"])


def test_validation_rows_are_no_matter_of_a_comparison(run, tmp_path):
    keys = (*LABELS, "--overlap_columns", "one", "two")
    found = compared(tmp_path, run("a", "same", *keys, reference="same"), run("b", "other", *keys, reference="same"))
    assert not any("validation" in caution for caution in found["cautions"])


def test_an_endpoint_is_compared_with_what_its_evaluation_knows_of_it(run, tmp_path):
    one = run("a", "Lamp {0} is here.")
    folder = one.recipe.output_dir / "eval"
    (folder / "predictions-api:x.jsonl").write_text((folder / "predictions-adapter.jsonl").read_text())
    (folder / "measured-api:x.json").write_text("{}")
    about = json.loads((folder / "results.json").read_text())
    about["models"]["api:x"] = MEASURED | {
        "kind": "api", "peak_memory_bytes": None, "latency": {"prompts": 0, "ttft_ms": {}, "tpot_ms": {}, "e2e_ms": {}}
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(about))
    assert list(compared(tmp_path, one)["models"]) == ["a", "a/api:x"]


@pytest.mark.parametrize(
    "words, reference, said",
    [
        ((), "Lamp {0} is upstairs.", "q0 has other references in b than in a; give all runs the same test rows"),
        (LABELS, "This one: other", r"q0 has other references in b than in a \(labels same and other\)"),
    ],
)
def test_other_references_are_refused(run, tmp_path, words, reference, said):
    runs = [run("a", "x", *words, reference="Lamp {0}: same"), run("b", "y", *words, reference=reference)]
    with pytest.raises(UserError, match=said):
        compare(tmp_path, "lamps", runs)
    assert not (tmp_path / "comparison.html").exists()


@pytest.mark.parametrize("change, said", [({"id": "z"}, "a and b were asked other questions"),
                                          ({"conversation": "z"}, "q3 is of another conversation in b than in a")])  # fmt: skip
def test_other_questions_and_conversations_are_refused(run, tmp_path, change, said):
    runs = [run("a", "x"), run("b", "y")]
    file = tmp_path / "b/eval/predictions-adapter.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[3] |= change
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=said):
        compare(tmp_path, "lamps", runs)
