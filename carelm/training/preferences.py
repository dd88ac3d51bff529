"""Learning from pairs of answers: direct preference optimisation (DPO; Rafailov et al. 2023, equation 7).

The loss of a pair is -log sigmoid(beta * margin): how much likelier than in the reference the better answer has become, less
how much likelier the worse one. The reference is the model as it is before step 0. What it says to all pairs is computed once,
at the run's first start, by the very model that is trained, and kept in the output folder: there is no second model, and
whether the run begins with a new adapter, goes on from one or trains the whole base is all the same.

A model can tell all pairs apart and say nothing any more, as both answers may become less likely. So each evaluation says how
likely the better answers are and how long answers have become, and a run whose answers vanish ends.
"""

import functools
import json
import time
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed
import torch.nn.functional as F
from tqdm import tqdm

from carelm.errors import UserError
from carelm.ranks import rank, share, total
from carelm.recipe import REFERENCE, Recipe
from carelm.training import divergence
from carelm.training.batches import BLANK, CollatePairs, Pairs
from carelm.training.prepared import Prepared
from carelm.training.state import zero_stage
from carelm.training.tensorboard import answer_in_training
from carelm.training.trainer import Trainer

MEASURED_ANSWERS = 16  # validation prompts whose answers are measured at each evaluation
SHORTEST = 1 / 3  # of the answers at the start, or of the better ones where these are shorter
IGNORED = -100


def start_of(recipe: Recipe, prepared: Prepared, precision: str, base: str, adapter: str | None) -> dict[str, Any]:
    """What the reference depends on.

    Args:
        precision: the run's, by name.
        base, adapter: fingerprints of the base's weights, and of the adapter that the run begins with.
    """
    return {"data": prepared.fingerprint, "base": base, "adapter": adapter, "bits": recipe.bits, "precision": precision}


def check_reference(recipe: Recipe, prepared: Prepared, precision: str, begun: dict[str, Any]) -> None:
    """Whether the reference of a run that goes on is there, and is that of its start; every rank calls it.

    Args:
        begun: the completion mark of the checkpoint that it goes on from.

    Raises:
        UserError: where it is not.
    """
    start = start_of(recipe, prepared, precision, begun["base_fingerprint"], begun["adapter_fingerprint"])
    path, problem = recipe.output_dir / REFERENCE, None
    if rank() == 0:
        found = _read(path)
        if found is None:
            problem = (
                f"output_dir: {path}, what the model that this run began as says to its pairs, is not there or damaged; put it "
                "back, or begin anew with --restart"
            )
        elif odd := [key for key in start if found["start"].get(key) != start[key]]:
            was, now = (one.get(odd[0]) for one in (found["start"], start))
            problem = f"output_dir: {path} is of another start ({odd[0]}: {was} there, {now} here); " + (
                f"set precision: {was}"
                if odd[0] == "precision"
                else "put the run's own back, or begin anew with --restart"
            )
    if (problem := share(problem)) is not None:
        raise UserError(problem)


def _read(path: Path) -> dict[str, Any] | None:
    """`start`, `answer_tokens`, `seconds`, `train` and maybe `validation` of a reference; None where there is no whole one."""
    try:
        with np.load(path) as held:
            return {**json.loads(str(held["about"])), **{name: held[name] for name in held.files if name != "about"}}
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):
        return None


