"""slurm/train.sh and slurm/eval.sh on a real SLURM cluster of two nodes (two_nodes.py), on CPU ranks under DeepSpeed."""

import contextlib
import datetime
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
from launching import PROJECT, VENV, eval_losses, losses, mark, same_bits, script, stopped_at
from two_nodes import Cluster, Jobs, what_is_missing

from carelm.cluster.job import KEPT

MISSING = what_is_missing()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]

TRAINING = ("--max_steps", 20, "--save_steps", 5, "--save_total_limit", 9, "--num_sample_answers", 0, "--max_samples", 50,
            "--per_device_eval_batch_size", 1)  # fmt: skip
KEYS = (*TRAINING, "--eval_steps", 5, "--max_eval_samples", 12)
EVALUATED_MOST_OF_THE_TIME = (*TRAINING, "--eval_steps", 1, "--max_eval_samples", 150)
EVALUATION = ("--max_eval_samples", 30, "--max_new_tokens", 12, "--num_latency_prompts", 2, "--models", "adapter")


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short, for the sockets in it
    cluster = Cluster(folder)
    yield cluster
    cluster.down()
    shutil.rmtree(folder)


def goes_on(jobs: Jobs, job: str, start: int) -> int:
    """Waits for the first new step of a start, which must be the one after the last stop (returned): none is done twice."""
    stopped = stopped_at(jobs.log(job).partition(f"start {start}")[0].rpartition("start ")[2])
    jobs.wait_for(job, rf"start {start}[^$]*going on from .*checkpoint-{stopped}\n[^$]*\| {stopped + 1}/20")
    return stopped


def ends_like(jobs: Jobs, job: str, unbroken: Path) -> None:
    jobs.completes(job)
    assert losses(jobs.run) == losses(unbroken) and eval_losses(jobs.run) == eval_losses(unbroken)
    assert same_bits(jobs.run, unbroken)


@pytest.fixture
def jobs(cluster, tmp_path):
    cluster.wait_for_nodes()
    return Jobs(cluster, tmp_path)


@pytest.fixture(scope="module")
def unbroken(cluster, tmp_path_factory):
    """Two nodes under ZeRO-2 from beginning to end, on rows that lie where the job is submitted."""
    jobs = Jobs(cluster, tmp_path_factory.mktemp("unbroken"))
    shutil.copytree(PROJECT / "demo/data", jobs.folder / "rows of the shop")
    jobs.completes(jobs.train(*KEYS, "--dataset_name", "rows of the shop"))
    return jobs.run


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    script("--output_dir", folder, *KEYS, check=True)
    return folder


def check_close(run, reference):
    for a, b in ((losses(run), losses(reference)), (eval_losses(run), eval_losses(reference))):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) <= 1e-3 * b[k] for k in b)


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


