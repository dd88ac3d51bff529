"""The folders that a training saves to, by their names. Imports no torch."""

from pathlib import Path


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The folders called checkpoint-N, oldest first, whole or not."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def find_recipe(folder: Path) -> Path | None:
    """The recipe.yaml of the run that made this adapter or checkpoint; None where it is not one of CareLM's."""
    return next((f for f in (folder / "recipe.yaml", folder.parent / "recipe.yaml") if f.exists()), None)
