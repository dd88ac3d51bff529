"""Starts train/sft.py as a user does, with the real launcher, and reads what it left behind."""

import fcntl
import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import yaml

from carelm.training.checkpoint_folders import find_checkpoints

PROJECT = Path(__file__).resolve().parent.parent
VENV = Path(sys.prefix)  # for slurm/job.sh
PROBE = Path(__file__).with_name("probe.py")
# One epoch, whose last batch holds two examples of four.
TWELVE_STEPS = ("--max_steps", 12, "--eval_steps", 6, "--save_steps", 6, "--num_sample_answers", 0, "--lora_r", 8,
                "--lora_alpha", 32, "--max_eval_samples", 10, "--max_samples", 46, "--global_batch_size", 4)  # fmt: skip


def environment(**extra: str) -> dict[str, str]:
    """One thread per rank, so that sums come in one order; no GPU, and no accelerate configuration of this
    machine; a progress bar that shows every step."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": "/nonexistent", "CUDA_VISIBLE_DEVICES": "",
            "TQDM_MININTERVAL": "0", **extra}  # fmt: skip


def command(*keys, config_file=None, num_processes=None, script="train/sft.py") -> list[str]:
    """`accelerate launch` with a port of its own; as many ranks as config_file says, or one."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    options = ["--config_file", str(config_file)] if config_file else []
    if num_processes or not config_file:
        options += ["--num_processes", str(num_processes or 1)]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", str(port)]
    return [*launcher, *options, str(script), *map(str, keys)]


def launch(*keys, config_file=None, num_processes=None, script="train/sft.py", check=True, **extra):
    """Runs it to its end; `extra` are environment variables."""
    words = command(*keys, config_file=config_file, num_processes=num_processes, script=script)
    done = subprocess.run(words, cwd=PROJECT, env=environment(**extra), capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr[-4000:]
    return done


def torchrun(number: int, *keys, script="train/sft.py", **extra):
    """So many ranks as torch's own launcher starts them, to their end."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(number), script]
    done = subprocess.run([*words, *map(str, keys)], cwd=PROJECT, env=environment(**extra), capture_output=True,
                          text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done


# A new process each time, but a copy of one that has the libraries loaded already: half of a short run is imports.
copies = multiprocessing.get_context("forkserver")
copies.set_forkserver_preload(
    [
        "carelm.training.trainer",
        "carelm.evaluation.answers",
        "carelm.models.merge",
        "carelm.retrieval.update",
        "lancedb",
    ]
)


def script(*keys, file="train/sft.py", check=False, **extra) -> subprocess.CompletedProcess:
    """A launched file as `python FILE` starts it: one process, no launcher; `extra` are environment variables."""
    words = [str(file), *map(str, keys)]
    with tempfile.TemporaryDirectory() as folder:
        process = copies.Process(target=_run_script, args=(words, environment(**extra), folder))
        process.start()
        process.join(300)
        if process.is_alive():
            process.kill()
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    done = subprocess.CompletedProcess(words, process.exitcode, out, err)
    assert done.returncode is not None and (not check or done.returncode == 0), err[-4000:]
    return done


def _run_script(words: list[str], variables: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(PROJECT)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
    sys.argv = words
    sys.path[0] = str(PROJECT / Path(words[0]).parent)
    runpy.run_path(words[0], run_name="__main__")


def made_once(tmp_path_factory, name: str, make) -> Path:
    """A folder that all workers of pytest-xdist share; the first of them that needs it has `make` fill it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    folder, whole = root / name, root / f"{name}.whole"
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)  # a worker has failed in the middle
            folder.mkdir()
            make(folder)
            whole.touch()
    return folder


def zero3_sharding_everything(folder: Path) -> Path:
    """An accelerate file for two CPU ranks under ZeRO-3 that shards small tensors too."""
    settings = json.loads((PROJECT / "ds_configs/zero3.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "zero3.json").write_text(json.dumps(settings))
    accelerate = yaml.safe_load((PROJECT / "accelerate_configs/cpu_zero3.yaml").read_text())
    accelerate["deepspeed_config"]["deepspeed_config_file"] = str(folder / "zero3.json")
    (folder / "cpu_zero3.yaml").write_text(yaml.safe_dump(accelerate))
    return folder / "cpu_zero3.yaml"


def history(folder: Path) -> list[dict]:
    """The log history of a run's last checkpoint."""
    last = find_checkpoints(folder)[-1]
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def losses(folder: Path) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in history(folder) if "loss" in entry}


def eval_losses(folder: Path) -> dict[int, float]:
    return {entry["step"]: entry["eval_loss"] for entry in history(folder) if "eval_loss" in entry}


def relative_distance(folder: Path, other: Path) -> float:
    """|a - b| / |b| over all tensors of two adapters."""
    from safetensors.torch import load_file

    a, b = (load_file(f / "adapter_model.safetensors") for f in (folder, other))
    assert a.keys() == b.keys()
    difference = sum((a[k].double() - b[k].double()).square().sum() for k in a)
    return float((difference / sum(b[k].double().square().sum() for k in b)).sqrt())


def _heed_ctrl_c() -> None:
    """Which the workers of pytest-xdist ignore, and whatever a shell starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Run:
    """A launch in the background, with its standard error in a file."""

    def __init__(self, folder, *keys, config_file=None):
        self.folder, self.log = folder, folder.with_suffix(".log")
        words = command("--output_dir", folder, *keys, config_file=config_file)
        self.process = subprocess.Popen(words, cwd=PROJECT, env=environment(), stdout=subprocess.DEVNULL,
                                        stderr=self.log.open("w"), start_new_session=True,
                                        preexec_fn=_heed_ctrl_c)  # fmt: skip

    def wait_for(self, pattern: str, seconds: float = 240) -> None:
        until = time.time() + seconds
        while not re.search(pattern, self.log.read_text()):
            assert self.process.poll() is None and time.time() < until, self.log.read_text()[-3000:]
            time.sleep(0.02)

    @property
    def ranks(self) -> list[psutil.Process]:
        return [p for p in psutil.Process(self.process.pid).children() if "train/sft.py" in " ".join(p.cmdline())]

    def kill(self) -> None:
        """SIGKILL to the launcher and its ranks at once: nothing can be saved any more."""
        processes = [*self.ranks, self.process]
        for process in processes:
            process.kill()
        for process in processes:
            process.wait()

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


def same_bits(run, other, file="adapter_model.safetensors") -> bool:
    from safetensors.torch import load_file

    a, b = (load_file(folder / file) for folder in (run, other))
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in b)
