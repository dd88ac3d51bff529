"""slurm/train.sh and slurm/eval.sh on a real SLURM cluster of two nodes (tests/cluster.py), on CPU ranks under DeepSpeed."""

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
from cluster import Cluster, what_is_missing
from launching import PROJECT, eval_losses, launch, losses, mark, same_bits, stopped_at

pytestmark = [pytest.mark.slurm, pytest.mark.skipif(bool(what_is_missing()), reason=what_is_missing() or "")]

KEYS = ("--max_steps", 20, "--eval_steps", 5, "--save_steps", 5, "--save_total_limit", 9, "--num_sample_answers", 0,
        "--max_samples", 50, "--max_eval_samples", 24, "--per_device_eval_batch_size", 1)  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short, for the sockets in it
    cluster = Cluster(folder)
    yield cluster
    cluster.down()
    shutil.rmtree(folder)


class Jobs:
    """Submits in a folder of its own, in which the logs are."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder = cluster, folder
        folder.mkdir(exist_ok=True)

    def submit(self, *words, options=("--nodes=2",), script="train.sh", check=True, **extra) -> str:
        done = self.cluster.run(
            "sbatch", "--parsable", *options, PROJECT / "slurm" / script, *words, cwd=self.folder, check=check,
            OMP_NUM_THREADS="1", HF_HOME="/nonexistent", CUDA_VISIBLE_DEVICES="", TQDM_MININTERVAL="0.1",
            VENV=str(Path(shutil.which("accelerate")).parent.parent), **extra,
        )  # fmt: skip
        return done.stdout.strip() if check else done.stderr

    def train(self, *keys, recipe="recipes/demo.yaml", **kwargs) -> str:
        return self.submit(recipe, "--output_dir", self.folder / "run", *(keys or KEYS), **kwargs)

    def log(self, job: str) -> str:
        return "".join(f.read_text() for f in sorted(self.folder.glob(f"slurm-{job}*.log")))

    def wait_for(self, job: str, pattern: str, seconds: float = 180) -> None:
        until = time.time() + seconds
        while not re.search(pattern, self.log(job)):
            assert time.time() < until and self.cluster.run("squeue", "-h", "-j", job).stdout, self.log(job)[-3000:]
            time.sleep(0.03)

    def goes_on(self, job: str, start: int) -> None:
        """Waits for the first new step of a start, which must be the one after the last stop: none is done twice."""
        stopped = stopped_at(self.log(job).partition(f"start {start}")[0].rpartition("start ")[2])
        going_on = rf"start {start}[^$]*going on from \S*checkpoint-{stopped}\n[^$]*\| {stopped + 1}/20"
        self.wait_for(job, going_on)

    def ends_like(self, job: str, unbroken: Path) -> None:
        assert self.wait(job)["JobState"] == "COMPLETED", self.log(job)[-3000:]
        run = self.folder / "run"
        assert losses(run) == losses(unbroken) and eval_losses(run) == eval_losses(unbroken)
        assert same_bits(run, unbroken)

    def wait(self, job: str) -> dict[str, str]:
        return self.cluster.wait(job)


@pytest.fixture
def jobs(cluster, tmp_path):
    cluster.wait_for_nodes()
    return Jobs(cluster, tmp_path)


@pytest.fixture(scope="module")
def unbroken(cluster, tmp_path_factory):
    """Two nodes under ZeRO-2 from beginning to end, and their evaluation as a job that waits for them."""
    jobs = Jobs(cluster, tmp_path_factory.mktemp("unbroken"))
    job = jobs.train()
    evaluation = jobs.submit("recipes/demo.yaml", "--output_dir", jobs.folder / "run", *EVALUATION, script="eval.sh",
                             options=("--nodes=2", f"--dependency=afterok:{job}"))  # fmt: skip
    assert jobs.wait(job)["JobState"] == "COMPLETED", jobs.log(job)[-3000:]
    assert jobs.wait(evaluation)["JobState"] == "COMPLETED", jobs.log(evaluation)[-3000:]
    return jobs.folder / "run"


EVALUATION = ("--max_eval_samples", 12, "--max_new_tokens", 12, "--num_latency_prompts", 2, "--models", "adapter")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    launch("--output_dir", folder, *KEYS)
    return folder


def check_close(run, reference):
    for a, b in ((losses(run), losses(reference)), (eval_losses(run), eval_losses(reference))):
        assert a.keys() == b.keys() and all(abs(a[k] - b[k]) <= 1e-3 * b[k] for k in b)


def test_two_nodes_have_the_losses_of_one_process_and_the_scores_of_a_local_evaluation(unbroken, one_process):
    check_close(unbroken, one_process)
    metrics = json.loads((unbroken / "train_metrics.json").read_text())
    assert (metrics["world_size"], metrics["zero_stage"]) == (2, 2)
    there = json.loads((unbroken / "eval/results.json").read_text())["models"]["adapter"]
    shutil.rmtree(unbroken / "eval")
    launch("--output_dir", unbroken, *EVALUATION, script="eval/run.py")
    here = json.loads((unbroken / "eval/results.json").read_text())["models"]["adapter"]
    assert there["throughput"]["examples"] == here["throughput"]["examples"]
    for score in ("rouge1", "rougeL", "bleu", "chrf"):
        assert there[score] == here[score]


@pytest.mark.long
def test_zero3_on_two_nodes_has_them_too(jobs, one_process):
    job = jobs.train(ACCELERATE_CONFIG_FILE="accelerate_configs/nodes_zero3.yaml")
    assert jobs.wait(job)["JobState"] == "COMPLETED", jobs.log(job)[-3000:]
    check_close(jobs.folder / "run", one_process)
    assert json.loads((jobs.folder / "run/train_metrics.json").read_text())["zero_stage"] == 3


def test_a_time_limit_and_a_kill_in_mid_save_end_with_the_same_bits(jobs, cluster, unbroken):
    job = jobs.train()
    jobs.wait_for(job, r"\| 1/20")
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@180 does when the time comes
    jobs.wait_for(job, "start 2")
    assert cluster.job(job)["Restarts"] == "1"
    jobs.goes_on(job, 2)

    partial, whole = jobs.folder / "run/checkpoint-15.partial", jobs.folder / "run/checkpoint-15"
    until = time.time() + 180
    while not partial.exists() and not whole.exists():
        assert time.time() < until, jobs.log(job)[-3000:]
        time.sleep(0.002)
    os.kill(cluster.processes("node1", "-u train/sft.py")[-1], signal.SIGKILL)
    jobs.wait_for(job, "start 3")
    jobs.ends_like(job, unbroken)


@pytest.mark.long
def test_preemption_and_requeue_save_and_go_on(jobs, cluster, unbroken):
    job = jobs.train()
    jobs.wait_for(job, r"\| 1/20")
    urgent = cluster.run("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "--wrap", "sleep 1",
                         cwd=jobs.folder).stdout.strip()  # fmt: skip
    jobs.wait_for(job, "start 2")
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    jobs.goes_on(job, 2)
    cluster.run("scontrol", "requeue", job)
    jobs.wait_for(job, "start 3")
    jobs.goes_on(job, 3)
    cluster.run(
        "scancel", "--signal=TERM", job
    )  # reaches the steps only, as a preemption where sites send no user signal
    jobs.wait_for(job, "start 4")
    jobs.goes_on(job, 4)
    jobs.ends_like(job, unbroken)
    assert jobs.log(job).count("stopped: after step") == 3


@pytest.mark.long
def test_a_lost_node_comes_back_and_the_job_goes_on(jobs, cluster, unbroken):
    job = jobs.train()
    jobs.wait_for(job, r"\| 7/20")
    cluster.crash("node2")
    cluster.boot("node2")
    jobs.wait_for(job, "Node failure on node2")
    cluster.wait_for_nodes()
    jobs.wait_for(job, "start 2")
    jobs.ends_like(job, unbroken)


def test_scancel_ends_for_good_and_the_run_goes_on_on_one_node_and_again_on_two(jobs, cluster, unbroken):
    run = jobs.folder / "run"
    job = jobs.train()
    jobs.wait_for(job, r"\| 2/20")
    cluster.run("scancel", job)
    ended = jobs.wait(job)
    assert ended["JobState"] == "CANCELLED" and ended["Restarts"] == "0"
    first = stopped_at(jobs.log(job))

    job = jobs.train(options=("--nodes=1",))
    jobs.wait_for(job, rf"\| {first + 2}/20")
    (run / "stop_request").write_text("to two nodes\n")
    ended = jobs.wait(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0")
    second = stopped_at(jobs.log(job))
    assert (mark(run, first)["world_size"], mark(run, second)["world_size"]) == (2, 1)

    job = jobs.train()
    assert jobs.wait(job)["JobState"] == "COMPLETED", jobs.log(job)[-3000:]
    check_close(run, unbroken)


def test_misuse_ends_with_what_to_do(jobs, cluster):
    assert "invalid partition" in jobs.train(options=("-p", "elsewhere"), check=False).lower()
    missing = jobs.train(recipe="recipes/none.yaml")
    odd = jobs.train("--global_batch_size", 9)
    gpus = jobs.train(
        "--global_batch_size", 9, options=("--nodes=2", "--exclusive", "--gpus-per-node=1")
    )  # gets all, 2 a node
    broken = jobs.train("--global_batch_size", 8, options=("--nodes=2", "--gpus-per-node=1"))
    for job, message in (
        (missing, "none.yaml cannot be read"),
        (odd, "9 does not divide by 2 ranks; the nearest sizes are 8 or 10"),
        (gpus, "9 does not divide by 4 ranks; the nearest sizes are 8 or 12"),
        (broken, "on node1: SLURM gave 1 GPUs and torch sees 0"),
    ):
        ended = jobs.wait(job)
        assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0")
        assert f"{message}" in jobs.log(job) and "Traceback" not in jobs.log(job)
    assert not (jobs.folder / "run").exists()
    train = PROJECT / "slurm/train.sh"
    venv = {"VENV": str(Path(shutil.which("accelerate")).parent.parent)}
    outside = cluster.run("bash", train, "recipes/demo.yaml", check=False, **venv)
    assert outside.returncode == 2 and "usage: sbatch" in outside.stderr
    prefetched = cluster.run("bash", train, "--prefetch", "recipes/demo.yaml", **venv)
    assert "demo/base is here" in prefetched.stderr and "train 1960 rows" in prefetched.stderr


def test_the_roll_call_names_the_node_that_is_not_like_the_others(jobs, cluster, tmp_path):
    """Each fault is a real one, on node2 alone."""
    recipe, other = tmp_path / "shop.yaml", tmp_path / "other.yaml"
    recipe.write_text((PROJECT / "recipes/demo.yaml").read_text())
    other.write_text(recipe.read_text().replace("seed: 42", "seed: 43"))
    package = Path(importlib.metadata.distribution("peft")._path) / "METADATA"
    older = tmp_path / "METADATA"
    older.write_text(re.sub(r"^Version: .*", "Version: 0.1.2", package.read_text(), flags=re.M))
    python, frozen = Path(sys.executable).resolve(), tmp_path / "frozen"
    frozen.write_text("#!/bin/sh\nsleep 600\n")
    frozen.chmod(0o755)
    faults = (
        (("mount", "--bind", other, recipe), ("umount", recipe), "node2 has another recipe than node1"),
        (("mount", "--bind", older, package), ("umount", package), "node2 has another peft than node1 (0.1.2, "),
        (("mount", "-t", "tmpfs", "tmpfs", jobs.folder), ("umount", jobs.folder), "node2 does not see what node1 writes there"),
        (("mount", "--bind", frozen, python), ("umount", python), "1 of 2 ranks did not report within 40 s, those of node2"),
    )  # fmt: skip
    for fault, repair, message in faults:
        cluster.run(*fault, machine="node2")
        began = time.time()
        job = jobs.train(recipe=recipe)
        ended = jobs.wait(job)
        cluster.run(*repair, machine="node2")
        assert message in jobs.log(job), jobs.log(job)[-2000:]
        assert ended["JobState"] == "FAILED" and ended["Restarts"] == "0" and time.time() - began < 75


@pytest.mark.long
def test_a_job_that_crashes_again_and_again_is_not_requeued_for_ever(jobs, cluster):
    job = jobs.train()
    for start in (1, 2, 3):
        jobs.wait_for(job, f"start {start}")
        until = time.time() + 120
        while not (victims := cluster.processes("node2", "-u train/sft.py")):
            assert time.time() < until, jobs.log(job)[-3000:]
            time.sleep(0.1)
        os.kill(victims[-1], signal.SIGKILL)
    ended = jobs.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2")
    assert "three starts have ended after nothing at all; it is not requeued again" in jobs.log(job)
