"""What only some recipes need and is not there, or lacks an argument, is one line before any weights load."""

import types
from contextlib import suppress

import pytest
import torch
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig

from carelm import files
from carelm.errors import UserError
from carelm.models.precision import Precision
from carelm.recipe_file import load_recipe
from carelm.training import arguments, callbacks
from carelm.training.arguments import make_training_args
from carelm.training.optional import check_optional

SCHEDULE_ARGUMENTS = {
    "cosine_with_min_lr": '{"min_lr": 0.0001}',
    "cosine_warmup_with_min_lr": '{"min_lr_rate": 0.1}',
    "warmup_stable_decay": '{"num_decay_steps": 4}',
}


def check(*keys):
    recipe = load_recipe(["--config", "recipes/demo.yaml", *keys], usage="")
    made = make_training_args(
        recipe, types.SimpleNamespace(validation=[]), Precision("fp32", "test"), torch.nn.Module()
    )
    check_optional(made, torch.nn.Sequential(torch.nn.Linear(8, 8, device="meta")))


def works_or_is_one_line(key, *keys):
    """True where it works on this machine; anything but a line that begins with the key goes through."""
    try:
        check(*keys)
        return True
    except UserError as error:
        assert str(error).startswith(key) and "\n" not in str(error)
        return False


@pytest.mark.parametrize(
    "variables, keys, wanted",
    [
        ({}, (), {"use_reentrant": True}),
        ({"WORLD_SIZE": "2"}, (), None),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, (), None),
        ({}, ("--gradient_checkpointing_kwargs", '{"use_reentrant": false}'), {"use_reentrant": False}),
    ],
)
def test_one_process_makes_the_graph_of_a_checkpointed_block_once(monkeypatch, variables, keys, wanted):
    """Several make it twice, in a way that DDP and DeepSpeed take; what the recipe says stays."""
    made = []
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(arguments, "SFTConfig", lambda **values: made.append(values) or SFTConfig(output_dir="unused"))
    monkeypatch.setattr(arguments, "_leave_out_shm_comm", lambda: None)
    recipe = load_recipe(["--config", "recipes/demo.yaml", *keys], usage="")
    with suppress(UserError):  # two ranks are not there
        make_training_args(recipe, types.SimpleNamespace(validation=[]), Precision("fp32", "test"), torch.nn.Module())
    assert made[0].get("gradient_checkpointing_kwargs") == wanted


@pytest.mark.parametrize("name", [member.value for member in OptimizerNames])
def test_every_optimizer_works_or_is_one_line(name):
    works = works_or_is_one_line("optim: ", "--optim", name)
    if name in ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adamw_8bit", "paged_lion_8bit"):
        assert works


@pytest.mark.parametrize("name", [member.value for member in SchedulerType])
def test_every_schedule_works_with_its_arguments_and_is_one_line_without(name):
    if name in SCHEDULE_ARGUMENTS:
        assert not works_or_is_one_line("lr_scheduler_type", "--lr_scheduler_type", name)
        assert works_or_is_one_line("", "--lr_scheduler_type", name, "--lr_scheduler_kwargs", SCHEDULE_ARGUMENTS[name])
    else:
        assert works_or_is_one_line("", "--lr_scheduler_type", name)


@pytest.mark.parametrize("name", [*INTEGRATION_TO_CALLBACK, "wandbb"])
def test_every_tracker_works_or_is_one_line(name):
    works = works_or_is_one_line("report_to: ", "--report_to", name)
    assert works if name == "tensorboard" else name != "wandbb" or not works


@pytest.mark.parametrize(
    "words, here",
    [("all", True), ("tensorboard", True), ("none tensorboard", True), ("none", False), ("[]", False)],
)
def test_tensorboard_is_written_by_ours_alone(words, here):
    recipe = load_recipe(["--config", "recipes/demo.yaml", "--report_to", *words.split()], usage="")
    prepared = types.SimpleNamespace(validation=[], samples=[])
    assert (
        "tensorboard"
        not in make_training_args(recipe, prepared, Precision("fp32", "test"), torch.nn.Module()).report_to
    )
    made = callbacks.make_callbacks(recipe, prepared, None, callbacks.Speed(1, 1.0))
    assert sum(isinstance(callback, callbacks.TensorBoard) for callback in made) == here


@pytest.mark.parametrize(
    "keys, line",
    [
        (("--optim_args", "momentum"), "optim: "),
        (("--report_to", "null"), "report_to: .* write none"),
        (("--logging_nan_inf_filter", "true"), "logging_nan_inf_filter: "),
        (("--adam_beta1", "1.5"), "optim: .* beta"),
        (("--lr_scheduler_kwargs", '{"nonsense": 1}'), "lr_scheduler_type, lr_scheduler_kwargs: cosine .*nonsense"),
        (("--lr_scheduler_type", "greedy", "--eval_strategy", "no"), "greedy requires an eval strategy"),
        (("--use_liger_kernel", "true"), "use_liger_kernel: .* leave it out"),
        (("--torch_compile", "true", "--torch_compile_backend", "none_such"), "torch_compile: backend none_such"),
        (("--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs", '{"none_such": 1}'),
         "gradient_checkpointing_kwargs: .*none_such"),
        (("--label_smoothing_factor", "1.5"), "label_smoothing_factor: 1.5 is not"),
        (("--local-rank=0",), "'local-rank' .* torch.distributed.launch .* torchrun"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_go_together_is_one_line(keys, line):
    with pytest.raises(UserError, match=line):
        check(*keys)


def test_a_user_without_a_home_is_told_of_the_cache(monkeypatch):
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("CARELM_CACHE")
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # KeyError, as for a number without an entry
    with pytest.raises(UserError, match="CARELM_CACHE: this user has no home folder"):
        files.cache()
    monkeypatch.setenv("CARELM_CACHE", "elsewhere")
    with pytest.raises(UserError, match="model_name_or_path: there is no folder ~/base"):
        load_recipe(["--config", "recipes/demo.yaml", "--model_name_or_path", "~/base"], usage="")
