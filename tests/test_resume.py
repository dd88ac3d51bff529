"""A run that was stopped goes on where it was: killed, on other ranks, with a torn checkpoint, on a full disk."""

import json
import os
import shutil
import signal
import subprocess
import time

import pytest
from launching import (
    PROJECT,
    TWELVE_STEPS,
    command,
    environment,
    history,
    launch,
    losses,
    relative_distance,
    zero3_sharding_everything,
)
from safetensors.torch import load_file

ZERO2 = PROJECT / "accelerate_configs/cpu_zero2.yaml"
# Dropout is on: a resumed run must draw what the unbroken one drew.
KEYS = ("--max_steps", 12, "--eval_steps", 4, "--save_steps", 4, "--save_total_limit", 9, "--num_sample_answers", 1,
        "--sample_max_new_tokens", 8, "--max_eval_samples", 60, "--lora_dropout", 0.1)  # fmt: skip


KEYS_EARLY = ("--max_steps", 40, "--eval_steps", 2, "--learning_rate", 0.3, "--early_stopping_patience", 2,
              "--save_total_limit", 1, "--num_sample_answers", 0, "--max_eval_samples", 60)  # fmt: skip


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """An unbroken run, and the same one killed (SIGKILL, all its processes) once it has passed its second checkpoint."""
    folder = tmp_path_factory.mktemp("resume")
    launch("--output_dir", folder / "unbroken", *KEYS, config_file=ZERO2)
    killed = subprocess.Popen(
        command("--output_dir", folder / "killed", *KEYS, config_file=ZERO2), cwd=PROJECT, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    while not (folder / "killed/checkpoint-8").exists():
        assert killed.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    shutil.rmtree(folder / "killed/checkpoint-12", ignore_errors=True)
    return folder


def test_a_killed_run_ends_with_the_same_bits(runs, tmp_path):
    shutil.copytree(runs / "killed", tmp_path / "run")
    done = launch("--output_dir", tmp_path / "run", *KEYS, config_file=ZERO2)
    assert f"going on from {tmp_path / 'run' / 'checkpoint-8'}" in done.stderr
    assert losses(tmp_path / "run") == losses(runs / "unbroken")
    a, b = (load_file(f / "adapter_model.safetensors") for f in (tmp_path / "run", runs / "unbroken"))
    assert all((a[k] == b[k]).all() for k in b)
    check_tensorboard(tmp_path / "run")
    check_finished_run_changes_nothing(tmp_path / "run")


def check_tensorboard(run):
    """No step stands twice, and every scalar and text that was promised is there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "runs"), size_guidance={"tensors": 0, "scalars": 0})
    events.Reload()
    tags = events.Tags()
    for tag in (
        "train/loss",
        "train/learning_rate",
        "train/grad_norm",
        "system/tokens_per_second",
        "system/host_memory_bytes",
    ):
        assert [e.step for e in events.Scalars(tag)] == list(range(1, 13)), tag
    assert [e.step for e in events.Scalars("eval/loss")] == [0, 4, 8, 12]
    texts = [tag for tag in tags["tensors"] if tag.startswith("answers/")]
    assert [e.step for e in events.Tensors(texts[0])] == [0, 4, 8, 12]


def check_finished_run_changes_nothing(run):
    before = snapshot(run)
    done = launch("--output_dir", run, *KEYS, config_file=ZERO2)
    assert "nothing to do" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads((run / "train_metrics.json").read_text())
    assert snapshot(run) == before


def test_a_run_of_two_ranks_goes_on_on_one(rungs, tmp_path):
    run = shutil.copytree(rungs / "zero2", tmp_path / "run")
    (run / "train_metrics.json").unlink()
    (run / "checkpoint-12/complete.json").unlink()  # a torn one: it must be named, skipped and kept
    done = launch("--output_dir", run, *TWELVE_STEPS)
    assert "checkpoint-12 is not whole (it has no complete.json); it is skipped and kept" in done.stderr
    assert f"going on from {run / 'checkpoint-6'}" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["world_size"] == 1
    assert losses(run) == pytest.approx(losses(rungs / "zero2"), rel=1e-5)
    assert relative_distance(run, rungs / "zero2") < 1e-4
    assert list(run.glob("checkpoint-12.torn-*"))


def test_a_run_of_one_process_goes_on_on_two_ranks_under_zero3(rungs, tmp_path):
    run = shutil.copytree(rungs / "one", tmp_path / "run")
    (run / "train_metrics.json").unlink()
    shutil.rmtree(run / "checkpoint-12")
    done = launch("--output_dir", run, *TWELVE_STEPS, config_file=zero3_sharding_everything(tmp_path))
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert (metrics["world_size"], metrics["zero_stage"]) == (2, 3)
    assert losses(run) == pytest.approx(losses(rungs / "one"), rel=1e-5)
    assert relative_distance(run, rungs / "one") < 1e-4


def test_early_stopping_keeps_the_best_weights(tmp_path):
    done = launch("--output_dir", tmp_path / "run", *KEYS_EARLY)
    metrics = json.loads(done.stdout.splitlines()[-1])
    evaluations = {e["step"]: e["eval_loss"] for e in history(tmp_path / "run") if "eval_loss" in e and e["step"]}
    best = min(evaluations, key=evaluations.get)
    assert metrics["global_step"] == best + 4 < 40
    assert metrics["eval_loss"] == evaluations[best]
    assert relative_distance(tmp_path / "run", tmp_path / f"run/checkpoint-{best}") == 0
    # Killed between its last checkpoint and its figures, it must not train on.
    (tmp_path / "run/train_metrics.json").unlink()
    done = launch("--output_dir", tmp_path / "run", *KEYS_EARLY)
    again = json.loads(done.stdout.splitlines()[-1])
    assert {k: again[k] for k in ("global_step", "eval_loss", "train_loss")} == {
        k: metrics[k] for k in ("global_step", "eval_loss", "train_loss")
    }
    assert relative_distance(tmp_path / "run", tmp_path / f"run/checkpoint-{best}") == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    (tmp_path / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=9m", "tmpfs", tmp_path / "disk"], check=True)
    try:
        done = launch("--output_dir", tmp_path / "disk/run", "--max_steps", 8, "--eval_steps", 2, "--save_steps", 2,
                      "--save_total_limit", 9, "--num_sample_answers", 0, check=False)  # fmt: skip
        assert done.returncode != 0
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "could not be saved" in errors[0] and "is whole and stays" in errors[0]
        from carelm.checkpoints import newest_whole

        assert newest_whole(tmp_path / "disk/run") is not None
        assert not list((tmp_path / "disk/run").glob("*.partial"))
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)
