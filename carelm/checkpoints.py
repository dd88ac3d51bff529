"""What a checkpoint holds, when it is whole, and the newest one to resume from.

    checkpoint-120/
        complete.json               the completion mark, written last: step, and the size of every file
        trainer_state.json          step, position, history, best (transformers' TrainerState)
        scheduler.json, scaler.json the learning-rate schedule's state, and fp16's loss scale
        training_state.safetensors  per trainable parameter NAME: NAME|weight in fp32, and the optimizer's state as it
                                    holds it: NAME|exp_avg, NAME|exp_avg_sq, NAME|step ...
        adapter_model.safetensors   the same weights as PEFT loads them, with adapter_config.json (full: the model)
        global_step120/             full under DeepSpeed, instead of training_state: DeepSpeed's own files

A checkpoint is written as checkpoint-120.partial and renamed once its mark is there, so that a folder called
checkpoint-N is whole unless something outside tore it; the mark's sizes tell. Random states are not held: every step
draws from a seed of its own (carelm.callbacks.StepSeed).
"""

import contextlib
import copy
import errno
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from carelm.ranks import say, share
from carelm.recipe import UserError, write_whole

if TYPE_CHECKING:
    from carelm.trainer import Trainer

MARK = "complete.json"
STATE = "training_state.safetensors"
DEEPSPEED_SCALE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("checkpoint-"))


def find_checkpoints(output_dir: Path) -> list[Path]:
    """The folders called checkpoint-N, oldest first, whole or not."""
    found = [p for p in output_dir.glob("checkpoint-*") if p.is_dir() and p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=step_of)


def what_is_torn(folder: Path) -> str | None:
    """Why a checkpoint is not whole, or None for one that is."""
    try:
        mark = json.loads((folder / MARK).read_text())
    except OSError:
        return f"it has no {MARK}"
    except json.JSONDecodeError:
        return f"its {MARK} is cut off"
    for name, size in mark["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, not {size}"
    return None


def newest_whole(output_dir: Path) -> Path | None:
    """The whole checkpoint of the highest step; torn ones are named and left where they are.

    Raises:
        UserError: where there are checkpoints and none is whole.
    """
    checkpoints = find_checkpoints(output_dir)
    for folder in reversed(checkpoints):
        torn = what_is_torn(folder)
        if torn is None:
            return folder
        say(f"{folder} is not whole ({torn}); it is skipped and kept")
    if checkpoints:
        raise UserError(
            f"output_dir: none of the {len(checkpoints)} checkpoints in {output_dir} is whole ({checkpoints[-1].name}: "
            f"{what_is_torn(checkpoints[-1])}); --restart begins anew, the old folder is renamed and kept"
        )
    return None


def read_mark(folder: Path) -> dict[str, Any]:
    return json.loads((folder / MARK).read_text())


def save(trainer: "Trainer", folder: Path, about: dict[str, Any]) -> None:
    """Writes one whole checkpoint or none; every rank calls it.

    Args:
        trainer: the running trainer.
        folder: the checkpoint's final name.
        about: what the mark says besides the files.

    Raises:
        UserError: where the disk is full or refuses; what was whole before stays so.
    """
    partial = folder.with_name(folder.name + ".partial")
    state = None if trainer.keeps_native_state else gather_state(trainer)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.recipe.method == "full" else None
    failure = None
    if trainer.is_world_process_zero():
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            trainer.state.save_to_json(str(partial / "trainer_state.json"))
            (partial / "scheduler.json").write_text(json.dumps(trainer.lr_scheduler.state_dict()))
            (partial / "scaler.json").write_text(json.dumps(_scaler_state(trainer)))
            if state is not None:
                save_file(state, partial / STATE)
            save_weights(trainer.model, state, weights, partial)
        except (OSError, SafetensorError) as error:
            failure = str(error)
    failure = share(failure, trainer.args.device)
    if failure is None and trainer.keeps_native_state:
        try:
            trainer.model_wrapped.save_checkpoint(str(partial))
            trainer.accelerator.wait_for_everyone()
            settle(partial.rglob("*"))  # what another node wrote is on its way to the disk from there
        except (OSError, RuntimeError) as error:  # the other ranks wait in DeepSpeed's barrier: this one ends the job
            raise UserError(
                f"output_dir: {folder.name} could not be saved ({error}); make room and run again"
            ) from None
        trainer.accelerator.wait_for_everyone()
    if failure is None and trainer.is_world_process_zero():
        try:
            files = {str(p.relative_to(partial)): p.stat().st_size for p in sorted(partial.rglob("*")) if p.is_file()}
            settle([*partial.rglob("*"), partial])
            write_whole(partial / MARK, json.dumps({**about, "files": files}, indent=1))
            _sync(partial)
            if folder.exists():  # the torn one of an earlier try at this step
                folder.rename(folder.with_name(f"{folder.name}.torn-{os.getpid()}"))
            partial.rename(folder)
            _sync(folder.parent)
        except OSError as error:
            failure = str(error)
    failure = share(failure, trainer.args.device)
    if failure is not None:
        if trainer.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        whole = [p for p in find_checkpoints(folder.parent) if what_is_torn(p) is None]
        left = f"{whole[-1]} is whole and stays" if whole else "there was none before it"
        raise UserError(f"output_dir: {folder.name} could not be saved ({failure}); {left}; make room and run again")


def settle(paths: Iterable[Path]) -> None:
    """Files and folders are on the disk from here on, whatever happens to the node; safetensors files, which only their
    owner can read, get the usual permissions."""
    os.umask(umask := os.umask(0))
    for path in paths:
        if path.suffix == ".safetensors":
            with contextlib.suppress(OSError):
                path.chmod(0o666 & ~umask)
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):  # others: a file system that does not do this
            raise
    finally:
        os.close(descriptor)


