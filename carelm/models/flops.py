"""Floating-point operations of matrix products: how many a second a device makes, and how many a trained token takes.

Their quotient is the model FLOPs utilisation (MFU: Chowdhery et al. 2022, PaLM, appendix B), here of what the device was
measured to reach and not of its data sheet.
"""

import time

import torch

SIZES = {"cuda": 4096, "cpu": 768}  # of the square products that are timed; 768: 4 ms in fp32 on two cores


def matmul_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 0.1) -> float:
    """FLOP/s of the fastest of some products [n, n] x [n, n] on this device, with the threads that are in use now.

    Args:
        seconds: that it may take; at least two products are made, one of them to warm up.
    """
    size = SIZES[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times, until = [], time.perf_counter() + seconds
    while len(times) < 2 or time.perf_counter() < until:
        began = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times[1:])
