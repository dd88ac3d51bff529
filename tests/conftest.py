"""What several test files share: the tiny base, the folder with public samples, a cache of its own for each test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

# Four workers may share two cores: threads that wait for one another would take most of the time. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

PROJECT = Path(__file__).resolve().parent.parent


LAUNCH_MOST = (
    "test_slurm_stops",
    "test_slurm",
    "test_resume",
    "test_curve",
    "test_evaluator",
    "test_stops",
    "test_assistants",
    "test_merge",
    "test_real_rows",
)


def pytest_collection_modifyitems(items):
    """The files that take longest come first, so that no worker is left with one of them at the end."""
    items.sort(
        key=lambda item: LAUNCH_MOST.index(item.path.stem) if item.path.stem in LAUNCH_MOST else len(LAUNCH_MOST)
    )


@pytest.fixture(scope="session")
def base() -> Path:
    """The tiny pretrained base that comes with the project."""
    return PROJECT / "demo/base"


@pytest.fixture(scope="session")
def real_base() -> Path:
    """SmolLM2-135M-Instruct, kept in the user's own cache: a fixture of the session begins before `own_cache`."""
    command = [sys.executable, PROJECT / "demo/real_base.py"]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300)
    last = done.stderr.splitlines()[-1:] or [""]
    if done.returncode == 2 and last[0].startswith("error: no real base: "):
        pytest.skip(last[0].removeprefix("error: "))
    assert done.returncode == 0, done.stderr
    return Path(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def carelm_data() -> Path:
    """A folder with a folder of real rows per recipe; it is no part of the project."""
    folder = Path(os.environ.get("CARELM_DATA", PROJECT.parent / "shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no public samples: CARELM_DATA names no folder ({folder})")
    return folder


@pytest.fixture(autouse=True)
def own_environment():
    """What a launched file sets for its process (HF_HUB_OFFLINE, ...) ends with the test that ran it in this one; what a
    fixture of a whole file has left is not seen either."""
    os.environ.pop("HF_HUB_OFFLINE", None)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """Prepared data of one test is never read by another, nor by a user's run."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CARELM_CACHE", str(cache))
    return cache


@pytest.fixture(scope="session")
def tokenizer(base):
    """The tiny base's tokenizer, loaded once."""
    from carelm.chat.tokenizer import load_tokenizer

    return load_tokenizer(str(base), revision="main", trust_remote_code=False, template_file=None)


@pytest.fixture
def make(tmp_path, tokenizer, monkeypatch):
    """A recipe over a file or folder; the keys given override a small one over the columns question and answer."""
    from carelm.recipe_file import load_recipe

    monkeypatch.setattr("carelm.chat.chat.load_tokenizer", lambda *_, **__: tokenizer)

    def make(dataset, **keys):
        keys = {"validation_fraction": 0, "test_fraction": 0, "max_length": 256, "dataset_name": str(dataset)} | keys
        if not keys.keys() & {"messages_column", "text_column"}:
            keys = {"prompt_template": "{question}", "completion_template": "{answer}"} | keys
        path = tmp_path / "small.yaml"
        path.write_text(yaml.safe_dump(keys), encoding="utf-8")
        return load_recipe(["--config", str(path)], usage="")

    return make
