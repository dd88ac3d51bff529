"""Several runs, each evaluated under its own recipe -> one comparison: their answers joined by question, on the same draws.

What is compared is what each run has trained, and every other model that its evaluation has named. A base that was asked the
same in several runs (the same weights, prompts and decoding) stands there once. The test questions of each recipe in
`also_test` are compared in the same way, for themselves.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from carelm.data.label_form import find_form, form_of
from carelm.data.labels import parse_label
from carelm.errors import UserError
from carelm.evaluation import label_file, report, results
from carelm.evaluation.check_scores import ask
from carelm.evaluation.label_results import CERTAINTY, Labelled
from carelm.evaluation.predictions import PredictionFile
from carelm.evaluation.questions import Question
from carelm.evaluation.scores import CONSTRAINED, LABEL_SCORES, NAMES, TEXT_SCORES
from carelm.files import fingerprint, read_json
from carelm.recipe import Recipe
from carelm.recipe_file import load_also_tests
from carelm.training import finished

TRAINED = ("eval_loss", "eval_loss_before", "global_step", "num_train_tokens", "tokens_per_second", "wall_seconds",
           "peak_memory_bytes", "trainable_parameters", "total_parameters")  # fmt: skip
MEASURED = ("kind", "folder", "precision", "bits", "unused_generation_config", "total_parameters", "trained_parameters",
            "load_seconds", "peak_memory_bytes", "prompt_tokens", "throughput", "latency", "conditions",
            "unfounded_numbers")  # fmt: skip
UNKNOWN = "An earlier version has evaluated it: see its own report for what that warns of."
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
    """One model of a run, and what it was asked.

    Attributes:
        name: in the comparison.
        run: its run's.
        recipe: by which it was asked: the run's, or one of its `also_test`.
        answers: the lines of its predictions by question.
        labels: the log-probabilities of the recipe's labels by question; empty where they were not scored.
        figures: what its evaluation has found.
    """

    name: str
    run: str
    recipe: Recipe
    answers: dict[str, dict[str, Any]]
    labels: dict[str, np.ndarray]
    figures: dict[str, Any]


def compare(folder: Path, title: str, runs: list[Compared]) -> dict[str, Any]:
    """Writes comparison.html, .md and .json into `folder` and returns what stands in the last; without answers, the losses are
    compared.

    Raises:
        UserError: where two runs were asked other questions, or the same with other references and without labels in common.
    """
    found: dict[str, Any] = {
        "primary_metric": "eval_loss",
        "models": {},
        "pairs": [],
        "verdicts": [],
        "cautions": [],
        "tests": {},
    }
    questions, lines = list[Question](), dict[str, list[dict[str, Any]]]()
    if asked := [run for run in runs if run.state == "finished" and run.is_evaluated]:
        of_runs = {run.name: read_json(_eval(run) / "results.json") for run in asked}
        names = _names(asked, of_runs)
        found, questions, lines = _compare(asked, of_runs, names)
        found["conditions"] = _conditions(of_runs) | {"num_resamples": _resamples(asked[0].recipe, len(lines))}
        for test in dict.fromkeys(test for about in of_runs.values() for test in about.get("tests", {})):
            try:
                found["tests"][test], _, _ = _compare(asked, of_runs, names, test)
            except UserError as error:
                raise UserError(f"also_test: {test}: {error}") from None
    found["runs"] = {name: {} for name in lines} | {run.name: _figures(run) for run in runs}
    groups = _by_tokenizer(runs)
    found["has_one_tokenizer"] = len(groups) < 2
    if len(groups) > 1:
        found["cautions"].append(
            "Validation losses do not compare between runs whose bases have other tokenizers, as each is a mean over tokens of "
            f"its own: {'; '.join(', '.join(names) for names in groups)}."
        )
    found["best"] = _best(found)
    found["cautions"] += [f"{run.name} {run.state}: {run.error}" for run in runs if run.error]
    curves = {run.name: report.loss_curves(run.recipe.output_dir / "runs") for run in runs if run.is_trained}
    return report.write_comparison(folder, title, found, questions, lines, {k: c for k, c in curves.items() if c})


def _compare(
    runs: list[Compared], of_runs: dict[str, dict[str, Any]], names: dict[tuple[str, str], str], test: str = ""
) -> tuple[dict[str, Any], list[Question], dict[str, list[dict[str, Any]]]]:
    """The results of the runs' own test questions, or of those of one of their `also_test`; the questions, and each model's
    answers in their order."""
    found_by = {name: about.get("tests", {}).get(test) if test else about for name, about in of_runs.items()}
    first = dict[str, tuple[Compared, str]]()  # of a base that several runs share, where it has been asked this
    for run in runs:
        for model in found_by[run.name]["models"] if found_by[run.name] else ():
            first.setdefault(names[run.name, model], (run, model))
    order = [name for name in dict.fromkeys(names.values()) if name in first]
    rows = [_row(run, model, name, test, found_by[run.name]) for name in order for run, model in [first[name]]]
    has_labels_only = _check_alike(rows)
    recipe = _recipe(rows, has_labels_only)
    questions = _questions(rows[0], recipe, has_labels_only)
    lines = {row.name: [row.answers[q.id] for q in questions] for row in rows}
    scored = [row for row in rows if row.labels]
    labelled = Labelled(
        log_probabilities={row.name: {"test": np.stack([row.labels[q.id] for q in questions])} for row in scored},
        known={row.name: {key: row.figures[key] for key in CERTAINTY if key in row.figures} for row in scored},
    )
    measured = {
        row.name: {key: row.figures.get(key) for key in MEASURED} for row in rows
    }  # an earlier version has fewer
    have_checks = not has_labels_only and all(row.recipe.checks == recipe.checks for row in rows)
    checks = ask(recipe, questions) if have_checks else []
    found = results.make_results(recipe, questions, lines, measured, checks, labelled, has_labels_only)
    found["test"] = {key: value for key, value in found_by[rows[0].run]["test"].items() if key != "num_shots"}
    found["best"] = _best(found)
    found["verdicts"] = [
        results.verdict(pair, recipe.primary_metric, found["test"]["conversations"])
        for pair in found["pairs"]
        if found["best"] in pair["models"]
    ]
    found["cautions"] += _cautions(rows, recipe.primary_metric, has_labels_only)
    if not have_checks and any(row.recipe.checks for row in rows):
        found["cautions"].append("The runs' checks are not about the same answers: see each run's own report.")
    found["cautions"] += [f"{name} was not asked {test}." for name, about in found_by.items() if not about]
    of_words = [
        {name: {**b, "differences": {}} for name, b in found_by[row.run].get("baselines", {}).items()} for row in rows
    ]
    if all(baselines == of_words[0] for baselines in of_words):  # they follow from the rows alone
        found["baselines"] = of_words[0]
    asked = {row.run: found_by[row.run]["test"] for row in rows}
    found["cautions"][:0] = _of_each({run: found_by[run].get("data_cautions", [UNKNOWN]) for run in asked})
    if test:
        leaks = {run: [about["leaks"]["sentence"]] for run, about in asked.items()}
        found["test"] |= {"leaks": {"sentence": " ".join(_of_each(leaks))}}
    return found, questions, lines


def _of_each(said: dict[str, list[str]]) -> list[str]:
    """Sentences about each run, once each, with the runs' names in front where it is not all of them."""
    whose = dict[str, list[str]]()
    for run, sentences in said.items():
        for sentence in dict.fromkeys(sentences):
            whose.setdefault(sentence, []).append(run)
    return [s if len(runs) == len(said) else f"{', '.join(runs)}: {s}" for s, runs in whose.items()]


