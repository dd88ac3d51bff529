"""Kills a random rank at a random moment, again and again, on a real SLURM cluster of two nodes: is the result the same?

    python benchmarks/kills.py [--trials 20] [--seed 0]

Each trial is one job of slurm/train.sh: two nodes under ZeRO-2, 12 steps with a save after each second. Once its training
processes are there, a rank drawn by the seed is killed (SIGKILL) after a drawn time, in every second trial in the middle of a
drawn save. The job requeues itself and ends; its adapter is compared bit by bit with that of a run that nobody disturbed.
Before that, jobs are stopped by the signal of a time limit: seconds until saved, and from the restart to the next step.
The same call again adds the trials that are missing. Needs root and SLURM's daemons. Results: benchmarks/results/kills.json,
with what the log of each trial said.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from launches import PROJECT, RESULTS, describe_machine, say, write_results

sys.path[:0] = [str(PROJECT / "tests"), str(PROJECT / "tests/cluster")]
from launching import same_bits  # noqa: E402
from two_nodes import Cluster, Jobs, what_is_missing  # noqa: E402

from carelm.provenance import git_commit  # noqa: E402

STEPS = 12
KEYS = ("--max_steps", STEPS, "--eval_steps", 4, "--save_steps", 2, "--save_total_limit", 2, "--num_sample_answers", 0,
        "--max_samples", 50, "--max_eval_samples", 24, "--lora_dropout", 0.1)  # fmt: skip
TOLD = re.compile(r"^carelm: (going on from .*|.* is not whole .*|.*requeued.*|job \d+, start .*)|^stopped: .*", re.M)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--stops", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if what_is_missing():
        sys.exit(what_is_missing())
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))
    cluster = Cluster(folder / "cluster")
    try:
        began = time.time()
        undisturbed = Jobs(cluster, folder / "undisturbed")
        undisturbed.completes(undisturbed.train(*KEYS))
        file = RESULTS / "kills.json"  # trials add up from call to call
        result = json.loads(file.read_text()) if file.exists() else {"stops": [], "kills": []}
        result |= {"machine": describe_machine(), "undisturbed_seconds": round(time.time() - began, 1)}
        for number in range(len(result["stops"]), options.stops):
            result["stops"].append(stop(Jobs(cluster, folder / f"stop-{number}"), undisturbed))
            say(str(result["stops"][-1]))
            write_results("kills", result)
        for number in range(len(result["kills"]), options.trials):
            draw = random.Random(f"{options.seed} {number}")
            in_save = draw.randrange(2, STEPS + 1, 2) if number % 2 else None
            trial = kill(Jobs(cluster, folder / f"kill-{number}"), undisturbed, f"node{draw.randint(1, 2)}",
                         draw.uniform(0, 30), in_save)  # fmt: skip
            result["kills"].append({**trial, "git_commit": git_commit()})
            say(f"{number + 1}: {trial}")
            write_results("kills", result)
    finally:
        cluster.down()
    shutil.rmtree(folder)
    if not all(trial["same_bits"] for trial in result["kills"] + result["stops"]):
        sys.exit("an adapter differs")


def stop(jobs: Jobs, undisturbed: Jobs) -> dict[str, object]:
    """The price of a stop: the signal of a time limit after the third step."""
    job = jobs.train(*KEYS)
    jobs.wait_for(job, rf"\| 3/{STEPS}")
    jobs.cluster.run("scancel", "--batch", "--signal=USR1", job)
    jobs.wait_for(job, "start 2")
    restarted = time.time()
    step, seconds = re.search(r"stopped: after step (\d+), ([\d.]+) s after", jobs.log(job)).groups()
    jobs.wait_for(job, rf"\| {int(step) + 1}/{STEPS}")
    first_step = time.time()
    jobs.completes(job)
    return {
        "seconds_from_signal_to_saved": float(seconds),
        "seconds_from_restart_to_first_new_step": round(first_step - restarted, 1),
        "same_bits": same_bits(jobs.run, undisturbed.run),
    }


def kill(jobs: Jobs, undisturbed: Jobs, node: str, seconds: float, in_save: int | None) -> dict[str, object]:
    job = jobs.train(*KEYS)
    victim = jobs.wait_for_rank(job, node)
    if in_save is None:
        time.sleep(seconds)
    else:
        jobs.wait_for_save(job, in_save)
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:  # the run was over already: no trial
        again = Jobs(jobs.cluster, jobs.folder.with_name(f"{jobs.folder.name}-again"))
        return kill(again, undisturbed, node, seconds / 2, in_save)
    jobs.completes(job)
    if "is not whole" in jobs.log(job):
        sys.exit(f"a torn checkpoint stood under its final name: {jobs.log(job)[-3000:]}")
    return {
        "node": node,
        "at": f"{seconds:.1f} s after the start of the rank" if in_save is None else f"in the save of step {in_save}",
        "same_bits": same_bits(jobs.run, undisturbed.run),
        "went_on_from_step": int((re.findall(r"going on from \S*checkpoint-(\d+)", jobs.log(job)) or [0])[-1]),
        "log": [m.group() for m in TOLD.finditer(jobs.log(job).replace(str(jobs.folder), "OUTPUTS"))],
    }


if __name__ == "__main__":
    main()
