"""Stop requests: how a run is asked to save and end, by whatever wants it to. Imports no torch of its own accord.

There is one protocol: a file `stop_request` in the output folder, whose text is the reason. A signal to a rank writes it, so
do the batch script of a SLURM job, a rank whose launcher has died, `max_hours` when it runs out, and a person who likes to.
All ranks look for it after every optimizer step and every batch of an evaluation, agree, and save at the same step.

The looks also feed the watch on hangs: `stall_timeout` seconds without one, and every rank writes the stacks of its threads to
the log and ends.
"""

import contextlib
import faulthandler
import os
import signal
import time

import psutil

from carelm import ranks
from carelm.recipe import Recipe, UserError

FILE = "stop_request"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequested(UserError):
    """Ends a run that was asked to stop, once it has saved."""

    exit_status = os.EX_TEMPFAIL  # 75: the same command goes on
    label = "stopped"

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class StopRequests:
    """Watches for stop requests and hangs from here on; every rank makes one, once the output folder is there."""

    def __init__(self, recipe: Recipe, launch: ranks.Launch | None):
        self.file = recipe.output_dir / FILE
        self.stall_timeout = recipe.stall_timeout
        launcher = psutil.Process().parent() if launch is not None else None
        self._launcher = launcher.pid if launcher is not None else None
        began = (launcher or psutil.Process()).create_time()
        self._ends = began + 3600 * recipe.max_hours if recipe.max_hours else float("inf")
        self._last_look, self._longest = None, 0.0
        in_job = "CARELM_STATUS_FILE" in os.environ  # whose script has removed what was left, before its own requests
        if ranks.rank() == 0 and not in_job and self.file.exists() and self.file.stat().st_mtime < began:
            ranks.say(f"{self.file} is from before this launch; it is removed")
            self.file.unlink(missing_ok=True)
        for number in SIGNALS:
            signal.signal(number, lambda number, frame: self.request(signal.Signals(number).name))
        self._watch()

    def request(self, reason: str) -> None:
        """Writes the request; the first one's reason stands."""
        if not self.file.exists():
            aside = self.file.with_name(f"{FILE}.{ranks.rank()}.partial")
            aside.write_text(reason + "\n")
            aside.replace(self.file)

    def look(self, device) -> str | None:
        """The reason of a request, the same on every rank, or None; every rank calls it at the same place."""
        now = time.time()
        self._longest = max(self._longest, now - (self._last_look or now))
        self._last_look = now
        self._watch()
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
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        self.close()
        seconds = 0.0
        if ranks.rank() == 0:
            with contextlib.suppress(FileNotFoundError):
                seconds = max(0.0, time.time() - self.file.stat().st_mtime)
            self.file.unlink(missing_ok=True)
        ranks.gather(None)  # none ends before all are here
        return seconds

    def close(self) -> None:
        """The run has no more steps: nothing is left to stop, or to hang."""
        faulthandler.cancel_dump_traceback_later()
        signal.setitimer(signal.ITIMER_REAL, 0)

    def _watch(self) -> None:
        if self.stall_timeout:
            faulthandler.dump_traceback_later(self.stall_timeout)
            # SIGALRM then ends the process, whatever it hangs in; later, for a rank that ends takes the others with it.
            signal.setitimer(signal.ITIMER_REAL, self.stall_timeout + 10)