def _write(path: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> str | None:
    """Returns why it cannot be written; None where it is."""
    aside = path.with_name(f"{path.stem}.partial.npz")
    try:
        np.savez(aside, about=json.dumps(about), **arrays)
        aside.replace(path)
    except OSError as error:
        return f"output_dir: {path} cannot be written ({error.strerror}); make room and run again"
    return None


def pair_losses(losses: torch.Tensor, reference: torch.Tensor, beta: float) -> torch.Tensor:
    """The loss of each pair, [pairs].

    Args:
        losses: the negative log-probabilities of whole answers: of the better ones, then of the worse, [2 * pairs].
        reference: the reference's log-probabilities of both, [pairs, 2].
    """
    gains = -losses.view(2, -1) - reference.T
    return -F.logsigmoid(beta * (gains[0] - gains[1]))


class PreferenceTrainer(Trainer):
    """A run of `objective: preferences`; all else is as in Trainer. The arguments are the same."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.data_collator = CollatePairs(self.data_collator)
        self.train_dataset = Pairs(self.prepared.train)
        self.eval_dataset = Pairs(self.prepared.validation) if self.prepared.validation is not None else None
        self.answer_tokens_before: float | None = None  # of the reference's answers
        self.reference_seconds = 0.0  # that it took to ask it

    # The loss

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> torch.Tensor:
        """The pairs of the global batch, and the tokens of their better answers."""
        counts = sum(_counts(inputs["labels"]) for inputs in batch_samples)
        return torch.tensor([total(float(count), device) for count in counts], device=device)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> torch.Tensor:
        """This rank's part of the mean over the pairs of the global batch; times the ranks, as their gradients are averaged.

        With `answer_weight` the mean over the tokens of the better answers is added, which is the loss of `objective: answers`
        on them (Pang et al. 2024, equation 1, has it per answer).
        """
        preference, answers = self._sums(model, inputs)
        pairs, tokens = num_items_in_batch
        loss = preference / pairs + self.recipe.answer_weight * answers / tokens
        return loss.float() * self.args.world_size

    def _sums(self, model, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Of a batch, fp64: the losses of its pairs summed, and those of the better answers' tokens."""
        inputs = dict(inputs)
        reference, labels = inputs.pop("reference"), inputs["labels"]
        losses = model(**inputs, by_row=True).loss
        is_pair = (labels.view(2, -1, labels.shape[1])[0] != IGNORED).any(1)  # not a blank one
        better = losses[: len(is_pair)]
        return (pair_losses(losses, reference, self.recipe.beta) * is_pair).sum(), better.sum()

    def totals_of(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        sums = torch.stack(self._sums(self.model_wrapped, inputs))
        return torch.cat([sums, _counts(inputs["labels"]).double()])

    def figures_of(self, totals: torch.Tensor) -> dict[str, float]:
        """The loss; that of the better answers per token; and how long the model's own answers are."""
        preference, answers, pairs, tokens = totals.tolist()
        chosen = answers / tokens
        figures = {"loss": preference / pairs + self.recipe.answer_weight * chosen, "chosen_loss": chosen}
        is_start = self.state.global_step == 0
        length = self.answer_tokens_before if is_start else self._answer_tokens()
        return figures | ({"answer_tokens": length} if length is not None else {})

    # The reference

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._know_reference(goes_on=resume_from_checkpoint is not None)
        return prepared

    def _know_reference(self, goes_on: bool) -> None:
        """Reads what the reference says to all pairs, or has the model say it that is not trained yet. What lies there of an
        earlier start that saved nothing may have been said by another. Every rank calls it."""
        path = self.recipe.output_dir / REFERENCE
        precision = "fp16" if self.args.fp16 else "bf16" if self.args.bf16 else "fp32"
        start = start_of(self.recipe, self.prepared, precision, self.base_fingerprint, self.adapter_fingerprint)
        if goes_on:  # and `check_reference` has found it right
            found = share(_read(path) if rank() == 0 else None, self.args.device)
        else:
            found, began = {"start": start, "answer_tokens": self._answer_tokens()}, time.perf_counter()
            found |= {name: self._log_probabilities(name) for name in ("train", "validation") if self._pairs(name)}
            found["seconds"] = time.perf_counter() - began
            about = {key: found[key] for key in ("start", "answer_tokens", "seconds")}
            arrays = {name: found[name] for name in ("train", "validation") if name in found}
            if (problem := share(_write(path, about, arrays) if rank() == 0 else None, self.args.device)) is not None:
                raise UserError(problem)
        for name in ("train", "validation"):
            if pairs := self._pairs(name):
                pairs.reference = found[name]
        self.answer_tokens_before, self.reference_seconds = found["answer_tokens"], found["seconds"]

    def _pairs(self, name: str) -> Pairs | None:
        return self.train_dataset if name == "train" else self.eval_dataset

    def _log_probabilities(self, name: str) -> np.ndarray:
        """Of both answers of each pair of a split, [pairs, 2] in fp64; in the batches of the first epoch, so that the first
        steps round alike."""
        pairs, batches = self._pairs(name), self.batches if name == "train" else self._validation_batches()
        said = torch.zeros(len(pairs), 2, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        bar = tqdm(
            batches, desc=f"reference, {name}", unit="batch", total=len(batches), dynamic_ncols=True, disable=rank() > 0
        )
        for numbers, inputs in zip(bar, self._loader(pairs, batches)):
            if reason := self.stops.look(self.args.device):
                self._stop(reason, evaluation_is_due=True)
            inputs = self._prepare_inputs(inputs)
            del inputs["reference"]
            with torch.no_grad(), self.compute_loss_context_manager():
                losses = self.model_wrapped(**inputs, by_row=True).loss
            if numbers != [BLANK]:
                said[numbers] = -losses.view(2, -1).T
        self.model.train()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(said)
        if not said.isfinite().all():
            divergence.end(self, "a log-probability of the reference is not finite", is_trained=False)
        return said.cpu().numpy()

    # What the answers become

    def _answer_tokens(self) -> float | None:
        """The mean length of the answers to the first validation prompts, without their end of turn; None where there are none.
        Every rank calls it."""
        samples = self.prepared.samples[:MEASURED_ANSWERS]
        if not samples:
            return None
        prompts = [self.chat.prompt_ids(sample["prompt"], tools=sample["tools"]) for sample in samples]
        answers = answer_in_training(
            self.model, self.chat, prompts, self.recipe.sample_max_new_tokens, self.args, zero_stage(self) == 3
        )
        lengths = [answer.new_tokens - (answer.finish_reason == "stop") for answer in answers]
        return share(float(np.mean(lengths)), self.args.device)

    @functools.cached_property
    def _better_tokens(self) -> float:
        """The mean length of the better answers, as far as answers are measured."""
        split, most = self.prepared.validation, self.recipe.sample_max_new_tokens
        return float(np.mean([min(int(split.pair(i)[0][1].sum()) - 1, most) for i in range(len(split))]))

    def evaluate(self, *args, **kwargs) -> dict[str, float]:
        """As in Trainer.

        Raises:
            UserError: where answers have become a third as long as they were, or shorter.
        """
        metrics = super().evaluate(*args, **kwargs)
        length, before = metrics.get("eval_answer_tokens"), self.answer_tokens_before
        if length is not None and before and length < SHORTEST * min(before, self._better_tokens):
            recipe, weight = self.recipe, "" if self.recipe.answer_weight else ", or set answer_weight: 1"
            raise UserError(
                f"learning_rate: at step {self.state.global_step} answers have {length:.1f} tokens on average, and had "
                f"{before:.1f} at the start: it forgets how to answer; lower it (now {self.args.learning_rate:g}), raise beta "
                f"(now {recipe.beta:g}){weight}; --restart begins anew, and what was saved before stays"
            )
        return metrics

    def metrics(self) -> dict[str, Any]:
        """As in Trainer, with the figures of the answers, before and after."""
        evaluations = [e for e in self.state.log_history if "eval_chosen_loss" in e]
        first = next((e for e in evaluations if e["step"] == 0), {})
        last = evaluations[-1] if evaluations else {}
        return super().metrics() | {
            "objective": self.recipe.objective,
            "reference_seconds": round(self.reference_seconds, 3),
            "eval_chosen_loss": last.get("eval_chosen_loss"),
            "eval_chosen_loss_before": first.get("eval_chosen_loss"),
            "eval_answer_tokens": last.get("eval_answer_tokens"),
            "eval_answer_tokens_before": self.answer_tokens_before,
        }


def _counts(labels: torch.Tensor) -> torch.Tensor:
    """The pairs of a batch that are not blank, and the trained tokens of their better answers."""
    better = labels.view(2, -1, labels.shape[1])[0] != IGNORED
    return torch.stack([better.any(1).sum(), better.sum()])
