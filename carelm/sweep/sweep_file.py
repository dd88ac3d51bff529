"""A sweep's YAML file and the command line -> its runs: each a checked recipe with a name and a folder of its own.

    recipe: recipes/datasets/bitext_support.yaml     or a list: a later one wins, key by key
    overrides: {max_samples: 400}           keys of every run
    grid: {lora_r: [4, 8], seed: [1, 2]}    every combination is a run; or
    runs: [{name: r4, lora_r: 4}, ...]      each is one; `models: [base]` in it: nothing is trained; or
    search: {num_trials: 20, lora_r: [4, 8], learning_rate: {low: 1.0e-5, high: 1.0e-3, log: true}}
    evaluate: true                          whether each run answers its test questions
    output_dir: outputs/NAME                where the runs' folders are made

Imports no torch.
"""

import contextlib
import difflib
import io
import itertools
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carelm.command_line import Layer, command_line, split_command_line
from carelm.errors import UserError
from carelm.files import here, locate
from carelm.keys import MEANT_ONCE, known, known_keys
from carelm.recipe import ONCE, Recipe, micro_batch_size
from carelm.recipe_file import load_also_tests, read_layers, resolve, with_data_beside
from carelm.training import runs
from carelm.yaml_file import did_you_mean, read_yaml

TYPES = {"recipe": (str, list), "overrides": dict, "grid": dict, "runs": list, "search": dict, "evaluate": bool,
         "output_dir": str}  # fmt: skip
WAYS = ("grid", "runs", "search")
NAME = re.compile(r"[\w][\w.,=+-]*")
LONGEST_NAME = 100  # of a folder; file systems end at 255, and files beside it have longer ones


@dataclass(frozen=True)
class Run:
    """One run of a sweep. In the sweep's folder it has a folder NAME, and beside that NAME.yaml (its recipe), NAME.log and
    NAME.json (how it ended).

    Attributes:
        name: of the axes that differ, or as the file gives it.
        axes: the keys that make it this run.
        recipe: with all other keys.
        is_evaluated: whether it answers its test questions.
    """

    name: str
    axes: dict[str, Any]
    recipe: Recipe
    is_evaluated: bool

    def beside(self, suffix: str) -> Path:
        return self.recipe.output_dir.with_name(self.name + suffix)

    @property
    def is_trained(self) -> bool:
        """Not where the models to be compared are named, and neither its adapter nor its folder is one of them."""
        words = [model.rpartition("@")[0] or model for model in self.recipe.models]
        return not words or any(w in ("adapter", "merged") or Path(w) == self.recipe.output_dir for w in words)


@dataclass(frozen=True)
class Sweep:
    """What the file says: `runs` is empty for a search, which makes its runs one by one by `make_run`."""

    name: str
    folder: Path
    runs: list[Run]
    search: dict[str, Any]
    evaluate: bool
    lower: list[Layer]
    upper: Layer
    heard: set[str] = field(default_factory=set)

    @property
    def ranges(self) -> dict[str, Any]:
        """What is searched: for each key a list of values, or {low, high} with log or step."""
        return {key: value for key, value in self.search.items() if key != "num_trials"}

    def make_run(self, name: str, axes: dict[str, Any], where: str) -> Run:
        """The run of these axes; what is said while its recipe is read is said once for all runs.

        Raises:
            UserError: for an axis that is none, or a recipe that is refused.
        """
        for key in axes:
            if key == "output_dir" or key in self.upper[1]:
                why = (
                    "each run has a folder of its own"
                    if key == "output_dir"
                    else "the command line sets it for all runs"
                )
                raise UserError(f"{where}: {key} is no axis: {why}")
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                own = (self.upper[0], {**self.upper[1], "output_dir": str(self.folder / name)})
                return Run(name, axes, resolve([*self.lower, (where, axes), own], name), self.evaluate)
        except UserError as error:
            raise error if where in str(error) else UserError(f"{where}: {error}") from None
        finally:
            for line in said.getvalue().splitlines():
                if line not in self.heard:
                    print(line, file=sys.stderr)
                self.heard.add(line)


