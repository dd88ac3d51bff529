"""Peak memory of this process, of its GPU where there is one, else resident; and the memory that there is for it."""

import os
import resource
import sys
from pathlib import Path

import psutil
import torch

ROOT = Path("/")  # of the file system; the kernel's own files lie there
# Of a cgroup of version 2 and 1: limit, use, and what of it is a cache that the kernel gives back.
CGROUP_FILES = (("memory.max", "memory.current", "inactive_file"),
                ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))  # fmt: skip


def peak_memory_bytes() -> int:
    """The most that torch allocated on the GPU, or on a CPU the most that was resident, since the last reset."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):  # no Linux
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory() -> None:
    """Begins the peak anew; where the system cannot, it stays that of the whole process."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass


def available_memory_bytes() -> int:
    """Host memory that this process may still take: what the machine has free, or less where a container or SLURM limits it.

    psutil tells the machine's alone. A limit is that of a cgroup, or of one above it, so the least of them all counts; of what
    is used the inactive file cache is taken off, as Docker and Kubernetes do.
    """
    return min([psutil.virtual_memory().available, *(left for _, left in _cgroups())])


def total_memory_bytes(device: torch.device) -> int:
    """The GPU's memory; or this rank's share of the machine's, or of what a container or SLURM allows, used or not."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    total = min([psutil.virtual_memory().total, *(limit for limit, _ in _cgroups())])
    return total // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _cgroups() -> list[tuple[int, int]]:
    """Limit, and limit less use, of every cgroup that limits this process. Inside a container the path may be the machine's
    own, of which nothing is seen there: then the topmost folder is the container's."""
    try:
        lines = (ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux
        return []
    found = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers not in ("", "memory"):
            continue
        top = ROOT / "sys/fs/cgroup" / controllers
        own = top / path.lstrip("/")
        for folder in (own, *own.parents):
            for limit, used, cache in CGROUP_FILES:
                if (folder / limit).exists() and (most := (folder / limit).read_text().strip()) != "max":
                    kept = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                    left = int(most) - int((folder / used).read_text()) + int(kept[cache])
                    found.append((int(most), max(0, left)))
            if folder == top:
                break
    return found
