"""slurm/train.sh and slurm/eval.sh on a real SLURM cluster of two nodes (two_nodes.py), on CPU ranks under DeepSpeed."""

import importlib.metadata
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
from launching import PROJECT, VENV, script
from two_nodes import KEYS, Cluster, Jobs, check_close, what_is_missing

MISSING = what_is_missing()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]

EVALUATION = ("--max_eval_samples", 30, "--max_new_tokens", 12, "--num_latency_prompts", 2, "--models", "adapter")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    script("--output_dir", folder, *KEYS, check=True)
    return folder


def test_two_nodes_have_the_losses_of_one_process(unbroken, one_process):
    check_close(unbroken, one_process)
    metrics = json.loads((unbroken / "train_metrics.json").read_text())
    assert (metrics["world_size"], metrics["zero_stage"]) == (2, 2)
    of_job, of_node2 = sorted(unbroken.parent.glob("slurm-*.log"), key=lambda file: len(file.name))
    called = r"2 ranks on 2 nodes \(node1, node2\) are there after [\d.]+ s; an all-reduce of 64 MiB takes \d+ ms"
    assert re.search(called, of_job.read_text()) and of_node2.name.endswith("-node2.log")


@pytest.mark.long
def test_eight_nodes_have_them_too(tmp_path, one_process):
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder, nodes=8)
    try:
        jobs = Jobs(cluster, tmp_path)
        jobs.completes(jobs.train(*KEYS, options=("--nodes=8",), ROLL_CALL_PATIENCE="120"))
    finally:
        cluster.down()
        shutil.rmtree(folder)
    check_close(jobs.run, one_process)
    assert json.loads((jobs.run / "train_metrics.json").read_text())["world_size"] == 8


@pytest.mark.long
def test_zero3_has_them_too_and_an_evaluation_that_waits_for_it_has_the_scores_of_a_local_one(
    jobs, cluster, one_process
):
    job = jobs.train(*KEYS, ACCELERATE_CONFIG_FILE="accelerate_configs/nodes_zero3.yaml")
    evaluation = jobs.submit("recipes/demo.yaml", "--output_dir", jobs.run, *EVALUATION, "--max_batch_tokens", 1,
                             script="eval.sh", options=("--nodes=2", f"--dependency=afterok:{job}"))  # fmt: skip
    jobs.completes(job)
    check_close(jobs.run, one_process)
    assert json.loads((jobs.run / "train_metrics.json").read_text())["zero_stage"] == 3

    jobs.wait_for(evaluation, r"adapter: .*\| [1-9]\d*/\d+ ")
    cluster.run("scancel", "--batch", "--signal=USR1", evaluation)  # its time limit
    jobs.wait_for(evaluation, r"start 2[^$]* of \d+ are there; goes on with the others")
    jobs.completes(evaluation)
    there = json.loads((jobs.run / "eval/results.json").read_text())["models"]["adapter"]
    shutil.rmtree(jobs.run / "eval")
    script("--output_dir", jobs.run, *EVALUATION, file="eval/run.py", check=True)
    here = json.loads((jobs.run / "eval/results.json").read_text())["models"]["adapter"]
    assert there["throughput"]["of_examples"] == here["throughput"]["of_examples"]
    for score in ("rouge1", "rougeL", "bleu", "chrf"):
        assert there[score] == here[score]


