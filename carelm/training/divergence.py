"""Ends a run whose numbers are no longer finite: at that step, on every rank, before anything is saved.

In fp16 a gradient that is not finite is no fault yet: the loss scale was too high, and the scaler skips the step and halves
it. Such steps are counted; the run ends where that does not help.
"""

import math
from collections.abc import Iterable
from typing import NoReturn

import torch
import transformers

from carelm import ranks
from carelm.errors import UserError
from carelm.models.finite import not_finite
from carelm.training.state import is_full, loss_scale, trainable

MOST_SKIPPED = 20  # steps in a row
LOWEST_SCALE = 1.0  # DeepSpeed's floor; below it the gradients are too large for fp16 as they are


class Divergence:
    """Looks at every step of one run.

    Attributes:
        skipped_steps: of the whole run, those before a resume included.
    """

    def __init__(self):
        self.skipped_steps = self._in_a_row = self._step = 0
        self._scale = math.inf  # that of the step before

    def look(self, trainer: transformers.Trainer, loss: torch.Tensor, grad_norm: float | torch.Tensor | None) -> None:
        """Every rank calls it after each optimizer step.

        Args:
            trainer: has just taken the step.
            loss: of this rank, summed since the last log.
            grad_norm: over all ranks; None where nothing computes it, and the trained weights are looked at instead.

        Raises:
            UserError: where the loss, or outside fp16 the gradient, is not finite, or fp16 skips one step after another.
        """
        if trainer.state.global_step == self._step:  # the end of an epoch comes after its last step
            return
        self._step = trainer.state.global_step
        found = None
        if not math.isfinite(loss):
            found = f"the loss is {float(loss)}"
        elif trainer.args.fp16:
            found = self._count_skipped(trainer)
        elif trainer.accelerator.optimizer_step_was_skipped:  # DeepSpeed does so in every precision
            found = "the gradient is not finite"
        elif grad_norm is None:
            found = "trained weights are not finite" if not_finite(trainable(trainer.model)) else None
        elif not 0 <= float(grad_norm) < math.inf:  # DeepSpeed writes -1 for a norm that is not finite
            found = f"the norm of the gradient is {float(grad_norm)}"
        if ranks.any_rank(found is not None, trainer.args.device):
            end(trainer, next(filter(None, ranks.gather(found))))

    def _count_skipped(self, trainer: transformers.Trainer) -> str | None:
        was, self._scale = self._scale, loss_scale(trainer)
        if not trainer.accelerator.optimizer_step_was_skipped:
            self._in_a_row = 0
            return None
        self.skipped_steps += 1
        self._in_a_row += 1
        if was <= LOWEST_SCALE:
            return f"the gradient is not finite at a loss scale of {was:g}"
        return f"fp16 has skipped {MOST_SKIPPED} steps in a row" if self._in_a_row >= MOST_SKIPPED else None


def check_weights(trainer: transformers.Trainer) -> None:
    """Before they are saved; every rank calls it. Raises UserError where trained weights are not finite."""
    if names := _on_any_rank(trainable(trainer.model)):
        end(trainer, f"trained weights are not finite ({len(names)} tensors, such as {names[0]})", is_trained=True)


def end(trainer: transformers.Trainer, found: str, is_trained: bool | None = None) -> NoReturn:
    """Raises UserError with the key to change; every rank calls it.

    Args:
        trainer: the run.
        found: what is not finite, the same on every rank.
        is_trained: whether a step has been taken before it was computed (default: from the second step on).
    """
    step, base = trainer.state.global_step, trainer.recipe.model["model_name_or_path"]
    is_trained = step > 1 if is_trained is None else is_trained
    untouched = is_full(trainer) and step == 0
    frozen = {name: p for name, p in trainer.model.named_parameters() if untouched or not p.requires_grad}
    if bad := _on_any_rank(frozen.items()):
        raise UserError(
            f"model_name_or_path: {found} at step {step}: {len(bad)} of {len(frozen)} tensors of {base} hold NaN or infinity, "
            f"such as {bad[0].removeprefix('base_model.model.')}; take another copy of it"
        )
    if trainer.args.fp16:
        raise UserError(
            f"precision: {found} at step {step}: {base} does not train in fp16; set precision: fp32, or lower learning_rate "
            f"(now {trainer.args.learning_rate:g}); --restart begins anew"
        )
    if not is_trained:
        raise UserError(
            f"model_name_or_path: {found} at step {step}, before anything was trained: the weights of {base} are not finite, "
            f"or too large to compute with; take another copy of it, or another base"
        )
    clip = ", set max_grad_norm: 1.0" if not trainer.args.max_grad_norm else ""
    raise UserError(
        f"learning_rate: {found} at step {step}, the run has diverged; lower it (now {trainer.args.learning_rate:g}){clip}, or "
        "look for odd rows in the data; --restart begins anew, and what was saved before stays"
    )


def _on_any_rank(tensors: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
    return sorted(set().union(*ranks.gather(not_finite(tensors))))
