"""A real sweep on the demo: killed, gone on with, one run failing; and a search whose study several calls share."""

import dataclasses
import json
import runpy
import signal
import subprocess
import sys
import time

import psutil
import yaml
from launching import PROJECT, environment

from carelm.sweep import processes, record
from carelm.sweep.grid import Grid
from carelm.sweep.sweep_file import read_sweep

SMALL = {
    "max_samples": 12, "max_eval_samples": 10, "max_new_tokens": 6, "num_latency_prompts": 1, "num_sample_answers": 0,
    "global_batch_size": 4, "max_steps": 40, "eval_steps": 20, "save_steps": 20, "load_in_4bit": False,
}  # fmt: skip


def sweep(folder, *words, **keys) -> list[str]:
    """The command of a sweep of the demo's recipe."""
    file = folder / "small.yaml"
    given = {"recipe": "recipes/demo.yaml", "output_dir": str(folder / "out"), **keys}
    given["overrides"] = SMALL | keys.get("overrides", {})
    file.write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    return [sys.executable, "train/sweep.py", str(file), *words]


def call(words) -> subprocess.CompletedProcess:
    return subprocess.run(words, cwd=PROJECT, env=environment(), capture_output=True, text=True, timeout=300)


def test_a_killed_sweep_goes_on_and_one_that_fails_does_not_end_the_others(tmp_path):
    """The parent is killed in the first training, which saves and ends; the next call goes on with it, trains nothing twice,
    answers with the base alone in the second run, and names the third, whose rows are not there."""
    listed = [
        {"name": "r4", "lora_r": 4},
        {"name": "bare", "models": ["base"]},
        {"name": "none", "dataset_name": "no/rows.jsonl"},
    ]
    words, out, log = sweep(tmp_path, runs=listed), tmp_path / "out", tmp_path / "out/r4.log"
    parent = subprocess.Popen(
        words, cwd=PROJECT, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    until = time.time() + 240
    while not log.exists() or "| 2/40" not in log.read_text():
        assert parent.poll() is None and time.time() < until
        time.sleep(0.02)
    [child] = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGKILL)
    parent.wait()

    done = call(words)
    assert not child.is_running() and done.returncode == 1, done.stderr
    said = log.read_text()
    assert "(SIGTERM); saved as checkpoint-" in said and "going on from" in said
    assert json.loads((out / "r4/train_metrics.json").read_text())["global_step"] == 40
    assert done.stderr.splitlines().count("carelm: r4 begins; its log is " + str(log)) == 1
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"runs": 3, "finished": 2, "failed": ["none"], "comparison": str(out / "comparison.html")}
    assert (
        "carelm: none failed after" in done.stderr
        and ": dataset_name: there is no file, folder or glob no/rows.jsonl" in done.stderr
    )
    compared = json.loads((out / "comparison.json").read_text())
    assert f"comparison.html; best: {compared['best']}\n" in done.stderr
    assert list(compared["models"]) == ["base", "r4", "bare"] and compared["runs"]["none"]["state"] == "failed"

    assert "base: all 14 answers are there; nothing to do" in (out / "bare.log").read_text()


def test_a_sweep_ends_with_the_commands_that_take_its_best_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(PROJECT)
    next_of_best = runpy.run_path("train/sweep.py")["next_of_best"]
    (tmp_path / "r4").mkdir()
    (tmp_path / "r4/recipe.yaml").touch()
    for best in ("r4", "base", None):  # a row of the comparison may be the base's
        next_of_best(tmp_path, best)
    saved, runs = f"{tmp_path}/r4/recipe.yaml", f"carelm: next: python train/runs.py {tmp_path}"
    assert (
        capsys.readouterr().err.splitlines()
        == [f"carelm: next: python {file} --config {saved}" for file in ("train/chat.py", "serve/run.py")] + [runs] * 2
    )


def test_a_finished_run_is_not_run_again_and_a_failed_one_is(tmp_path):
    listed = [{"name": name, "models": ["base"]} for name in ("done", "failed", "changed")]
    for one, seed in zip(listed, (1, 2, 3)):
        one["seed"] = seed
    runs = read_sweep(sweep(tmp_path, runs=listed)[2:]).runs
    for run, state, keys in zip(runs, ("finished", "failed", "finished"), ({}, {}, {"num_shots": 1})):
        run = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, **keys))
        taken = record.take(run)
        record.note(run, record.Outcome(state, "no rows"), at=record.STARTED - 60)
        taken.lock.close()
    grid = Grid(runs)
    taken = [grid.take() for _ in range(3)]
    assert [t and t.run.name for t in taken] == ["failed", "changed", None]
    assert grid.outcomes == {"done": record.Outcome("finished")} and not grid.waits()


def test_a_finished_run_that_is_to_train_longer_says_that_it_goes_on(tmp_path):
    [run] = read_sweep(sweep(tmp_path, runs=[{"name": "r4", "lora_r": 4}], overrides={"max_steps": 60})[2:]).runs
    file = run.recipe.output_dir / "train_metrics.json"
    file.parent.mkdir(parents=True)
    budget = {"num_train_epochs": run.recipe.training.get("num_train_epochs"), "max_steps": 40}
    file.write_text(json.dumps({"global_step": 40, "budget": budget}))
    said = processes.longer_than_before(run)
    assert said == "r4 was finished at step 40 with max_steps 40; it goes on from there with max_steps 60"
    file.write_text(json.dumps({"global_step": 60, "budget": budget | {"max_steps": 60}}))
    assert processes.longer_than_before(run) == ""


def test_a_run_that_another_call_has_under_way_is_left_to_it(tmp_path):
    runs = read_sweep(sweep(tmp_path, runs=[{"lora_r": 2}, {"lora_r": 4}])[2:]).runs
    one, other = Grid(runs), Grid(runs)
    taken = [one.take(), other.take(), other.take()]  # their locks are held as long as these are
    assert [t and t.run.name for t in taken] == ["lora_r=2", "lora_r=4", None]
    assert not other.waits() and [run.state for run in other.compared()] == ["running", "running"]
