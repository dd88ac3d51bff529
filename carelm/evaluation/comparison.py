"""Several runs, each evaluated under its own recipe -> one comparison: their answers joined by question, on the same draws.

What is compared is what each run has trained, and every other model that its evaluation has named. A base that was asked the
same in several runs (the same weights, prompts and decoding) stands there once.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carelm.errors import UserError
from carelm.evaluation import report, results
from carelm.evaluation.labels import parse_label
from carelm.evaluation.questions import Question
from carelm.evaluation.scores import TEXT_SCORES
from carelm.files import read_json
from carelm.recipe import Recipe
from carelm.training import finished

TRAINED = ("eval_loss", "eval_loss_before", "global_step", "num_train_tokens", "tokens_per_second", "wall_seconds",
           "peak_memory_bytes", "trainable_parameters", "total_parameters")  # fmt: skip
MEASURED = ("kind", "folder", "precision", "bits", "unused_generation_config", "total_parameters", "trained_parameters",
            "load_seconds", "peak_memory_bytes", "prompt_tokens", "throughput", "latency", "conditions")  # fmt: skip
LABEL_SCORES = ("accuracy", "macro_f1")  # of the answers; what a run knows beside them stands in its own report
RESAMPLES_OF_A_PAIR = 100  # fewer, and Holm's correction leaves no difference that could be shown


@dataclass(frozen=True)
class Compared:
    """A run: the keys that make it this one, how it ended, and whether it has trained and answered anything."""

    name: str
    recipe: Recipe
    axes: dict[str, Any]
    state: str
    error: str
    is_trained: bool
    is_evaluated: bool


@dataclass(frozen=True)
class Row:
    """One model of a run, by its name in the comparison: what it answered, by question, and what was measured meanwhile."""

    name: str
    run: Compared
    answers: dict[str, dict[str, Any]]
    measured: dict[str, Any]


def compare(folder: Path, title: str, runs: list[Compared]) -> Path:
    """Writes comparison.html, .md and .json into `folder` and returns the first; without answers, the losses are compared.

    Raises:
        UserError: where two runs were asked other questions, or the same with other references and without labels in common.
    """
    rows = _rows([run for run in runs if run.state == "finished" and run.is_evaluated])
    found: dict[str, Any] = {"primary_metric": "eval_loss", "models": {}, "pairs": [], "verdicts": [], "cautions": []}
    questions: list[Question] = []
    if rows:
        has_labels_only = _check_alike(rows)
        recipe = _recipe(rows, has_labels_only)
        questions = _questions(rows[0], recipe, has_labels_only)
        lines = {row.name: [row.answers[q.id] for q in questions] for row in rows}
        found = results.make_results(
            recipe, questions, lines, {r.name: r.measured for r in rows}, has_labels_only=has_labels_only
        )
        first = read_json(_eval(rows[0].run) / "results.json")
        found |= {"test": first["test"], "conditions": first["conditions"] | {"num_resamples": recipe.num_resamples}}
        found["cautions"] += _cautions(rows, has_labels_only)
    found["runs"] = {row.name: {} for row in rows} | {run.name: _figures(run) for run in runs}
    found["best"] = _best(found)
    found["verdicts"] = [
        results.verdict(pair, found["primary_metric"], found["test"]["conversations"])
        for pair in found["pairs"]
        if found["best"] in pair["models"]
    ]
    found["cautions"] += [f"{run.name} {run.state}: {run.error}" for run in runs if run.error]
    curves = {run.name: report.loss_curves(run.recipe.output_dir / "runs") for run in runs if run.is_trained}
    report.write_comparison(
        folder, title, found, questions, lines if rows else {}, {k: c for k, c in curves.items() if c}
    )
    return folder / "comparison.html"


def _eval(run: Compared) -> Path:
    return run.recipe.output_dir / "eval"


def _rows(runs: list[Compared]) -> list[Row]:
    """The models of all runs, bases first."""
    rows, bases = list[Row](), list[Row]()
    for run in runs:
        about = read_json(_eval(run) / "results.json")
        for name, figures in about["models"].items():
            with open(_eval(run) / f"predictions-{name}.jsonl", encoding="utf-8") as file:
                lines = [json.loads(line) for line in file][: about["test"]["questions"]]
            measured = {key: figures[key] for key in MEASURED}
            row = Row(name, run, {line["id"]: line for line in lines}, measured)
            is_own = name in ("adapter", run.recipe.output_dir.name) or len(about["models"]) == 1
            if name == "base" and not is_own and any(_asked(row) == _asked(other) for other in bases):
                continue
            if name == "base" and not is_own and not bases:
                bases.append(row)
            else:
                rows.append(dataclasses.replace(row, name=run.name if is_own else f"{run.name}/{name}"))
    return bases + rows


def _asked(row: Row) -> list[str]:
    return [line["made_by"] for line in row.answers.values()]


def _check_alike(rows: list[Row]) -> bool:
    """Whether label scores alone can be compared, as the references differ."""
    first, unlike = rows[0], None
    for row in rows[1:]:
        if others := row.answers.keys() ^ first.answers.keys():
            raise UserError(
                f"comparison: {first.run.name} and {row.run.name} were asked other questions ({min(others)} and "
                f"{len(others) - 1} more stand in one of them alone); give all runs the same test rows"
            )
        for key, line in first.answers.items():
            if row.answers[key]["conversation"] != line["conversation"]:
                raise UserError(
                    f"comparison: {key} is of another conversation in {row.run.name} than in {first.run.name}"
                )
            if row.answers[key]["references"] != line["references"]:
                labels = [_label(r, key) for r in (first, row)]
                if labels[0] is None or labels[0] != labels[1] or row.run.recipe.labels != first.run.recipe.labels:
                    raise UserError(
                        f"comparison: {key} has other references in {row.run.name} than in {first.run.name}"
                        + (f" (labels {labels[0]} and {labels[1]})" if any(labels) else "")
                        + "; give all runs the same test rows and reference_columns"
                    )
                unlike = row
    return unlike is not None


def _label(row: Row, question: str) -> str | None:
    labels = row.run.recipe.labels
    return parse_label(row.answers[question]["references"][0], labels) if labels else None


def _recipe(rows: list[Row], has_labels_only: bool) -> Recipe:
    """The first run's, by whose primary metric all are compared, with as many resamples as so many pairs need."""
    recipe = rows[0].run.recipe
    known = LABEL_SCORES if has_labels_only else (*TEXT_SCORES, *LABEL_SCORES)
    metric = recipe.primary_metric if recipe.primary_metric in known else "macro_f1"
    number = max(recipe.num_resamples, RESAMPLES_OF_A_PAIR * len(rows) * (len(rows) - 1) // 2)
    return dataclasses.replace(recipe, primary_metric=metric, num_resamples=number, overlap_columns=[])


def _questions(row: Row, recipe: Recipe, has_labels_only: bool) -> list[Question]:
    return [
        Question(
            id=key,
            conversation=line["conversation"],
            category=line["category"],
            messages=[{"role": "user", "content": line["question"]}],
            references=[parse_label(line["references"][0], recipe.labels)] if has_labels_only else line["references"],
        )
        for key, line in row.answers.items()
    ]


def _cautions(rows: list[Row], has_labels_only: bool) -> list[str]:
    cautions = []
    if has_labels_only:
        cautions.append("The references of the runs differ and their labels do not: only label scores are compared.")
    recipes = [row.run.recipe for row in rows]
    if recipes[0].primary_metric not in (*TEXT_SCORES, *LABEL_SCORES):
        cautions.append(f"{recipes[0].primary_metric} stands in each run's own report; here macro F1 decides.")
    for key in ("primary_metric", "max_new_tokens", "temperature"):
        if len({getattr(recipe, key) for recipe in recipes}) > 1:
            cautions.append(f"{key} is not the same in all runs.")
    return cautions


def _figures(run: Compared) -> dict[str, Any]:
    metrics = read_json(run.recipe.output_dir / finished.METRICS) if run.is_trained and run.state == "finished" else {}
    return {"state": run.state, "axes": run.axes, **{key: metrics.get(key) for key in TRAINED if run.is_trained}}


def _best(found: dict[str, Any]) -> str | None:
    """The row with the highest score, or without answers the lowest eval loss."""
    metric = found["primary_metric"]
    if found["models"]:
        return max(found["models"], key=lambda name: found["models"][name][metric]["value"])
    losses = {name: run["eval_loss"] for name, run in found["runs"].items() if run.get("eval_loss") is not None}
    return min(losses, key=losses.get, default=None)
