"""What the benchmarks share: starting the real launcher, the machine's description, and where results go."""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import yaml

from carelm.provenance import PACKAGES, git_commit

PROJECT = Path(__file__).resolve().parent.parent
RESULTS = PROJECT / "benchmarks/results"
EVERY_ROW_TRAINS = {  # of a recipe for rows of question and answer, as the scripts beside CareLM take them
    "prompt_template": "{question}",
    "completion_template": "{answer}",
    "validation_fraction": 0.0,
    "test_fraction": 0.0,
    "too_long": "cut",
    "num_sample_answers": 0,
    "eval_on_start": False,
}
ONE_PROCESS = PROJECT / "accelerate_configs/gpu.yaml"  # without DeepSpeed; on a machine that has no GPU, its CPU


@dataclass(frozen=True)
class Outcome:
    """How a command ended; `status` is None where it was still running at its time limit."""

    status: int | None
    seconds: float
    stdout: str
    stderr: str
    started: float  # time.time()

    @property
    def refusal(self) -> str | None:
        """CareLM's one-line message, where it refused the run."""
        found = re.findall(r"^error: (.+)$", self.stderr, re.MULTILINE)
        return found[0] if found else None

    @property
    def last_error(self) -> str:
        """The line that says best why the command failed."""
        if self.status is None:
            return f"no end after {self.seconds:.0f} s"
        lines = [re.sub(r"^\[rank\d+\]:\s*", "", line.strip()) for line in self.stderr.splitlines()]
        # The launcher adds its own CalledProcessError or ChildFailedError under that of the script.
        named = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b", line) and "subprocess." not in line]
        named = [line for line in named if "ChildFailedError" not in line]
        return (named or [line for line in lines if line] or ["no message"])[-1][:300]


def accelerate(config_file: Path, script: Path, *arguments: object, num_processes: int | None = None) -> list[str]:
    """The command `accelerate launch --config_file ... script arguments`, on a port that is free."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_file]
    command += ["--main_process_port", port]
    if num_processes is not None:
        command += ["--num_processes", num_processes]
    return [str(word) for word in (*command, script, *arguments)]


def run(command: list[str], environment: dict[str, str], timeout_s: float) -> Outcome:
    """Runs a command from the project's folder, offline; all its processes are ended at the time limit."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | environment
    started, clock = time.time(), time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=PROJECT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    status = None
    try:
        stdout, stderr = process.communicate(timeout=timeout_s)
        status = process.returncode
    except subprocess.TimeoutExpired:
        end(process)
        stdout, stderr = process.communicate()
    finally:
        end(process)  # where this script is stopped itself
    return Outcome(status, time.perf_counter() - clock, stdout, stderr, started)


def end(process: subprocess.Popen) -> None:
    """Kills a process with all that it started; torch's launcher gives each rank a session of its own, so no group has them."""
    if process.poll() is None:
        for one in [*psutil.Process(process.pid).children(recursive=True), process]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.wait()


def threads(ranks: int) -> str:
    """Threads for each of so many ranks on this machine's cores, for OMP_NUM_THREADS."""
    return str(max(1, len(os.sched_getaffinity(0)) // ranks))


def keys(**values: object) -> list[str]:
    """`--key value` for each; True and False are written as a command line has them."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def write_recipe(path: Path, values: dict[str, Any]) -> Path:
    """Writes a recipe with these keys."""
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    path.write_text(yaml.safe_dump(plain), encoding="utf-8")
    return path


def describe_machine() -> dict[str, Any]:
    """Processor, memory, GPU, versions, commit, date, and how busy the machine was."""
    model = platform.processor()
    if os.path.exists("/proc/cpuinfo"):
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = names[0] if names else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "load_average_at_start": [round(load, 2) for load in os.getloadavg()],
        "gpu": _gpu(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _gpu() -> str | None:
    import pynvml
    import torch

    if not torch.cuda.is_available():
        return None
    about = torch.cuda.get_device_properties(0)
    try:
        pynvml.nvmlInit()
        driver = pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:  # a container may have no NVML
        driver = f"unknown ({error})"
    return (
        f"{torch.cuda.device_count()} x {about.name}, {about.total_memory / 2**30:.1f} GiB, compute capability "
        f"{about.major}.{about.minor}, CUDA {torch.version.cuda}, driver {driver}"
    )


def write_results(name: str, results: dict[str, Any]) -> Path:
    """Writes benchmarks/results/NAME.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return path


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
