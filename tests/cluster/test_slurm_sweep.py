"""slurm/sweep.sh as a job array on a real SLURM cluster: its tasks share the runs, and one that is preempted goes on."""

import json
import re

import pytest
import yaml
from two_nodes import what_is_missing

MISSING = what_is_missing()
pytestmark = [pytest.mark.slurm, pytest.mark.skipif(MISSING is not None, reason=MISSING or "")]


def test_the_tasks_of_an_array_share_the_runs_and_one_at_its_time_limit_saves_and_goes_on(jobs, cluster, tmp_path):
    small = {
        "max_samples": 12,
        "max_eval_samples": 10,
        "num_sample_answers": 0,
        "global_batch_size": 4,
        "max_steps": 60,
    }
    keys = {"recipe": "recipes/demo.yaml", "overrides": small, "grid": {"lora_r": [2, 4]}, "evaluate": False}
    (tmp_path / "ranks.yaml").write_text(yaml.safe_dump({**keys, "output_dir": str(tmp_path / "out")}))
    array = jobs.submit("ranks.yaml", script="sweep.sh", options=("--array=0-1",))
    tasks = [f"{array}_{task}" for task in (0, 1)]  # both have the array's number until they start
    jobs._until(array, lambda: len({cluster.job(task)["JobId"] for task in tasks}) == 2, 0.05)
    first, second = (cluster.job(task)["JobId"] for task in tasks)
    jobs.wait_for(first, r"lora_r=\d begins")
    run = re.search(r"(lora_r=\d) begins", jobs.log(first)).group(1)
    log = tmp_path / f"out/{run}.log"
    jobs._until(first, lambda: log.exists() and "| 2/60" in log.read_text(), 0.05)
    cluster.run("scancel", "--batch", "--signal=USR1", tasks[0])  # its time limit
    jobs.completes(first)
    jobs.completes(second)
    assert "(SIGTERM); saved as checkpoint-" in log.read_text() and "going on from" in log.read_text()
    assert f"carelm: job {array}_0, start 2" in jobs.log(first) and "requeued, to go on" in jobs.log(first)
    begun = [name for job in (first, second) for name in re.findall(r"(lora_r=\d) begins", jobs.log(job))]
    assert sorted(begun) in (["lora_r=2", "lora_r=2", "lora_r=4"], ["lora_r=2", "lora_r=4", "lora_r=4"])
    found = [json.loads(line) for job in (first, second) for line in re.findall(r"^{.*}$", jobs.log(job), re.M)]
    assert any(one["finished"] == 2 and one["comparison"] for one in found)
    for run in ("lora_r=2", "lora_r=4"):
        assert json.loads((tmp_path / "out" / run / "train_metrics.json").read_text())["global_step"] == 60
