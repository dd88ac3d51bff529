"""The ranks of a launch: which one this is, how many were asked for, and how they end together. Imports no torch."""

import contextlib
import ctypes
import errno
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import yaml
from tqdm import tqdm

from carelm.errors import INTERRUPTED, UserError
from carelm.files import locate

if TYPE_CHECKING:
    import torch

LAUNCHERS = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "accelerate.commands.accelerate_cli")

# Launchers that give a process its number by variables of their own: how many there are, which one this is.
PROCESS_LAUNCHERS = {
    "mpirun (Open MPI)": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpirun": ("PMI_SIZE", "PMI_RANK"),
    "mpirun (MVAPICH)": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    "jsrun": ("JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
}

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

START = "start the ranks with torchrun --nproc_per_node N, accelerate launch or slurm/train.sh"


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def say(message: str) -> None:
    """Prints for people: rank 0 alone, on standard error (standard output carries the result)."""
    if rank() == 0:
        print(f"carelm: {message}", file=sys.stderr, flush=True)


def print_result(result: dict[str, Any]) -> None:
    """One JSON object on standard output, for a script. At a terminal a person reads the lines that are said, which name the
    file that holds the same."""
    if not sys.stdout.isatty():
        print(json.dumps(result), flush=True)


def check_variables() -> None:
    """Raises UserError where the variables that launchers set hold no number, name a rank that is not there, or are not all
    there, as where a shell or container exports WORLD_SIZE alone. Empty ones count as not set."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        if not (value := os.environ.get(name, "0").strip()).isdecimal():
            del os.environ[name]  # what follows can do without
            if value:
                raise UserError(f"{name}: the environment holds {value!r}, which is no number; {START}, or unset it")
    if rank() >= world_size():
        own, number = rank(), world_size()
        del os.environ["RANK"]
        raise UserError(f"RANK: the environment names rank {own} of {number} (WORLD_SIZE); {START}, or unset RANK")
    needed = ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if world_size() > 1 and (missing := [name for name in needed if not os.environ.get(name)]):
        raise UserError(
            f"WORLD_SIZE: the environment names {world_size()} ranks but no {', '.join(missing)}; {START}, or unset WORLD_SIZE"
        )


def run_main(main: Callable[[], None], kept: str = "the newest whole checkpoint stays") -> None:
    """Runs a launched file's `main`; a UserError or a full disk becomes one line, printed once, and its exit status. `kept`
    says what a full disk leaves."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in place of carelm.interrupts'
    try:
        check_variables()
        return main()
    except UserError as caught:
        error = caught
    except KeyboardInterrupt:
        error = UserError(INTERRUPTED)
    except Exception as caught:
        if getattr(caught, "errno", None) not in (errno.ENOSPC, errno.EDQUOT):
            traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)  # Python's own way out waits for the processes that load batches
        error = UserError(f"output_dir: the disk is full ({caught}); {kept}; make room and run again")
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # the message begins a line of its own
    if rank() == 0:
        print(f"{error.label}: {error}", file=sys.stderr, flush=True)
        if "TORCHELASTIC_RUN_ID" in os.environ or find_launch():
            alone = f"; one process needs none: python {sys.argv[0]} ..." if world_size() == 1 else ""
            say(f"what follows, if anything, is the launcher's own report of this{alone}")
        tell_status(error.exit_status, getattr(error, "reason", ""))
    elif error.label == "error":
        # A launcher ends the other ranks once one has ended: rank 0 must come first, with the message.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # by this; a run's own handler would take it for a stop request
        time.sleep(10)
        print(f"error (rank {rank()}): {error}", file=sys.stderr, flush=True)
        tell_status(error.exit_status)
    sys.stdout.flush()
    # Other threads (a process group that waits for its peers) must not keep a rank that has nothing left to do.
    os._exit(error.exit_status)


def tell_status(status: int, reason: str = "") -> None:
    """Tells a batch script how this launch ended; the launcher turns every exit status into 1."""
    if "CARELM_STATUS_FILE" in os.environ:
        with contextlib.suppress(OSError):
            Path(os.environ["CARELM_STATUS_FILE"]).write_text(f"{status} {reason}\n")