def read_sweep(arguments: list[str]) -> Sweep:
    """Reads `FILE [--config OVERLAY ...] [--key value ...]`; the overlays lie over the file's `recipe` and `overrides`, the
    axes over them, and the command line's keys over all.

    Raises:
        UserError: for whatever is wrong with the file or with one of its runs; nothing has been run or written by then.
    """
    if not arguments or arguments[0].startswith("--"):
        raise UserError("name the sweep's file first: python train/sweep.py recipes/sweeps/bits.yaml")
    path = here(Path(locate(arguments[0])))
    if not path.exists():
        nearest = did_you_mean(path, "recipes/sweeps", "recipes/sweeps/two_cores")
        raise UserError(
            f"there is no sweep file {path}; those of CareLM lie in recipes/sweeps/{nearest and f': {nearest}'}"
        )
    given = _read_keys(path)
    overlays, words = split_command_line(arguments[1:])
    upper = command_line(words)
    if once := [name for name in ONCE if name in words]:
        raise UserError(f"--{once[0]} is not for a sweep but for {MEANT_ONCE[once[0]]}; leave it out")
    folder = Path(upper[1].pop("output_dir", None) or given.get("output_dir") or f"outputs/{path.stem}")
    recipes = [given["recipe"]] if isinstance(given["recipe"], str) else given["recipe"]
    overrides = (f"{path}: overrides", given.get("overrides") or {})
    lower = [*read_layers(recipes), overrides, *read_layers(overlays)]
    sweep = Sweep(path.stem, folder, [], given.get("search") or {}, given.get("evaluate", True), lower, upper)
    if sweep.search:
        _check_search(path, sweep)
        return sweep
    where = "grid" if "grid" in given else "runs"
    axes = _combinations(path, given["grid"]) if where == "grid" else _listed(path, given["runs"])
    names = _names([dict(one) for one in axes])
    for name, one in zip(names, axes):
        own = {key: value for key, value in one.items() if key != "name"}
        sweep.runs.append(sweep.make_run(name, own, f"{path}: {where}" + (f", {name}" if where == "runs" else "")))
    _check(path, sweep)
    return sweep


