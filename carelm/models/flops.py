"""How many floating-point operations of matrix products a device makes in a second."""

import time

import torch

from carelm import ranks

SIZES = {"cuda": 4096, "cpu": 768}  # of the square products that are timed; 768: 4 ms in fp32 on two cores


def matmul_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP/s of the fastest of some products [n, n] x [n, n] on this device, with the threads that are in use now.

    Args:
        seconds: that it may take; at least two products are made, one of them to warm up.
    """
    size = SIZES[device.type]
    own = torch.Generator(device).manual_seed(0)  # no draw of the run's
    a, b = (torch.randn(size, size, device=device, generator=own).to(dtype) for _ in range(2))
    times, until = [], time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < until:
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times[1:])


def matmul_ceiling_of_all(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of all ranks together, each measured while the others are, as they may share a CPU; every rank calls it."""
    ranks.total(0, device)  # nobody begins before all are here
    return ranks.total(matmul_ceiling(device, dtype), device)
