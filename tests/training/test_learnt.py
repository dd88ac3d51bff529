"""A run that learns next to nothing says so: before it, and at its end below its figures."""

import dataclasses
import json
import runpy
import sys
import types

import numpy as np
import pytest
from conftest import PROJECT

from carelm.chat.chat import make_chat
from carelm.recipe_file import load_recipe
from carelm.training import learnt
from carelm.training.prepared import prepare
from carelm.training.preview import preview

METRICS = {
    "eval_loss_before": 8.6912, "eval_loss": 7.4371, "global_step": 12, "wall_seconds": 95.0, "num_trained_tokens": 1234,
    "tokens_per_second": 512.4, "peak_memory_bytes": 2**30,
}  # fmt: skip


@pytest.fixture
def rows(tmp_path):
    """A file of 30 questions and answers."""
    lines = (json.dumps({"question": f"Question {i}?", "answer": f"Answer {i}."}) for i in range(30))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    return tmp_path / "rows.jsonl"


def recipe_of(**keys):
    keys = {"max_steps": -1, "num_train_epochs": 1, "global_batch_size": 16, "learning_rate": 2e-4, **keys}
    return load_recipe([f"--{key}={value}" for key, value in keys.items()], usage="")


def expected(recipe, rows=400, validation_rows=40) -> str:
    return " ".join(learnt.expect(recipe, types.SimpleNamespace(train=range(rows), validation=range(validation_rows))))


def test_few_rows_that_make_few_steps_are_said_with_what_would_help():
    assert expected(recipe_of(), rows=30) == (
        "2 optimizer steps only (30 rows, 16 a step), at a learning_rate of 0.0002: it will hardly learn; take at least 25 "
        "steps (--max_steps 25) or fewer rows a step (--global_batch_size 4) or a higher --learning_rate (now 0.0002)"
    )
    one = expected(recipe_of(max_steps=1, learning_rate=2e-3, global_batch_size=4), rows=30)
    assert one.startswith("1 optimizer step only") and one.endswith("take at least 3 steps (--max_steps 3)")
    fixed = expected(recipe_of(max_steps=2), validation_rows=1)  # however few rows a step has, it is 2 steps
    assert "take at least 25 steps (--max_steps 25) or a higher --learning_rate" in fixed
    assert fixed.endswith("the eval loss is that of 1 example only: it moves by chance")


def test_a_rate_that_is_one_for_answers_is_said_where_pairs_are_learnt():
    pairs = {
        "objective": "preferences",
        "trained_turns": "last",
        "prompt_template": "{q}",
        "completion_template": "{a}",
        "rejected_template": "{b}",
    }
    said = expected(recipe_of(**pairs, learning_rate=2e-3))
    assert said.startswith("a learning_rate of 0.002 is one for answers") and said.endswith("(--learning_rate 2e-05)")
    assert not expected(recipe_of(**pairs, learning_rate=1e-4))


@pytest.mark.parametrize(
    "keys",
    [
        {"learning_rate": 2e-3},  # the demo's
        {"learning_rate": 5e-4, "max_steps": 26},  # the fewest steps that were measured to learn
        {"method": "full", "load_in_4bit": "false", "learning_rate": 1e-4, "max_steps": 26},
        {"method": "prompt_tuning", "learning_rate": 5e-4, "max_steps": 40},  # no limit was measured
    ],
)
def test_steps_that_were_measured_to_learn_are_no_alarm(keys):
    assert expected(recipe_of(**keys)) == ""


ASSESSED = [
    # what public rows on the demo's base, prompt tuning and the assistants on a real base have come to
    ([(0, 8.69), (12, 7.44)], "an eval loss of 7.440 is very high"),
    ([(0, 8.724), (60, 5.123)], "an eval loss of 5.123 is very high"),
    ([(0, 2.006), (40, 1.984)], "the eval loss has barely fallen (2.006 -> 1.984)"),
    ([(0, 2.0), (40, 2.0)], "the eval loss has not fallen (2.000 -> 2.000)"),
    ([(0, 1.9), (20, 2.4), (40, 2.6)], "the eval loss has not fallen (1.900 -> 2.600)"),
    ([(0, 1.9), (100, 1.2), (400, 1.4)], "the eval loss was best at step 100 of 400, 1.200, and is 1.400 at the end"),
    ([(100, 1.2), (400, 1.4)], "the eval loss was best at step 100 of 400"),
    ([(0, 9.162), (60, 4.037)], None),
    ([(0, 2.007), (40, 1.791)], None),
    ([(0, 4.863), (200, 0.347), (400, 0.171)], None),
    ([(0, 4.294), (75, 0.019), (150, 0.021)], None),
    ([(40, 2.0)], None),
    ([], None),
]  # fmt: skip


@pytest.mark.parametrize("losses, said", ASSESSED)
def test_what_eval_losses_say_against_a_run(losses, said):
    said_of_it = learnt.assess(recipe_of(learning_rate=5e-4), losses)
    assert said_of_it is None if said is None else said_of_it.startswith(said) and "\n" not in said_of_it