@pytest.mark.long
def test_a_run_that_was_stopped_and_killed_in_mid_save_goes_on_on_one_node(jobs, cluster, unbroken):
    """Under a name with spaces, and at last in an environment that is no virtual one but on the path, as a module's is."""
    jobs.run = jobs.folder / "run of the shop"
    job = jobs.train(*KEYS)
    jobs.wait_for(job, r"\| 1/20")
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@180 does when the time comes
    jobs.wait_for(job, "start 2")
    assert cluster.job(job)["Restarts"] == "1"
    assert goes_on(jobs, job, 2) < 10
    os.kill(jobs.freeze_in_save(job, 15), signal.SIGKILL)
    jobs.wait_for(job, "start 2[^$]*requeued, to go on where it was")
    cluster.run("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED" and not (jobs.run / "checkpoint-15").exists()
    assert same_bits(jobs.run / "checkpoint-10", unbroken / "checkpoint-10")

    job = jobs.train(*KEYS, options=("--nodes=1",), VENV="/nonexistent", PATH=f"{VENV}/bin:{os.environ['PATH']}")
    jobs.completes(job)
    assert "checkpoint-10" in re.search("going on from .*", jobs.log(job)).group()
    check_close(jobs.run, unbroken)
    assert json.loads((jobs.run / "train_metrics.json").read_text())["world_size"] == 1


def test_a_start_that_is_requeued_runs_what_the_first_one_ran(cluster, unbroken, tmp_path):
    """Submitted in the project's folder, whose every part is broken while the job runs; --restart, too, is done once."""
    for place in KEPT:
        shutil.copytree(PROJECT / place, tmp_path / place, ignore=shutil.ignore_patterns("__pycache__"))
    cluster.wait_for_nodes()
    jobs = Jobs(cluster, tmp_path, project=tmp_path)
    shutil.copytree(unbroken / "checkpoint-5", jobs.run / "checkpoint-5")
    shutil.copy(unbroken / "recipe.yaml", jobs.run)
    job = jobs.train(*KEYS, "--restart")
    jobs.wait_for(job, r"\| 1/20")
    for place in KEPT:
        for file in (f for f in (tmp_path / place).rglob("*") if f.is_file() and f.parent.name != "base"):
            file.write_text("broken while the job runs")
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    jobs.wait_for(job, "start 2")
    goes_on(jobs, job, 2)
    ends_like(jobs, job, unbroken)
    assert jobs.log(job).count("the earlier run is kept as") == 1
    assert not list((tmp_path / ".code").iterdir()) and not list(tmp_path.glob("slurm-*.code"))


def preempt(jobs: Jobs, cluster: Cluster) -> str:
    """Submits a more urgent job that wants both nodes; its number."""
    return cluster.run("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "--wrap", "sleep 1",
                       cwd=jobs.folder).stdout.strip()  # fmt: skip


@pytest.mark.long
def test_preemption_and_requeue_in_a_step_and_in_a_save(jobs, cluster, unbroken):
    job = jobs.train(*KEYS, "--dataloader_num_workers", 1)  # which SLURM's signals reach as well
    jobs.wait_for(job, r"\| 1/20")
    urgent = preempt(jobs, cluster)
    jobs.wait_for(job, "start 2")
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    goes_on(jobs, job, 2)
    cluster.run("scontrol", "requeue", job)
    jobs.wait_for(job, "start 3")
    goes_on(jobs, job, 3)

    jobs.freeze_in_save(job, 10)
    cluster.run("scontrol", "requeue", job)  # wakes it, too
    jobs.wait_for(job, "start 4")
    assert goes_on(jobs, job, 4) in (10, 11)

    writer = jobs.freeze_in_save(job, 15)
    preempt(jobs, cluster)
    jobs.wait_for(job, r"start 4[^$]*the ranks are asked to save")
    os.kill(writer, signal.SIGCONT)
    jobs.wait_for(job, "start 5")
    assert goes_on(jobs, job, 5) in (15, 16)

    cluster.run("scancel", "--signal=TERM", job)  # to the steps only, as a preemption where sites send no user signal
    jobs.wait_for(job, "start 6")
    goes_on(jobs, job, 6)
    ends_like(jobs, job, unbroken)
    assert jobs.log(job).count("stopped: after step") == 5


def stops_in_evaluation(jobs: Jobs, job: str, start: int) -> int:
    """The step after which a start has stopped, whose evaluation it has put off."""
    stopped = stopped_at(jobs.log(job).partition(f"start {start}")[2])
    assert mark(jobs.run, stopped)["evaluation_is_due"]
    return stopped


@pytest.mark.long
def test_a_real_time_limit_and_every_stop_in_an_evaluation_and_one_in_a_roll_call(jobs, cluster, unbroken):
    job = jobs.train(*EVALUATED_MOST_OF_THE_TIME, options=("--nodes=2", "--signal=B:USR1@30"))
    jobs.wait_for(job, "start 1")
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # there is nothing to save yet
    jobs.wait_for(job, r"start 2[^$]*\| 2/20")
    end = datetime.datetime.now() + datetime.timedelta(seconds=75)  # SLURM warns within half a minute
    cluster.run("scontrol", "update", f"jobid={job}", f"endtime={end:%Y-%m-%dT%H:%M:%S}")
    jobs.wait_for(job, "start 3")
    cluster.run("scontrol", "update", f"jobid={job}", "timelimit=60")
    assert "time limit or preemption: the ranks are asked" in jobs.log(job).rpartition("start 2")[2]
    first = goes_on(jobs, job, 3)

    jobs.wait_for(job, rf"\| {first + 2}/20")
    cluster.run("scontrol", "requeue", job)
    jobs.wait_for(job, "start 4")
    second = stops_in_evaluation(jobs, job, 3)
    jobs.wait_for(job, rf"start 4[^$]*\| {second + 1}/20")
    preempt(jobs, cluster)
    jobs.wait_for(job, "start 5")
    third = stops_in_evaluation(jobs, job, 4)
    jobs.wait_for(job, rf"start 5[^$]*\| {third + 1}/20")
    cluster.run("scancel", job)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "4")
    stops_in_evaluation(jobs, job, 5)

    job = jobs.train(*EVALUATED_MOST_OF_THE_TIME)
    jobs.completes(job)
    assert losses(jobs.run) == losses(unbroken) and same_bits(jobs.run, unbroken)
    assert list(eval_losses(jobs.run)) == list(range(21))


