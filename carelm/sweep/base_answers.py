"""The base's answers, which runs that ask it the same lend one another: it answers once for a whole sweep."""

import shutil
from dataclasses import fields

import yaml

from carelm.evaluation.candidates import QUANTIZATION
from carelm.keys import EVALUATION_KEYS, NOT_ABOUT_DATA
from carelm.recipe import Recipe
from carelm.sweep.sweep_file import Run

OTHERS = (
    "model_name_or_path",
    "model_revision",
    "max_length",
    "chat_template_path",
    "seed",
    "precision",
    *QUANTIZATION,
)
FIRST = "predictions-base.jsonl"
FILES = (
    "measured-base.json",
    "predictions-base.validation.jsonl",
    "labels-base.jsonl",
    "labels-base.validation.jsonl",
    FIRST,
)


def lend(run: Run) -> None:
    """Copies them from a run whose evaluation is done into one whose evaluation is to begin. The evaluator looks at each answer
    whether it is the one that would be made today: what is lent wrongly is made anew."""
    here = run.recipe.output_dir / "eval"
    if (here / FIRST).exists():
        return
    for results in sorted(here.parent.parent.glob("*/eval/results.json")):
        there, recipe = results.parent, results.parent.parent.with_name(f"{results.parent.parent.name}.yaml")
        if (there / FIRST).exists() and recipe.exists() and _asked(recipe, run.recipe):
            # Those of also_test lie deeper and come first. The last one says that all are there, each of them whole.
            for file in (f for name in FILES for f in sorted(there.rglob(name), key=lambda f: -len(f.parts))):
                own = here / file.relative_to(there)
                own.parent.mkdir(parents=True, exist_ok=True)
                partial = own.with_name(f"{own.name}.partial")
                shutil.copy2(file, partial)
                partial.replace(own)
            return


def _asked(file, recipe: Recipe) -> bool:
    """Whether the recipe in this file asks the base the same."""
    own = {f.name for f in fields(recipe) if "help" in f.metadata} - NOT_ABOUT_DATA
    keys = (own | set(EVALUATION_KEYS) | set(OTHERS)) - {"models", "num_resamples", "primary_metric"}
    before, now = yaml.safe_load(file.read_text(encoding="utf-8")), recipe.keys()
    return all(before.get(key) == now.get(key) for key in keys)
