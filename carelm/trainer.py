"""The trainer: transformers' Trainer with CareLM's batches, loss, evaluation and checkpoints.

The examples of every optimizer step follow from the data, `global_batch_size` and the seed alone. Ranks and gradient
accumulation only deal them out, and the loss of a step is the mean over the trained tokens of the whole global batch,
so that the curve is the same on every rung.
"""

import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import torch.distributed
import transformers
from torch.utils.data import DataLoader, Dataset
from trl import SFTConfig

from carelm import checkpoints
from carelm.callbacks import SampleAnswers, Speed
from carelm.chat import Chat
from carelm.data import Prepared, PreparedSplit
from carelm.models import Precision
from carelm.ranks import say, share, world_size
from carelm.recipe import Recipe, UserError, micro_batch_size
from carelm.stops import StopRequested, StopRequests, ignore_signals

BLANK = -1  # stands for an example with nothing to learn, where a rank would have none
LENGTH_POOL = 50  # batches of like length are cut from pools of this many global batches


def _leave_out_shm_comm() -> None:
    """DeepSpeed compiles an all-reduce over shared memory for CPU ranks, which its inference alone uses (comm/torch.py): a
    minute at the first start, and where that is killed a lock that every later start waits for."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_training_args(recipe: Recipe, prepared: Prepared, precision: Precision) -> SFTConfig:
    """TRL's arguments from the recipe, with the keys that CareLM derives; joins the process group.

    Raises:
        UserError: where TRL refuses a value.
    """
    micro = micro_batch_size(recipe, world_size())
    values = dict(recipe.training)
    if prepared.validation is None:
        if recipe.early_stopping_patience:
            raise UserError(
                "early_stopping_patience: there are no validation rows; set validation_fraction, or leave it out"
            )
        values |= {"eval_strategy": "no", "eval_on_start": False}
    if recipe.early_stopping_patience:
        values |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": False}
    derived = {
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": recipe.global_batch_size // world_size() // micro,
        "bf16": precision.name == "bf16",
        "fp16": precision.name == "fp16",
        "push_to_hub": False,  # the finished folder is pushed by carelm.hub
        "report_to": [tracker for tracker in values["report_to"] if tracker not in ("tensorboard", "none")],
        "disable_tqdm": True,  # carelm.callbacks draws the bar
        "restore_callback_states_from_checkpoint": True,
        "remove_unused_columns": False,
        "log_level_replica": "error",
        "save_total_limit": None,  # carelm.checkpoints removes old ones; transformers would take the newest as well
        "ddp_find_unused_parameters": values.get("ddp_find_unused_parameters", False),
    }
    if world_size() > 1 and not torch.cuda.is_available():
        derived["ddp_backend"] = "gloo"  # without it accelerate takes every rank for the only one
        _leave_out_shm_comm()
    # transformers begins with what the launcher says, which is the machine's default; the recipe decides.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no" if precision.name == "fp32" else precision.name
    if precision.name == "bf16" and not torch.cuda.is_available():
        derived["bf16"] = False  # with it transformers wants use_cpu, and then accelerate would not start DeepSpeed
    try:
        arguments = SFTConfig(**{**values, **derived})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"recipe {recipe.name}: {' '.join(str(error).split())}") from None
    arguments.bf16 = precision.name == "bf16"
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else nn.DataParallel, and a loss times the number of GPUs
        say("one process uses one of the visible GPUs; accelerate_configs/multi_gpu.yaml or zero2.yaml use more")
    if arguments.world_size != world_size():
        raise UserError(
            f"num_processes: {world_size()} ranks were started and only {arguments.world_size} found each other; name a "
            "--config_file from accelerate_configs/"
        )
    return arguments


class GlobalBatches:
    """Deals one rank its micro-batches: `accumulation` of them for each global batch, in every epoch another order.

    Args:
        lengths: tokens of each example.
        global_batch_size: examples of one optimizer step.
        micro_batch_size: examples of one forward on one rank.
        rank, ranks: this rank and how many there are.
        seed: of the order.
        group_by_length: cut batches from examples of like length. The order is that of a shuffle, pools of it sorted by
            length, and the batches shuffled again; the first batch of all is the longest, so that memory that does not
            suffice shows at once.
        shuffle: False keeps the order by length (evaluation).
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        ranks: int,
        seed: int = 0,
        group_by_length: bool = True,
        shuffle: bool = True,
    ):
        self.lengths = np.asarray(lengths)
        self.global_batch_size = global_batch_size
        self.accumulation = global_batch_size // (micro_batch_size * ranks)
        self.rank, self.ranks, self.seed = rank, ranks, seed
        self.group_by_length, self.shuffle = group_by_length, shuffle
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    @property
    def batch_sampler(self) -> "GlobalBatches":
        """transformers looks for `set_epoch` one level down, as it expects accelerate's wrapper around a sampler."""
        return self

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.lengths) / self.global_batch_size)

    def __len__(self) -> int:
        return self.steps_per_epoch * self.accumulation

    def plan(self, epoch: int) -> list[np.ndarray]:
        """The examples of each optimizer step of an epoch; the last batch may be smaller."""
        size = self.global_batch_size
        if not self.shuffle:
            return _cut(np.argsort(-self.lengths, kind="stable"), size)
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.lengths))
        if not self.group_by_length:
            return _cut(order, size)
        pools = _cut(order, LENGTH_POOL * size)
        batches = [b for pool in pools for b in _cut(pool[np.argsort(-self.lengths[pool], kind="stable")], size)]
        batches = [batches[i] for i in generator.permutation(len(batches))]
        if epoch == 0:
            longest = max(range(len(batches)), key=lambda i: self.lengths[batches[i]].max() * len(batches[i]))
            batches.insert(0, batches.pop(longest))
        return batches

    def tokens_until(self, step: int) -> int:
        """Tokens (without padding) in the first `step` optimizer steps of the run, over all ranks."""
        epochs, rest = divmod(step, self.steps_per_epoch)
        first = sum(int(self.lengths[batch].sum()) for batch in self.plan(epochs)[:rest]) if rest else 0
        return epochs * int(self.lengths.sum()) + first

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.plan(self.epoch):
            if self.group_by_length:
                batch = batch[np.argsort(-self.lengths[batch], kind="stable")]
            parts = np.array_split(batch, self.accumulation * self.ranks)
            for i in range(self.accumulation):
                part = parts[i * self.ranks + self.rank]
                yield part.tolist() or [BLANK]


