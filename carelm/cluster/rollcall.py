"""The roll call of a SLURM job: every rank reports in, before anything slow begins and in less than a minute.

    srun --ntasks=RANKS --ntasks-per-node=N python -m carelm.cluster.rollcall WORDS

WORDS are those of train/sft.py; one task per rank. A node that is missing, does not see the output's file system, or has
another copy of the recipe, of this code or of a package is named; then one all-reduce of the ranks is timed. exit status: 0 all
are there and alike, 2 otherwise.
"""

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from carelm import ranks
from carelm.errors import UserError, first_line
from carelm.files import code_fingerprint, fingerprint
from carelm.provenance import versions
from carelm.recipe import Recipe
from carelm.recipe_file import load_recipe

PLACES = ("carelm", "train", "eval", "slurm", "accelerate_configs", "ds_configs")
PATIENCE = int(os.environ.get("ROLL_CALL_PATIENCE", 40))  # seconds until a rank counts as missing
MEBIBYTES = 64  # of the all-reduce


def main() -> None:
    rank, number, hosts = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"]), os.environ["HOSTS"].split()
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_RANK": os.environ["SLURM_LOCALID"]}
    began, sign = time.monotonic(), None
    store = open_store(rank)
    try:
        if rank == 0:
            sign = leave_sign(load_recipe(sys.argv[1:], usage=__doc__))
            store.set("sign", str(sign))
        store.set(f"rank-{rank}", json.dumps(report(Path(hear(store, "sign", PATIENCE)))))
        if rank == 0:
            store.set("verdict", judge(store, number, hosts) or "alike")
        verdict = hear(store, "verdict", 2 * PATIENCE)
        if verdict != "alike":
            tell_that_heard(store, rank, number)
            raise UserError(verdict)
        seconds = time_all_reduce(store, rank, number)
    finally:
        if sign is not None:
            sign.unlink(missing_ok=True)
    rate = 2 * (number - 1) / number * MEBIBYTES / 1024 / seconds
    speed = f"; an all-reduce of {MEBIBYTES} MiB takes {1000 * seconds:.0f} ms ({rate:.2f} GiB/s on each link)"
    there = (
        f"{number} ranks on {len(hosts)} nodes ({', '.join(hosts)}) are there after {time.monotonic() - began:.1f} s"
    )
    ranks.say(there + (speed if number > 1 else ""))


def open_store(rank: int):
    """The place where the ranks meet, kept by rank 0."""
    from torch.distributed import DistStoreError, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["ROLL_CALL_PORT"])
    try:
        return TCPStore(host, port, is_master=rank == 0, wait_for_workers=False,
                        timeout=datetime.timedelta(seconds=PATIENCE))  # fmt: skip
    except (DistStoreError, RuntimeError) as error:
        time.sleep(2 * (rank != 0))  # rank 0's own message first
        hint = (
            "is the port taken?"
            if rank == 0
            else f"is {host} slow to start (ROLL_CALL_PATIENCE), or a firewall between?"
        )
        problem = first_line(error)
        _give_up(f"error ({socket.gethostname()}): {host}:{port} ({problem}); {hint}")


def hear(store, what: str, seconds: float) -> str:
    """What rank 0 has to say."""
    try:
        store.wait([what], datetime.timedelta(seconds=seconds))
        return store.get(what).decode()
    except RuntimeError:  # torch's DistStoreError and DistNetworkError
        raise UserError("rank 0 has left the roll call; its own message says why") from None


def tell_that_heard(store, rank: int, number: int) -> None:
    """Rank 0, which keeps the store, leaves it last, so that no other rank is cut off in the middle of a word."""
    store.set(f"heard-{rank}", "")
    if rank == 0:
        with contextlib.suppress(RuntimeError):  # those that are missing
            store.wait([f"heard-{other}" for other in range(number)], datetime.timedelta(seconds=2))


