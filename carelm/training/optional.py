"""What only some recipes need, tried before any weights load: optimizers, schedules, trackers and their packages."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.utils.checkpoint
import transformers
from accelerate.utils import TorchDynamoPlugin
from transformers import get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from carelm.errors import UserError

if TYPE_CHECKING:
    from trl import SFTConfig

OF_TRANSFORMERS = ("every_n_layers", "offload")  # the others go to torch.utils.checkpoint
FOLLOW_THE_EVAL_LOSS = ("reduce_lr_on_plateau", "greedy")
LARGEST_IN_32_BITS = 4096  # elements; bitsandbytes holds the state of smaller tensors in 32 bits


def check_optional(arguments: "SFTConfig", model: torch.nn.Module) -> None:
    """Makes the run's trackers, takes steps of its optimizer and schedule on a throwaway weight.

    Args:
        arguments: of the run.
        model: on the meta device; some optimizers are made for a model.

    Raises:
        UserError: for what is not installed here, does not work on this machine, or lacks an argument.
    """
    for tracker in arguments.report_to:
        with _named("report_to", tracker):
            for callback in get_reporting_integration_callbacks([tracker]):
                callback()
    if arguments.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise UserError("use_liger_kernel: the package is not installed; pip install liger-kernel, or leave it out")
    if arguments.use_liger_kernel and not torch.cuda.is_available():
        raise UserError("use_liger_kernel: its kernels are for GPUs, and this machine has none; leave it out")
    weight = torch.nn.Parameter(torch.zeros(LARGEST_IN_32_BITS + 1, device=arguments.device))
    weight.grad = torch.zeros_like(weight)
    with _named("optim", arguments.optim.value):
        kind, settings = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments, model)
        if not {"params", "model", "optimizer_dict"} & settings.keys():  # of the model
            kind([weight], **settings).step()
    schedule = arguments.lr_scheduler_type.value
    with _named("lr_scheduler_type, lr_scheduler_kwargs", schedule):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
        steps = arguments.max_steps if arguments.max_steps > 0 else 1000
        scheduler = get_scheduler(
            schedule, optimizer, arguments.get_warmup_steps(steps), steps, arguments.lr_scheduler_kwargs
        )
        optimizer.step()
        if schedule not in FOLLOW_THE_EVAL_LOSS:
            scheduler.step()
    if arguments.torch_compile:  # a function of one line shows whether there is a backend, and a compiler
        with _named("torch_compile", f"backend {arguments.torch_compile_backend}"):
            plugin = TorchDynamoPlugin(backend=arguments.torch_compile_backend, mode=arguments.torch_compile_mode)
            torch.compile(torch.sin, **plugin.to_kwargs())(weight)
    if arguments.gradient_checkpointing and arguments.gradient_checkpointing_kwargs:
        settings = {k: v for k, v in arguments.gradient_checkpointing_kwargs.items() if k not in OF_TRANSFORMERS}
        with _named("gradient_checkpointing_kwargs", str(settings)):
            torch.utils.checkpoint.checkpoint(torch.sin, weight, **settings)


@contextmanager
def _named(key: str, value: str) -> Iterator[None]:
    """Whatever is raised inside becomes the line that names the key."""
    try:
        yield
    except Exception as error:  # each of these libraries raises its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{key}: {value} cannot be used here ({reason}); install or set what it needs, or set another"
        ) from None