def _cut(order: np.ndarray, size: int) -> list[np.ndarray]:
    return [order[i : i + size] for i in range(0, len(order), size)]


class _Rows(Dataset):
    """A prepared split whose item -1 is blank: one token and nothing to learn."""

    def __init__(self, split: PreparedSplit):
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        return (np.zeros(1, np.int32), np.zeros(1, bool)) if i == BLANK else self.split[i]


class Collate:
    """Pads examples on the right to the longest of them: input_ids, attention_mask, labels, each [batch, length]."""

    def __init__(self, pad_token_id: int, multiple_of: int = 1):
        self.pad_token_id, self.multiple_of = pad_token_id, multiple_of

    def __call__(self, examples: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, torch.Tensor]:
        longest = max(len(ids) for ids, _ in examples)
        shape = (len(examples), -(-longest // self.multiple_of) * self.multiple_of)
        input_ids = torch.full(shape, self.pad_token_id)
        attention_mask, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
        for row, (ids, trained) in enumerate(examples):
            tokens = torch.from_numpy(ids.astype(np.int64))
            input_ids[row, : len(ids)] = tokens
            attention_mask[row, : len(ids)] = 1
            labels[row, : len(ids)][torch.from_numpy(np.array(trained))] = tokens[torch.from_numpy(np.array(trained))]
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


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
        self.saved_step, self.evaluation_is_due = 0, False
        self.started = time.time()
        self.wall_seconds_before = 0.0
        self.stopped_early = False
        super().__init__(
            model=model,
            args=args,
            train_dataset=_Rows(prepared.train),
            eval_dataset=_Rows(prepared.validation) if prepared.validation is not None else None,
            processing_class=chat.tokenizer,
            callbacks=callbacks,
        )
        self.remove_callback(transformers.PrinterCallback)
        multiple = args.pad_to_multiple_of
        if not isinstance(multiple, int):
            multiple = 8 if args.device.type == "cuda" else 1
        self.data_collator = Collate(chat.tokenizer.pad_token_id, multiple)
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
                callback.synced_gpus = self.zero_stage == 3
        if checkpoint is not None:
            self.check_checkpoint(checkpoint)
            self.args.eval_on_start = False

    @property
    def zero_stage(self) -> int:
        plugin = self.accelerator.state.deepspeed_plugin
        return plugin.zero_stage if plugin is not None else 0

    @property
    def keeps_native_state(self) -> bool:
        """A full fine-tune under DeepSpeed is saved by DeepSpeed, each rank its part."""
        return self.recipe.method == "full" and self.is_deepspeed_enabled

    @property
    def wall_seconds(self) -> float:
        """Of the whole run, earlier parts of it included."""
        return self.wall_seconds_before + time.time() - self.started

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

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The loss as in transformers; logits are only made from the first trained token of the batch on."""
        if self.recipe.method != "prompt_tuning":  # PEFT lengthens the labels by the virtual tokens itself
            trained = (inputs["labels"] != -100).any(dim=0).nonzero()
            first = int(trained[0]) if len(trained) else inputs["labels"].shape[1] - 1
            keep = inputs["labels"].shape[1] - max(first - 1, 0)  # the position before it predicts it
            inputs = {**inputs, "labels": inputs["labels"][:, -keep:], "logits_to_keep": keep}
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """The mean loss over all trained tokens of the validation split: the same on any number of ranks.

        (transformers averages over batches, so that its eval loss depends on the batch size.)
        """
        started = time.time()
        size = self.args.per_device_eval_batch_size
        batches = GlobalBatches(
            self.prepared.validation.lengths,
            global_batch_size=size * self.args.world_size,
            micro_batch_size=size,
            rank=self.args.process_index,
            ranks=self.args.world_size,
            shuffle=False,
        )
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for inputs in self._loader(self.eval_dataset, batches):
            if reason := self.stops.look(self.args.device):
                self._stop(reason, evaluation_is_due=True)
            inputs = self._prepare_inputs(inputs)
            with torch.no_grad(), self.compute_loss_context_manager():
                # num_items_in_batch=1 makes the loss a sum over tokens; compute_loss scales it by the ranks for training
                one = torch.ones((), device=self.args.device)
                loss = self.compute_loss(self.model_wrapped, inputs, num_items_in_batch=one) / self.args.world_size
            totals += torch.stack([loss.double(), (inputs["labels"] != -100).sum().double()])
        self.model.train()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(totals)
        metrics = {
            f"{metric_key_prefix}_loss": (totals[0] / totals[1]).item(),
            f"{metric_key_prefix}_runtime": round(time.time() - started, 3),
        }
        if not math.isfinite(metrics[f"{metric_key_prefix}_loss"]):
            raise UserError(
                f"learning_rate: the eval loss is {metrics[f'{metric_key_prefix}_loss']} at step {self.state.global_step}, "
                "the run has diverged; lower learning_rate, or set max_grad_norm, and --restart"
            )
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Stops and checkpoints

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """After a step: logs, evaluates and saves what is due. Asked to stop, it saves at once and puts the evaluation off."""
        reason, evaluation_is_due = self.stops.look(self.args.device), self.control.should_evaluate
        if self.args.eval_strategy == "epoch" and self.state.global_step % self.batches.steps_per_epoch == 0:
            evaluation_is_due = True  # the epoch's end comes after this look
        if reason:
            self.control.should_log, self.control.should_evaluate, self.control.should_save = True, False, False
        super()._maybe_log_save_evaluate(*args, **kwargs)
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

    def _save_checkpoint(self, model, trial) -> None:
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, transformers.trainer_callback.ExportableState):
                self.state.stateful_callbacks[type(callback).__name__] = callback.state()
        folder = self.recipe.output_dir / f"checkpoint-{self.state.global_step}"
        self._name_best()
        about = {
            "step": self.state.global_step,
            "evaluation_is_due": self.evaluation_is_due or self._ends_epoch_unevaluated(),
            "world_size": self.args.world_size,
            "zero_stage": self.zero_stage,
            "wall_seconds": round(self.wall_seconds, 3),
            "data_fingerprint": self.prepared.fingerprint,
            "base_fingerprint": self.base_fingerprint,
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
            if mark[key] != now:
                raise UserError(f"{what} are not those of {folder}; --restart begins anew, the old folder is kept")
        was, now = (mark["world_size"], mark["zero_stage"]), (self.args.world_size, self.zero_stage)
        if self.recipe.method == "full" and was != now and (was[1] or now[1]):
            raise UserError(
                f"num_processes: {folder} was written by {was[0]} ranks at ZeRO stage {was[1]}, this launch has {now[0]} at "
                f"{now[1]}; a full fine-tune under DeepSpeed goes on only as it was"
            )
        self.wall_seconds_before, self.saved_step = mark["wall_seconds"], mark["step"]
        self.evaluation_is_due = mark.get("evaluation_is_due", False)
        state = transformers.TrainerState.load_from_json(str(folder / "trainer_state.json"))
        control = state.stateful_callbacks["TrainerControl"]["args"]
        self.stopped_early = control["should_training_stop"] and state.global_step < state.max_steps

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        native = resume_from_checkpoint if self.keeps_native_state else None
        prepared = super()._prepare_for_training(max_steps, train_dataloader, native)
        if resume_from_checkpoint is not None and native is None:
            checkpoints.load_state(self, Path(resume_from_checkpoint))
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
            checkpoints.load_schedule(self, Path(checkpoint))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None) -> None:
        """Weights and optimizer are loaded together, once both are there (_prepare_for_training)."""

    def _load_rng_state(self, checkpoint) -> None:
        """Every step draws from a seed of its own (callbacks.StepSeed): there is no state to load."""

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        say(
            f"the best eval loss, {self.state.best_metric:.4f}, was at step {self.state.best_global_step}: its weights are kept"
        )
        if self.keeps_native_state:
            super()._load_best_model()
        else:
            checkpoints.load_weights(self, checkpoints.read_state(best, "|weight"), best)

    def save_result(self, folder: Path) -> None:
        """The trained weights, tokenizer and chat template, and the generation settings; every rank calls it."""
        state = None if self.recipe.method == "full" else checkpoints.gather_state(self)
        weights = self.accelerator.get_state_dict(self.model_wrapped) if self.recipe.method == "full" else None
        failure = None
        if self.is_world_process_zero():
            try:
                checkpoints.save_weights(self.model, state, weights, folder)
                self.chat.tokenizer.save_pretrained(folder)
                self.model.generation_config.save_pretrained(folder)
                checkpoints.settle(folder.glob("*.safetensors"))
            except (OSError, checkpoints.SafetensorError) as error:
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
            "num_train_tokens": self.batches.tokens_until(self.state.global_step),
            "world_size": self.args.world_size,
            "global_batch_size": self.recipe.global_batch_size,
            "per_device_train_batch_size": self.args.per_device_train_batch_size,
            "gradient_accumulation_steps": self.args.gradient_accumulation_steps,
            "zero_stage": self.zero_stage,
            "wall_seconds": round(self.wall_seconds, 2),
        }
