"""The runs in a folder as a table: what differs between them, how far each is, and what came out. Imports no torch.

Whatever lies there is a row or is none: what cannot be read is said in its row.
"""

import json
import math
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carelm.errors import UserError
from carelm.evaluation import verdicts
from carelm.evaluation.scores import NAMES
from carelm.evaluation.tables import ranged
from carelm.files import read_json
from carelm.keys import COMPARED, COMPARED_OF, FREE_KEYS, FREE_PREFIXES, identity_of, in_effect, known_keys
from carelm.ranks import say
from carelm.recipe_file import read_yaml
from carelm.training import finished, runs
from carelm.training.checkpoint_folders import MARK, find_checkpoints, step_of, what_is_torn

WIDTH = 100
NAME_WIDTH = 28
DEEPEST = 4  # folders below the one that is named
SHORTENED = 40  # characters of a key's value
SHOWN = [key for key in known_keys() if key in COMPARED or not (key in FREE_KEYS or key.startswith(FREE_PREFIXES))]
UNTRAINED = ("base", "api")
PARTS = ("eval", "merged", "runs")  # folders in a run's; beside them there may be another run's


@dataclass
class Row:
    """A run. What is not known, or cannot be read, is None, and `problems` say why.

    Attributes:
        name: its folder, as seen from the one that is listed.
        keys: those that may differ between runs, as the recipe has them or by default.
        seconds: of its training, so far.
        score: the deciding one, of the tuned model.
        metric: its name, and the model's where nothing was tuned.
    """

    folder: Path
    name: str
    state: str = ""
    keys: dict[str, Any] = field(default_factory=dict)
    eval_loss: float | None = None
    seconds: float | None = None
    score: dict[str, float] | None = None
    metric: str = ""
    model: str = ""
    problems: list[str] = field(default_factory=list)


def overview(root: Path) -> str:
    """The table of the runs in `root`, in sweeps in it, or of the run that it is.

    Raises:
        UserError: where there is none.
    """
    root, named = root.absolute(), root
    if not root.is_dir():
        raise UserError(f"runs: there is no folder {named}; train first, or name the folder that holds the runs")
    folders = dict[Path, Path]()
    for folder in _find(root, DEEPEST):
        folders.setdefault(folder.resolve(), folder)  # each once, however many links lead there
    rows = [_row(folder, root) for folder in folders.values()]
    if not rows:
        raise UserError(f"runs: {named} holds no run; train first, or name the folder that holds the runs")
    rows.sort(key=_order)
    all_differing, of_data = _differing(rows), {_data(row): [] for row in rows}
    for row in rows:
        of_data[_data(row)].append(row)
    differing = {data: {"dataset_name", *_differing(alike)} for data, alike in of_data.items()}
    names = min(NAME_WIDTH, max(len(row.name) for row in rows))
    states = max(len("state"), *(len(row.state) for row in rows))
    lines = [f"{'run':{names}}  {'state':{states}}  eval loss      time  deciding score (95 % interval)"]
    for row in rows:
        lines += _lines(row, names, states, [key for key in all_differing if key in differing[_data(row)]])
    return "\n".join(lines)


def _find(folder: Path, depth: int) -> Iterator[Path]:
    """The runs' folders at most so deep; of a sweep's run that has failed before it had one, where it would be."""
    if _is_run(folder):
        yield folder
    try:
        there = sorted(folder.iterdir())
    except OSError as error:
        return say(f"{folder} is left out ({error.strerror})")
    folders = {
        p for p in there if p.is_dir() and not p.name.startswith((".", "checkpoint-")) and p.suffix != ".partial"
    }
    failed = {p.with_suffix("") for p in there if p.suffix == ".json" and _record(p.with_suffix(""))}
    yield from failed - folders
    for path in sorted(folders, key=lambda path: (path.is_symlink(), path)):
        if depth and path.name not in PARTS:
            yield from _find(path, depth - 1)


def _record(folder: Path) -> dict[str, Any]:
    """How a sweep says that this run has ended; empty where it is none of a sweep."""
    try:
        found = read_json(folder.with_name(f"{folder.name}.json"))
    except UserError:
        return {}
    return found if isinstance(found, dict) and {"state", "error", "run"} <= found.keys() else {}


def _is_run(folder: Path) -> bool:
    if (folder / "merge.json").exists():
        return False
    files = ("recipe.yaml", finished.METRICS, "eval/recipe.yaml", "eval/results.json")
    return any((folder / file).exists() for file in files) or bool(find_checkpoints(folder))


def _row(folder: Path, root: Path) -> Row:
    row = Row(folder, root.name if folder == root else str(folder.relative_to(root)))
    try:
        row.keys = _keys(folder)
    except UserError as error:
        row.problems.append(str(error).replace(f"{folder}/", ""))
    metrics, results = _read(row, folder / finished.METRICS), _read(row, folder / "eval/results.json")
    _trained(row, metrics, has_answered=bool(results))
    if results:
        _evaluated(row, results)
    return row


def _keys(folder: Path) -> dict[str, Any]:
    places = (folder / "recipe.yaml", folder / "eval/recipe.yaml", folder.with_name(f"{folder.name}.yaml"))
    found = read_yaml(next((place for place in places if place.exists()), places[0]))
    return in_effect(found, SHOWN)


