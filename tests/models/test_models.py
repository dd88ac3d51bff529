"""Parameter counts, precision and the guards around weights; no training."""

import json
import os
import shutil
import types

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from carelm.errors import UserError
from carelm.models import adapters
from carelm.models.base import base_fingerprint, count_parameters, load_base
from carelm.models.precision import Precision, choose_precision
from carelm.recipe_file import load_recipe
from carelm.training.arguments import make_training_args

LLAMA3_8B = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
TINYLLAMA = LlamaConfig(
    vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4,
)  # fmt: skip
QV = ("--lora_target_modules", "q_proj", "v_proj")


@pytest.mark.parametrize(
    "config, keys, trainable, total, percent",
    [
        (LLAMA3_8B, ("--lora_r", "16"), 41_943_040, 8_072_204_288, "0.52"),
        (TINYLLAMA, ("--lora_r", "8", *QV), 1_126_400, 1_101_174_784, "0.1023"),
        (TINYLLAMA, ("--lora_r", "4", *QV), 563_200, 1_100_611_584, "0.0512"),
        (TINYLLAMA, ("--method", "prompt_tuning", "--num_virtual_tokens", "10"), 20_480, 1_100_068_864, "0.0019"),
        (TINYLLAMA, ("--method", "prompt_tuning", "--num_virtual_tokens", "20"), 40_960, 1_100_089_344, "0.0037"),
    ],
)
def test_parameter_counts_are_the_published_ones(config, keys, trainable, total, percent):
    recipe = load_recipe(["--config", "recipes/demo.yaml", *keys], usage="")
    with torch.device("meta"):
        model = adapters.add_adapter(AutoModelForCausalLM.from_config(config), recipe)
    assert count_parameters(model) == (trainable, total)
    digits = len(percent.split(".")[1])
    assert f"{100 * trainable / total:.{digits}f}" == percent


def test_a_4bit_base_counts_like_the_whole_one(base):
    recipe = load_recipe(["--config", "recipes/demo.yaml"], usage="")
    quantised = load_base(recipe, Precision("fp32", "test"))
    whole = AutoModelForCausalLM.from_pretrained(base)
    assert count_parameters(quantised)[1] == sum(p.numel() for p in whole.parameters())


def test_no_4bit_layer_is_repacked_on_a_cpu(base, monkeypatch):
    """Where the CPU has AVX512-BF16, as is pretended here."""
    import bitsandbytes.nn.modules
    from bitsandbytes.nn import Linear4bit

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    assert Linear4bit(8, 8).support_avx512bf16_for_cpu
    recipe = load_recipe(["--config", "recipes/demo.yaml"], usage="")
    model = load_base(recipe, Precision("fp32", "test"))
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert layers and not any(m.support_avx512bf16_for_cpu for m in layers)


def change_config(base, folder, **changes):
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return load_recipe(["--config", "recipes/demo.yaml", "--model_name_or_path", str(folder)], usage="")


def test_a_base_that_is_quantised_already_is_named_as_what_it_is(base, tmp_path):
    held = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    recipe = change_config(base, tmp_path / "base", quantization_config=held)
    adapters.check_base(recipe)
    recipe.model["load_in_4bit"] = False
    with pytest.raises(UserError, match="is quantised already .bitsandbytes.; set load_in_4bit: true"):
        adapters.check_base(recipe)
    recipe = change_config(base, tmp_path / "gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match="gptq.; take its original in whole weights"):
        adapters.check_base(recipe)


def test_a_base_whose_loss_is_a_mean_per_batch_is_refused(monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    with pytest.raises(UserError, match="LlamaForCausalLM takes a mean over each batch"):
        adapters.check_base(load_recipe(["--config", "recipes/demo.yaml"], usage=""))


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_recipe_decides_the_precision_and_not_the_launchers_default(monkeypatch, name):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16" if name == "fp32" else "fp16")
    recipe = load_recipe(["--config", "recipes/demo.yaml"], usage="")
    prepared = types.SimpleNamespace(validation=[])
    arguments = make_training_args(recipe, prepared, Precision(name, "test"))
    assert arguments.mixed_precision == os.environ["ACCELERATE_MIXED_PRECISION"] == {"fp32": "no"}.get(name, name)


def test_early_stopping_without_validation_rows_is_refused():
    recipe = load_recipe(["--config", "recipes/demo.yaml", "--early_stopping_patience", "2"], usage="")
    with pytest.raises(UserError, match="early_stopping_patience: .* set validation_fraction"):
        make_training_args(recipe, types.SimpleNamespace(validation=None), Precision("fp32", "test"))


@pytest.mark.parametrize(
    "capability, requested, chosen", [((7, 5), "auto", "fp16"), ((8, 0), "auto", "bf16"), ((9, 0), "auto", "bf16"),
                                      ((7, 5), "fp32", "fp32"), ((9, 0), "fp16", "fp16")]
)  # fmt: skip
def test_precision_follows_the_compute_capability(monkeypatch, capability, requested, chosen):
    """A T4 (7.5) says that it supports bf16, and emulates it."""
    pretend_gpu(monkeypatch, capability)
    precision = choose_precision(requested)
    assert precision.name == chosen and precision.reason


def test_bf16_on_a_t4_is_refused(monkeypatch):
    pretend_gpu(monkeypatch, (7, 5))
    with pytest.raises(UserError, match="compute capability 8.0"):
        choose_precision("bf16")


def pretend_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def test_the_fingerprint_of_a_base_changes_with_its_weights(base, tmp_path):
    import shutil

    copy = shutil.copytree(base, tmp_path / "base")
    assert base_fingerprint(str(copy)) == base_fingerprint(str(base))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(weights))
    assert base_fingerprint(str(copy)) != base_fingerprint(str(base))
