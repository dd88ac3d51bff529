"""A run that is asked to stop saves at the end of the step and goes on from there, whoever asks; a run that hangs ends."""

import json
import os
import re
import signal
import subprocess
import time

import psutil
from launching import PROJECT, command, environment, eval_losses, launch, losses, script
from safetensors.torch import load_file

ZERO2 = PROJECT / "accelerate_configs/cpu_zero2.yaml"
KEYS = ("--max_steps", 12, "--eval_steps", 4, "--save_steps", 4, "--save_total_limit", 9, "--num_sample_answers", 0,
        "--max_samples", 50, "--lora_dropout", 0.1, "--per_device_eval_batch_size", 1)  # fmt: skip


class Run:
    """A launch in the background, with its standard error in a file."""

    def __init__(self, folder, *keys, config_file=None):
        self.folder, self.log = folder, folder.with_suffix(".log")
        words = command("--output_dir", folder, *keys, config_file=config_file)
        self.process = subprocess.Popen(words, cwd=PROJECT, env=environment(), stdout=subprocess.DEVNULL,
                                        stderr=self.log.open("w"), start_new_session=True)  # fmt: skip

    def wait_for(self, pattern: str, seconds: float = 120) -> None:
        until = time.time() + seconds
        while not re.search(pattern, self.log.read_text()):
            assert self.process.poll() is None and time.time() < until, self.log.read_text()[-3000:]
            time.sleep(0.02)

    @property
    def ranks(self) -> list[psutil.Process]:
        return [p for p in psutil.Process(self.process.pid).children() if "train/sft.py" in " ".join(p.cmdline())]

    def ends(self, ranks: list[psutil.Process]) -> str:
        """Waits until launcher and ranks have ended, none of them well, and returns the log."""
        assert self.process.wait(60) != 0
        gone, left = psutil.wait_procs(ranks, 60)
        assert not left, "a rank trains on without its launcher"
        return self.log.read_text()


def stopped_at(log: str) -> int:
    return int(re.search(r"^stopped: after step (\d+), .* saved as checkpoint-", log, re.M).group(1))


def mark(folder, step: int) -> dict:
    return json.loads((folder / f"checkpoint-{step}/complete.json").read_text())


def same_bits(run, other) -> bool:
    a, b = (load_file(f / "adapter_model.safetensors") for f in (run, other))
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in b)


def test_two_ranks_stop_three_times_and_end_with_the_same_bits(tmp_path):
    launch("--output_dir", tmp_path / "unbroken", *KEYS, config_file=ZERO2)
    folder = tmp_path / "run"

    run = Run(folder, *KEYS, config_file=ZERO2)
    run.wait_for(r"eval loss")  # before the first step: the evaluation of step 0 is over
    ranks = run.ranks
    run.process.send_signal(signal.SIGTERM)
    first = stopped_at(log := run.ends(ranks))
    assert "(SIGTERM)" in log and mark(folder, first)["step"] == first < 4

    run = Run(folder, *KEYS, config_file=ZERO2)
    run.wait_for(r"going on from")
    run.wait_for(r"\| 4/12")
    time.sleep(0.3)  # in the evaluation
    (folder / "stop_request").write_text("enough for today\n")
    log = run.ends(run.ranks)
    assert stopped_at(log) == 4 and "(enough for today)" in log
    assert mark(folder, 4)["evaluation_is_due"] and not (folder / "stop_request").exists()

    run = Run(folder, *KEYS, config_file=ZERO2)
    run.wait_for(r"\| 5/12")
    ranks = run.ranks
    run.process.kill()
    third = stopped_at(log := run.ends(ranks))
    assert "(the launcher has died)" in log and third > 4

    done = launch("--output_dir", folder, *KEYS, config_file=ZERO2)
    assert f"going on from {folder / f'checkpoint-{third}'}" in done.stderr
    assert losses(folder) == losses(tmp_path / "unbroken")
    assert eval_losses(folder) == eval_losses(tmp_path / "unbroken")
    assert same_bits(folder, tmp_path / "unbroken")


def test_one_process_stops_with_its_launcher_in_time_and_before_it_has_begun(tmp_path):
    folder = tmp_path / "run"
    keys = ("--max_steps", 2000, "--num_sample_answers", 0, "--max_eval_samples", 24, "--eval_strategy", "no")

    run = Run(folder, *keys, "--max_hours", 0.006)  # 22 s
    first = stopped_at(log := run.ends([]))
    assert "(max_hours)" in log and 0 < first < 2000

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
    """The checkpoint is that of the run's last step, and the evaluation is all that is left to do."""
    keys = ("--num_train_epochs", 1, "--max_samples", 24, "--num_sample_answers", 0, "--max_eval_samples", 120,
            "--per_device_eval_batch_size", 1)  # fmt: skip
    run = Run(tmp_path / "run", *keys)
    run.wait_for(r"\| 3/3")
    (tmp_path / "run/stop_request").touch()
    assert stopped_at(log := run.ends([])) == 3 and "(the file stop_request)" in log
    assert mark(tmp_path / "run", 3)["evaluation_is_due"] and list(eval_losses(tmp_path / "run")) == [0]
    done = launch("--output_dir", tmp_path / "run", *keys)
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics["global_step"] == 3 and metrics["eval_loss"] < metrics["eval_loss_before"] - 0.1


def test_a_hang_is_noticed_and_every_rank_says_where(tmp_path):
    run = Run(tmp_path / "run", "--max_steps", 2000, "--eval_strategy", "no", "--dataloader_num_workers", 1,
              "--stall_timeout", 15, config_file=ZERO2)  # fmt: skip
    run.wait_for(r"\| 2/2000")
    ranks = run.ranks
    worker = ranks[1].children()[-1]
    worker.send_signal(signal.SIGSTOP)  # its rank waits for a batch, the other one for its rank
    try:
        log = run.ends(ranks)
    finally:
        worker.kill()
    assert len(re.findall(r"Timeout \(0:00:15\)!", log)) == 2
    assert "dataloader.py" in log
