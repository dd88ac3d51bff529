"""Every way to stop a job of slurm/train.sh, and how it goes on, on a real SLURM cluster of two nodes (two_nodes.py)."""

import contextlib
import datetime
import os
import shutil
import signal

import pytest
from launching import PROJECT, VENV, eval_losses, losses, mark, same_bits, stopped_at
from two_nodes import KEYS, TRAINING, Cluster, Jobs, check_close, what_is_missing

from carelm.cluster.job import KEPT

MISSING = what_is_missing()
pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]
EVALUATED_MOST_OF_THE_TIME = (*TRAINING, "--eval_steps", 1, "--max_eval_samples", 150)


def test_later_starts_run_what_the_first_ran_and_the_run_goes_on_on_one_node_and_again_on_two(
    cluster, unbroken, tmp_path
):
    """Submitted in the project's folder, every part of which is broken while the job runs; --restart, too, is done once.

    Folders have spaces in their names; the one node has an environment that is on the path, as a module's is.
    """
    for place in KEPT:
        shutil.copytree(PROJECT / place, tmp_path / place, ignore=shutil.ignore_patterns("__pycache__"))
    cluster.wait_for_nodes()
    jobs = Jobs(cluster, tmp_path, project=tmp_path)
    run = jobs.run = tmp_path / "runs of the shop/first run"
    shutil.copytree(unbroken / "checkpoint-5", run / "checkpoint-5")
    shutil.copy(unbroken / "recipe.yaml", run)
    job = jobs.train(*KEYS, "--restart")
    jobs.wait_for(job, r"\| 1/20")
    for place in KEPT:
        for file in (f for f in (tmp_path / place).rglob("*") if f.is_file() and f.parent.name != "base"):
            file.write_text("broken while the job runs")
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what --signal=B:USR1@180 does when the time comes
    jobs.wait_for(job, "start 2")
    assert cluster.job(job)["Restarts"] == "1"
    assert jobs.goes_on(job, 2) < 5
    os.kill(jobs.freeze_in_save(job, 10), signal.SIGKILL)
    jobs.wait_for(job, "start 2[^$]*requeued, to go on where it was")
    jobs.wait_for_state(job, "PENDING")  # a scancel in the moment before the requeue would be undone by it
    assert (jobs.code(job) / "COMMIT").exists()
    cluster.run("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED" and not (run / "checkpoint-10").exists()
    assert jobs.log(job).count("the earlier run is kept as") == 1
    assert same_bits(run / "checkpoint-5", unbroken / "checkpoint-5")

    jobs = Jobs(cluster, tmp_path / "elsewhere")
    jobs.run = run
    job = jobs.train(*KEYS, options=("--nodes=1",), VENV="/nonexistent", PATH=f"{VENV}/bin:{os.environ['PATH']}")
    jobs.wait_for(job, r"going on from .*checkpoint-5\n[^$]*\| 7/20")
    (run / "stop_request").touch()
    ended = cluster.wait(job)
    assert "(the file stop_request)" in jobs.log(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "75:0", "0")
    assert mark(run, stopped_at(jobs.log(job)))["world_size"] == 1

    job = jobs.train(*KEYS)
    jobs.freeze_in_save(job, 15)
    cluster.run("scancel", job)  # wakes it, too
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    assert stopped_at(jobs.log(job)) in (15, 16)
    assert not jobs.code(job).exists() and not list(jobs.folder.glob("*.code"))

    job = jobs.train(*KEYS)
    jobs.completes(job)
    assert not jobs.code(job).exists() and not list(jobs.folder.glob("*.code"))
    check_close(run, unbroken)


def preempt(jobs: Jobs, cluster: Cluster) -> str:
    """Submits a more urgent job that wants both nodes; its number."""
    return cluster.run("sbatch", "--parsable", "-p", "urgent", "-N2", "--exclusive", "--wrap", "sleep 1",
                       cwd=jobs.folder).stdout.strip()  # fmt: skip


def test_preemption_in_a_step_and_in_a_save_a_requeue_and_a_signal_to_the_steps(jobs, cluster, unbroken):
    job = jobs.train(*KEYS, "--dataloader_num_workers", 1)  # which SLURM's signals reach as well
    jobs.wait_for(job, r"\| 1/20")
    urgent = preempt(jobs, cluster)
    jobs.wait_for(job, "start 2")
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    jobs.goes_on(job, 2)

    jobs.freeze_in_save(job, 10)
    cluster.run("scontrol", "requeue", job)  # wakes it, too
    jobs.wait_for(job, "start 3")
    assert jobs.goes_on(job, 3) in (10, 11)

    writer = jobs.freeze_in_save(job, 15)
    preempt(jobs, cluster)
    jobs.wait_for(job, r"start 3[^$]*the ranks are asked to save")
    os.kill(writer, signal.SIGCONT)
    jobs.wait_for(job, "start 4")
    assert jobs.goes_on(job, 4) in (15, 16)

    cluster.run("scancel", "--signal=TERM", job)  # to the steps only, as a preemption where sites send no user signal
    jobs.wait_for(job, "start 5")
    jobs.goes_on(job, 5)
    jobs.ends_like(job, unbroken)
    assert jobs.log(job).count("stopped: after step") == 4


def stops_in_evaluation(jobs: Jobs, job: str, start: int) -> int:
    """The step after which a start has stopped, whose evaluation it has put off."""
    stopped = stopped_at(jobs.log(job).partition(f"start {start}")[2])
    assert mark(jobs.run, stopped)["evaluation_is_due"]
    return stopped


def test_a_real_time_limit_a_requeue_and_a_cancel_in_an_evaluation_and_a_signal_in_a_roll_call(jobs, cluster, unbroken):
    job = jobs.train(*EVALUATED_MOST_OF_THE_TIME, options=("--nodes=2", "--signal=B:USR1@30"))
    jobs.wait_for(job, "start 1")
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # there is nothing to save yet
    jobs.wait_for(job, r"start 2[^$]*\| 2/20")
    end = datetime.datetime.now() + datetime.timedelta(seconds=75)  # SLURM warns within half a minute
    cluster.run("scontrol", "update", f"jobid={job}", f"endtime={end:%Y-%m-%dT%H:%M:%S}")
    jobs.wait_for(job, "start 3")
    cluster.run("scontrol", "update", f"jobid={job}", "timelimit=60")
    assert "time limit or preemption: the ranks are asked" in jobs.log(job).rpartition("start 2")[2]
    first = jobs.goes_on(job, 3)

    jobs.wait_for(job, rf"\| {first + 2}/20")
    cluster.run("scontrol", "requeue", job)
    jobs.wait_for(job, "start 4")
    second = stops_in_evaluation(jobs, job, 3)
    jobs.wait_for(job, rf"start 4[^$]*\| {second + 1}/20")
    cluster.run("scancel", job)
    ended = cluster.wait(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "3")
    stops_in_evaluation(jobs, job, 4)

    job = jobs.train(*EVALUATED_MOST_OF_THE_TIME)
    jobs.completes(job)
    assert losses(jobs.run) == losses(unbroken) and same_bits(jobs.run, unbroken)
    assert list(eval_losses(jobs.run)) == list(range(21))


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
    jobs.ends_like(job, unbroken)
