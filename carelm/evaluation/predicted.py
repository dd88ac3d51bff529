"""`predicted_columns`: a new question lacks these columns, so that test rows take what another run has answered for them."""

import dataclasses
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from carelm.data.example import Example, NoAnswer
from carelm.data.labels import parse_label
from carelm.data.rows import question_of
from carelm.data.tags import make_tags
from carelm.data.values import cell_text
from carelm.errors import UserError
from carelm.files import fingerprint, locate, read_json
from carelm.recipe import Recipe

GOLD = "gold"


@dataclasses.dataclass(frozen=True)
class Predictions:
    """One model's answers of a finished evaluation: by question, then by id.

    Attributes:
        recipe: what it was asked by.
        made_by: a hash of the model, its decoding and all prompts; None for an endpoint's answers.
        doubts: what may make them better than they are, or others than they would be today, as sentences.
    """

    file: Path
    recipe: Recipe
    answers: dict[str, dict[str, str]]
    made_by: str | None
    doubts: list[str]

    def of(self, example: Example) -> str | None:
        """The answer to the very question that this row is under the other recipe's template; None where there is none."""
        try:
            tags = make_tags(self.recipe, cell_text(example.row, self.recipe.tag_column or "", example.source) or "")
            answers = self.answers[question_of(self.recipe, example.source, example.row | tags)]
        except (NoAnswer, KeyError):
            return None
        several = {*answers.values()}  # one question under several system messages
        return answers.get(example.id, next(iter(several)) if len(several) == 1 else None)


def fill_in(recipe: Recipe, examples: list[Example]) -> tuple[list[Example], dict[str, dict[str, Any]]]:
    """The test split's examples with predicted values in their questions, and for each column what they are, with a sentence.

    An answer without a label, where the other recipe has labels, leaves the column empty: no text that nobody has foreseen gets
    into a prompt.

    Raises:
        UserError: where there is no finished evaluation, or a row without a prediction.
    """
    values: dict[str, list[str]] = {}
    about: dict[str, dict[str, Any]] = {}
    for column, place in recipe.predicted_columns.items():
        if place == GOLD:
            sentence = f"{column}: the data's own values are used, which a new question does not have: an upper bound."
            about[column] = {"from": GOLD, "sentence": sentence}
        else:
            try:
                values[column], about[column] = _predict(recipe, column, _read(place), examples)
            except UserError as error:
                raise UserError(f"predicted_columns: {column}: {error}") from None
    filled = []
    for row, example in enumerate(examples if values else ()):
        own = {column: of_rows[row] for column, of_rows in values.items()}
        question = question_of(recipe, example.source, example.row, own)
        prompt = [m | {"content": question} if m["role"] == "user" else m for m in example.prompt]
        filled.append(dataclasses.replace(example, prompt=prompt))
    return filled or examples, about


def _predict(
    recipe: Recipe, column: str, predictions: Predictions, examples: list[Example]
) -> tuple[list[str], dict[str, Any]]:
    said = [predictions.of(example) for example in examples]
    if missing := [e.source for e, answer in zip(examples, said) if answer is None]:
        raise UserError(
            f"{len(missing)} of {len(examples)} test rows have no prediction in {predictions.file} (first {missing[0]}); both "
            "recipes need the same dataset_name, split_seed, test_fraction, row_filter, id_column and question, and the one "
            "that predicts no max_eval_samples"
        )
    labels = predictions.recipe.labels
    values = [(parse_label(a, labels) or "") if labels else a.strip() for a in said]
    unparsable = values.count("")
    own = [(cell_text(e.row, column, e.source, labels) or "").strip() for e in examples]
    gold = [(value, true) for value, true in zip(values, own) if true]
    if labels and gold and not {true for _, true in gold} & {*labels}:
        raise UserError(
            f"none of the labels in {predictions.file.parent / 'recipe.yaml'} ({', '.join(labels)[:200]}) stands in the column "
            f"(there: {gold[0][1][:60]!r}); training has seen the column's values, so they have to be written alike"
        )
    accuracy = sum(value == true for value, true in gold) / len(gold) if gold else None
    right = f"{accuracy:.3f} of {len(gold)} are the data's own" if gold else "the data has none to compare them with"
    return values, {
        "from": str(predictions.file),
        "made_by": predictions.made_by,
        "rows": len(values),
        "unparsable": unparsable,
        "rows_with_gold": len(gold),
        "accuracy": accuracy,
        "sentence": f"{column}: predicted values are used, from {predictions.file}, for all {len(values)} test rows; {right}, "
        f"and {unparsable} without {'a label' if labels else 'text'} stay empty." + "".join(predictions.doubts),
    }


