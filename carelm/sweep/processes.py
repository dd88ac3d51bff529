"""The runs of a sweep as processes of their own, one for each GPU at a time; on a CPU one after another.

A run is `train/sft.py`, then `eval/run.py`, with its recipe NAME.yaml; both write to NAME.log. Who runs it holds a lock that
its processes inherit: a run whose sweep was killed is not begun a second time while it is still ending, and several sweeps (the
tasks of a job array) share the runs of one file.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import psutil

from carelm.files import ROOT, fingerprint, read_json, write_whole
from carelm.ranks import say
from carelm.recipe_file import save_recipe
from carelm.sweep.sweep_file import Run
from carelm.training import finished, runs, stops

if TYPE_CHECKING:
    from carelm.evaluation.comparison import Compared
    from carelm.sweep.grid import Grid
    from carelm.sweep.search import Search

LOOK_EVERY_S = 0.3
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


def devices() -> list[str]:
    """CUDA_VISIBLE_DEVICES for each run that there is room for: a GPU each, or one run on the CPU."""
    import torch

    number = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",")[:number] if named and number else [str(k) for k in range(number)] or [""]


def work(source: "Grid | Search", places: list[str]) -> None:
    """Runs what the source gives, one run at a time in each of the places (values of CUDA_VISIBLE_DEVICES).

    Raises:
        StopRequested: after Ctrl-C, SIGTERM or SIGUSR1, once every run has saved.
    """
    free, busy, asked = list(places), list[Taken](), list[int]()
    before = {number: signal.signal(number, lambda number, _: asked.append(number)) for number in stops.SIGNALS}
    try:
        while True:
            while free and not asked and (taken := source.take()) is not None:
                taken.device = free.pop(0)
                busy.append(taken)
                _begin(taken)
            if not busy and (asked or not source.waits()):
                break
            time.sleep(LOOK_EVERY_S)
            for taken in list(busy):
                if asked and taken.process.poll() is None:
                    taken.process.send_signal(signal.SIGTERM)
                if (outcome := _look(taken, source, bool(asked))) is not None:
                    busy.remove(taken)
                    free.append(taken.device)
                    _end(taken, source, outcome)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        name = signal.Signals(asked[0]).name
        raise stops.StopRequested(f"{name}: the runs are saved; the same command goes on with them", name)


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


def _begin(taken: Taken) -> None:
    run = taken.run
    save_recipe(run.recipe, run.beside(".yaml"))
    taken.left, taken.began = ["train/sft.py"] * run.is_trained + ["eval/run.py"] * run.is_evaluated, time.time()
    say(f"{run.name} begins{f' on GPU {taken.device}' if taken.device else ''}; its log is {run.beside('.log')}")
    if told := longer_than_before(run):
        say(told)
    _start_next(taken)


def longer_than_before(run: Run) -> str:
    """What to tell of a run that was finished with another number of steps and goes on; empty for all others."""
    before, budget = metrics(run), runs.budget(run.recipe)
    changed = [key for key in budget if before.get("budget", budget).get(key) != budget[key]]
    if not changed:
        return ""
    was, now = (", ".join(f"{key} {of[key]}" for key in changed) for of in (before["budget"], budget))
    return f"{run.name} was finished at step {before['global_step']} with {was}; it goes on from there with {now}"


def _start_next(taken: Taken) -> None:
    script = ROOT / taken.left.pop(0)
    if script.name == "run.py":
        from carelm.sweep import base_answers

        base_answers.lend(taken.run)
    words = [sys.executable, str(script), "--config", str(taken.run.beside(".yaml"))]
    with open(taken.run.beside(".log"), "a") as log:
        log.write(f"carelm: {' '.join(words)}\n")
        log.flush()
        taken.process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log,
                                         pass_fds=[taken.lock.fileno()], preexec_fn=_end_with_parent,
                                         env={**os.environ, "CUDA_VISIBLE_DEVICES": taken.device})  # fmt: skip


def _end_with_parent() -> None:
    """In the child, on Linux: SIGTERM once the sweep has died, upon which a training saves. Elsewhere it goes on to its
    end, and the next call waits for its lock."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _look(taken: Taken, source: "Grid | Search", is_asked: bool) -> Outcome | None:
    """How the run has ended; None where it has not. The next script of it is started here."""
    status, run = taken.process.poll(), taken.run
    is_in_training = "train/sft.py" in taken.process.args[1]
    if status is None:
        if is_in_training and not taken.is_pruned:
            taken.is_pruned = source.look(run)
        return None
    if is_asked and (status or taken.left):
        return Outcome("stopped")
    if status == 0 and taken.left:
        _start_next(taken)
        return None
    if status == stops.StopRequested.exit_status and taken.is_pruned:
        return Outcome("pruned")
    return Outcome("finished") if status == 0 else Outcome("failed", _last_words(run, status))


def _last_words(run: Run, status: int) -> str:
    """The line in which the run says why it ended."""
    if status < 0:
        return f"it was ended by {signal.Signals(-status).name}"
    lines = [line for line in run.beside(".log").read_text(errors="replace").splitlines() if line.strip()]
    said = next((line for line in lines[:-4:-1] if line.startswith(("error: ", "stopped: "))), lines[-1])
    return said.removeprefix("error: ")


def _end(taken: Taken, source: "Grid | Search", outcome: Outcome) -> None:
    run, seconds = taken.run, time.time() - taken.began
    if outcome.state != "stopped":
        note(run, outcome, time.time())
    source.ended(run, outcome)
    taken.lock.close()
    loss = metrics(run).get("eval_loss") if outcome.state == "finished" else None
    figures = f", eval loss {loss:.4f}" if loss is not None else ""
    say(f"{run.name} {outcome.state} after {seconds:.0f} s{figures}{': ' if outcome.error else ''}{outcome.error}")