def test_misuse_ends_with_what_to_do(jobs, cluster):
    assert "invalid partition" in jobs.train(*KEYS, options=("-p", "elsewhere"), check=False).lower()
    missing = jobs.train(*KEYS, recipe="recipes/none.yaml")
    odd = jobs.train("--global_batch_size", 9)
    every = ("--nodes=2", "--exclusive", "--gpus-per-node=1")  # gets all, two a node
    gpus = jobs.train("--global_batch_size", 9, options=every)
    broken = jobs.train("--global_batch_size", 8, options=("--nodes=2", "--gpus-per-node=1"))
    for job, message in (
        (missing, "none.yaml cannot be read"),
        (odd, "9 does not divide by 2 ranks; the nearest sizes are 8 or 10"),
        (gpus, "9 does not divide by 4 ranks; the nearest sizes are 8 or 12"),
        (broken, "on node1: SLURM gave 1 GPUs and torch sees 0"),
    ):
        ended = cluster.wait(job)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
        assert message in jobs.log(job) and "Traceback" not in jobs.log(job)
    assert not (jobs.run).exists()
    train = PROJECT / "slurm/train.sh"
    outside = cluster.run("bash", train, "recipes/demo.yaml", check=False, VENV=str(VENV))
    assert outside.returncode == 2 and "usage: sbatch" in outside.stderr
    words = ("recipes/demo.yaml", "--config", "recipes/overlays/demo_base.yaml")
    prefetched = cluster.run("bash", train, "--prefetch", *words, VENV=str(VENV))
    assert "demo/base is here" in prefetched.stderr and "train 1960 rows" in prefetched.stderr


@pytest.mark.long
def test_the_node_that_is_not_like_the_others_is_named(jobs, cluster, tmp_path):
    """Each fault is a real one, on node2 alone."""
    copies = tmp_path / ".code"
    copies.mkdir()
    package = Path(importlib.metadata.distribution("peft")._path) / "METADATA"
    older = tmp_path / "METADATA"
    older.write_text(re.sub(r"^Version: .*", "Version: 0.1.2", package.read_text(), flags=re.M))
    data, stale = shutil.copytree(PROJECT / "demo/data", tmp_path / "data"), tmp_path / "train.jsonl"
    rows = data / "train.jsonl"
    stale.write_text(rows.read_text().replace("order", "parcel"))
    python, frozen = Path(sys.executable).resolve(), tmp_path / "frozen"
    frozen.write_text("#!/bin/sh\nsleep 600\n")
    frozen.chmod(0o755)
    faults = (
        (("mount", "-t", "tmpfs", "tmpfs", copies), ("umount", copies), "on node2: recipe .code/"),
        (("mount", "--bind", older, package), ("umount", package), "node2 has another peft than node1 (0.1.2, "),
        (("mount", "-t", "tmpfs", "tmpfs", jobs.folder), ("umount", jobs.folder), "node2 does not see what node1 writes there"),
        (("mount", "--bind", stale, rows), ("umount", rows), "dataset_name: node2 has other rows than node1"),
        (("mount", "--bind", frozen, python), ("umount", python), "1 of 2 ranks did not report within 15 s, those of node2"),
    )  # fmt: skip
    for fault, repair, message in faults:
        cluster.run(*fault, machine="node2")
        try:
            began = time.time()
            patience = "15" if "did not report" in message else "40"
            job = jobs.train(*KEYS, "--dataset_name", data, ROLL_CALL_PATIENCE=patience)
            ended = cluster.wait(job)
        finally:
            cluster.run(*repair, machine="node2")
        assert message in jobs.log(job), jobs.log(job)[-2000:]
        assert ended["JobState"] == "FAILED" and ended["Restarts"] == "0" and time.time() - began < 75


@pytest.mark.long
def test_a_job_that_hangs_or_crashes_again_and_again_is_not_requeued_for_ever(jobs, cluster):
    job = jobs.train(*KEYS, "--stall_timeout", 20)
    jobs.wait_for(job, "parameters are trained")
    os.kill(jobs.wait_for_rank(job, "node2"), signal.SIGSTOP)  # node1 waits for it
    second = jobs.train(*KEYS)  # in the same folder
    assert cluster.wait(second)["ExitCode"] == "2:0" and f"is that of job {job}" in jobs.log(second)
    for start in (2, 3):
        jobs.wait_for(job, f"start {start}")
        os.kill(jobs.wait_for_rank(job, "node2"), signal.SIGKILL)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2")
    assert "has hung for 20 s" in jobs.log(job).partition("start 2")[0]
    assert "three starts have ended after nothing at all; it is not requeued again" in jobs.log(job)
