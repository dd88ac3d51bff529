"""A run that is asked to stop saves at the end of the step and goes on from there, whoever asks; a run that hangs ends."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import types

import pytest
from launching import PROJECT, Run, eval_losses, mark, script, stopped_at

from carelm.training import stops

ZERO2 = PROJECT / "accelerate_configs/cpu_zero2.yaml"


def test_one_process_stops_with_its_launcher_in_time_and_before_it_has_begun(tmp_path):
    folder = tmp_path / "run"
    keys = ("--max_steps", 2000, "--num_sample_answers", 0, "--max_samples", 50, "--max_eval_samples", 24,
            "--eval_strategy", "no")  # fmt: skip

    done = script("--output_dir", folder, *keys, "--max_hours", 0.006)  # 22 s
    assert done.returncode == 75 and "(max_hours)" in done.stderr
    assert 0 < (first := stopped_at(done.stderr)) < 2000

    run = Run(folder, *keys)
    run.wait_for(rf"\| {first + 1}/2000")
    second = script("--output_dir", folder, *keys)  # a second run in the same folder
    assert second.returncode == 2 and re.search(r"error: output_dir: .* is in use by process \d+ on ", second.stderr)
    ranks = run.ranks
    run.process.terminate()  # ends this launcher at once
    log = run.ends(ranks)
    assert stopped_at(log) > first and re.search(r"\((the launcher has died|SIGTERM)\)", log)

    (folder / "stop_request").write_text("left behind\n")
    os.utime(folder / "stop_request", (0, 0))
    run = Run(folder, *keys)
    run.wait_for("stop_request is from before this launch; it is removed")
    ranks = run.ranks
    ranks[0].send_signal(signal.SIGINT)
    assert "(SIGINT)" in run.ends(ranks)


def test_a_stop_in_the_last_evaluation_of_an_epoch_puts_it_off(tmp_path):
    """The checkpoint is that of the run's last step, saved before the evaluation, which is all that is left to do."""
    keys = ("--max_steps", -1, "--num_train_epochs", 1, "--max_samples", 24, "--num_sample_answers", 0,
            "--max_eval_samples", 120, "--per_device_eval_batch_size", 1, "--eval_strategy", "epoch",
            "--save_steps", 3)  # fmt: skip
    run = Run(tmp_path / "run", *keys)
    run.wait_for(r"\| 3/3 \[")
    (tmp_path / "run/stop_request").write_text("enough for today\n")
    assert stopped_at(log := run.ends([])) == 3 and "(enough for today)" in log
    assert mark(tmp_path / "run", 3)["evaluation_is_due"] and list(eval_losses(tmp_path / "run")) == [0]
    done = script("--output_dir", tmp_path / "run", *keys, check=True)
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics["global_step"] == 3 and metrics["eval_loss"] < metrics["eval_loss_before"] - 0.1


def test_a_run_that_is_suspended_does_not_hang():
    code = "import time; from carelm.training.stops import HangWatch; w = HangWatch(3); print('on', flush=True)\n"
    code += "for _ in range(8): time.sleep(0.5); w.look()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(5)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=30)[1] == b"" and process.returncode == 0


@pytest.mark.long
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=str)
def test_two_ranks_stop_in_an_evaluation_when_their_launcher_is_told_to(tmp_path, sent):
    keys = ("--max_steps", 9, "--eval_steps", 3, "--num_sample_answers", 0, "--max_samples", 50, "--max_eval_samples", 80,
            "--per_device_eval_batch_size", 1)  # fmt: skip
    run = Run(tmp_path / "run", *keys, config_file=ZERO2)
    run.wait_for(r"\| 3/9")  # its evaluation comes now
    ranks = run.ranks
    os.killpg(run.process.pid, sent)  # as a terminal does: the launcher has put its ranks into groups of their own
    assert stopped_at(log := run.ends(ranks)) == 3 and f"({sent.name})" in log
    assert mark(tmp_path / "run", 3)["evaluation_is_due"] and not (tmp_path / "run/stop_request").exists()


@pytest.mark.long
def test_a_hang_is_noticed_and_every_rank_says_where(tmp_path):
    run = Run(tmp_path / "run", "--max_steps", 2000, "--eval_strategy", "no", "--dataloader_num_workers", 1,
              "--stall_timeout", 40, config_file=ZERO2)  # fmt: skip
    run.wait_for(r"\| 2/2000")
    ranks = run.ranks
    worker = ranks[1].children()[-1]
    worker.send_signal(signal.SIGSTOP)  # its rank waits for a batch, the other one for its rank
    try:
        log = run.ends(ranks)
    finally:
        worker.kill()
    assert len(re.findall("has hung for 40 s", log)) == 2
    assert "dataloader.py" in log


def test_a_signal_is_answered_at_once_and_once(tmp_path, capfd):
    before = {number: signal.getsignal(number) for number in stops.SIGNALS}
    try:
        requests = stops.StopRequests(types.SimpleNamespace(output_dir=tmp_path, stall_timeout=0, max_hours=None), None)
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert requests.file.read_text() == "SIGINT\n"
    assert capfd.readouterr().err == "\ncarelm: SIGINT: saves at the end of this step and stops; wait for it\n"
