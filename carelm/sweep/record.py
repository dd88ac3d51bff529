"""What is known of a sweep's runs across processes: who has a run, under a lock, and how it has ended, in NAME.json."""

import json
import os
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil

from carelm.files import fingerprint, read_json, write_whole
from carelm.sweep.sweep_file import Run
from carelm.training import finished, runs

if TYPE_CHECKING:
    from carelm.evaluation.comparison import Compared

STARTED = time.time()


@dataclass(frozen=True)
class Outcome:
    """How a run ended: finished, failed (`error` is its line), pruned, stopped (the next call goes on with it); or that it is
    running, in another call."""

    state: str
    error: str = ""


@dataclass
class Taken:
    """A run that this process has the lock of, the scripts of it that are to come, and the process of the one under way."""

    run: Run
    lock: IO[str]
    device: str = ""
    left: list[str] = field(default_factory=list)
    process: subprocess.Popen | None = None
    began: float = 0.0
    is_pruned: bool = False


def try_lock(path: Path) -> IO[str] | None:
    """The file, locked, or None where another process has it; a process that inherits the file has it too."""
    import fcntl

    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+")  # noqa: SIM115 - stays open as long as the run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def take(run: Run) -> Taken | None:
    """The run with its lock, in which stands who has it; None where another process has it."""
    lock = try_lock(_lock_file(run))
    if lock is None:
        return None
    lock.truncate(0)
    lock.write(f"{os.getpid()} {os.uname().nodename}")
    lock.flush()
    return Taken(run, lock)


def is_orphan(run: Run) -> bool:
    """Whether the sweep that has begun a locked run is gone, so that the run is ending by itself."""
    pid, _, host = _lock_file(run).read_text().partition(" ")
    return host == os.uname().nodename and not psutil.pid_exists(int(pid))


def _lock_file(run: Run) -> Path:
    return run.recipe.output_dir.with_name(f".{run.name}.lock")


def recorded(run: Run) -> Outcome | None:
    """How this very run has ended, where it has; what failed in an earlier call is tried again."""
    record = read_json(run.beside(".json"))
    if record.get("run") != _identity(run):
        return None
    if record["state"] == "failed":
        return Outcome("failed", record["error"]) if record["at"] > STARTED else None
    is_there = runs.find_finished(run.recipe) is not None if run.is_trained else True
    return Outcome(record["state"]) if is_there else None


def note(run: Run, outcome: Outcome, at: float) -> None:
    """Keeps how the run has ended, and when, for `recorded`."""
    record = {"state": outcome.state, "error": outcome.error, "at": at, "run": _identity(run)}
    write_whole(run.beside(".json"), json.dumps(record, indent=1))


def metrics(run: Run) -> dict[str, Any]:
    """The figures of its training; empty where there are none."""
    return read_json(run.recipe.output_dir / finished.METRICS) if run.is_trained else {}


def as_compared(run: Run, outcome: Outcome) -> "Compared":
    """The run as a comparison takes it."""
    from carelm.evaluation.comparison import Compared

    return Compared(run.name, run.recipe, run.axes, outcome.state, outcome.error, run.is_trained, run.is_evaluated)


def _identity(run: Run) -> str:
    return fingerprint(run.recipe.keys(), run.is_evaluated)
