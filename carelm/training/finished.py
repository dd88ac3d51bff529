"""Whether a finished run is still what it was: its data, its result's files and the code that made it. Imports no torch."""

import hashlib
from pathlib import Path
from typing import Any

from carelm.adapter_folder import start_fingerprint
from carelm.data.report import shortened
from carelm.data.sources import changed_files, hash_files
from carelm.errors import UserError
from carelm.files import code_fingerprint
from carelm.ranks import say
from carelm.recipe import CERTIFIED, ENGINE_LOG, FEEDBACK, PRECISION_NOTE, REFERENCE, Recipe

METRICS = "train_metrics.json"
# No part of the result; what is served, and what people say of it, goes on growing.
BESIDE = {
    METRICS,
    PRECISION_NOTE,
    REFERENCE,
    FEEDBACK,
    CERTIFIED,
    ENGINE_LOG,
    "recipe.yaml",
    "data_report.json",
    "README.md",
}
WHOLE = 2**26  # bytes of a file that is hashed whole; of a larger one its two ends are


def describe(folder: Path) -> dict[str, Any]:
    """What a finished run's metrics say for `check`, beside `data_files`: size and hash of the result's files, and one of the
    code."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and not p.name.startswith((".", "stop_request")))
    return {
        "result_files": {name: _size_and_hash(folder / name) for name in names if name not in BESIDE},
        "code_fingerprint": _code(),
    }


def check(recipe: Recipe, metrics: dict[str, Any]) -> None:
    """Compares a finished run with what its metrics say of it; what cannot be compared here is said. Downloads nothing.

    Raises:
        UserError: where its data is here and differs, or a file of its result is gone or changed.
    """
    folder, same_code = recipe.output_dir, metrics.get("code_fingerprint") == _code()
    anew = f"begin anew with --restart ({folder} is kept aside), or set another output_dir"
    if changes := _changed_result(folder, metrics.get("result_files")):
        write = f"remove {folder / METRICS} to write it again from its newest checkpoint, or "
        raise UserError(
            f"output_dir: the result of this finished run is not what it was: {shortened(changes)}; put it back, "
            f"{write if any(folder.glob('checkpoint-*')) else ''}{anew}"
        )
    begun_with = metrics.get("adapter_fingerprint")
    if begun_with and (now := start_fingerprint(recipe)) is None:
        say(f"the adapter that this finished run has gone on from is not here and is not compared ({recipe.adapter})")
    elif begun_with and now != begun_with:
        raise UserError(
            f"adapter: {recipe.adapter} is not what this finished run has gone on from; put it back, or {anew}"
        )
    if changes := _changed_data(recipe, metrics, same_code):
        go_on = f"go on from it with these rows (--adapter {folder} and another --output_dir), " * (
            recipe.method != "full"
        )
        raise UserError(
            f"dataset_name: the data of this finished run is not what it was: {shortened(changes)}; put it back, {go_on}or "
            f"{anew}"
        )
    if not same_code and "code_fingerprint" in metrics:
        say(f"the code has changed since this run was trained (commit {metrics.get('git_commit')}); it stays finished")


def _changed_result(folder: Path, recorded: dict[str, list] | None) -> list[str]:
    if recorded is None:  # of an earlier version
        return [] if any(folder.glob("*.safetensors")) else ["it holds no .safetensors file"]
    changes = []
    for name, (size, digest) in recorded.items():
        if not (folder / name).is_file():
            changes.append(f"{name} is gone")
        elif (now := _size_and_hash(folder / name)) != [size, digest]:
            changes.append(f"{name} has changed" if now[0] == size else f"{name} has {now[0]} bytes, not {size}")
    return changes


def _changed_data(recipe: Recipe, metrics: dict[str, Any], same_code: bool) -> list[str]:
    recorded, name = metrics.get("data_files"), recipe.dataset_name
    if recorded is None:
        why = "it is from a hub" if "data_files" in metrics else "an earlier version has trained on it"
        say(f"whether {name} has changed since this run was trained is not looked up ({why})")
        return []
    try:
        now = hash_files(recipe)
    except UserError as error:
        now, why = None, str(error)
    else:
        why = f"there is no {name}"
    if now is None:
        say(f"the data of this finished run cannot be read here and is not compared ({why})")
        return []
    # Other code may read other files of the same folder.
    changes = changed_files(recorded, now).items()
    return [f"{file} {what}" for file, what in changes if same_code or what != "is new"]


def _code() -> str:
    return code_fingerprint("carelm", "train")


def _size_and_hash(file: Path) -> list:
    size = file.stat().st_size
    with open(file, "rb") as content:
        digest = hashlib.sha256(content.read(WHOLE if size <= WHOLE else 2**20))
        if size > WHOLE:
            content.seek(size - 2**20)
            digest.update(content.read())
    return [size, digest.hexdigest()[:16]]
