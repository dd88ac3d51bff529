"""A search by Optuna: which values a run takes follows from how earlier ones ended, and one that is worse than most is pruned.

The study is a file in the sweep's folder, which several processes may share (the tasks of a job array). Values come from a
tree-structured Parzen estimator (Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization) that counts runs under way
as bad ones, so that several at a time do not try the same. A run is pruned where its lowest validation loss so far is above the
median of what the others had at that step. What counts in the end is the run's validation loss.
"""

import json
import os
from typing import TYPE_CHECKING, Any

from carelm.errors import UserError
from carelm.evaluation.report import loss_curves
from carelm.sweep.record import Outcome, Taken, as_compared, is_orphan, metrics, take, try_lock
from carelm.sweep.sweep_file import Run, Sweep
from carelm.training import stops

if TYPE_CHECKING:
    from carelm.evaluation.comparison import Compared

INSTALL = "pip install -e '.[search]', or pip install optuna"


class Search:
    """Makes the runs of a search, one by one, for `carelm.sweep.processes.work`.

    Raises:
        UserError: where Optuna is not there, or the study in the folder is of other ranges or another recipe.
    """

    def __init__(self, sweep: Sweep):
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise UserError(f"search: Optuna is not installed; {INSTALL}") from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.sweep, self.states, self.trial_class = sweep, optuna.trial.TrialState, optuna.trial.Trial
        self._running, self._orphans = dict[str, "optuna.trial.Trial"](), list[Run]()
        recipe = sweep.make_run("trial", {}, "search").recipe
        sweep.folder.mkdir(parents=True, exist_ok=True)
        self.study = optuna.create_study(
            study_name=sweep.name,
            storage=JournalStorage(JournalFileBackend(str(sweep.folder / "study.log"))),
            sampler=optuna.samplers.TPESampler(
                # Tasks that share a study begin with draws of their own.
                seed=recipe.seed + int(os.environ.get("SLURM_ARRAY_TASK_ID", 0)),
                constant_liar=True,
            ),
            pruner=optuna.pruners.MedianPruner(),
            direction="minimize",
            load_if_exists=True,
        )
        self._distributions = {key: _distribution(optuna.distributions, given) for key, given in sweep.ranges.items()}
        about = {"ranges": sweep.ranges} | {key: str(v) for key, v in recipe.keys().items() if key != "output_dir"}
        before = self.study.user_attrs.get("about", about)
        if changed := [key for key in before.keys() | about.keys() if before.get(key) != about.get(key)]:
            raise UserError(
                f"output_dir: {sweep.folder} holds a search with other {', '.join(sorted(changed))}; set another output_dir"
            )
        self.study.set_user_attr("about", about)

    def take(self) -> Taken | None:
        """A trial that a killed sweep has left, else a new one."""
        lock = try_lock(self.sweep.folder / ".study.lock")
        if lock is None:  # another task is beginning one
            return None
        with lock:
            self._orphans = []
            for trial in self._trials():
                run = self._run(trial)
                if trial.state != self.states.RUNNING or run.name in self._running:
                    continue
                if (taken := take(run)) is not None:
                    self._running[run.name] = self.trial_class(self.study, trial._trial_id)
                    return taken
                self._orphans += [run] * is_orphan(run)
            if self._is_full():
                return None
            trial = self.study.ask(self._distributions)
            run = self._run(trial)
            self._running[run.name] = trial
            return take(run)

    def waits(self) -> bool:
        """Whether there may be something to take later on."""
        return bool(self._orphans) or not self._is_full()

    def look(self, run: Run) -> bool:
        """Reports new validation losses, and asks the run to stop where it is to be pruned; returns whether it is."""
        trial = self._running[run.name]
        there = self._trials()[trial.number].intermediate_values
        for step, loss in loss_curves(run.recipe.output_dir / "runs").get("validation", []):
            if step and step not in there:
                trial.report(loss, step)
                if trial.should_prune():
                    reason = (
                        f"pruned: by step {step} its validation loss, {loss:.4f}, is above the median of the others"
                    )
                    stops.write_request(run.recipe.output_dir, reason, by="sweep")
                    return True
        return False

    def ended(self, run: Run, outcome: Outcome) -> None:
        trial, loss = self._running.pop(run.name), metrics(run).get("eval_loss")
        if outcome.state == "finished" and loss is None:
            outcome = Outcome("failed", "it has no validation loss; set validation_fraction above 0")
        if outcome.state == "failed":
            trial.set_user_attr("error", outcome.error)
        if outcome.state != "stopped":
            state = {"finished": "COMPLETE", "pruned": "PRUNED", "failed": "FAIL"}[outcome.state]
            self.study.tell(trial, loss if outcome.state == "finished" else None, self.states[state])

    def summary(self) -> str:
        """How many of `num_trials` have ended how; a failed one counts, so that a search that always fails comes to its end."""
        number, states = self.sweep.search["num_trials"], [run.state for run in self.compared()]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(["finished", *sorted(states)]))
        more = f"; num_trials: {number + states.count('failed')} tries as many others" if "failed" in states else ""
        return f"{len(states)} of {number} trials: {counts}{more}"

    def compared(self) -> list["Compared"]:
        """All trials in their order, as a comparison takes them."""
        words = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}
        return [
            as_compared(self._run(t), Outcome(words.get(t.state.name, "running"), t.user_attrs.get("error", "")))
            for t in self._trials()
        ]

    def _trials(self) -> list[Any]:
        return self.study.get_trials(deepcopy=False)

    def _is_full(self) -> bool:
        return len(self._trials()) >= self.sweep.search["num_trials"]

    def _run(self, trial: Any) -> Run:
        values = {
            key: {_choice(v): v for v in given} for key, given in self.sweep.ranges.items() if isinstance(given, list)
        }
        axes = {key: values[key][value] if key in values else value for key, value in trial.params.items()}
        return self.sweep.make_run(f"trial-{trial.number:03}", axes, "search")


def _choice(value: Any) -> Any:
    """A value as Optuna can keep it."""
    return json.dumps(value) if isinstance(value, (list, dict)) else value


def _distribution(distributions: Any, given: Any) -> Any:
    if isinstance(given, list):
        return distributions.CategoricalDistribution([_choice(value) for value in given])
    is_whole = isinstance(given["low"], int) and isinstance(given["high"], int)
    return (distributions.IntDistribution if is_whole else distributions.FloatDistribution)(**given)
