"""The runs of a sweep as processes of their own, one for each GPU at a time; on a CPU one after another.

A run is `train/sft.py`, then `eval/run.py`, with its recipe NAME.yaml; both write to NAME.log. Who runs it holds a lock that
its processes inherit: a run whose sweep was killed is not begun a second time while it is still ending, and several sweeps (the
tasks of a job array) share the runs of one file.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

from carelm.files import ROOT
from carelm.ranks import say
from carelm.recipe_file import save_recipe
from carelm.sweep.record import Outcome, Taken, metrics, note
from carelm.sweep.sweep_file import Run
from carelm.training import runs, stops

if TYPE_CHECKING:
    from carelm.sweep.grid import Grid
    from carelm.sweep.search import Search

LOOK_EVERY_S = 0.3


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
    said = (
        outcome.error or (metrics(run).get("caution") if outcome.state == "finished" and run.is_trained else None) or ""
    )
    say(f"{run.name} {outcome.state} after {seconds:.0f} s{figures}{': ' if said else ''}{said}")
