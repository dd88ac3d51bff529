"""The one place where precision is chosen."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from carelm import ranks
from carelm.errors import UserError
from carelm.files import read_json, write_whole
from carelm.models.flops import matmul_ceiling
from carelm.recipe import PRECISION_NOTE

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WORTHWHILE = 2  # times fp32's speed that a CPU's bf16 products must have; without bf16 in hardware they are slower


@dataclass(frozen=True)
class Precision:
    """What the run computes in (bf16, fp16 or fp32), and why.

    Attributes:
        note: what was measured to choose it, where that is yet to be kept for later starts.
    """

    name: str
    reason: str
    note: dict[str, Any] | None = None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]

    def keep(self, run: Path) -> None:
        """Writes in the run's folder (rank 0) what was measured, so that every later start computes in the same."""
        if self.note is not None and ranks.rank() == 0:
            run.mkdir(parents=True, exist_ok=True)
            write_whole(run / PRECISION_NOTE, json.dumps(self.note, indent=1))


def choose_precision(
    requested: str,
    run: Path | None = None,
    *,
    anew: bool = False,
    training: bool = True,
    overflows_in_fp16: bool = False,
) -> Precision:
    """The recipe's precision, or for `auto` the best that the hardware really has.

    On a CPU `auto` is bf16 where its products are twice as fast as fp32's. That is measured once for a run, by rank 0, and
    kept in its folder: a stopwatch must not change what a run that goes on, or the evaluation of its result, computes. So
    every rank calls it, once there is a process group.

    `torch.cuda.is_bf16_supported()` is true on a T4, where bf16 is emulated; the compute capability decides instead.

    Args:
        run: the run's output folder.
        anew: whether the run in it is not gone on with.
        overflows_in_fp16: whether the base does (the T5 family: its feed-forward sums pass 65,504, under autocast too).

    Raises:
        UserError: where the hardware lacks the precision that was asked for, or what the run has kept is damaged.
    """
    if requested == "fp16" and overflows_in_fp16:
        raise UserError("precision: the sums of a T5 overflow in fp16; set precision: auto, fp32 or bf16")
    if not torch.cuda.is_available():
        if requested == "fp16" and training:
            raise UserError("precision: a CPU does not train in fp16; set precision: auto, fp32 or bf16")
        return _measured(run, anew) if requested == "auto" else Precision(requested, "asked for")
    capability = torch.cuda.get_device_capability()
    has_bf16 = capability >= (8, 0)
    card = f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}"
    if requested == "bf16" and not has_bf16:
        raise UserError(f"precision: bf16 needs compute capability 8.0, this is {card}; set precision: auto or fp16")
    if requested != "auto":
        return Precision(requested, "asked for")
    if overflows_in_fp16 and not has_bf16:
        return Precision("fp32", f"{card}; the sums of a T5 overflow in fp16")
    return Precision("bf16" if has_bf16 else "fp16", card)


def _measured(run: Path | None, anew: bool) -> Precision:
    """Rank 0's choice for its CPU, or the one that it finds kept."""
    choice: Precision | UserError | None = None
    if ranks.rank() == 0:
        try:
            choice = (None if run is None or anew else _kept(run)) or _of_this_cpu(run)
        except UserError as error:
            choice = error
    choice = ranks.share(choice)
    if isinstance(choice, UserError):
        raise choice
    return choice


def _kept(run: Path) -> Precision | None:
    """What an earlier start has chosen; None where there was none."""
    file = run / PRECISION_NOTE
    if note := read_json(file):
        try:
            choice = Precision(note["precision"], _reason(note, file))
        except (KeyError, TypeError, ZeroDivisionError):
            choice = None
        if choice is None or choice.name not in ("fp32", "bf16"):
            raise UserError(f"{file} names no precision; remove it, and set precision: fp32 or bf16")
        return choice
    if any(run.glob("checkpoint-*")) or any(run.glob("*.safetensors")):
        return Precision("fp32", f"the run in {run} was begun without a {PRECISION_NOTE}")
    return None


def _of_this_cpu(run: Path | None) -> Precision:
    cpu, flops = torch.device("cpu"), dict.fromkeys(("fp32", "bf16"), 0.0)
    for name in ("fp32", "bf16") * 2:  # in turn, as others may be busy here
        flops[name] = max(flops[name], matmul_ceiling(cpu, DTYPES[name], seconds=0.05))
    name = "bf16" if flops["bf16"] >= WORTHWHILE * flops["fp32"] else "fp32"
    note = {"precision": name, "matmul_flops": flops, "threads": torch.get_num_threads()}
    return Precision(name, _reason(note, run and run / PRECISION_NOTE), note)


def _reason(note: dict[str, Any], file: Path | None) -> str:
    times = note["matmul_flops"]["bf16"] / note["matmul_flops"]["fp32"]
    kept = f", kept in {file}" if file else ""
    return f"bf16 products were {times:.1f} times as fast as fp32's on the CPU of the first start{kept}"