def leave_sign(recipe: Recipe) -> Path:
    """A file in the output folder, or in what is there of its parents, for the other nodes to see."""
    folder = recipe.output_dir.resolve()
    sign = next(p for p in (folder, *folder.parents) if p.is_dir()) / f".carelm-{os.environ['SLURM_JOB_ID']}"
    try:
        sign.touch()
    except OSError as error:
        raise UserError(f"output_dir: {sign.parent} cannot be written ({error.strerror})") from None
    return sign


def report(sign: Path) -> dict[str, Any]:
    """What has to be the same on every rank, and what is wrong on this one."""
    import torch

    gpus, given = torch.cuda.device_count(), int(os.environ.get("SLURM_GPUS_ON_NODE", 0))
    names = sorted({torch.cuda.get_device_name(i) for i in range(gpus)})
    about = {
        "host": socket.gethostname(),
        "problem": f"SLURM gave {given} GPUs and torch sees {gpus}; look at nvidia-smi there" if gpus < given else None,
        "sees_output": sign.exists(),
        "code of CareLM": code_fingerprint(*PLACES),
        "set of GPUs": f"{gpus} {', '.join(names)}".strip(),
        "python": platform.python_version(),
    }
    try:
        about["recipe"] = fingerprint(load_recipe(sys.argv[1:], usage=__doc__).keys())
        about |= versions()
    except (UserError, importlib.metadata.PackageNotFoundError) as error:
        about["problem"] = str(error)
    return about


def judge(store, number: int, hosts: list[str]) -> str | None:
    """What is wrong, in one line, or None; rank 0 alone."""
    reports, missing, until = {}, [], time.monotonic() + PATIENCE
    for rank in range(number):
        left = max(0.1, until - time.monotonic())
        try:
            store.wait([f"rank-{rank}"], datetime.timedelta(seconds=left))
            reports[rank] = json.loads(store.get(f"rank-{rank}"))
        except RuntimeError:  # torch's DistStoreError: nothing came in time
            missing.append(rank)
    if missing:
        names = ", ".join(sorted({hosts[rank * len(hosts) // number] for rank in missing}))
        return (f"{len(missing)} of {number} ranks did not report within {PATIENCE} s, those of {names}; "
                f"sbatch --exclude={names.replace(', ', ',')} leaves out what is broken")  # fmt: skip
    first = reports[0]
    for other in reports.values():
        if not other["sees_output"]:
            return (f"output_dir: {other['host']} does not see what {first['host']} writes there; set output_dir to a folder "
                    "on a file system that all nodes share")  # fmt: skip
        if other["problem"]:
            return f"on {other['host']}: {other['problem']}"
        for what in first.keys() - {"host", "sees_output", "problem"}:
            if other.get(what) != first[what]:
                return f"{other['host']} has another {what} than {first['host']} ({other.get(what)}, {first[what]})"
    return None


def time_all_reduce(store, rank: int, number: int) -> float:
    """Seconds of one all-reduce in fp32 between all ranks, the best of three."""
    import torch
    import torch.distributed as dist

    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["SLURM_LOCALID"]) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    advice = "where the nodes have several networks, set NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME in slurm/job.sh"
    problem = f"error ({socket.gethostname()}): the ranks cannot talk to each other; {advice}"
    watch = threading.Timer(PATIENCE, _give_up, [problem])  # NCCL may wait for ever
    watch.start()
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=dist.PrefixStore("group", store), rank=rank,
                                world_size=number, timeout=datetime.timedelta(seconds=PATIENCE))  # fmt: skip
        numbers, times = torch.ones(MEBIBYTES * 2**20 // 4, device=device), []
        for _ in range(3):
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(numbers)
            float(numbers[0])  # waits for the device
            times.append(time.perf_counter() - began)
        dist.barrier()
        dist.destroy_process_group()
    except RuntimeError as error:
        raise UserError(f"the ranks cannot talk to each other ({first_line(error)}); {advice}") from None
    finally:
        watch.cancel()
    return min(times)


def _give_up(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
    ranks.tell_status(2)
    os._exit(2)


if __name__ == "__main__":
    ranks.run_main(main)
