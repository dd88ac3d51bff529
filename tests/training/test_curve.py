"""The same recipe on every rung: the same curve, the same adapter, and under ZeRO-3 a base that is really sharded."""

import json
import shutil

import pytest
import torch
from launching import (
    PROBE,
    PROJECT,
    TWELVE_STEPS,
    eval_losses,
    launch,
    losses,
    relative_distance,
    script,
    torchrun,
    zero3_sharding_everything,
)
from safetensors.torch import load_file

RUNGS = ("accumulated", "torchrun2", "torchrun4", "zero1", "zero2", "zero3")


@pytest.fixture(scope="module")
def rungs(tmp_path_factory):
    """Twelve steps of the demo's recipe on one process, with the batch split in two, on two and four ranks without DeepSpeed,
    and on two at each stage."""
    folder = tmp_path_factory.mktemp("rungs")

    def run(name, *keys, config_file=None):
        (folder / f"probe-{name}").mkdir()
        words = ("--output_dir", folder / name, *TWELVE_STEPS, *keys)
        variables = {"PROBE": str(folder / f"probe-{name}")}
        if config_file is None:
            return script(*words, file=PROBE, check=True, **variables)
        return launch(*words, config_file=config_file, script=PROBE, **variables)

    run("one")
    # No evaluation in mid-run here: one that changed the weights or the random draws would show in the losses.
    run("accumulated", "--per_device_train_batch_size", 2, "--eval_strategy", "no", "--eval_on_start", "false",
        "--per_device_eval_batch_size", 7, "--gradient_checkpointing", "true")  # fmt: skip
    for number in (2, 4):
        torchrun(number, "--output_dir", folder / f"torchrun{number}", *TWELVE_STEPS)
    run("zero1", config_file=PROJECT / "accelerate_configs/cpu_zero1.yaml")
    run("zero2", config_file=PROJECT / "accelerate_configs/cpu_zero2.yaml")
    run("zero3", "--gradient_checkpointing", "true", config_file=zero3_sharding_everything(folder))
    return folder


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_has_the_losses_of_one_process(rungs, rung):
    one, other = losses(rungs / "one"), losses(rungs / rung)
    assert len(one) == 12
    assert other == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_ends_with_the_adapter_of_one_process(rungs, rung):
    assert relative_distance(rungs / rung, rungs / "one") < 1e-4


@pytest.mark.parametrize("rung", ["torchrun2", "torchrun4", "zero1", "zero2", "zero3"])
def test_the_eval_loss_does_not_depend_on_the_ranks(rungs, rung):
    assert eval_losses(rungs / rung) == pytest.approx(eval_losses(rungs / "one"), rel=1e-5)


def test_the_eval_loss_does_not_depend_on_the_batch(rungs):
    """The accumulated run evaluated seven examples at a time."""
    assert eval_losses(rungs / "accumulated")[12] == pytest.approx(eval_losses(rungs / "one")[12], rel=1e-5)


def test_zero3_shards_the_4bit_base(rungs):
    for rank in (0, 1):
        held = json.loads((rungs / f"probe-zero3/rank-{rank}.json").read_text())
        assert held["whole"] > 1_000_000
        assert held["resident"] <= held["whole"] / 2 + held["persistent"] + 4096, held


@pytest.mark.parametrize("rung", ["one", "zero1", "zero2", "zero3"])
def test_the_adapter_reloads_in_a_new_process_with_the_same_logits(rungs, rung):
    assert_reloads(rungs / rung, rungs / f"probe-{rung}")


def test_a_run_of_two_ranks_goes_on_on_one(rungs, tmp_path):
    run = shutil.copytree(rungs / "zero2", tmp_path / "run")
    (run / "train_metrics.json").unlink()
    (run / "checkpoint-12/complete.json").unlink()  # a torn one: it must be named, skipped and kept
    done = script("--output_dir", run, *TWELVE_STEPS, check=True)
    assert "checkpoint-12 is not whole (it has no complete.json); it is skipped and kept" in done.stderr
    assert f"going on from {run / 'checkpoint-6'}" in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["world_size"] == 1
    assert losses(run) == pytest.approx(losses(rungs / "zero2"), rel=1e-5)
    assert relative_distance(run, rungs / "zero2") < 1e-4
    assert list(run.glob("checkpoint-12.torn-*"))


