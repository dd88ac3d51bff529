"""The consolidated training state: weights and optimizer of every trained parameter by name, for any number of ranks."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from safetensors import safe_open

from carelm.errors import UserError
from carelm.models.finite import not_finite

STATE = "training_state.safetensors"
DEEPSPEED_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def zero_stage(trainer: transformers.Trainer) -> int:
    """DeepSpeed's stage, 0 without DeepSpeed."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    return plugin.zero_stage if plugin is not None else 0


def is_full(trainer: transformers.Trainer) -> bool:
    """Whether the base itself is trained, and not an adapter on it."""
    return not isinstance(trainer.model, PeftModel)


def is_native(trainer: transformers.Trainer) -> bool:
    """A full fine-tune under DeepSpeed is saved by DeepSpeed, each rank its part."""
    return is_full(trainer) and trainer.is_deepspeed_enabled


def trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def gather_state(trainer: transformers.Trainer) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of every trainable parameter by name, in fp32 on the CPU; every rank calls it.

    Empty on ranks other than 0. Before the first step there is no optimizer state, only weights.
    """
    keep = trainer.is_world_process_zero()
    state = {}
    for name, parameter in trainable(trainer.model):
        for key, value in _parameter_state(trainer, parameter):
            if keep:
                state[f"{name}|{key}"] = value.detach().to("cpu", copy=True).contiguous()
    return state


def _parameter_state(
    trainer: transformers.Trainer, parameter: torch.nn.Parameter
) -> Iterator[tuple[str, torch.Tensor]]:
    if not trainer.is_deepspeed_enabled:
        yield "weight", parameter.data.float()
        for key, value in _inner_optimizer(trainer).state.get(parameter, {}).items():
            yield key, torch.as_tensor(value)
        return
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    yield "weight", safe_get_full_fp32_param(parameter)
    inner = _inner_optimizer(trainer)
    step = next((s["step"] for s in inner.state.values() if "step" in s), None)
    if step is not None:
        yield "step", torch.as_tensor(step, dtype=torch.float32)
        for key in ("exp_avg", "exp_avg_sq"):
            yield key, safe_get_full_optimizer_state(parameter, key)


def _inner_optimizer(trainer: transformers.Trainer) -> torch.optim.Optimizer:
    """The optimizer that does the arithmetic, out of accelerate's and DeepSpeed's wrappers."""
    optimizer = trainer.optimizer
    while getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    return optimizer


def read_state(folder: Path, suffix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a consolidated state whose keys end with `suffix`, on the CPU."""
    with safe_open(folder / STATE, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.endswith(suffix)}


def load_state(trainer: transformers.Trainer, folder: Path) -> None:
    """Puts a consolidated state into model and optimizer, whatever wrote it and on however many ranks.

    Raises:
        UserError: where the checkpoint's parameters or optimizer are not this run's.
    """
    stored = read_state(folder)
    if bad := not_finite(stored.items()):
        raise UserError(
            f"{folder}: {len(bad)} of its {len(stored)} tensors hold NaN or infinity, such as {bad[0]}; remove that folder to "
            "go on from the one before it, or begin anew with --restart"
        )
    load_weights(trainer, stored, folder)
    if trainer.is_deepspeed_enabled:
        _load_deepspeed_optimizer(trainer, stored)
    else:
        optimizer = _inner_optimizer(trainer)
        for name, parameter in trainable(trainer.model):
            keys = [k for k in stored if k.startswith(f"{name}|") and not k.endswith("|weight")]
            optimizer.state[parameter] = {
                k.removeprefix(f"{name}|"): stored[k].to(
                    _step_device(optimizer, parameter) if k.endswith("|step") else parameter.device, copy=True
                )
                for k in keys
            }
    load_schedule(trainer, folder)
    _load_scaler(trainer, json.loads((folder / "scaler.json").read_text()))