@dataclass(frozen=True)
class Launch:
    """What the command line of `accelerate launch` asked for; None where it left the choice to accelerate."""

    num_processes: int | None
    deepspeed: bool
    config_file: Path | None
    config_file_is_default: bool
    is_for_gpus: bool
    threads_were_set: bool


def find_launch() -> Launch | None:
    """Reads the launcher's own command line and configuration file; None under another launcher or none at all."""
    for process in psutil.Process().parents()[:3]:
        try:
            words, environment = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        if any(Path(word).name in LAUNCHERS for word in words[:4]) or any(w in LAUNCHERS for w in words[:4]):
            break
    else:
        return None
    options = {}
    for word, following in zip(words, [*words[1:], ""]):
        if word.endswith(".py"):  # what follows is the script's
            break
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            options[name.replace("-", "_")] = value if equals else following
    home = os.path.expanduser(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    default = Path(home) / "accelerate/default_config.yaml"
    file = Path(options["config_file"]) if "config_file" in options else default if default.is_file() else None
    settings = {}
    if file is not None:
        try:
            settings = yaml.safe_load(file.read_text()) or {}
        except (OSError, yaml.YAMLError):  # accelerate itself will have complained
            pass
    asked = options.get("num_processes", settings.get("num_processes"))
    return Launch(
        num_processes=int(asked) if asked is not None else None,
        deepspeed="use_deepspeed" in options or settings.get("distributed_type") == "DEEPSPEED",
        config_file=file,
        config_file_is_default=file is not None and "config_file" not in options,
        is_for_gpus=bool(settings) and not (settings.get("use_cpu") or "cpu" in options),
        threads_were_set="OMP_NUM_THREADS" in environment or "num_cpu_threads_per_process" in options,
    )


def check_launch() -> Launch | None:
    """Says which accelerate defaults apply, and raises UserError where fewer ranks are there than were asked for, or several
    that do not know of one another."""
    if "WORLD_SIZE" not in os.environ:
        _check_alone()
    launch = find_launch()
    if launch is None:
        return None
    # An accelerate file names its DeepSpeed file as seen from the project; the launch may be from elsewhere.
    if "ACCELERATE_DEEPSPEED_CONFIG_FILE" in os.environ:
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = locate(os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"])
    if launch.config_file_is_default:
        say(f"your accelerate default {launch.config_file} applies; --config_file accelerate_configs/... names another")
    if launch.num_processes not in (None, world_size()):
        raise UserError(
            f"num_processes: {launch.num_processes} ranks were asked for and {world_size()} started. On a CPU accelerate "
            "starts several ranks only under DeepSpeed: --config_file accelerate_configs/cpu_zero2.yaml; or use torchrun"
        )
    return launch


def _check_alone() -> None:
    """Raises UserError where mpirun or srun have started several processes: each would take itself for the only one, and all
    would train the same run. The line is the first one's; the others end without."""
    variables = dict(os.environ)
    if (
        "SLURM_PROCID" in variables and variables.get("ENVIRONMENT") != "BATCH"
    ):  # a batch script is one process of its job
        variables.setdefault("SLURM_STEP_NUM_TASKS", variables.get("SLURM_NTASKS", "1"))
    for launcher, (number, own) in PROCESS_LAUNCHERS.items():
        if int(variables.get(number, 1)) < 2:
            continue
        if int(variables.get(own, 0)) > 0:
            time.sleep(5)  # a launcher ends all processes once one has ended: the first comes first, with the message
            os._exit(UserError.exit_status)
        raise UserError(
            f"num_processes: {launcher} has started {variables[number]} processes that do not know of one another; {START} "
            "(for runs that have nothing to do with one another set WORLD_SIZE=1)"
        )


def check_launch_without_zero3() -> Launch | None:
    """`check_launch` for what computes with whole models: raises UserError under ZeRO-3."""
    launch = check_launch()
    stage, file = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"), os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file not in (None, "None"):
        settings = yaml.safe_load(Path(file).read_text())
        stage = settings.get("zero_optimization", {}).get("stage")
    if str(stage) == "3":
        raise UserError(
            "distributed_type: ZeRO-3 shards a model, and here each rank holds a whole one; use --config_file "
            "accelerate_configs/multi_gpu.yaml (on a CPU accelerate_configs/cpu_zero2.yaml)"
        )
    return launch


def join(timeout_s: float = 7 * 24 * 3600) -> None:
    """A process group over gloo. Without a timeout it is for ranks that compute each for itself and only wait for one
    another, however long."""
    if world_size() > 1:
        import datetime

        import torch.distributed

        torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=timeout_s))


