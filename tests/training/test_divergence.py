"""A run whose numbers are no longer finite ends at that step, and leaves what was saved before."""

import shutil
import types

import pytest
import torch
from accelerate import Accelerator
from launching import script
from safetensors.torch import load_file, save_file

from carelm.errors import UserError
from carelm.training import checkpoints, state
from carelm.training.divergence import Divergence, check_weights

KEYS = ("--max_steps", 6, "--max_samples", 24, "--max_eval_samples", 8, "--global_batch_size", 4, "--num_sample_answers", 0,
        "--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", 1)  # fmt: skip


def only_error(done):
    assert done.returncode == 2, done.stderr[-3000:]
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_run_that_diverges_ends_at_that_step_and_the_good_checkpoint_stays(tmp_path):
    done = script("--output_dir", tmp_path / "run", *KEYS, "--learning_rate", "1e38", "--max_grad_norm", 0)
    line = only_error(done)
    assert "learning_rate: " in line and "at step 2" in line and "1e+38" in line and "set max_grad_norm: 1.0" in line
    newest = checkpoints.newest_whole(tmp_path / "run")
    assert newest.name == "checkpoint-1"
    assert all(tensor.isfinite().all() for tensor in load_file(newest / state.STATE).values())
    assert {p.name for p in (tmp_path / "run").iterdir() if p.is_file()} <= {"recipe.yaml", ".lock"}


def test_a_base_that_holds_nan_is_named_and_not_the_learning_rate(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    tensors = load_file(tmp_path / "base/model.safetensors")
    for name in [name for name in tensors if name.endswith("norm.weight")][:2]:
        tensors[name][3] = torch.nan
    save_file(tensors, tmp_path / "base/model.safetensors", {"format": "pt"})
    done = script("--output_dir", tmp_path / "run", "--model_name_or_path", tmp_path / "base", *KEYS)
    line = only_error(done)
    assert "model_name_or_path: the eval loss is nan at step 0: 2 of 38 tensors" in line and "input_layernorm" in line


class Run:
    """One weight under accelerate, on a CPU; torch's own scaler stands in for that of a GPU."""

    def __init__(self, scale=None):
        self.accelerator = Accelerator(cpu=True)
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
        self.model = torch.nn.Linear(2, 1)
        _, self.optimizer = self.accelerator.prepare(self.model, torch.optim.SGD(self.model.parameters(), lr=0.1))
        self.state = types.SimpleNamespace(global_step=0)
        self.args = types.SimpleNamespace(fp16=scale is not None, device=torch.device("cpu"), learning_rate=0.1,
                                          max_grad_norm=1.0)  # fmt: skip
        self.recipe = types.SimpleNamespace(model={"model_name_or_path": "a base"})
        self.is_deepspeed_enabled = False
        self.divergence = Divergence()

    def step(self, factor=1.0, looks=1):
        loss = self.model(torch.ones(1, 2)).sum()
        self.accelerator.backward(loss)
        for parameter in self.model.parameters():
            parameter.grad *= factor
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.global_step += 1
        for _ in range(looks):
            self.divergence.look(self, loss.detach(), norm)


def test_a_step_that_the_scaler_skips_is_counted_once_and_is_no_fault():
    run = Run(scale=8.0)
    for factor in (1.0, float("inf"), 1.0, float("nan"), 1.0):
        run.step(factor, looks=2)  # the end of an epoch looks again
    assert run.divergence.skipped_steps == 2


def test_twenty_skipped_steps_in_a_row_end_the_run():
    run = Run(scale=2.0**40)
    run.step(float("inf"))
    run.step()
    for _ in range(19):
        run.step(float("inf"))
    with pytest.raises(
        UserError, match="precision: fp16 has skipped 20 steps in a row at step 22: a base does not train"
    ):
        run.step(float("inf"))


def test_a_step_that_is_skipped_at_the_lowest_scale_ends_the_run():
    run = Run(scale=4.0)
    run.step(float("inf"))
    run.step(float("inf"))
    with pytest.raises(UserError, match="at a loss scale of 1 at step 3"):
        run.step(float("inf"))
    assert run.divergence.skipped_steps == 3


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_outside_fp16_a_gradient_that_is_not_finite_ends_the_run(factor):
    run = Run()
    run.step()
    with pytest.raises(
        UserError, match="learning_rate: the norm of the gradient is .* at step 2, the run has diverged"
    ):
        run.step(factor)


@pytest.mark.parametrize(
    "loss, norm, found",
    [(torch.nan, 1.0, "the loss is nan"), (torch.inf, 1.0, "the loss is inf"), (1.0, -1.0, "the norm of the gradient is -1"),
     (1.0, None, "trained weights are not finite")],
)  # fmt: skip
def test_what_is_not_finite_is_named(loss, norm, found):
    run = Run()
    run.step()
    run.state.global_step = 7
    run.model.weight.data[0, 0] = torch.inf
    with pytest.raises(UserError, match=f"{found}.* at step 7, the run has diverged"):
        run.divergence.look(run, torch.tensor(loss), norm)


def test_weights_that_are_not_finite_are_not_saved():
    run = Run()
    check_weights(run)
    run.model.bias.data[0] = torch.nan
    with pytest.raises(
        UserError, match="learning_rate: trained weights are not finite .1 tensors, such as bias. at step 1"
    ):
        run.state.global_step = 1
        check_weights(run)


def test_a_checkpoint_that_holds_nan_is_not_gone_on_from(tmp_path):
    save_file({"a|weight": torch.tensor([1.0, torch.nan]), "a|step": torch.tensor(3.0)}, tmp_path / state.STATE)
    with pytest.raises(
        UserError, match="1 of its 2 tensors hold NaN or infinity, such as a.weight; remove that folder"
    ):
        state.load_state(None, tmp_path)
