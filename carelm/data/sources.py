"""Where a recipe's rows are: files, folders, globs and Hub datasets, by split."""

import glob
import os
from pathlib import Path
from typing import Any

from carelm.data.readers import DATA_SUFFIXES, read_rows
from carelm.data.templates import template_columns
from carelm.errors import UserError
from carelm.files import locate
from carelm.recipe import Recipe

SPLITS = ("train", "validation", "test")


def is_hub_id(dataset_name: str) -> bool:
    """Whether a dataset name that is no file, folder or glob here has the shape of a Hub id (owner/name)."""
    if any(c in dataset_name for c in "*?[") or os.path.exists(locate(dataset_name)):
        return False
    looks_like_path = dataset_name.startswith((".", "/", "~")) or dataset_name.endswith(DATA_SUFFIXES)
    return not looks_like_path and dataset_name.count("/") <= 1


def stay_offline(recipe: Recipe) -> None:
    """Where a run needs nothing from a hub, none is waited for; to be called before any library of the Hub is imported."""
    if os.path.exists(recipe.base) and not is_hub_id(recipe.dataset_name) and not recipe.training.get("push_to_hub"):
        os.environ["HF_HUB_OFFLINE"] = "1"


def find_files(recipe: Recipe) -> dict[str, list[Path]]:
    """The files of each split: by name in a folder (train.csv, test-00000.parquet), all of `train` for a file or glob."""
    name = locate(recipe.dataset_name)
    path = Path(name)
    if path.is_dir():
        wanted = {
            "train": recipe.dataset_train_split,
            "validation": recipe.dataset_validation_split,
            "test": recipe.dataset_test_split,
        }
        files = sorted(p for p in path.iterdir() if p.suffix in DATA_SUFFIXES)
        by_split = {s: [f for f in files if split_of(f) == wanted[s]] for s in SPLITS}
        if not by_split["train"]:
            there = ", ".join(f.name for f in files) or "no data files"
            raise UserError(f"dataset_train_split: {path} has no file of a split '{wanted['train']}' (there: {there})")
        return {s: f for s, f in by_split.items() if f}
    matches = [Path(p) for p in sorted(glob.glob(name))] if not path.exists() else [path]
    if not matches:
        raise UserError(f"dataset_name: there is no file, folder or glob {recipe.dataset_name}")
    for match in matches:
        if match.suffix not in DATA_SUFFIXES:
            raise UserError(f"dataset_name: {match} is none of {', '.join(DATA_SUFFIXES)}")
    return {"train": matches}


def split_of(file: Path) -> str:
    """`train.jsonl`, `train-00000-of-00002.parquet` -> "train"."""
    return file.stem.split("-0")[0]


def _load_hub(recipe: Recipe) -> dict[str, list[tuple[str, dict]]]:
    import datasets

    try:
        loaded = datasets.load_dataset(recipe.dataset_name, recipe.dataset_config)
    except Exception as error:  # the Hub's client raises its own, OSError, ValueError: all mean that it is not there
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"dataset_name: {recipe.dataset_name} is no file here and cannot be had from the Hub ({reason}); "
            "--dataset_name FILE puts a file in its place"
        ) from None
    names = (recipe.dataset_train_split, recipe.dataset_validation_split, recipe.dataset_test_split)
    if names[0] not in loaded:
        raise UserError(
            f"dataset_train_split: {recipe.dataset_name} has no split '{names[0]}' (there: {', '.join(loaded)})"
        )
    return {
        split: [(f"{name}:{i}", row) for i, row in enumerate(loaded[name], 1)]
        for split, name in zip(SPLITS, names)
        if name in loaded
    }


def load_splits(recipe: Recipe) -> dict[str, list[tuple[str, dict]]]:
    """The (source, row) pairs of each split that the data has by name, after `row_filter`; columns are checked."""
    if is_hub_id(recipe.dataset_name):
        splits = _load_hub(recipe)
    else:
        splits = {s: [pair for f in files for pair in read_rows(f)] for s, files in find_files(recipe).items()}
    for split, rows in splits.items():
        if not rows:
            raise UserError(f"dataset_name: the {split} split of {recipe.dataset_name} has no rows")
        _check_columns(recipe, rows, split, reference_columns(recipe, split, splits))
        for column, wanted in (recipe.row_filter or {}).items():
            wanted = [str(w) for w in (wanted if isinstance(wanted, list) else [wanted])]
            rows = [pair for pair in rows if str(pair[1].get(column)) in wanted]
        splits[split] = rows
    if not splits["train"]:
        raise UserError(f"row_filter: {recipe.row_filter} leaves no training row of {recipe.dataset_name}")
    return splits


def reference_columns(recipe: Recipe, split: str, splits: dict[str, Any]) -> list[str]:
    """`reference_columns` where test rows are among a split's: without a test split they are cut from train."""
    return recipe.reference_columns if split == ("test" if "test" in splits else "train") else []


def _check_columns(recipe: Recipe, rows: list[tuple[str, dict]], split: str, references: list[str]) -> None:
    there = {column for _, row in rows for column in row}
    needed = {"messages_column": [recipe.messages_column] if recipe.messages_column else []}
    for key in ("prompt_template", "completion_template", "system_prompt"):
        needed[key] = template_columns(getattr(recipe, key) or "", key)
    for key in ("category_column", "id_column", "tools_column"):
        needed[key] = [getattr(recipe, key)] if getattr(recipe, key) else []
    needed["row_filter"] = list(recipe.row_filter or {})
    needed["reference_columns"] = references
    if split == "test" and references:  # such rows may have no other answer
        needed["completion_template"] = []
    for key, columns in needed.items():
        for column in columns:
            if column not in there:
                file = rows[0][0].rsplit(":", 1)[0]
                raise UserError(f"{key}: {file} has no column '{column}' (there: {', '.join(sorted(there))})")
