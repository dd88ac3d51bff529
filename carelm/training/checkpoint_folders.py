"""The folders that a training saves to: their names, and whether one is whole. Imports no torch."""

import json
from pathlib import Path

MARK = "complete.json"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The folders called checkpoint-N, oldest first, whole or not."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def find_recipe(folder: Path) -> Path | None:
    """The recipe.yaml of the run that made this adapter or checkpoint; None where it is not one of CareLM's."""
    return next((f for f in (folder / "recipe.yaml", folder.parent / "recipe.yaml") if f.exists()), None)


def what_is_torn(folder: Path) -> str | None:
    """Why a checkpoint is not whole, or None for one that is."""
    try:
        mark = json.loads((folder / MARK).read_text())
    except OSError:
        return f"it has no {MARK}"
    except json.JSONDecodeError:
        return f"its {MARK} is cut off"
    for name, size in mark["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return None
