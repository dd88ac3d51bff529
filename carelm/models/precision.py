"""The one place where precision is chosen."""

from dataclasses import dataclass

import torch

from carelm.errors import UserError

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """What the run computes in (bf16, fp16 or fp32), and why."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]


def choose_precision(requested: str, *, training: bool = True) -> Precision:
    """The recipe's precision, or for `auto` the best that the hardware really has.

    `torch.cuda.is_bf16_supported()` is true on a T4, where bf16 is emulated; the compute capability decides instead.

    Raises:
        UserError: where the hardware lacks the precision that was asked for.
    """
    if not torch.cuda.is_available():
        if requested == "fp16" and training:
            raise UserError("precision: a CPU does not train in fp16; set precision: auto, fp32 or bf16")
        return Precision("fp32" if requested == "auto" else requested, "CPU" if requested == "auto" else "asked for")
    capability = torch.cuda.get_device_capability()
    has_bf16 = capability >= (8, 0)
    card = f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}"
    if requested == "bf16" and not has_bf16:
        raise UserError(f"precision: bf16 needs compute capability 8.0, this is {card}; set precision: auto or fp16")
    if requested != "auto":
        return Precision(requested, "asked for")
    return Precision("bf16" if has_bf16 else "fp16", card)
