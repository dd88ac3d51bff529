"""What the launcher's own settings do, and that they are said."""

import os
import subprocess
import sys
import textwrap
import types

import pytest
import torch
from launching import PROJECT, environment, launch

from carelm import ranks
from carelm.errors import UserError
from carelm.models.precision import Precision
from carelm.recipe_file import load_recipe
from carelm.training import arguments


def test_a_default_accelerate_configuration_is_reported(tmp_path):
    (tmp_path / "accelerate").mkdir()
    file = tmp_path / "accelerate/default_config.yaml"
    file.write_text("distributed_type: 'NO'\nnum_machines: 1\nnum_processes: 1\nuse_cpu: true\n")
    keys = ("--config", "recipes/demo.yaml", "--dataset_name", "none.csv", "--output_dir", tmp_path / "out")
    done = launch(*keys, check=False, HF_HOME=str(tmp_path))
    assert f"your accelerate default {file} applies" in done.stderr
    assert "error: dataset_name: there is no file, folder or glob none.csv" in done.stderr and done.returncode != 0


def test_without_a_launcher_nothing_is_asked_for():
    assert ranks.find_launch() is None
    assert ranks.check_launch() is None


def test_on_a_cpu_nothing_is_compiled_at_the_import():
    """bitsandbytes' torch.compile would load torch's compiler into every process; the recipe's torch_compile still can."""
    lines = """
        import os, sys
        from carelm import ranks
        ranks.use_cpu(None)


        assert "bitsandbytes" in sys.modules and "torch._inductor.compile_fx" not in sys.modules
        assert "TORCHDYNAMO_DISABLE" not in os.environ
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(lines)], cwd=PROJECT, env=environment(), check=True)


@pytest.mark.parametrize(
    "variables, launcher",
    [
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "mpirun"),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, "mpirun"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "mpirun"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "srun"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "ENVIRONMENT": "BATCH"}, "srun"),
    ],
)
def test_processes_that_do_not_know_of_one_another_are_refused(monkeypatch, variables, launcher):
    launched_with(monkeypatch, variables)
    with pytest.raises(UserError, match=f"num_processes: {launcher}.* has started . processes .* torchrun"):
        ranks.check_launch()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks.check_launch() is None


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "4"},  # the shell of salloc
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "ENVIRONMENT": "BATCH"},  # a batch script
        {
            "SLURM_NTASKS": "1",
            "SLURM_PROCID": "0",
            "SLURM_STEP_NUM_TASKS": "1",
            "ENVIRONMENT": "BATCH",
        },  # srun -n1 in one
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "RANK": "1", "WORLD_SIZE": "2"},  # a launcher in each task
    ],
)
def test_one_process_of_a_job_and_ranks_of_a_launcher_are_not(monkeypatch, variables):
    launched_with(monkeypatch, variables)
    assert ranks.check_launch() is None


@pytest.mark.parametrize(
    "variables, named",
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: the environment holds 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK: the environment holds '-1'"),
        ({"RANK": "1"}, "RANK: the environment names rank 1 of 1"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK: .* rank 2 of 2"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: the environment names 2 ranks but no RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "a"}, "WORLD_SIZE: .* 2 ranks but no MASTER_PORT"),
    ],
)
def test_variables_of_a_launcher_that_are_not_whole_are_refused(monkeypatch, variables, named):
    launched_with(monkeypatch, variables)
    with pytest.raises(UserError, match=f"^{named}.*(torchrun|unset)"):
        ranks.check_variables()
    assert ranks.rank() == 0  # the line is said once


def test_variables_that_are_empty_are_not_set(monkeypatch):
    launched_with(monkeypatch, dict.fromkeys(("RANK", "LOCAL_RANK", "WORLD_SIZE"), ""))
    ranks.check_variables()
    assert (ranks.rank(), ranks.local_rank(), ranks.world_size()) == (0, 0, 1)


def launched_with(monkeypatch, variables):
    """These are the only variables of a launcher."""
    own = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "ENVIRONMENT")
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "PMI_", "MV2_")) or name in own:
            monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_of_several_processes_the_first_alone_says_so():
    lines = "import time; time.sleep = lambda s: None; from carelm import ranks; ranks.run_main(ranks.check_launch)"
    outputs = []
    for number in ("0", "1"):
        variables = environment(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK=number)
        done = subprocess.run([sys.executable, "-c", lines], cwd=PROJECT, env=variables, capture_output=True, text=True)
        assert done.returncode == 2
        outputs.append(done.stdout + done.stderr)
    assert outputs[0].startswith("error: num_processes: mpirun") and outputs[1] == ""


@pytest.mark.parametrize("number", [1, 2])
def test_ranks_of_a_cpu_under_deepspeed_compile_nothing(monkeypatch, number):
    """A compile that is killed leaves a lock behind, for which every later start would wait."""
    import deepspeed.ops

    def refuse(**_):
        raise ValueError("as far as this")

    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", True)
    monkeypatch.setattr(arguments, "SFTConfig", refuse)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("WORLD_SIZE", str(number))
    recipe = load_recipe(["--config", "recipes/demo.yaml"], usage="")
    with pytest.raises(UserError, match="as far as this"):
        arguments.make_training_args(
            recipe, types.SimpleNamespace(validation=[]), Precision("fp32", "test"), torch.nn.Module()
        )
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


@pytest.mark.parametrize(
    "name, number, better",
    [
        ("gpu.yaml", 1, "without --config_file it is the same"),
        ("multi_gpu.yaml", 2, "accelerate_configs/cpu_zero2.yaml is for that"),
        ("zero3_offload.yaml", 2, "accelerate_configs/cpu_zero3.yaml is for that"),
    ],
)
def test_a_file_for_gpus_says_so_where_there_is_none(monkeypatch, capsys, name, number, better):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", str(number))
    file = PROJECT / "accelerate_configs" / name
    settings = {"num_processes": number, "deepspeed": False, "config_file_is_default": False, "threads_were_set": True}
    ranks.check_gpus(ranks.Launch(**settings, config_file=file, is_for_gpus=True))
    assert f"{name} is for GPUs and there is none here: this run is on the CPU; {better}" in capsys.readouterr().err
    ranks.check_gpus(ranks.Launch(**settings, config_file=file, is_for_gpus=False))
    assert capsys.readouterr().err == ""


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="num_processes: 2 ranks .* 1 GPUs"):
        ranks.check_gpus(None)
