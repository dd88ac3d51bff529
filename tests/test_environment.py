"""A launched file outside the environment is one line that says how to get into it."""

import os
import shutil
import subprocess
import sys

import pytest
from launching import PROJECT

LAUNCHED = [*(PROJECT / "train").glob("*.py"), PROJECT / "eval/run.py"]


def outside(*words, cwd=PROJECT):
    """Without site-packages, as a Python has it into which nothing is installed."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-S", *map(str, words)], cwd=cwd, env=variables, capture_output=True, text=True
    )


@pytest.mark.parametrize("file", LAUNCHED, ids=lambda file: file.name)
def test_outside_the_environment_each_launched_file_says_how_to_get_into_one(file):
    done = outside(file, "--help")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: {sys.executable} has no ") and "torch" in done.stderr
    assert "source " in done.stderr and "bin/activate" in done.stderr


def test_an_environment_that_is_there_is_to_be_activated_and_not_installed(tmp_path):
    for part in ("carelm/__init__.py", "carelm/environment.py", "train/sft.py", "train/merge.py"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / part, tmp_path / part)
    assert "make install" in outside("train/merge.py", cwd=tmp_path).stderr
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    line = outside("merge.py", cwd=tmp_path / "train").stderr
    assert line.endswith("; activate its environment: source ../.venv/bin/activate\n") and "install" not in line
