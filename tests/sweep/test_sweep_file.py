"""A sweep's file becomes named runs, each a checked recipe; what is wrong with one is said before anything runs."""

import json
import shutil

import pytest
import yaml
from conftest import PROJECT
from drawn import make_adapter

from carelm.errors import UserError
from carelm.recipe_file import save_recipe
from carelm.sweep import base_answers
from carelm.sweep.plan import format_plan
from carelm.sweep.sweep_file import read_sweep

SWEEPS = sorted((PROJECT / "recipes/sweeps").rglob("*.yaml"))


@pytest.fixture
def read(tmp_path):
    """Reads a sweep of the demo's recipe with the keys given, and the words of a command line."""

    def read(*words: str, **keys):
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump({"recipe": "recipes/demo.yaml", **keys}, sort_keys=False), encoding="utf-8")
        return read_sweep([str(path), "--output_dir", str(tmp_path / "out"), *words])

    return read


def names(sweep) -> list[str]:
    return [run.name for run in sweep.runs]


def message_of(read, tmp_path, *words, **keys) -> str:
    with pytest.raises(UserError) as caught:
        read(*words, **keys)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    return str(caught.value)


def test_every_combination_is_a_run_named_by_the_axes_that_differ(read, tmp_path):
    sweep = read(grid={"lora_r": [4, 8], "learning_rate": [0.0001, "2e-4"], "load_in_4bit": [True]})
    assert names(sweep) == ["lora_r=4,learning_rate=0.0001", "lora_r=4,learning_rate=2e-4",
                            "lora_r=8,learning_rate=0.0001", "lora_r=8,learning_rate=2e-4"]  # fmt: skip
    last = sweep.runs[-1].recipe
    assert (last.model["lora_r"], last.training["learning_rate"], last.bits) == (8, 2e-4, 4)
    assert last.output_dir == tmp_path / "out" / names(sweep)[-1]
    assert names(read(grid={"lora_target_modules": [["q_proj", "v_proj"], ["all-linear"]]})) == [
        "lora_target_modules=q_proj+v_proj",
        "lora_target_modules=all-linear",
    ]


def test_a_listed_run_has_its_own_name_and_may_only_answer(read):
    sweep = read(runs=[{"name": "r4", "lora_r": 4}, {"method": "prompt_tuning"}, {"models": ["base"], "num_shots": 2}])
    assert names(sweep) == ["r4", "method=prompt_tuning", "models=base,num_shots=2"]
    assert [run.is_trained for run in sweep.runs] == [True, True, False]


def test_names_that_come_out_the_same_are_numbered(read):
    assert names(read(grid={"dataset_name": ["shop/data", "clinic/data"]})) == [
        "dataset_name=data",
        "dataset_name=data-2",
    ]


def test_overrides_lie_under_overlays_those_under_axes_and_the_command_line_over_all(read):
    keys = {"overrides": {"learning_rate": 1e-4, "lora_alpha": 8, "seed": 1}, "grid": {"lora_r": [4, 8]}}
    [first, _] = read("--config", "recipes/overlays/demo_base.yaml", "--seed", "7", **keys).runs
    assert (first.recipe.training["learning_rate"], first.recipe.seed) == (2e-3, 7)
    assert (first.recipe.model["lora_alpha"], first.recipe.model["lora_r"]) == (8, 4)


