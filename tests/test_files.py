"""What a run's code is hashed from: every room, in depth."""

import shutil
from pathlib import Path

import pytest
from launching import PROJECT

from carelm import files
from carelm.chat.chat import make_chat
from carelm.cluster import rollcall
from carelm.recipe_file import load_recipe
from carelm.training import prepared

ROOMS = sorted({f.parent for place in rollcall.PLACES for f in (PROJECT / place).rglob("*") if f.suffix in files.CODE})
SHAPES_ROWS = ("carelm/data", "carelm/chat")


@pytest.fixture(scope="module")
def recipe_and_chat():
    recipe = load_recipe(["--max_samples", "20"], usage="")
    return recipe, make_chat(recipe)


@pytest.fixture
def copy(tmp_path, monkeypatch) -> Path:
    for place in rollcall.PLACES:
        shutil.copytree(PROJECT / place, tmp_path / place, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(files, "ROOT", tmp_path)
    return tmp_path


def test_one_changed_file_in_any_room_is_other_code_and_in_some_other_prepared_data(copy, recipe_and_chat):
    def hashes() -> tuple[str, str]:
        return files.code_fingerprint(*rollcall.PLACES), prepared._fingerprint(*recipe_and_chat, None)

    assert {"carelm", "carelm/data", "carelm/evaluation", "train", "eval", "slurm", "ds_configs"} <= {
        str(room.relative_to(PROJECT)) for room in ROOMS
    }
    before = hashes()
    for room in ROOMS:
        for suffix in sorted({f.suffix for f in room.iterdir()} & set(files.CODE)):
            file = copy / max(room.glob(f"*{suffix}"), key=lambda f: f.stat().st_size).relative_to(PROJECT)
            text = file.read_text()
            file.write_text(text + "\n")
            code, data = hashes()
            assert code != before[0], file
            assert (data != before[1]) == str(file.relative_to(copy)).startswith(SHAPES_ROWS), file
            file.write_text(text)
    assert hashes() == before
    (copy / "carelm/training/prepared.py").write_text("")
    (copy / "carelm/data/other.py").write_text("")  # a file more
    assert hashes()[1] != before[1]


def test_every_file_of_the_code_is_hashed():
    """A kind of file that nobody has thought of is named here."""
    unhashed = {f.name for place in rollcall.PLACES for f in (PROJECT / place).rglob("*") if f.is_file()
                and f.suffix not in (*files.CODE, ".pyc")}  # fmt: skip
    assert not unhashed
