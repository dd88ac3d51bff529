"""train/runs.py has a row for each run in a folder, whatever state it was left in, and what differs between them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT

from carelm.errors import UserError
from carelm.sweep.overview import overview

RECIPE = {"model_name_or_path": "demo/base", "dataset_name": "demo/data", "messages_column": "messages", "method": "lora",
          "learning_rate": 0.0002, "max_steps": 40, "lora_r": 8}  # fmt: skip


def make_run(folder, **keys):
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE | {"output_dir": str(folder)} | keys))
    return folder


def finish(folder, eval_loss=1.25, seconds=90.0, **more):
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    metrics = {"global_step": 40, "eval_loss": eval_loss, "wall_seconds": seconds, "result_files": {}} | more
    (folder / "train_metrics.json").write_text(json.dumps(metrics))
    return folder


def evaluate(folder, value, metric="rougeL", models=("base", "adapter")):
    (folder / "eval").mkdir(exist_ok=True)
    score = {"value": value, "low": value - 0.05, "high": value + 0.05}
    found = {name: {"kind": name, metric: score | ({"value": 0.0} if name != models[-1] else {})} for name in models}
    (folder / "eval/results.json").write_text(json.dumps({"primary_metric": metric, "models": found}))
    return folder


def save(folder, step, *eval_losses):
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir()
    history = [{"step": step, "loss": 1.0}, *({"step": step, "eval_loss": loss} for loss in eval_losses)]
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    files = {"trainer_state.json": (checkpoint / "trainer_state.json").stat().st_size}
    (checkpoint / "complete.json").write_text(json.dumps({"files": files, "wall_seconds": 7300}))
    return checkpoint


def rows(folder) -> dict[str, str]:
    """The lines of each run by its name, each on one line."""
    table = overview(folder)
    assert max(map(len, table.splitlines())) <= 100
    found, name = {}, None
    for line in table.splitlines()[1:]:
        if not line.startswith(" "):
            name, _, line = line.partition(" ")
        found[name] = f"{found.get(name, '')} {line}"
    return {name: " ".join(line.split()) for name, line in found.items()}


def test_runs_on_the_same_data_stand_together_the_best_first_with_what_differs(tmp_path):
    finish(make_run(tmp_path / "a-loss-only", lora_r=16), eval_loss=0.5)
    evaluate(finish(make_run(tmp_path / "b-worse", lora_r=4)), 0.4)
    evaluate(finish(make_run(tmp_path / "c-best", lora_r=4, learning_rate=0.001)), 0.6)
    finish(make_run(tmp_path / "d-other-data", dataset_name="another.csv", lora_r=4))
    finish(make_run(tmp_path / "e-worse-loss", method="prompt_tuning"), eval_loss=0.7)
    found = rows(tmp_path)
    assert [*found] == ["c-best", "b-worse", "a-loss-only", "e-worse-loss", "d-other-data"]
    same = "dataset_name=demo/data, learning_rate=0.0002"
    assert found["c-best"] == (
        "finished 1.2500 90 s 0.600 (0.550 to 0.650) ROUGE-L method=lora, dataset_name=demo/data, learning_rate=0.001, lora_r=4"
    )
    assert found["a-loss-only"] == f"finished 0.5000 90 s - method=lora, {same}, lora_r=16"
    assert found["d-other-data"].endswith(" - dataset_name=another.csv")  # alone on its data: all else would differ
    assert found["e-worse-loss"] == f"finished 0.7000 90 s - method=prompt_tuning, {same}"


def test_a_default_that_is_written_out_and_where_a_run_lies_are_no_difference(tmp_path):
    finish(make_run(tmp_path / "short"))
    finish(make_run(tmp_path / "long", lora_dropout=0.0, seed=42, save_steps=7, models=["base"], unknown_by_now=1))
    assert {*rows(tmp_path).values()} == {"finished 1.2500 90 s -"}


def test_of_two_budgets_the_one_that_counts_is_shown(tmp_path):
    finish(make_run(tmp_path / "steps", num_train_epochs=5.0))
    finish(make_run(tmp_path / "more-steps", max_steps=80))
    finish(make_run(tmp_path / "epochs", max_steps=-1, num_train_epochs=2.0))
    finish(make_run(tmp_path / "default", max_steps=None))
    found = {name: line.partition(" - ")[2] for name, line in rows(tmp_path).items()}
    assert found == {"steps": "max_steps=40", "more-steps": "max_steps=80", "epochs": "num_train_epochs=2.0",
                     "default": "num_train_epochs=3.0"}  # fmt: skip


def test_each_state_is_named_and_figures_come_from_the_newest_whole_checkpoint(tmp_path):
    stopped = make_run(tmp_path / "stopped")
    save(stopped, 10, 2.5)
    torn = save(stopped, 20, 1.5)
    (torn / "trainer_state.json").write_text("{")
    longer = finish(make_run(tmp_path / "goes-on"))
    save(longer, 60)
    (save(make_run(tmp_path / "torn"), 5) / "complete.json").write_text("[]")
    make_run(tmp_path / "begun")
    finish(
        make_run(tmp_path / "gone"), result_files={"adapter_model.safetensors": [1, "x"], "tokenizer.json": [1, "x"]}
    )
    evaluate(make_run(tmp_path / "base"), 0.2, models=("base",))
    assert rows(tmp_path) == {
        "stopped": "stopped, step 10 2.5000 2.0 h -",
        "goes-on": "stopped, step 60 - 2.0 h - was finished at step 40, and goes on",
        "torn": "broken - - - none of its 1 checkpoints is whole",
        "begun": "no checkpoint - - -",
        "gone": "finished 1.2500 90 s - of its result tokenizer.json is gone",
        "base": "only answers - - 0.200 (0.150 to 0.250) ROUGE-L, base",
    }


def test_a_run_is_running_as_long_as_its_process_is_there(tmp_path):
    for name, pid, host in (("here", os.getpid(), os.uname().nodename), ("gone", 2**22 + 1, os.uname().nodename),
                            ("elsewhere", os.getpid(), "another-node"), ("odd", "x", "y")):  # fmt: skip
        save(make_run(tmp_path / name), 10)
        (tmp_path / name / ".lock").write_text(f"job 7, start 1, process {pid} on {host}\n")
    states = {name: line.split(" - ")[0] for name, line in rows(tmp_path).items()}
    stopped = "stopped, step 10"
    assert states == {"here": "running, step 10", "gone": stopped, "elsewhere": stopped, "odd": stopped}


def test_runs_of_a_sweep_are_found_the_failed_one_too_that_never_had_a_folder(tmp_path):
    sweep = tmp_path / "bits"
    finish(make_run(sweep / "lora_r=4,learning_rate=0.0002", lora_r=4))
    (sweep / "lora_r=0.yaml").write_text(yaml.safe_dump(RECIPE | {"lora_r": 0}))
    (sweep / "lora_r=0.json").write_text(
        json.dumps({"state": "failed", "error": "lora_r: 0\nmore", "at": 1, "run": "x"})
    )
    (sweep / "comparison.json").write_text("{}")
    save(make_run(sweep / "pruned"), 5)
    (sweep / "pruned.json").write_text(json.dumps({"state": "pruned", "error": "", "at": 1, "run": "x"}))
    found = rows(tmp_path)
    assert found["bits/lora_r=4,learning_rate=0.0002"].startswith("finished")
    assert found["bits/lora_r=0"] == "failed - - - lora_r=0 lora_r: 0" and found["bits/pruned"].startswith("pruned")
    assert len(found) == 3


BROKEN = [
    ("train_metrics.json", '{"global_step": 40', "broken - - - {}/train_metrics.json is damaged and no JSON"),
    ("train_metrics.json", "[1]", "broken - - - {}/train_metrics.json is damaged and no object of JSON"),
    ("train_metrics.json", '{"global_step": "x", "eval_loss": "low", "wall_seconds": NaN, "result_files": 3}',
     "finished - - -"),
    ("eval/results.json", "{", "no checkpoint - - - {}/eval/results.json is damaged and no JSON"),
    ("eval/results.json", '{"models": {}}', "only answers - - - eval/results.json has no deciding score"),
    ("eval/results.json", '{"models": {"base": {"kind": "base"}}, "primary_metric": "rougeL"}',
     "only answers - - - eval/results.json has no deciding score"),
    ("recipe.yaml", "a: [", "no checkpoint - - - recipe {}/recipe.yaml line 1 is not YAML: "),
    ("recipe.yaml", "- a", "no checkpoint - - - recipe {}/recipe.yaml holds no `key: value` lines"),
    ("recipe.yaml", "\0\x01", "no checkpoint - - - recipe {}/recipe.yaml"),
    ("recipe.yaml", "lora_r: {a: [1]}\nmethod: [1]\ndataset_name: null", "no checkpoint - - -"),
    ("checkpoint-7/complete.json", '{"files": 3}', "broken - - - none of its 1 checkpoints is whole"),
    ("checkpoint-7/complete.json", '{"files": {}}', "stopped, step 7 - - -"),
    (".lock", "process", "no checkpoint - - -"),
]  # fmt: skip


@pytest.mark.parametrize("file, text, line", BROKEN)
def test_what_is_broken_is_said_in_its_row_and_the_others_stand(file, text, line, tmp_path):
    finish(make_run(tmp_path / "whole"))
    broken = make_run(tmp_path / "broken")
    (broken / file).parent.mkdir(exist_ok=True)
    (broken / file).write_text(text)
    table = " ".join(overview(tmp_path).split())
    found = rows(tmp_path)
    assert found["whole"].startswith("finished 1.2500") and line.split(" {}")[0] in found["broken"]
    assert line.partition("{}")[2].split("/")[-1] in table


def test_a_score_that_is_older_than_the_weights_is_said(tmp_path):
    run = evaluate(finish(make_run(tmp_path / "run")), 0.5)
    os.utime(run / "eval/results.json", (1, 1))
    assert rows(tmp_path)["run"].endswith("its score is older than its weights: evaluate it again")


def test_links_files_hidden_and_half_written_folders_are_no_further_runs(tmp_path):
    run = finish(make_run(tmp_path / "run"))
    (run / "merged").mkdir()
    (run / "merged/recipe.yaml").write_text("a: 1")
    (tmp_path / "again").symlink_to(run)
    (tmp_path / "loop").symlink_to(tmp_path)
    make_run(tmp_path / ".hidden")
    make_run(tmp_path / "merge.partial")
    (tmp_path / "notes.txt").write_text("no run")
    (tmp_path / "data.json").write_text("[1, 2]")
    assert [*rows(tmp_path)] == ["run"] and [*rows(run)] == ["run"]


def test_a_run_in_the_folder_of_others_hides_none_of_them(tmp_path, monkeypatch):
    evaluate(finish(make_run(tmp_path / "all")), 0.5)
    finish(make_run(tmp_path / "all/shop"))
    (tmp_path / "all/shop-bf16").mkdir()
    for file in ("merge.json", "recipe.yaml"):
        (tmp_path / "all/shop-bf16" / file).write_text("{}")
    assert [*rows(tmp_path)] == ["all", "all/shop"]
    monkeypatch.chdir(tmp_path / "all")
    assert [*rows(Path("."))] == [*rows(Path(""))] == ["all", "shop"]


def test_long_names_and_values_stay_within_the_width(tmp_path):
    for name in ("n" * 90, "短い" * 20):
        keys = {"system_prompt": name + "\n" + "word " * 100, "category_column": name, "learning_rate": len(name) / 1e5}
        evaluate(finish(make_run(tmp_path / name, **keys)), 0.5, metric="constrained_macro_f1")
    assert [re.sub(r".*\) ", "", line) for line in rows(tmp_path).values()][0].startswith("macro F1, constrained")


@pytest.mark.parametrize(
    "name, line", [("none", "there is no folder"), ("file", "there is no folder"), ("", "holds no run")]
)
def test_where_there_is_no_run_it_says_so(name, line, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=line):
        overview(tmp_path / name)


def test_the_command_prints_the_table_without_torch_and_names_a_folder_that_is_not_there(tmp_path):
    finish(make_run(tmp_path / "outputs/shop"))
    code = "import runpy, sys; sys.argv = ['runs.py']; runpy.run_path(sys.orig_argv[-1], run_name='__main__'); " \
           "assert not {'torch', 'transformers', 'evaluate'} & sys.modules.keys()"  # fmt: skip
    words = [sys.executable, "-c", code, PROJECT / "train/runs.py"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "shop  finished     1.2500" in done.stdout, done.stderr
    done = subprocess.run([*words[:1], words[-1]], cwd=tmp_path / "outputs", capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: runs: there is no folder outputs;"), done.stderr
    done = subprocess.run([words[0], words[-1], "--sort"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: unrecognized arguments: --sort\n")
