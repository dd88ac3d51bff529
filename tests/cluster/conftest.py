"""The cluster of the tests here, one for each worker of pytest-xdist, and the run that stopped ones are compared with."""

import shutil
import tempfile
from pathlib import Path

import pytest
from launching import PROJECT, made_once
from two_nodes import KEYS, Cluster, Jobs


@pytest.fixture(scope="session")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # short, for the sockets in it
    cluster = Cluster(folder)
    yield cluster
    cluster.down()
    shutil.rmtree(folder)


@pytest.fixture
def jobs(cluster, tmp_path):
    cluster.wait_for_nodes()
    return Jobs(cluster, tmp_path)


@pytest.fixture(scope="session")
def unbroken(cluster, tmp_path_factory):
    """Two nodes under ZeRO-2 from beginning to end, on rows that lie where the job is submitted."""

    def make(folder: Path) -> None:
        jobs = Jobs(cluster, folder)
        shutil.copytree(PROJECT / "demo/data", folder / "rows of the shop")
        jobs.completes(jobs.train(*KEYS, "--dataset_name", "rows of the shop"))

    return made_once(tmp_path_factory, "unbroken", make) / "run"
