"""An adapter and its base -> one plain checkpoint, one layer at a time, and how far it is from what it was made of.

A quantised base has two merges, which are two functions: onto the whole weights of the base, whose rounding the adapter has
never seen, and onto the dequantised weights that it was trained on.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig, get_peft_model, load_peft_weights
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.quantizers import AutoHfQuantizer

from carelm.chat.chat import Chat
from carelm.errors import UserError
from carelm.files import write_whole
from carelm.models.base import load_config, quantization_config
from carelm.models.precision import DTYPES
from carelm.recipe import Recipe


def merge_weights(recipe: Recipe, adapter: Path, target: Path, onto: str, dtype: str) -> None:
    """Writes the merged weights, config and tokenizer into `target`, a shard of the base at a time.

    Args:
        recipe: names the base and how it was held.
        adapter: the adapter's folder.
        onto: "base" for the whole weights, "quantized" for the dequantised ones.
        dtype: fp32, bf16 or fp16; the sums are made in fp32.

    Raises:
        UserError: where the adapter is of a kind that cannot be merged, or does not fit the base.
    """
    config = load_config(recipe)
    peft_config = PeftConfig.from_pretrained(adapter)
    if peft_config.is_prompt_learning:
        raise UserError(f"--adapter: {adapter} is a trained prompt, which has no weights to merge; serve it with PEFT")
    if getattr(peft_config, "bias", "none") != "none":
        raise UserError(f"--adapter: {adapter} trains biases (bias: {peft_config.bias}), which cannot be merged here")
    if config.tie_word_embeddings and peft_config.modules_to_save:
        raise UserError(
            f"--adapter: {adapter} holds its own {', '.join(peft_config.modules_to_save)}, and the base ties its word "
            "embeddings; such an adapter cannot be merged here"
        )
    with torch.device("meta"):
        plain, to_quantize = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    quantized = _quantized_modules(recipe, to_quantize) if onto == "quantized" else {}
    layers = dict(get_peft_model(plain, peft_config, low_cpu_mem_usage=True).base_model.model.named_modules())
    trained: dict[str, dict[str, torch.Tensor]] = {}  # of each layer, by the name within it
    for name, tensor in load_peft_weights(adapter, device="cpu").items():
        module, kind = _split_name(name.removeprefix("base_model.model."))
        trained.setdefault(module, {})[kind] = tensor
    target.mkdir(parents=True)
    shards = _shards(recipe)
    index: dict[str, Any] = {"metadata": {"total_size": 0}, "weight_map": {}}
    for file in tqdm(shards, desc="merge", unit="shard", dynamic_ncols=True):
        merged = {}
        for name, weight in _tensors(file):
            module, _, kind = name.rpartition(".")
            if kind == "weight" and module in quantized:
                weight = _dequantized(weight, quantized[module], DTYPES[recipe.precision])
            if kind == "weight" and module in trained:
                weight = _merged(layers[module], weight, trained.pop(module))
            merged[name] = weight.to(DTYPES[dtype]) if weight.is_floating_point() else weight
            index["weight_map"][name] = file.name
            index["metadata"]["total_size"] += merged[name].numel() * merged[name].element_size()
        save_file(merged, target / file.name, metadata={"format": "pt"})
    if trained:
        raise UserError(
            f"--adapter: {adapter} changes {next(iter(trained))} and {len(trained) - 1} more, which the files of "
            f"{recipe.base} do not hold under that name; it belongs to another base"
        )
    if len(shards) > 1:
        write_whole(target / "model.safetensors.index.json", json.dumps(index, indent=1))
    config.dtype = DTYPES[dtype]
    config.save_pretrained(target)


def save_beside(recipe: Recipe, adapter: Path, chat: Chat, target: Path) -> None:
    """Tokenizer, chat template and generation config, as the adapter was trained with."""
    chat.tokenizer.save_pretrained(target)
    source = adapter if (adapter / "generation_config.json").exists() else recipe.base
    try:
        GenerationConfig.from_pretrained(source).save_pretrained(target)
    except OSError:  # a base without one
        pass


def _quantized_modules(recipe: Recipe, model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The layers that bitsandbytes holds in 4 or 8 bits when the base is loaded as for training; all on the meta device."""
    settings = quantization_config(recipe, DTYPES[recipe.precision])
    AutoHfQuantizer.from_config(settings, pre_quantized=False).preprocess_model(model=model, device_map=None)
    return {n: m for n, m in model.named_modules() if type(m).__name__ in ("Linear4bit", "Linear8bitLt")}


def _dequantized(weight: torch.Tensor, module: torch.nn.Module, dtype: torch.dtype) -> torch.Tensor:
    """The weight as the quantised layer computes with it, in fp32."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant
    from bitsandbytes.nn import Int8Params, Params4bit

    held = {k: v for k, v in module.weight.__dict__.items() if not k.startswith("_")}
    if type(module).__name__ == "Linear4bit":
        packed = Params4bit(weight.to(dtype), requires_grad=False, **held).to("cpu")
        return dequantize_4bit(packed.data, packed.quant_state).float()
    packed = Int8Params(weight.to(dtype), requires_grad=False).to("cpu")
    return int8_vectorwise_dequant(packed.data, packed.SCB).float()


def _split_name(name: str) -> tuple[str, str]:
    """ "layers.0.q_proj.lora_A.weight" -> ("layers.0.q_proj", "lora_A.default.weight"), the name in a PEFT layer."""
    module, found, kind = name.partition(".lora_")
    if not found:  # a weight of lora_modules_to_save
        return tuple(name.rsplit(".", 1))
    kind, _, rest = f"lora_{kind}".partition(".")
    rest = rest or ("weight" if kind == "lora_magnitude_vector" else "")
    return module, ".".join(part for part in (kind, "default", rest) if part)


def _merged(layer: torch.nn.Module, weight: torch.Tensor, trained: dict[str, torch.Tensor]) -> torch.Tensor:
    """PEFT's own merge of one layer in fp32; the other layers stay on the meta device."""
    if "weight" in trained:
        return trained["weight"]
    base = layer.get_base_layer()
    base.weight = torch.nn.Parameter(weight.float(), requires_grad=False)
    loaded = layer.load_state_dict(
        {name: tensor.float() for name, tensor in trained.items()}, strict=False, assign=True
    )
    missing = [name for name in loaded.missing_keys if ".default" in name] + loaded.unexpected_keys
    if missing:
        raise UserError(f"--adapter: its file and its adapter_config.json do not agree about {missing[0]}")
    layer.merge(safe_merge=True)
    result = base.weight.data
    layer.to_empty(device="meta")
    return result


def _shards(recipe: Recipe) -> list[Path]:
    folder = Path(recipe.base)
    if not folder.is_dir():
        patterns = ["*.safetensors", "*.json"]
        folder = Path(
            snapshot_download(recipe.base, revision=recipe.model.get("model_revision"), allow_patterns=patterns)
        )
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    return [folder / name for name in sorted(names)]


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - no dictionary
            yield name, tensors.get_tensor(name)