@pytest.mark.long
def test_a_job_goes_on_after_a_node_has_lost_its_processes_was_lost_itself_and_does_not_answer(jobs, cluster, unbroken):
    job = jobs.train(*KEYS, SAVE_PATIENCE="5")
    jobs.freeze_in_save(job, 10)
    for process in cluster.processes("node1", "train/sft.py"):
        with contextlib.suppress(ProcessLookupError):  # it ends with its parent
            os.kill(process, signal.SIGKILL)
    jobs.wait_for(job, r"start 2[^$]*going on from \S*checkpoint-5\n[^$]*\| 12/20")
    cluster.crash("node2")
    cluster.boot("node2")
    jobs.wait_for(job, "Node failure on node2")
    cluster.wait_for_nodes()
    jobs.wait_for(job, r"start 3[^$]*going on from \S*checkpoint-1[05]\n[^$]*\| 16/20")
    os.kill(jobs.wait_for_rank(job, "node2"), signal.SIGSTOP)  # it will not answer until SLURM wakes it
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    jobs.wait_for(job, r"the ranks have not saved within 5 s[^$]*start 4[^$]*going on from ")
    ends_like(jobs, job, unbroken)


@pytest.mark.long
def test_scancel_ends_for_good_and_the_run_goes_on_on_one_node_and_again_on_two(jobs, cluster, unbroken):
    run = jobs.run
    job = jobs.train(*KEYS)
    jobs.wait_for(job, r"\| 2/20")
    cluster.run("scancel", job)
    ended = cluster.wait(job)
    assert ended["JobState"] == "CANCELLED" and ended["Restarts"] == "0"
    first = stopped_at(jobs.log(job))

    job = jobs.train(*KEYS, options=("--nodes=1",))
    jobs.wait_for(job, rf"\| {first + 2}/20")
    (run / "stop_request").touch()
    ended = cluster.wait(job)
    assert "(the file stop_request)" in jobs.log(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0")
    second = stopped_at(jobs.log(job))
    assert (mark(run, first)["world_size"], mark(run, second)["world_size"]) == (2, 1)

    job = jobs.train(*KEYS)
    jobs.freeze_in_save(job, 15)
    cluster.run("scancel", job)  # wakes it, too
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    assert stopped_at(jobs.log(job)) in (15, 16)

    jobs.completes(jobs.train(*KEYS))
    check_close(run, unbroken)


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
    recipe, other = tmp_path / "shop.yaml", tmp_path / "other.yaml"
    recipe.write_text((PROJECT / "recipes/demo.yaml").read_text())
    other.write_text(recipe.read_text().replace("seed: 42", "seed: 43"))
    package = Path(importlib.metadata.distribution("peft")._path) / "METADATA"
    older = tmp_path / "METADATA"
    older.write_text(re.sub(r"^Version: .*", "Version: 0.1.2", package.read_text(), flags=re.M))
    rows, stale = PROJECT / "demo/data/train.jsonl", tmp_path / "train.jsonl"
    stale.write_text(rows.read_text().replace("order", "parcel"))
    python, frozen = Path(sys.executable).resolve(), tmp_path / "frozen"
    frozen.write_text("#!/bin/sh\nsleep 600\n")
    frozen.chmod(0o755)
    faults = (
        (("mount", "--bind", other, recipe), ("umount", recipe), "node2 has another recipe than node1"),
        (("mount", "--bind", older, package), ("umount", package), "node2 has another peft than node1 (0.1.2, "),
        (("mount", "-t", "tmpfs", "tmpfs", jobs.folder), ("umount", jobs.folder), "node2 does not see what node1 writes there"),
        (("mount", "--bind", stale, rows), ("umount", rows), "dataset_name: node2 has other rows than node1"),
        (("mount", "--bind", frozen, python), ("umount", python), "1 of 2 ranks did not report within 40 s, those of node2"),
    )  # fmt: skip
    for fault, repair, message in faults:
        cluster.run(*fault, machine="node2")
        try:
            began = time.time()
            job = jobs.train(*KEYS, recipe=recipe)
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