def _conditions(of_runs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What holds for all runs; where it is not the same in all of them, what holds for each."""
    found = {}
    for key in next(iter(of_runs.values()))["conditions"]:
        each = {name: about["conditions"].get(key) for name, about in of_runs.items()}
        found[key] = each if len({str(value) for value in each.values()}) > 1 else next(iter(each.values()))
    return found


def _eval(run: Compared) -> Path:
    return run.recipe.output_dir / "eval"


def _names(runs: list[Compared], of_runs: dict[str, dict[str, Any]]) -> dict[tuple[str, str], str]:
    """What the models of each run are called in the comparison, bases first; a base that several runs share has one name."""
    bases, names = dict[tuple, str](), dict[tuple[str, str], str]()
    for run in runs:
        models = of_runs[run.name]["models"]
        for model in models:
            is_own = model in ("adapter", run.recipe.output_dir.name) or len(models) == 1
            names[run.name, model] = run.name if is_own else f"{run.name}/{model}"
            if model == "base" and not is_own:
                asked = _asked(run, model, of_runs[run.name])
                names[run.name, model] = bases.setdefault(asked, names[run.name, model])
    shared = [*bases.values()]
    if len(shared) == 1:
        names = {key: "base" if name in shared else name for key, name in names.items()}
        shared = ["base"]
    return dict(sorted(names.items(), key=lambda item: item[1] not in shared))


def _asked(run: Compared, model: str, about: dict[str, Any]) -> tuple:
    """What a model's free answers are made by, and the form by which its labels are scored."""
    form = form_of(run.recipe) if f"{CONSTRAINED}macro_f1" in about["models"][model] else None
    return form, *(line["made_by"] for line in _answers(run, model, "", about).values())


def _answers(run: Compared, model: str, test: str, about: dict[str, Any]) -> dict[str, dict[str, Any]]:
    with open(_eval(run) / test / f"predictions-{model}.jsonl", encoding="utf-8") as file:
        lines = [json.loads(line) for line in file][: about["test"]["questions"]]
    return {line["id"]: line for line in lines}


def _row(run: Compared, model: str, name: str, test: str, about: dict[str, Any]) -> Row:
    answers, figures = _answers(run, model, test, about), about["models"][model]
    row = Row(name, run.name, load_also_tests(run.recipe)[test] if test else run.recipe, answers, {}, figures)
    if f"{CONSTRAINED}macro_f1" not in figures:
        return row
    form = find_form(row.recipe, map(Question.expected, _questions(row, row.recipe, has_labels_only=False)))
    made_by = {question: line["made_by"] for question, line in answers.items()}
    file = PredictionFile(_eval(run) / test / f"predictions-{model}.jsonl", made_by)
    there = label_file.open_file(file, form, label_file.said(file, form)).read() if form else {}
    if missing := answers.keys() - there.keys():
        raise UserError(
            f"comparison: {run.name}: {len(missing)} of {len(answers)} answers of {model} have no label scores; evaluate it "
            f"again: eval/run.py --config {run.recipe.output_dir}.yaml"
        )
    log_probabilities = label_file.log_probabilities((there[question] for question in answers), form)
    return dataclasses.replace(row, labels=dict(zip(answers, log_probabilities)))


def _check_alike(rows: list[Row]) -> bool:
    """Whether label scores alone can be compared, as the references differ."""
    first, unlike = rows[0], None
    for row in rows[1:]:
        if others := row.answers.keys() ^ first.answers.keys():
            raise UserError(
                f"comparison: {first.run} and {row.run} were asked other questions ({min(others)} and "
                f"{len(others) - 1} more stand in one of them alone); give all runs the same test rows"
            )
        if row.recipe.labels != first.recipe.labels:
            raise UserError(
                f"comparison: {first.run} and {row.run} have other labels; give all runs the same, in one order"
            )
        for key, line in first.answers.items():
            if row.answers[key]["conversation"] != line["conversation"]:
                raise UserError(f"comparison: {key} is of another conversation in {row.run} than in {first.run}")
            if row.answers[key]["references"] != line["references"]:
                labels = [_label(r, key) for r in (first, row)]
                if labels[0] is None or labels[0] != labels[1]:
                    raise UserError(
                        f"comparison: {key} has other references in {row.run} than in {first.run}"
                        + (f" (labels {labels[0]} and {labels[1]})" if any(labels) else "")
                        + "; give all runs the same test rows and reference_columns"
                    )
                unlike = row
    return unlike is not None


def _label(row: Row, question: str) -> str | None:
    labels = row.recipe.labels
    return parse_label(row.answers[question]["references"][0], labels) if labels else None


def _recipe(rows: list[Row], has_labels_only: bool) -> Recipe:
    """The first run's, by whose primary metric all are compared where all have it, with as many resamples as so many pairs
    need."""
    recipe = rows[0].recipe
    known = () if has_labels_only else TEXT_SCORES
    known += LABEL_SCORES if all(row.labels for row in rows) else LABEL_SCORES[:2]
    metric = recipe.primary_metric if recipe.primary_metric in known else "macro_f1"
    number = _resamples(recipe, len(rows))
    return dataclasses.replace(recipe, primary_metric=metric, num_resamples=number, overlap_columns=[])


def _resamples(recipe: Recipe, rows: int) -> int:
    return max(recipe.num_resamples, RESAMPLES_OF_A_PAIR * rows * (rows - 1) // 2)


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


def _cautions(rows: list[Row], metric: str, has_labels_only: bool) -> list[str]:
    cautions = []
    if has_labels_only:
        cautions.append("The references of the runs differ and their labels do not: only label scores are compared.")
    wanted = NAMES[rows[0].recipe.primary_metric]
    if wanted != NAMES[metric]:
        cautions.append(f"{wanted} cannot be had of all runs: {NAMES[metric]} decides here.")
    for key in ("primary_metric", "max_new_tokens", "temperature"):
        each = {row.run: getattr(row.recipe, key) for row in rows}
        if len({*each.values()}) > 1:
            said = ", ".join(f"{run} {value}" for run, value in each.items())
            cautions.append(f"{key} is not the same in all runs: {said}.")
    return cautions


def _figures(run: Compared) -> dict[str, Any]:
    metrics = read_json(run.recipe.output_dir / finished.METRICS) if run.is_trained and run.state == "finished" else {}
    return {"state": run.state, "axes": run.axes, **{key: metrics.get(key) for key in TRAINED if run.is_trained}}


def _by_tokenizer(runs: list[Compared]) -> list[list[str]]:
    """The names of the runs that have a validation loss, those with the same tokenizer together."""
    groups = dict[str, list[str]]()
    for run in runs:
        if _figures(run).get("eval_loss") is not None:
            saved = read_json(run.recipe.output_dir / "tokenizer.json")  # none: not a fast one, told by its base
            parts = (
                [saved.get(part) for part in ("normalizer", "pre_tokenizer", "model")] if saved else [run.recipe.base]
            )
            groups.setdefault(fingerprint(*parts), []).append(run.name)
    return list(groups.values())


def _best(found: dict[str, Any]) -> str | None:
    """The row with the highest score, or without answers the lowest eval loss, where these compare."""
    metric = found["primary_metric"]
    if found["models"]:
        return max(found["models"], key=lambda name: found["models"][name][metric]["value"])
    if not found["has_one_tokenizer"]:
        return None
    losses = {name: run["eval_loss"] for name, run in found["runs"].items() if run.get("eval_loss") is not None}
    return min(losses, key=losses.get, default=None)
