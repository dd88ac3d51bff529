"""The trainer: transformers' Trainer with CareLM's batches, loss, evaluation and checkpoints.

The examples of every optimizer step follow from the data, `global_batch_size` and the seed alone. Ranks and gradient
accumulation only deal them out, and the loss of a step is the mean over the trained tokens of the whole global batch,
so that the curve is the same on every rung.
"""

import math
import time
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed
import transformers
from safetensors import SafetensorError
from torch.utils.data import DataLoader, Dataset
from trl import SFTConfig

from carelm.adapter_folder import start_fingerprint
from carelm.chat.chat import Chat
from carelm.errors import UserError
from carelm.ranks import say, share
from carelm.recipe import Recipe
from carelm.training import checkpoints, divergence, learnt
from carelm.training.batches import Collate, GlobalBatches, Rows
from carelm.training.prepared import Prepared
from carelm.training.speed import Speed
from carelm.training.state import (
    dynamic_loss_scaler,
    gather_state,
    is_full,
    is_native,
    load_schedule,
    load_state,
    load_weights,
    read_state,
    zero_stage,
)
from carelm.training.stops import StopRequested, StopRequests, ignore_signals
from carelm.training.tensorboard import SampleAnswers


class Trainer(transformers.Trainer):
    """One run of a recipe. See the module for what differs from transformers' own.

    Args:
        recipe: the run.
        prepared: its data in tokens.
        chat: renders the sample answers.
        base_fingerprint: of the base's weights, for the completion marks.
        stops: is looked at after every step and every batch of an evaluation.
        model, args, callbacks: as in transformers.
    """

    def __init__(
        self,
        recipe: Recipe,
        prepared: Prepared,
        chat: Chat,
        base_fingerprint: str,
        stops: StopRequests,
        *,
        model: torch.nn.Module,
        args: SFTConfig,
        callbacks: list[transformers.TrainerCallback],
    ):
        self.recipe, self.prepared, self.chat = recipe, prepared, chat
        self.base_fingerprint, self.stops = base_fingerprint, stops
        self.adapter_fingerprint = start_fingerprint(recipe)
        self.saved_step, self.evaluation_is_due = 0, False
        self.started = time.time()
        self.wall_seconds_before = 0.0
        self.stopped_early = False
        self.divergence = divergence.Divergence()
        super().__init__(
            model=model,
            args=args,
            train_dataset=Rows(prepared.train),
            eval_dataset=Rows(prepared.validation) if prepared.validation is not None else None,
            processing_class=chat.tokenizer,
            callbacks=callbacks,
        )
        self.label_smoother = None  # the model's forward does it (carelm.models.loss)
        self.remove_callback(transformers.PrinterCallback)
        multiple = args.pad_to_multiple_of
        if not isinstance(multiple, int):
            multiple = 8 if args.device.type == "cuda" else 1
        self.data_collator = Collate(chat.tokenizer.pad_token_id, multiple, chat.is_encoder_decoder)
        self.batches = GlobalBatches(
            prepared.train.lengths,
            global_batch_size=recipe.global_batch_size,
            micro_batch_size=args.per_device_train_batch_size,
            rank=args.process_index,
            ranks=args.world_size,
            seed=recipe.seed if args.data_seed is None else args.data_seed,
            group_by_length=recipe.group_by_length,
        )

    def follow(self, speed: Speed, checkpoint: Path | None) -> None:
        """Ties the callbacks to what only the trainer knows, and checks the checkpoint to go on from."""
        speed.batches = self.batches
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, SampleAnswers):
                callback.synced_gpus = zero_stage(self) == 3
        if checkpoint is not None:
            self.check_checkpoint(checkpoint)
            self.args.eval_on_start = False

    @property
    def wall_seconds(self) -> float:
        """Of the whole run, earlier parts of it included."""
        return self.wall_seconds_before + time.time() - self.started

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None):
        """As transformers has it, but for a run of one step, whose share of warmup would round up to all of it: at a learning
        rate of 0."""
        if num_training_steps == 1:
            self.args.warmup_steps = 0
        return super().create_scheduler(num_training_steps, optimizer)

    # Batches and loss

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self.batches)

    def _loader(self, dataset: Dataset, batches: GlobalBatches) -> DataLoader:
        return DataLoader(
            dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type == "cuda",
            worker_init_fn=ignore_signals,
        )

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The mean loss over all trained tokens of the validation split: the same on any number of ranks.

        (transformers averages over batches, so that its eval loss depends on the batch size.)
        """
        started = time.time()
        totals = 0
        self.model.eval()
        for inputs in self._loader(self.eval_dataset, self._validation_batches()):
            if reason := self.stops.look(self.args.device):
                self._stop(reason, evaluation_is_due=True)
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                totals += self.totals_of(inputs)
        self.model.train()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(totals)
        figures = self.figures_of(totals) | {"runtime": round(time.time() - started, 3)}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in figures.items()}
        if not math.isfinite(loss := metrics[f"{metric_key_prefix}_loss"]):
            divergence.end(self, f"the eval loss is {loss}", is_trained=self.state.global_step > 0)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _validation_batches(self) -> GlobalBatches:
        size = self.args.per_device_eval_batch_size
        return GlobalBatches(
            self.prepared.validation.lengths,
            global_batch_size=size * self.args.world_size,
            micro_batch_size=size,
            rank=self.args.process_index,
            ranks=self.args.world_size,
            shuffle=False,
        )

    def totals_of(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """What this rank's batch of an evaluation adds to its totals, fp64: the summed loss, the trained tokens."""
        # num_items_in_batch=1 makes the loss a sum over tokens; compute_loss scales it by the ranks for training
        one = torch.ones((), device=self.args.device)
        loss = self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=one) / self.args.world_size
        return torch.stack([loss.double(), (inputs["labels"] != -100).sum().double()])

    def figures_of(self, totals: torch.Tensor) -> dict[str, float]:
        """The figures of an evaluation from the totals over all ranks."""
        return {"loss": (totals[0] / totals[1]).item()}

    # Stops and checkpoints

    def _maybe_log_save_evaluate(self, tr_loss, grad_norm, *args, **kwargs) -> None:
        """After a step: logs, evaluates and saves what is due. Asked to stop, it saves at once and puts the evaluation off."""
        self.divergence.look(self, tr_loss, grad_norm)
        reason, evaluation_is_due = self.stops.look(self.args.device), self.control.should_evaluate
        if self.args.eval_strategy == "epoch" and self.state.global_step % self.batches.steps_per_epoch == 0:
            evaluation_is_due = True  # the epoch's end comes after this look
        if reason:
            self.control.should_log, self.control.should_evaluate, self.control.should_save = True, False, False
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)
        if reason:
            self._stop(reason, evaluation_is_due)

    def _stop(self, reason: str, evaluation_is_due: bool) -> NoReturn:
        """Saves this step where that is not done, and ends the run; every rank calls it."""
        step = self.state.global_step
        if self.saved_step != step:
            self.evaluation_is_due = evaluation_is_due
            self._save_checkpoint(self.model, None)
        seconds = self.stops.answered()
        saved = (
            f"saved as checkpoint-{step}; the same command goes on from there" if step else "there is nothing to save"
        )
        raise StopRequested(f"after step {step}, {seconds:.1f} s after it was asked to ({reason}); {saved}", reason)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """As in transformers; in fp16 with the steps that the scaler has skipped so far."""
        if self.args.fp16 and "loss" in logs:
            logs["skipped_steps"] = self.divergence.skipped_steps
        super().log(logs, *args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        divergence.check_weights(self)
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, transformers.trainer_callback.ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        folder = self.recipe.output_dir / f"checkpoint-{self.state.global_step}"
        self._name_best()
        about = {
            "step": self.state.global_step,
            "evaluation_is_due": self.evaluation_is_due or self._ends_epoch_unevaluated(),
            "world_size": self.args.world_size,
            "zero_stage": zero_stage(self),
            "wall_seconds": round(self.wall_seconds, 3),
            "skipped_steps": self.divergence.skipped_steps,
            "is_loss_chunked": self.model.is_loss_chunked,
            "data_fingerprint": self.prepared.fingerprint,
            "base_fingerprint": self.base_fingerprint,
            "adapter_fingerprint": self.adapter_fingerprint,
        }
        checkpoints.save(self, folder, about)
        self.saved_step = self.state.global_step
        if self.is_world_process_zero():
            keep = self.recipe.training["save_total_limit"]
            checkpoints.remove_old(self.recipe.output_dir, keep, self.state.best_global_step)

    def _ends_epoch_unevaluated(self) -> bool:
        """Whether the evaluation at the end of an epoch is still to come; transformers saves by steps before it."""
        step = self.state.global_step
        ends = self.args.eval_strategy == "epoch" and step > 0 and step % self.batches.steps_per_epoch == 0
        return ends and not any("eval_loss" in e for e in self.state.log_history if e["step"] == step)

    def _name_best(self) -> None:
        if self.state.best_global_step:
            best = self.recipe.output_dir / f"checkpoint-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best)

    def check_checkpoint(self, folder: Path) -> None:
        """Raises UserError where a checkpoint belongs to other data, another base or, for `full`, other ranks."""
        mark = checkpoints.read_mark(folder)
        for key, now, what in (
            ("data_fingerprint", self.prepared.fingerprint, "dataset_name: the training rows"),
            ("base_fingerprint", self.base_fingerprint, "model_name_or_path: the base's weights"),
        ):
            if mark.get(key) != now:
                raise UserError(f"{what} are not those of {folder}; --restart begins anew, the old folder is kept")
        was, now = (mark["world_size"], mark["zero_stage"]), (self.args.world_size, zero_stage(self))
        if is_full(self) and was != now and (was[1] or now[1]):
            raise UserError(
                f"num_processes: {folder} was written by {was[0]} ranks at ZeRO stage {was[1]}, this launch has {now[0]} at "
                f"{now[1]}; a full fine-tune under DeepSpeed goes on only as it was"
            )
        self.wall_seconds_before, self.saved_step = mark["wall_seconds"], mark["step"]
        self.adapter_fingerprint = mark.get("adapter_fingerprint")  # its folder may be gone
        self.evaluation_is_due = mark.get("evaluation_is_due", False)
        self.divergence.skipped_steps = mark.get("skipped_steps", 0)
        state = transformers.TrainerState.load_from_json(str(folder / "trainer_state.json"))
        control = state.stateful_callbacks["TrainerControl"]["args"]
        self.stopped_early = control["should_training_stop"] and state.global_step < state.max_steps

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        native = resume_from_checkpoint if is_native(self) else None
        prepared = super()._prepare_for_training(max_steps, train_dataloader, native)
        if (scaler := dynamic_loss_scaler(self)) is not None:
            scaler.raise_error_at_min_scale = False  # self.divergence ends the run there, with a line
        if resume_from_checkpoint is not None and native is None:
            load_state(self, Path(resume_from_checkpoint))
        return prepared

    def _run_epoch(self, **kwargs) -> None:
        """One epoch, or none where the checkpoint is the run's last one: transformers would take one step more."""
        self._evaluate_where_due()
        if self.state.global_step >= self.state.max_steps or self.stopped_early:
            self.control.should_training_stop = True
        if not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    def _finalize_training(self, *args, **kwargs):
        self._evaluate_where_due()  # where the checkpoint is that of the last epoch's end, there was no epoch to run
        step, has_best = self.state.global_step, self.args.load_best_model_at_end
        is_known = any("eval_loss" in e for e in self.state.log_history if e["step"] == step)
        if self.prepared.validation is not None and not is_known and not has_best:
            self._evaluate(
                None, None
            )  # the last steps may be fewer than eval_steps: the figures are those of the result
        return super()._finalize_training(*args, **kwargs)

    def _evaluate_where_due(self) -> None:
        """The evaluation that a stop has put off."""
        if self.evaluation_is_due:
            metrics = self._evaluate(None, None)
            self._determine_best_metric(metrics=metrics, trial=None)
            self._name_best()
            self.evaluation_is_due = False

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        """What DeepSpeed keeps itself it has loaded by now; the schedule is ours."""
        if checkpoint is not None:
            load_schedule(self, Path(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Weights and optimizer are loaded together, once both are there (_prepare_for_training)."""

    def _load_rng_state(self, checkpoint) -> None:
        """Every step draws from a seed of its own (callbacks.StepSeed): there is no state to load."""

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        say(
            f"the best eval loss, {self.state.best_metric:.4f}, was at step {self.state.best_global_step}: its weights are kept"
        )
        if is_native(self):
            super()._load_best_model()
        else:
            load_weights(self, read_state(best, "|weight"), best)

    def save_result(self, folder: Path) -> None:
        """The trained weights, tokenizer and chat template, and the generation settings; every rank calls it."""
        divergence.check_weights(self)
        state = None if is_full(self) else gather_state(self)
        weights = self.accelerator.get_state_dict(self.model_wrapped) if is_full(self) else None
        failure = None
        if self.is_world_process_zero():
            try:
                checkpoints.save_weights(self.model, state, weights, folder)
                self.chat.tokenizer.save_pretrained(folder)
                self.model.generation_config.save_pretrained(folder)
                checkpoints.settle(folder.glob("*.safetensors"))
            except (OSError, SafetensorError) as error:
                failure = str(error)
        failure = share(failure, self.args.device)
        if failure is not None:
            raise UserError(f"output_dir: the result could not be saved ({failure}); make room and run again")

    def metrics(self) -> dict[str, Any]:
        """What the run came to, from its whole history (earlier parts of a resumed run included)."""
        losses = [(e["step"], e["loss"]) for e in self.state.log_history if "loss" in e]
        steps = [step for step, _ in losses]
        weights = np.diff([0, *steps])
        evaluations = [e for e in self.state.log_history if "eval_loss" in e]
        before = [e["eval_loss"] for e in evaluations if e["step"] == 0]
        best = self.state.best_metric if self.args.load_best_model_at_end else None
        return {
            "train_loss": float(np.average([loss for _, loss in losses], weights=weights)) if losses else None,
            "eval_loss": best if best is not None else evaluations[-1]["eval_loss"] if evaluations else None,
            "eval_loss_before": before[0] if before else None,
            "global_step": self.state.global_step,
            "skipped_steps": self.divergence.skipped_steps,
            "num_train_tokens": self.batches.tokens_until(self.state.global_step),
            "num_trained_tokens": self.batches.tokens_until(self.state.global_step, self.prepared.train.trained_counts),
            "caution": learnt.assess(self.recipe, [(e["step"], e["eval_loss"]) for e in evaluations], kept=best),
            "world_size": self.args.world_size,
            "global_batch_size": self.recipe.global_batch_size,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "zero_stage": zero_stage(self),
            "wall_seconds": round(self.wall_seconds, 2),
        }
