"""How a base, whole or quantised, is loaded."""

import hashlib
import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from trl import ModelConfig

from carelm.chat.chat import Chat
from carelm.errors import UserError
from carelm.models.precision import Precision
from carelm.recipe import Recipe


def load_config(recipe: Recipe) -> PreTrainedConfig:
    """The base's configuration.

    Raises:
        UserError: where there is no such model, or only pickled weights.
    """
    folder = Path(recipe.base)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model_name_or_path: {folder} holds no .safetensors weights; pickled ones are not loaded: convert them with "
            "save_pretrained()"
        )
    try:
        return AutoConfig.from_pretrained(
            recipe.base,
            revision=recipe.model.get("model_revision", "main"),
            trust_remote_code=recipe.training.get("trust_remote_code", False),
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model_name_or_path: {recipe.base} is no causal language model ({reason})") from None


def check_vocabulary(chat: Chat, config: PreTrainedConfig) -> None:
    """Raises UserError where the tokenizer has ids for which the base holds no embedding."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    beyond = [(i, token) for token, i in chat.tokenizer.get_vocab().items() if rows is not None and i >= rows]
    if beyond:
        i, token = min(beyond)
        raise UserError(
            f"model_name_or_path: the tokenizer of {chat.tokenizer.name_or_path} has ids beyond the {rows} of the base (the "
            f"first is {i}, {token!r}); take the tokenizer that belongs to it, or resize its embedding and save both"
        )


def load_base(recipe: Recipe, precision: Precision) -> PreTrainedModel:
    """The base model as the recipe wants it held: in the precision's dtype, or in 8 or 4 bits.

    A full fine-tune without DeepSpeed's own masters needs fp32 weights under autocast, so it is loaded in fp32.

    Raises:
        UserError: where the folder or Hub repository holds no such model, or pickled weights only.
    """
    model_args = ModelConfig(**recipe.model)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            recipe.base,
            revision=model_args.model_revision,
            dtype=torch.float32 if recipe.method == "full" else precision.dtype,
            quantization_config=quantization_config(recipe, precision.dtype),
            attn_implementation=model_args.attn_implementation,
            trust_remote_code=recipe.training.get("trust_remote_code", False),
            use_safetensors=True,
        )
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model_name_or_path: {recipe.base} cannot be loaded ({reason})") from None
    if recipe.bits == 4:
        keep_cpu_weights_plain(model)
    return model


def quantization_config(recipe: Recipe, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How bitsandbytes holds the base; None for a whole one."""
    model_args = ModelConfig(**recipe.model)
    if recipe.bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=model_args.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=model_args.use_bnb_nested_quant,
            bnb_4bit_compute_dtype=compute_dtype,
            bnb_4bit_quant_storage=model_args.bnb_4bit_quant_storage,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if recipe.bits == 8 else None


def keep_cpu_weights_plain(model: torch.nn.Module) -> None:
    """Stops bitsandbytes from repacking 4-bit weights at the first forward without gradients.

    On CPUs with AVX512-BF16 it does so for good, and gradients after it are wrong (off by 91 % where it was measured).
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False


def align_special_tokens(model: PreTrainedModel, chat: Chat) -> None:
    """Makes generation stop at the chat template's end of turn, and pad with the tokenizer's pad token."""
    stops = model.generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    model.generation_config.eos_token_id = sorted({*stops, *chat.end_of_turn_ids})
    for config in (model.config, model.generation_config):
        config.pad_token_id = chat.tokenizer.pad_token_id


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; a 4-bit weight counts for what it stands for, a ZeRO-3 shard for the whole."""
    trainable = total = 0
    for parameter in model.parameters():
        number = getattr(parameter, "ds_numel", parameter.numel())
        if type(parameter).__name__ == "Params4bit" and parameter.bnb_quantized:
            number *= 2 * parameter.element_size()
        total += number
        trainable += number if parameter.requires_grad else 0
    return trainable, total


def base_fingerprint(name_or_path: str, revision: str = "main") -> str:
    """A short hash that differs where the base's weights do.

    Of a folder: its config and, for every weight file, name, size, and the first and last MiB (the first holds the
    safetensors header with every tensor's name, shape and place). Of a Hub id: the id and revision.
    """
    digest = hashlib.sha256()
    folder = Path(name_or_path)
    if not folder.is_dir():
        return hashlib.sha256(f"{name_or_path}@{revision}".encode()).hexdigest()[:16]
    config = json.loads((folder / "config.json").read_text())
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as weights:
            digest.update(weights.read(2**20))
            weights.seek(max(0, size - 2**20))
            digest.update(weights.read())
    return digest.hexdigest()[:16]