def test_ranks_with_unlike_numbers_of_chunks_have_the_losses_of_one_process():
    """Without DeepSpeed, under ZeRO-2 and ZeRO-3; a rank with nothing to learn among them."""
    done = torchrun(2, script="tests/models/uneven_ranks.py")
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('["')]
    assert len(found) == 15
    assert [case for case in found if not case[2] < 1e-5] == []


@pytest.mark.long
def test_a_run_of_one_process_goes_on_on_two_ranks_under_zero3(rungs, tmp_path):
    one = rungs / "one"
    run = shutil.copytree(one, tmp_path / "run")
    (run / "train_metrics.json").unlink()
    shutil.rmtree(run / "checkpoint-12")
    done = launch("--output_dir", run, *TWELVE_STEPS, config_file=zero3_sharding_everything(tmp_path))
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert (metrics["world_size"], metrics["zero_stage"]) == (2, 3)
    assert f"going on from {run / 'checkpoint-6'}" in done.stderr
    assert losses(run) == pytest.approx(losses(one), rel=1e-5)
    assert relative_distance(run, one) < 1e-4


@pytest.mark.long
def test_prompt_tuning_goes_on_on_two_ranks_under_zero3_saves_and_reloads(tmp_path):
    keys = ("--method", "prompt_tuning", "--max_samples", 50, "--max_eval_samples", 8, "--max_steps", 4, "--save_steps", 2,
            "--eval_steps", 2, "--num_sample_answers", 1, "--sample_max_new_tokens", 8)  # fmt: skip
    script("--output_dir", tmp_path / "one", *keys, check=True)
    run = shutil.copytree(tmp_path / "one", tmp_path / "run")
    (run / "train_metrics.json").unlink()
    shutil.rmtree(run / "checkpoint-4")
    (tmp_path / "probe").mkdir()
    done = launch("--output_dir", run, *keys, config_file=zero3_sharding_everything(tmp_path), script=PROBE,
                  PROBE=str(tmp_path / "probe"))  # fmt: skip
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics["zero_stage"] == 3 and metrics["world_size"] == 2
    assert f"going on from {run / 'checkpoint-2'}" in done.stderr
    assert losses(run) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    assert metrics["eval_loss"] < metrics["eval_loss_before"]
    assert_reloads(run, tmp_path / "probe")


@pytest.mark.long
def test_bf16_stays_close_on_two_ranks(tmp_path):
    batch = ("--global_batch_size", 8)  # rounding shows less in the mean over more tokens
    keys = ("--precision", "bf16", "--learning_rate", 3e-4, *TWELVE_STEPS[:-2], *batch)
    script("--output_dir", tmp_path / "one", *keys, check=True)
    launch("--output_dir", tmp_path / "two", *keys, config_file=PROJECT / "accelerate_configs/cpu_zero2.yaml")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
    assert relative_distance(tmp_path / "two", tmp_path / "one") < 2e-2


def assert_reloads(run, probe):
    """The saved adapter on a freshly loaded base gives the logits that the training process saw at its end."""
    from peft import PeftModel
    from probe import TOKENS

    from carelm.models.base import load_base
    from carelm.models.precision import Precision
    from carelm.recipe_file import load_recipe

    recipe = load_recipe(["--config", str(run / "recipe.yaml")], usage="")
    model = PeftModel.from_pretrained(load_base(recipe, Precision("fp32", "test")), run).eval()
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
    expected = load_file(probe / "logits.safetensors")["logits"]
    assert torch.allclose(logits[:, -16:], expected[:, -16:], atol=1e-4)
    with model.disable_adapter(), torch.no_grad():
        assert not torch.allclose(model(input_ids=TOKENS).logits, expected[:, -16:], atol=1e-2)
