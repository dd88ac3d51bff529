"""The runs that a sweep's file lists: which of them are left to do here."""

from typing import TYPE_CHECKING

from carelm.ranks import say
from carelm.sweep.record import Outcome, Taken, as_compared, is_orphan, recorded, take
from carelm.sweep.sweep_file import Run

if TYPE_CHECKING:
    from carelm.evaluation.comparison import Compared


class Grid:
    """Gives its runs in their order to `carelm.sweep.processes.work`.

    Attributes:
        runs: all of them.
        left: runs that are not done, or are done by another call at the moment.
        outcomes: how the others ended, those of earlier calls included.
    """

    def __init__(self, runs: list[Run]):
        self.runs, self.left, self.outcomes = runs, list(runs), dict[str, Outcome]()
        self._orphans: list[Run] = []

    def take(self) -> Taken | None:
        orphans = []
        for run in list(self.left):
            if (taken := take(run)) is None:
                orphans += [run] * is_orphan(run)
                if run in orphans and run not in self._orphans:
                    say(f"{run.name} is still ending, its sweep was killed; waiting for it")
                continue
            self.left.remove(run)
            if (outcome := recorded(run)) is None:
                return taken
            self.outcomes[run.name] = outcome
            taken.lock.close()
        self._orphans = orphans
        return None

    def waits(self) -> bool:
        """Whether there may be something to take later on."""
        return bool(self._orphans)

    def look(self, run: Run) -> bool:
        """Whether the run, in training, is to be pruned: a listed one never is."""
        return False

    def ended(self, run: Run, outcome: Outcome) -> None:
        self.outcomes[run.name] = outcome

    def compared(self) -> "list[Compared]":
        """All runs in the order of the file, as a comparison takes them."""
        return [as_compared(run, self.outcomes.get(run.name, Outcome("running"))) for run in self.runs]
