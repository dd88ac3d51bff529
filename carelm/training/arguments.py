"""A recipe -> the arguments of TRL and transformers, with what CareLM derives."""

import os

import torch
from trl import SFTConfig

from carelm.errors import UserError
from carelm.models.checkpointing import may_reenter
from carelm.models.precision import Precision
from carelm.ranks import say, world_size
from carelm.recipe import Recipe, micro_batch_size
from carelm.training.prepared import Prepared


def _leave_out_shm_comm() -> None:
    """DeepSpeed compiles an all-reduce over shared memory for CPU ranks, which its inference alone uses (comm/torch.py): a
    minute at the first start, and where that is killed a lock that every later start waits for."""
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_training_args(recipe: Recipe, prepared: Prepared, precision: Precision, shape: torch.nn.Module) -> SFTConfig:
    """TRL's arguments from the recipe, with the keys that CareLM derives; joins the process group.

    Args:
        shape: the base on the meta device.

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
        "push_to_hub": False,  # the finished folder is pushed by carelm.training.hub
        "disable_tqdm": True,  # carelm.training.callbacks draws the bar
        "restore_callback_states_from_checkpoint": True,
        "remove_unused_columns": False,
        "log_level_replica": "error",
        "save_total_limit": None,  # carelm.training.checkpoints removes old ones; transformers would take the newest as well
        "ddp_find_unused_parameters": values.get("ddp_find_unused_parameters", False),
    }
    is_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    is_alone = world_size() == 1 and not is_deepspeed and not values.get("torch_compile")
    if is_alone and values.get("gradient_checkpointing_kwargs") is None and may_reenter(shape):
        # The graph of a block is made once and not twice, which counts where a GPU waits for its processor.
        derived["gradient_checkpointing_kwargs"] = {"use_reentrant": True}
    if is_deepspeed and not torch.cuda.is_available():
        _leave_out_shm_comm()  # one rank alone would compile it too
    if world_size() > 1 and not torch.cuda.is_available():
        derived["ddp_backend"] = "gloo"  # without it accelerate takes every rank for the only one
        if not is_deepspeed:
            derived["use_cpu"] = True  # without it accelerate makes no DDP of CPU ranks: each would train for itself
    # transformers begins with what the launcher says, which is the machine's default; the recipe decides.
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no" if precision.name == "fp32" else precision.name
    if precision.name == "bf16" and not torch.cuda.is_available():
        derived["bf16"] = False  # with it transformers wants use_cpu, and then accelerate would not start DeepSpeed
    try:
        arguments = SFTConfig(**{**values, **derived})
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"recipe {recipe.name}: {' '.join(str(error).split())}") from None
    arguments.bf16 = precision.name == "bf16"
    # carelm.training.callbacks writes TensorBoard's events; transformers has made `all` the names of what is installed.
    arguments.report_to = [tracker for tracker in arguments.report_to if tracker not in ("tensorboard", "none")]
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # else nn.DataParallel, and a loss times the number of GPUs
        say("one process uses one of the visible GPUs; accelerate_configs/multi_gpu.yaml or zero2.yaml use more")
    if arguments.world_size != world_size():
        raise UserError(
            f"num_processes: {world_size()} ranks were started and only {arguments.world_size} found each other; name a "
            "--config_file from accelerate_configs/"
        )
    return arguments