def _read(place: str) -> Predictions:
    """The predictions of a run's result, or of a file of predictions."""
    found = Path(locate(place))
    if not found.exists():
        raise UserError(f"there is no {place}; train and evaluate the recipe that predicts it, or write gold")
    if found.is_dir():
        folder = found / "eval" if (found / "eval").is_dir() else found
        there = sorted(f.name for f in folder.glob("predictions-*.jsonl"))
        own = [f"predictions-{name}.jsonl" for name in ("adapter", found.resolve().name)]
        name = next((name for name in own if name in there), None)
        if name is None:
            hint = f"; name one of these files: {', '.join(there)}" if there else "; evaluate that run with eval/run.py"
            raise UserError(f"{folder} has no {own[0]}{hint}")
        found = folder / name
    measured = found.with_name(f"measured-{found.stem.removeprefix('predictions-')}.json")
    number = _number_asked(found)
    if number is None or not (found.with_name("recipe.yaml").exists() and measured.exists()):
        raise UserError(f"{found} is not of a finished evaluation; evaluate that run with eval/run.py")
    try:
        keys = dict(yaml.safe_load(found.with_name("recipe.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        raise UserError(f"{found.with_name('recipe.yaml')} is damaged; evaluate that run again") from None
    other = Recipe(
        **{f.name: keys[f.name] for f in dataclasses.fields(Recipe) if "help" in f.metadata and f.name in keys}
    )
    if not other.prompt_template:
        raise UserError(
            f"{found.with_name('recipe.yaml')} has no prompt_template, by which its questions would be known"
        )
    made_by = read_json(measured).get("key")
    answers: dict[str, dict[str, str]] = defaultdict(dict)
    for line in _lines(found, made_by, number):
        answers[line["question"]][line["id"]] = line["prediction"]
    doubts = []
    if other.keep_test_questions:
        doubts.append(" That run has keep_test_questions: it may have been trained on them.")
    changed = max((f.stat().st_mtime for f in found.parent.parent.glob("*.safetensors")), default=0)
    if changed > found.stat().st_mtime:
        doubts.append(" That run's weights are newer than these answers: evaluate it again.")
    return Predictions(found, other, dict(answers), made_by, doubts)


def _number_asked(file: Path) -> int | None:
    """How many questions the last evaluation has asked, by its results.json; that of `also_test` lies in the folder above."""
    own, above = (read_json(folder / "results.json") for folder in (file.parent, file.parent.parent))
    return (own or above.get("tests", {}).get(file.parent.name, {})).get("test", {}).get("questions")


def _lines(file: Path, made_by: str | None, number: int) -> list[dict[str, Any]]:
    """The lines of the last evaluation, which stand first; behind them there may be those of earlier ones, of other weights."""
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:number] if line]
        ids = [
            (line["id"], line["made_by"]) for line in lines if isinstance(line["question"] + line["prediction"], str)
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged ({error}); evaluate that run again") from None
    if len(lines) < number or made_by not in (None, fingerprint(sorted(ids))):
        raise UserError(f"{file} is not as its evaluation has left it; evaluate that run again")
    return lines
