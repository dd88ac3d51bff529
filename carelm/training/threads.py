"""Whether a CPU's threads help: where other processes take the cores, threads wait for one another at every operation."""

import time

import torch


def measure(threads: int, seconds: float = 0.05) -> tuple[float, float]:
    """FLOP/s of small products one after the other, with so many threads and with one; it takes four times `seconds`."""
    flops = {threads: 0.0, 1: 0.0}
    own = torch.Generator().manual_seed(0)  # no draw of the run's
    a, b = (torch.randn(256, 256, generator=own) for _ in range(2))
    for number in (threads, 1) * 2:  # in turn: what others do changes
        torch.set_num_threads(number)
        torch.mm(a, b)
        began, products = time.perf_counter(), 0
        while (spent := time.perf_counter() - began) < seconds:
            torch.mm(a, b)
            products += 1
        flops[number] = max(flops[number], 2 * 256**3 * products / spent)
    torch.set_num_threads(threads)
    return flops[threads], flops[1]


def advice(threads: int, several: float, one: float) -> str | None:
    """What to say where so many threads reach `several` FLOP/s and one alone `one`; None where they are no slower."""
    if one < 1.5 * several:
        return None
    return (
        f"{threads} threads make matrix products {one / several:.1f} times slower than one does: other processes take the "
        "cores, and threads wait for one another; stop (Ctrl-C saves), and put OMP_NUM_THREADS=1 before the same command"
    )