def gather(value: Any) -> list[Any]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if world_size() == 1:
        return [value]
    import torch.distributed

    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def any_rank(flag: bool, device: "torch.device") -> bool:
    """Whether `flag` is true on at least one rank; every rank calls it."""
    if world_size() == 1:
        return flag
    import torch
    import torch.distributed

    flags = torch.tensor(float(flag), device=device)
    torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return bool(flags.item())


def total(value: float, device: "torch.device") -> float:
    """The sum of all ranks' values; every rank calls it."""
    if world_size() == 1:
        return value
    import torch
    import torch.distributed

    values = torch.tensor(float(value), device=device)
    torch.distributed.all_reduce(values)
    return values.item()


def check_gpus(launch: Launch | None) -> None:
    """Says that an accelerate file for GPUs computes on the CPU where there are none.

    Raises:
        UserError: where there are GPUs, but not one for each rank of this machine.
    """
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        if here > torch.cuda.device_count():
            raise UserError(
                f"num_processes: {here} ranks were started on this machine, which has {torch.cuda.device_count()} GPUs to be "
                f"seen; --num_processes {torch.cuda.device_count()} starts one for each"
            )
    elif launch is not None and launch.is_for_gpus:
        stage = re.search(r"zero[123]", launch.config_file.name)
        better = f"accelerate_configs/cpu_{stage.group() if stage else 'zero2'}.yaml is for that"
        if world_size() == 1:
            better = "without --config_file it is the same"
        say(f"{launch.config_file} is for GPUs and there is none here: this run is on the CPU; {better}")


def use_cpu(launch: Launch | None) -> None:
    """Where there is no GPU: shares the machine's cores among its ranks, unless threads are set, as accelerate gives every
    CPU process one; says where more threads are set than there are cores; and imports bitsandbytes, before PEFT does,
    without torch.compile around functions that a CPU does not call, which takes seconds. Memory that a step frees is kept for
    the next one: given back and asked for again, its pages cost a tenth of a step of long rows."""
    import torch

    if torch.cuda.is_available():
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        libc.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # its maximum
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    usable = psutil.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # a container or a batch job may have been given fewer
        usable = len(os.sched_getaffinity(0))
    if not (launch.threads_were_set if launch else "OMP_NUM_THREADS" in os.environ):
        torch.set_num_threads(max(1, min(psutil.cpu_count(logical=False) or 1, usable) // here))
    if here * (threads := torch.get_num_threads()) > usable:
        better = max(1, usable // here)
        say(
            f"{here} x {threads} threads share {usable} cores, which is slow; put OMP_NUM_THREADS={better} before the command"
        )
    if "TORCHDYNAMO_DISABLE" not in os.environ:  # the recipe's torch_compile is not to be disabled with it
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        import bitsandbytes  # noqa: F401

        del os.environ["TORCHDYNAMO_DISABLE"]


def share(value: Any, device: "torch.device | None" = None) -> Any:
    """Rank 0's value on every rank; every rank calls it, once the process group is there."""
    if world_size() == 1:
        return value
    import torch.distributed

    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=device)
    return box[0]


def get_ready(launch: Launch | None) -> None:
    """Readies this rank to answer its share: its GPU, and the group of all ranks; they part with `leave`."""
    import torch

    from carelm import quiet

    check_gpus(launch)
    quiet.silence(has_gpu=torch.cuda.is_available(), is_first_rank=rank() == 0)
    use_cpu(launch)
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank())
    join()


def leave() -> None:
    """Ends the process group, without which a gloo run may abort at exit."""
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
