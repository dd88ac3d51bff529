"""What a sweep would do, in words: its runs and their steps. Imports no torch."""

from carelm.chat.chat import make_chat
from carelm.recipe import Recipe
from carelm.sweep.sweep_file import Run, Sweep
from carelm.training import learnt
from carelm.training.prepared import prepare


def format_plan(sweep: Sweep) -> str:
    """A line per run, with its optimizer steps, and how their labels fit the answers. The data of runs whose steps follow from
    it, or that have labels, is prepared."""
    where = f"in {sweep.folder}, a folder each:"
    if sweep.search:
        run = sweep.make_run("trial-000", {}, "search")
        ranges = [f"{key}: {given}" for key, given in sweep.ranges.items()]
        trials = f"{sweep.search['num_trials']} trials  {_what(run)} at most"
        return "\n".join([where, trials, *ranges, *_label_notes([run])])
    width = max((len(run.name) for run in sweep.runs), default=0)
    lines = [f"{run.name:{width}}  {_what(run)}  {_axes(run)}".rstrip() for run in sweep.runs]
    return "\n".join([where, *lines, *_label_notes(sweep.runs)])


def _label_notes(runs: list[Run]) -> list[str]:
    labelled = [run.recipe for run in runs if run.is_trained and run.recipe.labels]
    reports = [prepare(recipe, make_chat(recipe)).report for recipe in labelled]
    return [f"labels: {note}" for note in dict.fromkeys(n for r in reports for n in r["train"]["label_notes"])]


def _what(run: Run) -> str:
    if not run.is_trained:
        return "only answers"
    return f"{_steps(run.recipe)} steps" + ("" if run.is_evaluated else ", no answers")


def _axes(run: Run) -> str:
    return " ".join(f"{key}={str(value).splitlines()[0] if value else value}" for key, value in run.axes.items())


def _steps(recipe: Recipe) -> int:
    """Raises UserError where the data that they follow from cannot be prepared."""
    is_given = (recipe.training.get("max_steps") or -1) > 0
    return learnt.steps(recipe, 0 if is_given else len(prepare(recipe, make_chat(recipe)).train))
