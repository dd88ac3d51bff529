"""Which tensors hold NaN or infinity."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open


def not_finite(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    """The names of those that hold NaN or infinity; under ZeRO-3 a parameter's part on this rank is looked at."""
    held = ((name, getattr(tensor, "ds_tensor", tensor)) for name, tensor in tensors)
    return [name for name, tensor in held if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]


def not_finite_in(file: Path) -> tuple[list[str], int]:
    """Those of a .safetensors file, and how many tensors it has."""
    with safe_open(file, "pt") as tensors:
        names = list(tensors.keys())
        return not_finite((name, tensors.get_tensor(name)) for name in names), len(names)