def _read_keys(path: Path) -> dict[str, Any]:
    given = read_yaml(path, "sweep")
    if "recipe" not in given and given.keys() & known_keys().keys() - TYPES.keys():
        raise UserError(f"{path}: it is a recipe and no sweep: python train/sft.py --config {path}")
    for key, value in given.items():
        if key not in TYPES:
            near = difflib.get_close_matches(str(key), TYPES, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else "keys of a recipe stand under overrides, grid or runs"
            raise UserError(f"{path}: a sweep has no key '{key}'; {hint}")
        if not isinstance(value, TYPES[key]):
            kind = {dict: "`key: value` lines", list: "a list", bool: "true or false"}.get(TYPES[key], "a path")
            raise UserError(f"{path}: {key}: {value!r} is not {kind}")
    if not given.get("recipe"):
        raise UserError(f"{path}: recipe: name the recipe that all runs start from")
    ways = [way for way in WAYS if way in given]
    if len(ways) != 1:
        raise UserError(f"{path}: it has {' and '.join(ways) or 'no runs'}; set one of {', '.join(WAYS)}")
    if not given[ways[0]]:
        raise UserError(f"{path}: {ways[0]} is empty, there is nothing to run")
    keys = {part: _beside(path, value) for part, value in given.items() if part in ("overrides", "grid", "search")}
    listed = [_beside(path, one) if isinstance(one, dict) else one for one in given.get("runs", [])]
    return given | keys | ({"runs": listed} if listed else {})


def _beside(path: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """`with_data_beside`, also for several values of the key."""
    names = keys.get("dataset_name")
    if isinstance(names, list):
        return keys | {"dataset_name": [with_data_beside(path, {"dataset_name": n})["dataset_name"] for n in names]}
    return with_data_beside(path, keys)


def _combinations(path: Path, grid: dict[str, Any]) -> list[dict[str, Any]]:
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise UserError(f"{path}: grid: {key}: {values!r} is no list of values; write [{values or '...'}]")
    return [dict(zip(grid, values)) for values in itertools.product(*grid.values())]


def _listed(path: Path, listed: list[Any]) -> list[dict[str, Any]]:
    for number, one in enumerate(listed, 1):
        if not isinstance(one, dict):
            raise UserError(f"{path}: runs: the {number}. is {one!r}, no `key: value` lines")
        if "name" in one and not (isinstance(one["name"], str) and NAME.fullmatch(one["name"])):
            raise UserError(
                f"{path}: runs: name: {one['name']!r} cannot be a folder's; take letters, digits and - _ . ,"
            )
        if "name" in one and [other.get("name") for other in listed[:number]].count(one["name"]) > 1:
            raise UserError(f"{path}: runs: two are called '{one['name']}'; rename one")
    return listed


def _names(listed: list[dict[str, Any]]) -> list[str]:
    """A short name for each run from the axes that differ: lora_r=4,learning_rate=0.0002."""
    keys = list(dict.fromkeys(key for one in listed for key in one if key != "name"))
    differ = [key for key in keys if any(one.get(key, ...) != listed[0].get(key, ...) for one in listed)] or keys
    names: list[str] = []
    for one in listed:
        own = ",".join(f"{key}={_word(one[key])}" for key in differ if key in one) or "recipe"
        name, number = one.get("name") or own[:LONGEST_NAME], 1
        while name in names:
            number += 1
            name = f"{own[:LONGEST_NAME]}-{number}"
        names.append(name)
    return names


def _word(value: Any) -> str:
    """A value as part of a folder's name."""
    if isinstance(value, (bool, type(None))):
        return str(value).lower()
    if isinstance(value, list):
        return "+".join(map(_word, value))
    if isinstance(value, (int, float)):
        return f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^\w.+-]+", "-", str(value).rstrip("/").rpartition("/")[2])[:40].strip("-.") or "none"


def _check(path: Path, sweep: Sweep) -> None:
    """What can be wrong with the runs together, and with what their folders hold."""
    seen: dict[str, str] = {}
    for run in sweep.runs:
        keys = str({key: value for key, value in sorted(run.recipe.keys().items()) if key != "output_dir"})
        if keys in seen:
            raise UserError(f"{path}: runs {seen[keys]} and {run.name} are the same; take one of them out")
        seen[keys] = run.name
        check_run(run)
        if not run.is_trained and not sweep.evaluate:
            raise UserError(f"{path}: {run.name} trains nothing (models) and is not evaluated (evaluate: false)")


def _check_search(path: Path, sweep: Sweep) -> None:
    """The number of trials, the ranges, and the recipes at their ends."""
    number = sweep.search.get("num_trials")
    if not isinstance(number, int) or number < 1:
        raise UserError(f"{path}: search: num_trials: {number!r} is no number of runs")
    if not sweep.ranges:
        raise UserError(
            f"{path}: search: it has no ranges; write lora_r: [4, 8] or lora_r: {{low: 4, high: 64, log: true}}"
        )
    ends = {}
    for key, given in sweep.ranges.items():
        where = f"{path}: search: {key}"
        known(key, f"{path}: search")
        if (
            isinstance(given, dict)
            and given.keys() >= {"low", "high"}
            and given.keys() <= {"low", "high", "log", "step"}
        ):
            ends[key] = [given["low"], given["high"]]
            if not all(isinstance(end, (int, float)) for end in ends[key]):
                raise UserError(f"{where}: {given} has an end that is no number (in YAML write 1.0e-5)")
            if given["low"] > given["high"]:
                raise UserError(f"{where}: low {given['low']} is above high {given['high']}")
            if given.get("log") and given["low"] <= 0:
                raise UserError(f"{where}: log: low is not above 0")
        elif isinstance(given, list) and given:
            ends[key] = given
        else:
            raise UserError(
                f"{where}: {given!r} is neither a list of values nor {{low: ..., high: ...}}, with log or step"
            )
    for k in range(max(map(len, ends.values()))):
        check_run(sweep.make_run(f"trial-{k:03}", {key: own[min(k, len(own) - 1)] for key, own in ends.items()},
                                 f"{path}: search"), look=False)  # fmt: skip


def check_run(run: Run, look: bool = True) -> None:
    """Raises UserError where the batch does not divide, there will be no such model, or the run's folder, which is looked into,
    holds something else."""
    try:
        if run.recipe.method == "full" and "adapter" in run.recipe.models:
            raise UserError("models: method: full makes no adapter; leave models out for the base and what is trained")
        if run.is_evaluated:
            load_also_tests(run.recipe)
        micro_batch_size(run.recipe, 1)
        if run.is_trained and look:
            with contextlib.redirect_stderr(io.StringIO()):  # said where it is begun
                runs.find_finished(run.recipe)
    except UserError as error:
        raise UserError(f"{run.name}: {error}") from None
