"""Runs a recipe many times with other keys, each run in a process of its own, and compares what came out.

    python train/sweep.py recipes/sweeps/alpha_over_r.yaml --dry_run
    python train/sweep.py recipes/sweeps/alpha_over_r.yaml --config recipes/overlays/demo_base.yaml --max_steps 40
    sbatch --array 0-3 --gpus-per-node 1 slurm/sweep.sh recipes/sweeps/alpha_over_r.yaml

The file names a `recipe` (or a list, of which a later one wins), `overrides` for all runs, and a `grid` (key: list of values,
every combination is a run), `runs` (a list of overrides) or a `search` (ranges, for Optuna). Overlays and keys that follow hold
for all runs. Every recipe is checked before the first run begins; --dry_run prints the runs and their steps, and ends.

Writes to output_dir (default outputs/NAME): a folder for each run with its adapter and eval/, beside it NAME.yaml, NAME.log and
NAME.json, and comparison.html, .md and .json. As many runs at a time as there are GPUs. The same command again goes on: a
finished run is not run again, one that was cut off goes on from its checkpoint, one that failed is tried again. The last line
on standard output is one JSON object.

exit status: 0 no run has failed, 1 one has (the others are compared), 2 something is to be mended first, 75 it was stopped.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm import environment, interrupts, quiet, ranks  # noqa: F401
from carelm.data.sources import stay_offline
from carelm.next_steps import say_next
from carelm.sweep.grid import Grid
from carelm.sweep.processes import devices, work
from carelm.sweep.sweep_file import read_sweep


def main() -> None:
    words = [word for word in sys.argv[1:] if word != "--dry_run"]
    if {"--help", "-h"} & set(words):
        return print(__doc__)
    sweep = read_sweep(words)
    if len(words) < len(sys.argv[1:]):
        stay_offline(*(run.recipe for run in sweep.runs or [sweep.make_run("trial-000", {}, "search")]))
        from carelm.sweep.plan import format_plan

        return print(format_plan(sweep))
    import torch

    quiet.silence(has_gpu=torch.cuda.is_available(), is_first_rank=True)
    if sweep.search:
        from carelm.sweep.search import Search
    source = Search(sweep) if sweep.search else Grid(sweep.runs)
    work(source, devices())

    runs = source.compared()
    names = {state: [run.name for run in runs if run.state == state] for state in ("finished", "failed", "running")}
    said = [source.summary()] if sweep.search else []
    found = {"runs": len(runs), "finished": len(names["finished"]), "failed": names["failed"], "comparison": None}
    if names["running"]:
        under_way = ", ".join(names["running"])
        said.append(f"{under_way}: under way in another call; the one that ends last makes the comparison")
    elif names["finished"]:
        from carelm.evaluation.comparison import compare

        compared = compare(sweep.folder, sweep.name, runs)
        found["comparison"] = str(sweep.folder / "comparison.html")
        said += [compared["headline"], f"comparison: {found['comparison']}; best: {compared['best']}"]
    ranks.print_result(found)
    for sentence in said:
        ranks.say(sentence)
    if found["comparison"]:
        next_of_best(sweep.folder, compared["best"])
    if names["failed"]:
        sys.exit(1)


def next_of_best(folder: Path, best: str | None) -> None:
    """The commands that take the best run, where that one has trained, and the list of all otherwise."""
    saved = folder / (best or "") / "recipe.yaml"
    if saved.is_file():
        say_next(["train/chat.py", "--config", str(saved)], ["serve/run.py", "--config", str(saved)])
    else:
        say_next(["train/runs.py", str(folder)])


if __name__ == "__main__":
    ranks.run_main(main)
