"""A run that was stopped goes on where it was: killed, on other ranks, with a torn checkpoint, on a full disk."""

import json
import os
import shutil
import subprocess
import time

import pytest
from launching import (
    PROJECT,
    Run,
    eval_losses,
    history,
    launch,
    losses,
    mark,
    relative_distance,
    same_bits,
    script,
)

from carelm.training import checkpoints

ZERO2 = PROJECT / "accelerate_configs/cpu_zero2.yaml"
# Dropout is on: a resumed run must draw what the unbroken one drew. An epoch is five steps, the last of two examples, so
# that it goes on within the second.
KEYS = ("--max_steps", 9, "--eval_steps", 3, "--save_steps", 3, "--save_total_limit", 9, "--num_sample_answers", 1,
        "--sample_max_new_tokens", 8, "--max_eval_samples", 40, "--per_device_eval_batch_size", 1, "--max_samples", 34,
        "--lora_dropout", 0.1)  # fmt: skip


KEYS_EARLY = ("--max_steps", 40, "--eval_steps", 2, "--learning_rate", 0.05, "--early_stopping_patience", 2,
              "--save_total_limit", 1, "--num_sample_answers", 0, "--max_samples", 16, "--max_eval_samples", 8,
              "--lora_alpha", 64)  # fmt: skip


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


def test_a_run_that_is_killed_ends_with_the_same_bits(tmp_path):
    unbroken, folder = tmp_path / "unbroken", tmp_path / "run"
    launch("--output_dir", unbroken, *KEYS, config_file=ZERO2)

    run = Run(folder, *KEYS, config_file=ZERO2)
    while not (folder / "checkpoint-6").exists():
        assert run.process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.02)
    run.kill()
    shutil.rmtree(folder / "checkpoint-9", ignore_errors=True)

    done = launch("--output_dir", folder, *KEYS, config_file=ZERO2)
    assert f"going on from {folder / 'checkpoint-6'}" in done.stderr
    assert losses(folder) == losses(unbroken) and eval_losses(folder) == eval_losses(unbroken)
    assert same_bits(folder, unbroken)
    check_tensorboard(folder)
    check_finished_run_changes_nothing(folder)


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
        "usage/tokens_per_second",
        "usage/mfu",
        "usage/host_memory_gib",
    ):
        assert [e.step for e in events.Scalars(tag)] == list(range(1, 10)), tag
    assert [e.step for e in events.Scalars("train/epoch")] == list(range(10))
    assert [e.step for e in events.Scalars("eval/loss")] == [0, 3, 6, 9]
    texts = [tag for tag in tags["tensors"] if tag.startswith("answers/")]
    assert [e.step for e in events.Tensors(texts[0])] == [0, 3, 6, 9]


def check_finished_run_changes_nothing(run):
    before = snapshot(run)
    done = script("--output_dir", run, *KEYS)
    assert "nothing to do" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads((run / "train_metrics.json").read_text())
    assert snapshot(run) == before


def test_early_stopping_keeps_the_best_weights(tmp_path):
    done = script("--output_dir", tmp_path / "run", *KEYS_EARLY, check=True)
    metrics = json.loads(done.stdout.splitlines()[-1])
    evaluations = {e["step"]: e["eval_loss"] for e in history(tmp_path / "run") if "eval_loss" in e and e["step"]}
    best = min(evaluations, key=evaluations.get)
    assert metrics["global_step"] == best + 4 < 40
    assert {p.name for p in (tmp_path / "run").glob("checkpoint-*")} == {f"checkpoint-{best}", f"checkpoint-{best + 4}"}
    assert metrics["eval_loss"] == evaluations[best]
    assert relative_distance(tmp_path / "run", tmp_path / f"run/checkpoint-{best}") == 0
    # Killed between its last checkpoint and its figures, it must not train on.
    (tmp_path / "run/train_metrics.json").unlink()
    done = script("--output_dir", tmp_path / "run", *KEYS_EARLY, check=True)
    assert f"going on from {tmp_path / 'run' / f'checkpoint-{best + 4}'}" in done.stderr
    again = json.loads(done.stdout.splitlines()[-1])
    assert {k: again[k] for k in ("global_step", "eval_loss", "train_loss")} == {
        k: metrics[k] for k in ("global_step", "eval_loss", "train_loss")
    }
    assert relative_distance(tmp_path / "run", tmp_path / f"run/checkpoint-{best}") == 0


def test_a_run_that_goes_on_takes_its_loss_in_the_way_that_it_began_with(tmp_path):
    run, few = (
        tmp_path / "run",
        ("--save_steps", 1, "--eval_strategy", "no", "--max_samples", 16, "--max_eval_samples", 4),
    )
    script("--output_dir", run, *few, "--max_steps", 1, check=True)
    begun = mark(run, 1)
    assert begun["is_loss_chunked"] is True
    (run / "checkpoint-1/complete.json").write_text(json.dumps(begun | {"is_loss_chunked": False}))
    done = script("--output_dir", run, *few, "--max_steps", 2, check=True)
    assert "the run was begun with the logits of whole rows" in done.stderr
    assert mark(run, 2)["is_loss_chunked"] is False


@pytest.mark.long
def test_a_full_fine_tune_under_zero2_goes_on_with_the_same_bits(tmp_path):
    keys = ("--method", "full", "--load_in_4bit", "false", "--max_steps", 4, "--eval_steps", 2, "--save_steps", 2,
            "--learning_rate", "1e-4", "--num_sample_answers", 0, "--max_samples", 50, "--max_eval_samples", 8)  # fmt: skip
    launch("--output_dir", tmp_path / "whole", *keys, config_file=ZERO2)
    run = shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(run / "checkpoint-4")
    (run / "train_metrics.json").unlink()
    done = launch("--output_dir", run, *keys, config_file=ZERO2)
    assert f"going on from {run / 'checkpoint-2'}" in done.stderr
    assert losses(run) == losses(tmp_path / "whole")
    assert same_bits(run, tmp_path / "whole", "model.safetensors")


def test_old_checkpoints_go_and_the_last_whole_one_stays(tmp_path):
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/weights").write_text("1234")
        (tmp_path / f"checkpoint-{step}/complete.json").write_text(json.dumps({"files": {"weights": 4}}))
    os.truncate(tmp_path / "checkpoint-4/weights", 2)
    checkpoints.remove_old(tmp_path, keep=1, best_step=1)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-1", "checkpoint-3", "checkpoint-4"}


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_leaves_the_older_checkpoint(tmp_path):
    (tmp_path / "disk").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=26m", "tmpfs", tmp_path / "disk"], check=True)
    try:
        done = script("--output_dir", tmp_path / "disk/run", "--max_steps", 8, "--eval_steps", 2, "--save_steps", 2,
                      "--save_total_limit", 9, "--num_sample_answers", 0, "--max_samples", 50,
                      "--max_eval_samples", 8)  # fmt: skip
        assert done.returncode != 0
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "could not be saved" in errors[0] and "is whole and stays" in errors[0]
        assert checkpoints.newest_whole(tmp_path / "disk/run") is not None
        assert not list((tmp_path / "disk/run").glob("*.partial"))
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)