def save_weights(model: torch.nn.Module, state: dict | None, weights: dict | None, folder: Path) -> None:
    """The trained weights as their library loads them: an adapter for PEFT, or a model for transformers (rank 0)."""
    if weights is not None:
        model.save_pretrained(folder, state_dict=weights)
        return
    trained = {key.removesuffix("|weight"): tensor for key, tensor in state.items() if key.endswith("|weight")}
    config = model.peft_config["default"]
    if config.is_prompt_learning:
        # PEFT's own way runs the prompt encoder, which under ZeRO-3 hangs or dies on rank 0 alone.
        tensors = {"prompt_embeddings": trained["prompt_encoder.default.embedding.weight"]}
    else:
        from peft import get_peft_model_state_dict

        tensors = get_peft_model_state_dict(model, state_dict=trained, save_embedding_layers=False)
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    config = copy.copy(config)
    config.inference_mode = True
    config.save_pretrained(str(folder))


def remove_old(output_dir: Path, keep: int | None, best_step: int | None) -> None:
    """Leaves the newest `keep` whole checkpoints and the best one; torn ones are not touched.

    One that goes is renamed first, so that a kill in the middle leaves none that looks torn; what the disk does not let go now
    (NFS keeps files that are open somewhere) goes at the next save.
    """
    if keep is None:
        return
    whole = [p for p in find_checkpoints(output_dir) if what_is_torn(p) is None]
    for folder in whole[: -max(keep, 1)]:
        if step_of(folder) != best_step:
            aside = folder.with_name(f".{folder.name}.removed")
            shutil.rmtree(aside, ignore_errors=True)  # of an earlier run to this step
            folder.rename(aside)
    for folder in output_dir.glob(".checkpoint-*.removed"):
        shutil.rmtree(folder, ignore_errors=True)


# The consolidated training state


def trainable(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def gather_state(trainer: "Trainer") -> dict[str, torch.Tensor]:
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


def _parameter_state(trainer: "Trainer", parameter: torch.nn.Parameter) -> Iterator[tuple[str, torch.Tensor]]:
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


def _inner_optimizer(trainer: "Trainer") -> torch.optim.Optimizer:
    """The optimizer that does the arithmetic, out of accelerate's and DeepSpeed's wrappers."""
    optimizer = trainer.optimizer
    while getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
    return optimizer


def read_state(folder: Path, suffix: str = "") -> dict[str, torch.Tensor]:
    """The tensors of a consolidated state whose keys end with `suffix`, on the CPU."""
    with safe_open(folder / STATE, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys() if key.endswith(suffix)}


def load_state(trainer: "Trainer", folder: Path) -> None:
    """Puts a consolidated state into model and optimizer, whatever wrote it and on however many ranks.

    Raises:
        UserError: where the checkpoint's parameters or optimizer are not this run's.
    """
    stored = read_state(folder)
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


def load_schedule(trainer: "Trainer", folder: Path) -> None:
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


def _scaler_state(trainer: "Trainer") -> dict[str, float]:
    """fp16's loss scale and its counters: of torch's GradScaler, or of DeepSpeed's loss scaler; else empty."""
    if trainer.accelerator.scaler is not None:
        return trainer.accelerator.scaler.state_dict()
    scaler = _dynamic_loss_scaler(trainer)
    return {key: getattr(scaler, key) for key in DEEPSPEED_SCALE} if scaler is not None else {}


def _load_scaler(trainer: "Trainer", state: dict[str, float]) -> None:
    """A scale that another kind of scaler wrote is left out: it finds its own within a few steps."""
    if trainer.accelerator.scaler is not None:
        if "scale" in state:
            trainer.accelerator.scaler.load_state_dict(state)
    elif (scaler := _dynamic_loss_scaler(trainer)) is not None and "cur_scale" in state:
        vars(scaler).update(state)


def _dynamic_loss_scaler(trainer: "Trainer") -> Any:
    """DeepSpeed's fp16 loss scaler; None without DeepSpeed and in other precisions."""
    scaler = getattr(trainer.model_wrapped.optimizer, "loss_scaler", None) if trainer.is_deepspeed_enabled else None
    return scaler if getattr(scaler, "dynamic", False) else None


def load_weights(trainer: "Trainer", stored: dict[str, torch.Tensor], folder: Path) -> None:
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

        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0, enabled=trainer.zero_stage == 3):
            parameter.data.copy_(weight)  # safe_set_full_fp32_param leaves the live weights alone
        safe_set_full_fp32_param(parameter, weight)


def _load_deepspeed_optimizer(trainer: "Trainer", stored: dict[str, torch.Tensor]) -> None:
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
    flats = zero.fp32_partitioned_groups_flat if trainer.zero_stage == 3 else zero.single_partition_of_fp32_groups
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