def _step_device(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> torch.device:
    """Torch's fused Adam wants its step count beside the parameter, the others on the CPU (Optimizer.load_state_dict)."""
    beside = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
    return parameter.device if beside else torch.device("cpu")


def load_schedule(trainer: transformers.Trainer, folder: Path) -> None:
    """Puts the learning rate where it was.

    All parameter groups share one rate, and how many groups there are differs: ZeRO drops empty ones.
    """
    state = json.loads((folder / "scheduler.json").read_text())
    groups = trainer.optimizer.param_groups
    scheduler = getattr(trainer.lr_scheduler, "scheduler", trainer.lr_scheduler)
    for key in ("base_lrs", "_last_lr"):
        if key in state:
            state[key] = state[key][:1] * len(groups)
    if "lr_lambdas" in state:
        state["lr_lambdas"] = []  # functions of the step, made anew from the recipe
    scheduler.load_state_dict(state)
    if hasattr(scheduler, "lr_lambdas"):  # the run's length may have changed, and the schedule with it
        state["_last_lr"] = [
            base * scale(scheduler.last_epoch) for base, scale in zip(scheduler.base_lrs, scheduler.lr_lambdas)
        ]
    for group, rate in zip(groups, state["_last_lr"]):
        group["lr"] = rate


def scaler_state(trainer: transformers.Trainer) -> dict[str, float]:
    """fp16's loss scale and its counters: of torch's GradScaler, or of DeepSpeed's loss scaler; else empty."""
    if trainer.accelerator.scaler is not None:
        return trainer.accelerator.scaler.state_dict()
    scaler = dynamic_loss_scaler(trainer)
    return {key: getattr(scaler, key) for key in DEEPSPEED_SCALE} if scaler is not None else {}


def loss_scale(trainer: transformers.Trainer) -> float:
    """fp16's loss scale as it is now; infinity in other precisions."""
    if trainer.accelerator.scaler is not None:
        return trainer.accelerator.scaler.get_scale()
    return float(trainer.model_wrapped.optimizer.loss_scale) if trainer.is_deepspeed_enabled else math.inf


def _load_scaler(trainer: transformers.Trainer, state: dict[str, float]) -> None:
    """A scale that another kind of scaler wrote is left out: it finds its own within a few steps."""
    if trainer.accelerator.scaler is not None:
        if "scale" in state:
            trainer.accelerator.scaler.load_state_dict(state)
    elif (scaler := dynamic_loss_scaler(trainer)) is not None and "cur_scale" in state:
        vars(scaler).update(state)


def dynamic_loss_scaler(trainer: transformers.Trainer) -> Any:
    """DeepSpeed's fp16 loss scaler; None without DeepSpeed and in other precisions."""
    scaler = getattr(trainer.model_wrapped.optimizer, "loss_scaler", None) if trainer.is_deepspeed_enabled else None
    return scaler if getattr(scaler, "dynamic", False) else None


def load_weights(trainer: transformers.Trainer, stored: dict[str, torch.Tensor], folder: Path) -> None:
    """Copies `NAME|weight` tensors into the live parameters (and DeepSpeed's fp32 masters)."""
    there = {key.removesuffix("|weight") for key in stored if key.endswith("|weight")}
    here = {name for name, _ in trainable(trainer.model)}
    if there != here:
        odd = sorted(there ^ here)[0]
        raise UserError(f"{folder}: its trained parameters are not this run's (such as {odd}); --restart begins anew")
    for name, parameter in trainable(trainer.model):
        weight = stored[f"{name}|weight"].to(parameter.device)
        if not trainer.is_deepspeed_enabled:
            parameter.data.copy_(weight)
            continue
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=zero_stage(trainer) == 3):
            parameter.data.copy_(weight)  # safe_set_full_fp32_param leaves the live weights alone
        safe_set_full_fp32_param(parameter, weight)


def _load_deepspeed_optimizer(trainer: transformers.Trainer, stored: dict[str, torch.Tensor]) -> None:
    """Adam's state does not exist in ZeRO before the first step: it is made here, then filled parameter by parameter."""
    from deepspeed.utils import safe_set_full_optimizer_state

    steps = [tensor.item() for key, tensor in stored.items() if key.endswith("|step")]
    if not steps:  # a checkpoint from before the first step
        return
    if not any(key.endswith("|exp_avg") for key in stored):
        raise UserError("optim: the checkpoint's optimizer is not Adam; it can only be resumed without DeepSpeed")
    inner = _inner_optimizer(trainer)
    is_torch = type(inner).__module__.startswith("torch.")
    zero = trainer.model_wrapped.optimizer
    flats = zero.fp32_partitioned_groups_flat if zero_stage(trainer) == 3 else zero.single_partition_of_fp32_groups
    for flat in flats:
        inner.state[flat] = {
            "step": torch.tensor(float(steps[0]), device=_step_device(inner, flat)) if is_torch else int(steps[0]),
            "exp_avg": torch.zeros_like(flat),
            "exp_avg_sq": torch.zeros_like(flat),
        }
    if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in trainable(trainer.model):
        for key in ("exp_avg", "exp_avg_sq"):
            safe_set_full_optimizer_state(parameter, stored[f"{name}|{key}"].to(trainer.args.device), key)