@pytest.mark.parametrize(
    "keys, said",
    [
        ({"grid": {"lora_rank": [4]}}, "grid: unknown key 'lora_rank'; did you mean 'lora_r'?"),
        ({"runs": [{"name": "a", "bf16": True}]}, "runs, a: key 'bf16' is not set in a recipe: set precision"),
        ({"grid": {"lora_r": ["four"]}}, "grid: lora_r: 'four' is not of type int"),
        ({"grid": {"global_batch_size": [8, 0]}}, "grid: global_batch_size: 0 is not at least 1"),
        ({"grid": {"global_batch_size": [8, 12]}}, "global_batch_size=12: per_device_train_batch_size: 8 does not divide"),
        ({"grid": {"method": ["lora", "prompt"]}}, "method: 'prompt' is none of lora, full, prompt_tuning"),
        ({"grid": {}}, "grid is empty, there is nothing to run"),
        ({"grid": {"lora_r": []}}, "grid: lora_r: [] is no list of values"),
        ({"grid": {"lora_r": 8}}, "grid: lora_r: 8 is no list of values; write [8]"),
        ({"grid": {"lora_r": [8, 8]}}, "runs lora_r=8 and lora_r=8-2 are the same"),
        ({"runs": [{"name": "a", "lora_r": 4}, {"name": "a"}]}, "two are called 'a'"),
        ({"runs": [{"name": "../a"}]}, "'../a' cannot be a folder's"),
        ({"runs": ["lora_r"]}, "runs: the 1. is 'lora_r', no `key: value` lines"),
        ({"runs": [{"models": ["base"]}], "evaluate": False}, "trains nothing (models) and is not evaluated"),
        ({"grid": {"output_dir": ["a", "b"]}}, "output_dir is no axis: each run has a folder of its own"),
        ({"gird": {"lora_r": [4]}}, "a sweep has no key 'gird'; did you mean 'grid'?"),
        ({"lora_r": 4}, "a sweep has no key 'lora_r'; keys of a recipe stand under overrides, grid or runs"),
        ({"grid": {"lora_r": [4]}, "runs": [{}]}, "it has grid and runs; set one of grid, runs, search"),
        ({}, "it has no runs; set one of grid, runs, search"),
        ({"grid": {"lora_r": [4]}, "evaluate": "no"}, "evaluate: 'no' is not true or false"),
        ({"grid": {"lora_r": [4]}, "recipe": "recipes/none.yaml"}, "recipe recipes/none.yaml cannot be read"),
        ({"search": {"lora_r": [4, 8]}}, "search: num_trials: None is no number of runs"),
        ({"search": {"num_trials": 4}}, "search: it has no ranges"),
        ({"search": {"num_trials": 4, "lora_rank": [4]}}, "unknown key 'lora_rank'; did you mean 'lora_r'?"),
        ({"search": {"num_trials": 4, "lora_r": {"low": 4}}}, "search: lora_r: {'low': 4} is neither a list of values nor"),
        ({"search": {"num_trials": 4, "lora_r": {"low": 8, "high": 4}}}, "low 8 is above high 4"),
        ({"search": {"num_trials": 4, "lora_dropout": {"low": 0.0, "high": 1.5}}}, "lora_dropout: 1.5"),
        ({"search": {"num_trials": 4, "learning_rate": {"low": 0.0, "high": 0.1, "log": True}}}, "log: low is not above 0"),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)  # fmt: skip
def test_what_is_wrong_is_one_line_and_nothing_is_written(read, tmp_path, keys, said):
    assert said in message_of(read, tmp_path, **keys)


def test_the_command_line_does_not_set_an_axis(read, tmp_path):
    said = message_of(read, tmp_path, "--lora_r", "4", grid={"lora_r": [4, 8]})
    assert "lora_r is no axis: the command line sets it for all runs" in said


def test_a_folder_that_holds_another_run_is_refused(read, tmp_path):
    make_adapter(tmp_path / "out/lora_r=4", "--lora_r", "16", "--load_in_4bit", "false")
    with pytest.raises(UserError, match=r"lora_r=4: output_dir .* holds another run, .*lora_r \(was 16, is 4\)"):
        read(grid={"lora_r": [4]}, overrides={"load_in_4bit": False})


def test_a_dry_run_prints_the_runs_with_the_steps_that_the_trainer_counts(read, tmp_path):
    keys = {"max_samples": 46, "global_batch_size": 8, "num_train_epochs": 1.5}
    sweep = read(overrides=keys, runs=[{"max_steps": -1}, {"max_steps": 7}, {"models": ["base"]}])
    assert format_plan(sweep).splitlines() == [
        f"in {sweep.folder}, a folder each:",
        "max_steps=-1  9 steps  max_steps=-1",
        "max_steps=7   7 steps  max_steps=7",
        "models=base   only answers  models=['base']",
    ]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_how_labels_fit_and_refuses_those_that_do_not(read, tmp_path):
    rows = [{"q": f"Ticket {i}?", "a": ("order", "refund")[i % 2]} for i in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"dataset_name": "rows.jsonl", "prompt_template": "{q}", "completion_template": "{a}", "max_steps": 2,
            "category_column": None, "id_column": None}  # fmt: skip
    three = {**keys, "labels": ["order", "refund", "complaint"]}
    plan = format_plan(read(overrides=three, grid={"lora_r": [4, 8]})).splitlines()
    assert len(plan) == 4 and plan[-1] == "labels: in labels and in no answer: complaint"
    with pytest.raises(UserError, match="^labels: 30 of 30 expected answers|^labels: .* hold none of Order 1, Order 2"):
        format_plan(read(overrides={**keys, "labels": ["Order 1", "Order 2"]}, grid={"lora_r": [4, 8]}))


def test_data_of_a_sweeps_own_keys_is_looked_for_beside_its_file(read, tmp_path):
    (tmp_path / "rows").mkdir()
    for name in ("one", "two"):
        (tmp_path / f"rows/{name}.jsonl").write_text('{"messages": []}\n')
    where = [str(tmp_path / f"rows/{name}.jsonl") for name in ("one", "two")]
    named = ["rows/one.jsonl", "rows/two.jsonl"]
    sweep = read(overrides={"dataset_name": named[0]}, grid={"lora_r": [4, 8]})
    assert [run.recipe.dataset_name for run in sweep.runs] == where[:1] * 2
    assert [run.recipe.dataset_name for run in read(grid={"dataset_name": named}).runs] == where
    assert [run.recipe.dataset_name for run in read(runs=[{"dataset_name": name} for name in named]).runs] == where
    search = {"num_trials": 2, "dataset_name": named}
    assert read(search=search).ranges["dataset_name"] == where


def test_a_full_fine_tune_is_no_adapter_to_be_compared(read, tmp_path):
    said = message_of(read, tmp_path, runs=[{"method": "full", "load_in_4bit": False, "models": ["adapter"]}])
    assert "method: full makes no adapter" in said


def test_a_recipe_in_also_test_that_is_not_there_is_said_before_anything_runs(read, tmp_path):
    said = message_of(read, tmp_path, runs=[{"lora_r": 4}], overrides={"also_test": ["recipes/none.yaml"]})
    assert "recipes/none.yaml" in said


def test_the_answers_of_the_base_are_lent_with_those_to_other_tests(read):
    one, two, other = read(runs=[{"lora_r": 4}, {"lora_r": 8}, {"max_eval_samples": 3}]).runs
    names = (
        "predictions-base.jsonl",
        "medquad/predictions-base.jsonl",
        "labels-base.jsonl",
        "predictions-adapter.jsonl",
    )
    for name in (*names, "results.json"):
        file = one.recipe.output_dir / "eval" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    save_recipe(one.recipe, one.beside(".yaml"))
    for run in (two, other):
        base_answers.lend(run)
    assert [(two.recipe.output_dir / "eval" / name).exists() for name in names] == [True, True, True, False]
    assert not (other.recipe.output_dir / "eval").exists()


def test_a_lending_that_was_cut_off_is_made_good_by_the_next_one(read, monkeypatch):
    one, two = read(runs=[{"lora_r": 4}, {"lora_r": 8}]).runs
    for name in (*base_answers.FILES, "medquad/predictions-base.jsonl", "results.json"):
        file = one.recipe.output_dir / "eval" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)
    save_recipe(one.recipe, one.beside(".yaml"))
    here, copy = two.recipe.output_dir / "eval", shutil.copy2
    for cut in range(6):
        left = iter(range(cut))

        def copy_until_killed(file, to, left=left):
            to.write_text("half")
            next(left)
            copy(file, to)

        monkeypatch.setattr(shutil, "copy2", copy_until_killed)
        with pytest.raises(StopIteration):
            base_answers.lend(two)
        assert "half" not in [f.read_text() for f in here.rglob("*") if f.is_file() and f.suffix != ".partial"]
    monkeypatch.setattr(shutil, "copy2", copy)
    base_answers.lend(two)
    assert {f.name for f in here.rglob("*base*") if f.suffix != ".partial"} == {*base_answers.FILES}


@pytest.mark.parametrize("given, near", [
    ("explanaton", "recipes/sweeps/explanation.yaml"), ("recipes/sweeps/bit.yaml", "recipes/sweeps/bits.yaml"),
    ("recipes/sweeps/two_cores/intent.yaml", "recipes/sweeps/two_cores/intents.yaml"),
])  # fmt: skip
def test_a_sweep_file_that_is_not_there_is_said_with_the_nearest_one(given, near):
    with pytest.raises(UserError) as caught:
        read_sweep([given])
    said = f"there is no sweep file {given}; those of CareLM lie in recipes/sweeps/: did you mean {near}?"
    assert str(caught.value) == said


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_sweep_that_comes_with_carelm_can_be_run_and_says_how(path, tmp_path):
    sweep = read_sweep(
        [str(path), "--config", str(PROJECT / "recipes/overlays/demo_base.yaml"), "--output_dir", str(tmp_path / "out")]
    )
    assert sweep.runs or sweep.search
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any(f"# Command: python train/sweep.py {path.relative_to(PROJECT)}" in line for line in header)
