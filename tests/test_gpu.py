"""What only a CUDA device can show, with real launches; elsewhere everything here is skipped with the reason.

    python -m pytest -o addopts= -n 6 -q tests/test_gpu.py -k "not 8b"     # six launches at a time

The launches go through benchmarks/timed.py, which writes down from the outside each step's loss and memory, and at the
end the dtype of every tensor that there is.
"""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

PROJECT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(PROJECT / "benchmarks"), str(PROJECT / "tests/models")]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch sees none on this machine"),
]


def has_bf16() -> bool:
    return torch.cuda.get_device_capability() >= (8, 0)


def launch(tmp_path: Path, accelerate_file: str, *arguments: str) -> tuple[list[float], dict[str, list[str]], dict]:
    """QLoRA on the demo for 12 steps on one GPU: (losses, dtypes, train_metrics)."""
    from launches import accelerate, run
    from timed import read_times

    times, output_dir = tmp_path / "times.jsonl", tmp_path / "output"
    command = accelerate(
        PROJECT / f"accelerate_configs/{accelerate_file}.yaml",
        PROJECT / "benchmarks/timed.py",
        "--times", times, PROJECT / "train/sft.py",
        "--output_dir", output_dir, "--max_steps", 12, "--max_samples", 192, "--max_eval_samples", 32,
        "--learning_rate", "5e-3", "--num_sample_answers", 1, "--report_to", "none", *arguments,
        num_processes=1,
    )  # fmt: skip
    environment = {"CARELM_CACHE": str(tmp_path / "cache"), "CUDA_VISIBLE_DEVICES": "0"}
    outcome = run(command, environment, 600)
    assert outcome.status == 0, outcome.stderr[-4000:]
    _, losses, dtypes = read_times(times)
    assert len(losses) == 12
    return (
        [losses[step] for step in sorted(losses)],
        dtypes,
        json.loads((output_dir / "train_metrics.json").read_text()),
    )


def assert_falling(losses: list[float], metrics: dict) -> None:
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-3:]) < sum(losses[:3])
    assert metrics["eval_loss"] < metrics["eval_loss_before"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_4_bits_has_the_gradients_of_the_weight_that_its_bits_stand_for(dtype):
    from test_lora import assert_exact

    if dtype == torch.bfloat16 and not has_bf16():
        pytest.skip("needs a GPU of compute capability 8.0 or newer")
    assert_exact(dtype, "cuda")


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)])
def test_a_norm_as_one_operation_has_the_output_and_gradient_of_the_models_own(dtype, most):
    from test_norms import assert_computes_as_its_own
    from transformers import Qwen3Config, Qwen3ForCausalLM

    if dtype == torch.bfloat16 and not has_bf16():
        pytest.skip("needs a GPU of compute capability 8.0 or newer")
    assert_computes_as_its_own((Qwen3ForCausalLM, Qwen3Config), 9, dtype, most, "cuda")


def test_fp16_trains_as_on_a_t4_with_fp32_trainable_weights_and_no_bf16_tensor(tmp_path):
    losses, dtypes, metrics = launch(tmp_path, "gpu", "--precision", "fp16")
    assert metrics["precision"] == "fp16"
    assert dtypes["trainable"] == ["float32"]
    assert dtypes["optimizer"] == ["float32"]
    assert dtypes["quantized"] == ["float16"]
    assert not [where for where, kinds in dtypes.items() if "bfloat16" in kinds], dtypes
    assert_falling(losses, metrics)


def test_auto_precision_is_bf16_from_compute_capability_8_and_fp16_below(tmp_path):
    losses, _, metrics = launch(tmp_path, "gpu", "--precision", "auto", "--gradient_checkpointing", "true")
    assert_falling(losses, metrics)
    assert metrics["precision"] == ("bf16" if has_bf16() else "fp16")


def test_bf16_is_refused_where_it_is_only_emulated(tmp_path):
    if has_bf16():
        pytest.skip("needs a GPU below compute capability 8.0")
    command = [sys.executable, "train/sft.py", "--precision", "bf16", "--output_dir", str(tmp_path / "output")]
    environment = os.environ | {"CARELM_CACHE": str(tmp_path / "cache")}
    refused = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120)
    assert refused.returncode == 2
    assert "error: precision: bf16 needs compute capability 8.0" in refused.stderr
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("accelerate_file, zero_stage", [("gpu", 0), ("zero2", 2), ("zero3", 3)])
def test_bf16_qlora_trains_on_one_gpu(tmp_path, accelerate_file, zero_stage):
    if not has_bf16():
        pytest.skip("needs a GPU of compute capability 8.0 or newer")
    losses, _, metrics = launch(tmp_path, accelerate_file, "--precision", "bf16")
    assert (metrics["precision"], metrics["zero_stage"], metrics["world_size"]) == ("bf16", zero_stage, 1)
    assert_falling(losses, metrics)


@pytest.mark.parametrize("accelerate_file", ["gpu", "zero2"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_a_run_on_a_gpu_goes_on_from_its_checkpoint(tmp_path, accelerate_file, precision):
    """torch's fused Adam keeps its step count on the GPU, fp16 has a loss scale: both must come back."""
    import launching

    keys = ("--output_dir", tmp_path / "run", *launching.TWELVE_STEPS, "--precision", precision)
    config_file = PROJECT / f"accelerate_configs/{accelerate_file}.yaml"
    one = {"config_file": config_file, "num_processes": 1, "CUDA_VISIBLE_DEVICES": "0"}
    launching.launch(*keys, **one)
    whole = launching.losses(tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-12")
    (tmp_path / "run/train_metrics.json").unlink()
    done = launching.launch(*keys, **one)
    assert f"going on from {tmp_path / 'run' / 'checkpoint-6'}" in done.stderr
    assert launching.losses(tmp_path / "run") == pytest.approx(whole, rel=1e-2 if precision == "fp16" else 1e-3)


def test_an_8b_shape_trains_at_length_1024_in_fp16_within_14_5_gib(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--only", "c", "--budget", "1800"]
    command += ["--folder", str(tmp_path), "--output", str(tmp_path / "gpu.json")]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=1900)
    assert done.returncode == 0, done.stderr[-4000:]
    [cell] = json.loads((tmp_path / "gpu.json").read_text())["cells"]
    assert cell["result"] == "works", cell
    result, *_ = cell["runs"]
    assert result["peak_reserved_gib"] <= 14.5
    assert result["dtypes"]["trainable"] == ["float32"]
    assert all(math.isfinite(loss) for loss in result["losses"])
    assert sum(result["losses"][-4:]) < sum(result["losses"][:4])