def _read(row: Row, path: Path) -> dict[str, Any]:
    """The file's object; an empty one where there is none, or none that can be read."""
    try:
        found = read_json(path)
        if isinstance(found, dict):
            return found
        row.problems.append(f"{path.relative_to(row.folder.parent)} is damaged and no object of JSON")
    except UserError:
        row.problems.append(f"{path.relative_to(row.folder.parent)} is damaged and no JSON")
    return {}


def _trained(row: Row, metrics: dict[str, Any], has_answered: bool) -> None:
    """State, eval loss and time, of the figures of a finished run or else of the newest whole checkpoint."""
    folder, saved = row.folder, find_checkpoints(row.folder)
    whole = next((path for path in reversed(saved) if not _torn(path)), None)
    step, done = step_of(whole) if whole else 0, _number(metrics.get("global_step")) or 0
    record = _record(folder)
    if metrics and done >= step:
        row.state, row.eval_loss, row.seconds = (
            "finished",
            *map(_number, map(metrics.get, ("eval_loss", "wall_seconds"))),
        )
        files = metrics.get("result_files")
        gone = [name for name in files if not (folder / name).is_file()] if isinstance(files, dict) else []
        row.problems += [f"of its result {', '.join(gone[:2])} is gone"] if gone else []
    elif whole:
        state = _read(row, whole / "trainer_state.json")
        history = state.get("log_history")
        losses = [e["eval_loss"] for e in history if "eval_loss" in e] if isinstance(history, list) else []
        row.eval_loss = _number(losses[-1]) if losses else None
        row.seconds = _number(_read(row, whole / MARK).get("wall_seconds"))
        row.state = f"stopped, step {step}"
        row.problems += [f"was finished at step {done:.0f}, and goes on"] if metrics else []
    elif saved:
        row.state = "broken"
        row.problems.append(f"none of its {len(saved)} checkpoints is whole")
    else:
        row.state = "only answers" if has_answered else "no checkpoint"
    if runs.is_running(folder / runs.LOCK):
        row.state = f"running, step {step}" if whole else "running"
    elif row.state != "finished" and record.get("state") in ("failed", "pruned"):
        row.state = record["state"]
        row.problems += str(record["error"]).splitlines()[:1]
    if any("is damaged" in problem and finished.METRICS in problem for problem in row.problems):
        row.state = "broken"


def _torn(checkpoint: Path) -> bool:
    try:
        return what_is_torn(checkpoint) is not None
    except (KeyError, TypeError, AttributeError, ValueError):  # a mark that says something else
        return True


def _evaluated(row: Row, results: dict[str, Any]) -> None:
    try:
        model, figure = verdicts.deciding(results)
        row.metric, row.model = (
            results["primary_metric"],
            model if results["models"][model]["kind"] in UNTRAINED else "",
        )
        row.score = {key: float(figure[key]) for key in ("value", "low", "high")}
    except (KeyError, TypeError, AttributeError, ValueError, StopIteration):
        row.problems.append("eval/results.json has no deciding score")
    weights = [file.stat().st_mtime for file in row.folder.glob("*.safetensors")]
    if row.score and not row.model and weights and max(weights) > (row.folder / "eval/results.json").stat().st_mtime:
        row.problems.append("its score is older than its weights: evaluate it again")


def _number(value: Any) -> float | None:
    is_one = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_one else None


def _order(row: Row) -> tuple:
    """Runs on the same data stand together, the best first; those without a score by their loss, then those that have none."""
    score, loss = row.score["value"] if row.score else -math.inf, row.eval_loss
    return not row.keys, _data(row), row.score is None, row.metric, -score, math.inf if loss is None else loss, row.name


def _data(row: Row) -> str:
    return json.dumps(identity_of("dataset_name", row.keys), default=str)


def _differing(rows: list[Row]) -> list[str]:
    """The keys that are not equal in all runs that have them, those that people change first."""
    found = []
    for key in sorted(SHOWN, key=lambda key: (*COMPARED, *sum(COMPARED_OF.values(), ()), key).index(key)):
        values = [
            json.dumps(identity_of(key, row.keys), sort_keys=True, default=str) for row in rows if key in row.keys
        ]
        found += [key] if len({*values}) > 1 else []
    return found


def _lines(row: Row, names: int, states: int, differing: list[str]) -> list[str]:
    loss = "-" if row.eval_loss is None else f"{row.eval_loss:.4f}"
    score = "{} ({}) {}".format(*ranged(row.metric, row.score), NAMES[row.metric]) if row.score else "-"
    score += f", {row.model}" if row.model else ""
    name, above = (row.name, []) if len(row.name) <= names else ("", [row.name])
    line = f"{name:{names}}  {row.state:{states}}  {loss:>9}  {_time(row.seconds):>8}  {score}"
    keys = [f"{key}={_text(row.keys[key])}" for key in differing if row.keys.get(key) is not None]
    below = [", ".join(keys)] if keys else []
    folded = [
        part
        for text in [*below, *row.problems]
        for part in textwrap.wrap(text, WIDTH, initial_indent="    ", subsequent_indent="      ", max_lines=3)
    ]
    first = textwrap.wrap(line, WIDTH, subsequent_indent=" " * (WIDTH - 31), drop_whitespace=False)
    return [*above, *(part.rstrip() for part in first), *folded]


def _text(value: Any) -> str:
    plain = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return textwrap.shorten(plain, SHORTENED, placeholder=" ...") if plain.split() else '""'


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
