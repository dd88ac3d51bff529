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
draws from a seed of its own (carelm.training.callbacks.StepSeed).
"""

import contextlib
import copy
import errno
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file

from carelm.errors import UserError
from carelm.files import write_whole
from carelm.ranks import say, share
from carelm.training.checkpoint_folders import MARK, find_checkpoints, step_of, what_is_torn
from carelm.training.state import STATE, gather_state, is_full, is_native, scaler_state


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


def save(trainer: transformers.Trainer, folder: Path, about: dict[str, Any]) -> None:
    """Writes one whole checkpoint or none; every rank calls it.

    Args:
        trainer: the running trainer.
        folder: the checkpoint's final name.
        about: what the mark says besides the files.

    Raises:
        UserError: where the disk is full or refuses; what was whole before stays so.
    """
    partial = folder.with_name(folder.name + ".partial")
    state = None if is_native(trainer) else gather_state(trainer)
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_full(trainer) else None
    failure = None
    if trainer.is_world_process_zero():
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            trainer.state.save_to_json(str(partial / "trainer_state.json"))
            (partial / "scheduler.json").write_text(json.dumps(trainer.lr_scheduler.state_dict()))
            (partial / "scaler.json").write_text(json.dumps(scaler_state(trainer)))
            if state is not None:
                save_file(state, partial / STATE)
            save_weights(trainer.model, state, weights, partial)
        except (OSError, SafetensorError) as error:
            failure = str(error)
    failure = share(failure, trainer.args.device)
    if failure is None and is_native(trainer):
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
