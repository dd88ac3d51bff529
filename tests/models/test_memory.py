"""Host memory that is left: the machine's, or less where a container or SLURM limits it."""

import types

import psutil
import pytest
import torch

from carelm.models import memory
from carelm.models.base import load_base
from carelm.models.precision import Precision
from carelm.recipe_file import load_recipe

MIB = 2**20
VERSION_2 = ("memory.max", "memory.current", "inactive_file", "max")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file", 9223372036854771712)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A file system of its own for a machine with 1,000 MiB free; makes the cgroups of this process."""
    monkeypatch.setattr(memory, "ROOT", tmp_path)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1000 * MIB, total=2000 * MIB))

    def cgroup(version, folder, limit=None, used=0, cache=0):
        limits, uses, caches, unlimited = version
        there = tmp_path / "sys/fs/cgroup" / ("memory" if version is VERSION_1 else "") / folder
        there.mkdir(parents=True, exist_ok=True)
        (there / limits).write_text(f"{unlimited if limit is None else limit * MIB}\n")
        (there / uses).write_text(f"{used * MIB}\n")
        (there / "memory.stat").write_text(f"anon 4096\n{caches} {cache * MIB}\n")

    def belongs(*lines):
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text("".join(f"{line}\n" for line in lines))

    return types.SimpleNamespace(cgroup=cgroup, belongs=belongs)


def test_without_cgroups_it_is_what_the_machine_has_free(machine):
    assert memory.available_memory_bytes() == 1000 * MIB


@pytest.mark.parametrize("version, line", [(VERSION_2, "0::/slurm/job_5/step_0"),
                                           (VERSION_1, "4:memory:/slurm/job_5/step_0")], ids=["v2", "v1"])  # fmt: skip
def test_the_least_of_the_limits_on_the_way_up_counts_less_what_is_used_but_for_its_cache(machine, version, line):
    machine.belongs("7:cpuset:/elsewhere", line)
    machine.cgroup(version, "slurm/job_5/step_0", limit=600, used=100)
    assert memory.available_memory_bytes() == 500 * MIB
    machine.cgroup(version, "slurm/job_5", limit=700, used=450, cache=50)
    assert memory.available_memory_bytes() == 300 * MIB
    machine.cgroup(version, "slurm/job_5")
    machine.cgroup(version, "", limit=2000, used=10)
    assert memory.available_memory_bytes() == 500 * MIB
    machine.cgroup(version, "slurm/job_5/step_0", limit=600, used=610)
    assert memory.available_memory_bytes() == 0
    machine.cgroup(version, "slurm/job_5/step_0")
    assert memory.available_memory_bytes() == 1000 * MIB


@pytest.mark.parametrize("version, line", [(VERSION_2, "0::/"), (VERSION_2, "0::/docker/ab12"),
                                           (VERSION_1, "4:memory:/docker/ab12")],
                         ids=["v2, own names", "v2, the machine's names", "v1"])  # fmt: skip
def test_inside_a_container_the_topmost_cgroup_is_its_own(machine, version, line):
    machine.belongs(line)
    machine.cgroup(version, "", limit=400, used=100)
    assert memory.available_memory_bytes() == 300 * MIB
    assert memory.total_memory_bytes(torch.device("cpu")) == 400 * MIB


def test_the_ranks_of_a_machine_share_its_memory(machine, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.total_memory_bytes(torch.device("cpu")) == 500 * MIB


def test_a_4bit_base_stays_so_where_the_container_is_too_small_for_more(machine, capsys):
    machine.belongs("0::/")
    machine.cgroup(VERSION_2, "", limit=410, used=400)
    model = load_base(load_recipe(["--config", "recipes/demo.yaml"], usage=""), Precision("fp32", "test"))
    assert "Linear4bit" in {type(module).__name__ for module in model.modules()}
    assert "of the 10 MiB that are free" in capsys.readouterr().err
