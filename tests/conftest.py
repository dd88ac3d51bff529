"""What several test files share: the tiny base, the folder with public samples, a cache of its own for each test."""

import os
from pathlib import Path

import pytest
from launching import PROBE, TWELVE_STEPS, launch, zero3_sharding_everything

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def base() -> Path:
    """The tiny pretrained base that comes with the project."""
    return PROJECT / "demo/base"


@pytest.fixture(scope="session")
def carelm_data() -> Path:
    """A folder with a folder of real rows per recipe; it is no part of the project."""
    folder = Path(os.environ.get("CARELM_DATA", PROJECT.parent / "shared/data"))
    if not folder.is_dir():
        pytest.skip(f"no public samples: CARELM_DATA names no folder ({folder})")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """Prepared data of one test is never read by another, nor by a user's run."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CARELM_CACHE", str(cache))
    return cache


@pytest.fixture(scope="session")
def rungs(tmp_path_factory) -> Path:
    """Twelve steps of the demo's recipe on one process, with the batch split in two, and on two ranks at each stage."""
    folder = tmp_path_factory.mktemp("rungs")

    def run(name, *keys, config_file=None):
        (folder / f"probe-{name}").mkdir()
        launch("--output_dir", folder / name, *TWELVE_STEPS, *keys, config_file=config_file, script=PROBE,
               PROBE=str(folder / f"probe-{name}"))  # fmt: skip

    run("one")
    # No evaluation in mid-run here: one that changed the weights or the random draws would show in the losses.
    run("accumulated", "--per_device_train_batch_size", 4, "--eval_strategy", "no", "--eval_on_start", "false",
        "--per_device_eval_batch_size", 7)  # fmt: skip
    run("zero1", config_file=PROJECT / "accelerate_configs/cpu_zero1.yaml")
    run("zero2", config_file=PROJECT / "accelerate_configs/cpu_zero2.yaml")
    run("zero3", config_file=zero3_sharding_everything(folder))
    return folder