def test_the_remedy_is_more_steps_and_a_higher_rate_where_that_is_still_low():
    low = learnt.assess(recipe_of(), [(0, 8.69), (12, 7.44)])
    assert low.endswith("take more steps (--max_steps, now 12) or a higher --learning_rate (now 0.0002) or more rows")
    high = learnt.assess(recipe_of(learning_rate=2e-3), [(0, 8.69), (12, 7.44)])
    assert high.endswith("take more steps (--max_steps, now 12) or more rows")
    assert "--early_stopping_patience 2" in learnt.assess(recipe_of(), [(0, 1.9), (100, 1.2), (400, 1.4)])


def test_a_run_that_adds_rows_to_what_an_adapter_knows_is_judged_by_what_it_forgets(tmp_path):
    (tmp_path / "other.yaml").write_text("messages_column: messages\n")
    mixed = recipe_of(also_train={str(tmp_path / "other.yaml"): "all"})
    recipe = dataclasses.replace(mixed, adapter="outputs/shop")
    assert learnt.assess(recipe, [(0, 0.367), (33, 0.376)]) is None
    assert learnt.assess(recipe, [(0, 0.171), (78, 0.311)]).startswith(
        "the eval loss has risen (0.171 -> 0.311): it forgets"
    )


def test_where_the_best_weights_are_kept_a_later_rise_is_no_matter():
    assert learnt.assess(recipe_of(), [(0, 1.9), (100, 1.2), (400, 1.4)], kept=1.2) is None


def test_the_preview_says_it_too(rows, make):
    recipe = make(rows, num_train_epochs=1)
    last = preview(recipe, make_chat(recipe), 1).splitlines()[-2:]
    assert last[0].startswith("2 optimizer steps only (30 rows, 16 a step)") and last[1].startswith(
        "no validation rows"
    )


def test_trained_tokens_are_those_that_the_data_report_counts(rows, make):
    recipe = make(rows)
    prepared = prepare(recipe, make_chat(recipe))
    counts = prepared.train.trained_counts
    assert counts.tolist() == [int(np.sum(prepared.train[i][1])) for i in range(30)]
    assert counts.sum() == prepared.report["train"]["trained_tokens"] < prepared.report["train"]["tokens"]


def test_a_person_reads_rounded_figures_below_the_json_line(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr("sys.argv", ["train/sft.py", "--output_dir", str(tmp_path / "out")])
    sft, recipe = runpy.run_path("train/sft.py"), load_recipe(["--output_dir", str(tmp_path / "out")], usage="")
    metrics = METRICS | {"caution": learnt.assess(recipe, [(0, 8.6912), (12, 7.4371)])}
    monkeypatch.setattr(sys, "stderr", sys.stdout)  # as in a terminal
    sft["report"](recipe, metrics)
    first, *said = capfd.readouterr().out.splitlines()
    assert json.loads(first) == metrics
    assert said[:3] == [
        f"carelm: finished: {tmp_path}/out, eval loss 8.6912 -> 7.4371",
        "carelm: 12 steps, 1.6 minutes, 1,234 trained tokens, 512 tokens/s, 1.0 GiB of memory; all figures: "
        f"{tmp_path}/out/train_metrics.json",
        f"carelm: {metrics['caution']}",
    ]
    assert [line[:14] for line in said[3:]] == ["carelm: next: "] * 3


@pytest.mark.parametrize("tokens, ends", [((32.14, 30.0), ", answers of 32.1 -> 30.0 tokens"), ((None, None), "")])
def test_a_run_of_preferences_says_how_likely_preferred_answers_are_and_how_long_its_own(tokens, ends):
    chosen = {"eval_chosen_loss_before": 1.0, "eval_chosen_loss": 1.25}
    lengths = dict(zip(("eval_answer_tokens_before", "eval_answer_tokens"), tokens))
    metrics = (
        {"wall_seconds": 60, "global_step": 8, "eval_loss_before": 0.6931, "eval_loss": 0.5, "caution": None}
        | chosen
        | lengths
    )
    assert learnt.in_words(recipe_of(), metrics)[0].endswith(f"chosen loss 1.0000 -> 1.2500{ends}")


def test_what_went_on_from_an_adapter_is_compared_with_it_next(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr("sys.argv", ["train/sft.py", "--adapter", "outputs/shop", "--output_dir", str(tmp_path)])
    recipe = dataclasses.replace(load_recipe(["--output_dir", str(tmp_path)], usage=""), adapter="outputs/shop")
    runpy.run_path("train/sft.py")["report"](recipe, METRICS | {"caution": None})
    assert f"--config {tmp_path}/recipe.yaml --models outputs/shop adapter\n" in capfd.readouterr().err


def test_without_test_rows_the_next_command_is_no_evaluation_and_a_terminal_shows_no_json(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(PROJECT)
    monkeypatch.setattr("sys.argv", ["train/sft.py", "--output_dir", str(tmp_path)])
    sft, recipe = runpy.run_path("train/sft.py"), load_recipe(["--output_dir", str(tmp_path)], usage="")
    (tmp_path / "data_report.json").write_text(json.dumps({"train": {"used": 3}, "test": {"used": 0}}))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    sft["report"](recipe, METRICS | {"caution": None})
    out, err = capfd.readouterr()
    assert out == "" and [line.split("next: ")[1].split()[1] for line in err.splitlines() if "next: " in line] == [
        "train/chat.py",
        "serve/run.py",
    ]
