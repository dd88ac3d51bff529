"""Stop requests: how a run is asked to save and end, by whatever wants it to. Imports no torch of its own accord.

There is one protocol: a file `stop_request` in the output folder, whose text is the reason. A signal to a rank writes it, so
do the batch script of a SLURM job, a rank whose launcher has died, `max_hours` when it runs out, and a person who likes to.
All ranks look for it after every optimizer step and every batch of an evaluation, agree, and save at the same step.

The looks also feed the watch on hangs: `stall_timeout` seconds without one, and every rank writes the stacks of its threads to
the log and ends. The evaluator has the watch alone: its answers are kept as they come.
"""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import psutil

from carelm import ranks
from carelm.errors import UserError
from carelm.recipe import Recipe

FILE = "stop_request"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequested(UserError):
    """Ends a run that was asked to stop, once it has saved."""

    exit_status = os.EX_TEMPFAIL  # 75: the same command goes on
    label = "stopped"

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def write_request(folder: Path, reason: str, by: str) -> None:
    """Asks the run in this folder to save and stop, for the first reason that is given; `by` tells those who ask apart."""
    file = folder / FILE
    if not file.exists():
        aside = file.with_name(f"{FILE}.{by}.partial")
        aside.write_text(reason + "\n")
        with contextlib.suppress(FileNotFoundError):  # a second signal came in between and has asked
            aside.replace(file)


class StopRequests:
    """Watches for stop requests and hangs from here on; every rank makes one, once the output folder is there."""

    def __init__(self, recipe: Recipe, launch: ranks.Launch | None):
        self.file = recipe.output_dir / FILE
        self.watch = HangWatch(recipe.stall_timeout)
        launcher = psutil.Process().parent() if launch is not None else None
        self._launcher = launcher.pid if launcher is not None else None
        began = (launcher or psutil.Process()).create_time()
        self._ends = began + 3600 * recipe.max_hours if recipe.max_hours else float("inf")
        self._last_look, self._longest = None, 0.0
        # A batch job may have asked before its launchers began.
        since = int(os.environ.get("CARELM_STARTED", began))
        if ranks.rank() == 0 and self.file.exists() and self.file.stat().st_mtime < since:
            ranks.say(f"{self.file} is from before this launch; it is removed")
            self.file.unlink(missing_ok=True)
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def request(self, reason: str) -> None:
        """Writes the request; the first one's reason stands."""
        write_request(self.file.parent, reason, by=str(ranks.rank()))

    def _on_signal(self, number: int, frame) -> None:
        reason = signal.Signals(number).name
        if ranks.rank() == 0 and not self.file.exists():  # print may be what was interrupted
            os.write(2, f"\ncarelm: {reason}: saves at the end of this step and stops; wait for it\n".encode())
        self.request(reason)

    def look(self, device) -> str | None:
        """The reason of a request, the same on every rank, or None; every rank calls it at the same place."""
        now = time.time()
        self._longest = max(self._longest, now - (self._last_look or now))
        self._last_look = now
        self.watch.look()
        if os.getppid() != self._launcher and self._launcher is not None:
            self.request("the launcher has died")
        if ranks.rank() == 0 and now + 2 * self._longest > self._ends:  # one such time to the next look, one to save
            self.request("max_hours")
        seen = self.file.exists()
        if not ranks.any_rank(seen, device):
            return None
        try:
            reason = self.file.read_text().strip()
        except FileNotFoundError:  # another node's, which a network disk does not show here yet
            reason = None
        reasons = ranks.gather(reason)
        return next(filter(None, reasons), f"the file {FILE}")

    def answered(self) -> float:
        """Takes the request away, once the run is saved; returns the seconds since it was made. Later signals are ignored."""
        ignore_signals()
        self.watch.pause()
        seconds = 0.0
        if ranks.rank() == 0:
            with contextlib.suppress(FileNotFoundError):
                seconds = max(0.0, time.time() - self.file.stat().st_mtime)
            self.file.unlink(missing_ok=True)
        ranks.gather(None)  # none ends before all are here
        return seconds


def ignore_signals(*_) -> None:
    """From here on; also in a process that loads batches, whose rank answers for it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class HangWatch:
    """Ends this process where it does not `look` for so many seconds, in whatever lets go of Python's lock; 0: never.

    The seconds are counted by a thread that sleeps one at a time, so that a pause of the whole process (scontrol suspend,
    Ctrl-Z) is none.
    """

    def __init__(self, seconds: int):
        self.seconds, self._now, self._last = seconds, 0, 0.0
        if seconds:
            threading.Thread(target=self._count, daemon=True).start()

    def look(self) -> None:
        self._last = self._now

    def pause(self) -> None:
        """Until the next look."""
        self._last = float("inf")

    def _count(self) -> None:
        while self._now - self._last < self.seconds:
            time.sleep(1)
            self._now += 1
        print(f"carelm: rank {ranks.rank()} on {socket.gethostname()} has hung for {self.seconds} s (stall_timeout); it is in:",
              file=sys.stderr, flush=True)  # fmt: skip
        faulthandler.dump_traceback(sys.__stderr__)  # a notebook's sys.stderr is no file
        time.sleep(10)  # a rank that ends takes the others with it, which have theirs to write
        os._exit(1)
