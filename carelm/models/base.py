"""How a base, whole or quantised, is loaded."""

import contextlib
import hashlib
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import deepspeed as deepspeed_integration
from transformers.utils import cached_file
from trl import ModelConfig

from carelm.chat.chat import Chat
from carelm.chat.encoder_decoder import check_kind
from carelm.errors import UserError, first_line
from carelm.files import read_json
from carelm.models.memory import available_memory_bytes
from carelm.models.precision import Precision
from carelm.ranks import any_rank, say
from carelm.recipe import Recipe

SHARE_OF_MEMORY = 0.5  # of what is free now, that a dequantised base may take


def load_config(recipe: Recipe) -> PreTrainedConfig:
    """The base's configuration.

    Raises:
        UserError: where there is no such model, only pickled weights, or an encoder-decoder of a kind that is not known here.
    """
    folder = Path(recipe.base)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        raise UserError(
            f"model_name_or_path: {folder} holds no .safetensors weights; pickled ones are not loaded: convert them with "
            "save_pretrained()"
        )
    try:
        config = AutoConfig.from_pretrained(
            recipe.base,
            revision=recipe.revision,
            trust_remote_code=recipe.training.get("trust_remote_code", False),
        )
    except Exception as error:  # each kind of config has checks, and errors, of its own
        raise no_language_model(recipe, error) from None
    if check_kind(recipe.base, config.to_dict()) and getattr(config, "decoder_start_token_id", None) is None:
        raise UserError(
            f"model_name_or_path: the config.json of {recipe.base} names no decoder_start_token_id, with which every answer of "
            "an encoder-decoder begins; write it there (0 for a T5, 2 for a BART)"
        )
    return config


def auto_class(config: PreTrainedConfig) -> type[AutoModelForCausalLM | AutoModelForSeq2SeqLM]:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


@contextlib.contextmanager
def _loaded_whole() -> Iterator[None]:
    """Sets transformers' DeepSpeed configuration aside, so that every rank loads whole weights and DeepSpeed's engine shares
    them out later. transformers calls the output layer of every T5 tied, unless it differs from the word embeddings in the
    files; in parts, empty ones are compared, which are always equal, so that FLAN-T5 would lose its own."""
    held = deepspeed_integration._hf_deepspeed_config_weak_ref
    deepspeed_integration._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed_integration._hf_deepspeed_config_weak_ref = held


def no_language_model(recipe: Recipe, error: Exception) -> UserError:
    """What a library says of a config, as the line that names the base."""
    reason = " ".join(str(error).split())[:300]
    if not isinstance(error, (OSError, ValueError)):
        reason = f"{type(error).__name__}: {reason}"
    return UserError(f"model_name_or_path: {recipe.base} is no causal language model ({reason})")


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


def load_base(recipe: Recipe, precision: Precision, may_dequantize: bool = True) -> PreTrainedModel:
    """The base model as the recipe wants it held: in the precision's dtype, or in 8 or 4 bits.

    A full fine-tune without DeepSpeed's own masters needs fp32 weights under autocast, so it is loaded in fp32. On a CPU a
    4-bit base is dequantised once, where that is allowed and memory suffices (`keep_cpu_weights_plain`).

    Raises:
        UserError: where the folder or Hub repository holds no such model, or pickled weights only.
    """
    model_args = ModelConfig(**recipe.model)
    generation = load_generation_config(recipe.base, model_args.model_revision)
    config = load_config(recipe)
    try:
        with _loaded_whole() if config.is_encoder_decoder else contextlib.nullcontext():
            model, loaded = auto_class(config).from_pretrained(
                recipe.base,
                revision=model_args.model_revision,
                dtype=torch.float32 if recipe.method == "full" else precision.dtype,
                quantization_config=quantization_config(recipe, precision.dtype),
                attn_implementation=model_args.attn_implementation,
                trust_remote_code=recipe.training.get("trust_remote_code", False),
                use_safetensors=True,
                generation_config=generation,
                output_loading_info=True,
            )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"model_name_or_path: {recipe.base} cannot be loaded ({first_line(error)})") from None
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(
            f"model_name_or_path: the files of {recipe.base} lack {len(missing)} tensors of {type(model).__name__}, such as "
            f"{missing[0]}, which would be drawn at random; get the base again, or take another one"
        )
    if recipe.bits == 4:
        check_shapes_in_4_bits(model, recipe.base)
        model = keep_cpu_weights_plain(model, precision.dtype, may_dequantize)
    leave_out_added_losses(model)
    if config.is_encoder_decoder and model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = False  # so that what is saved is read as it is; every T5 is called tied
    if generation is None:  # made of what older bases have in config.json
        model.generation_config = repaired(model.generation_config.to_diff_dict())
    return model


def leave_out_added_losses(model: PreTrainedModel) -> None:
    """Turns off what some bases add to the loss of the tokens, and says so: mixtures of experts for even use of their experts,
    Bamba for small logits. It comes once for each micro batch, so that the curve would depend on their size."""
    configs = [model.config, *(getattr(model.config, name, None) for name in model.config.sub_configs)]
    routers = [config for config in configs if getattr(config, "output_router_logits", False)]
    for config in routers:
        config.output_router_logits = False
    added = ["output_router_logits"] if routers else []
    if getattr(model, "z_loss_coefficient", 0):
        model.z_loss_coefficient = model.config.z_loss_coefficient = 0.0
        added.append("z_loss_coefficient")
    if added:
        say(
            f"what the base adds to the loss ({', '.join(added)}) is left out: the curve would depend on the micro batch"
        )


def load_generation_config(source: str, revision: str = "main") -> GenerationConfig | None:
    """The generation_config.json of a folder or Hub id, repaired; None where it has none.

    Raises:
        UserError: where it is no JSON object.
    """
    name = "generation_config.json"
    file = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    if file is None:
        return None
    try:
        return repaired(json.loads(Path(file).read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise UserError(f"model_name_or_path: {file} is no JSON object ({error})") from None


def repaired(values: dict[str, Any]) -> GenerationConfig:
    """A generation config without what transformers would refuse to save with the result, which is said: sampling flags without
    do_sample, as many bases ship them, beam flags without beams.

    Raises:
        UserError: where nothing that is left out makes it valid.
    """
    left_out = {}
    while problem := _what_is_invalid(values):
        named = (key for key in values if f"`{key}`" in problem)
        without = ((key, {k: v for k, v in values.items() if k != key}) for key in named)
        repair = next((v for key, v in without if f"`{key}`" not in _what_is_invalid(v)), None)
        if repair is None:
            raise UserError(f"model_name_or_path: the base's generation_config.json cannot be used ({problem})")
        left_out |= {key: value for key, value in values.items() if key not in repair}
        values = repair
    if left_out:
        words = ", ".join(f"{key} {value}" for key, value in left_out.items())
        say(f"the base's generation_config.json is invalid; these are left out of it: {words}")
    return GenerationConfig.from_dict(values)


def _what_is_invalid(values: dict[str, Any]) -> str:
    try:
        GenerationConfig.from_dict(values).validate(strict=True)
    except (ValueError, TypeError) as error:
        return " ".join(str(error).split())
    return ""


def check_architecture(model: PreTrainedModel, name: str) -> None:
    """Raises UserError where a base does not predict every token from those before it alone, or does not sum its loss over the
    tokens of a whole step (`num_items_in_batch`), so that the curve would depend on micro batch and ranks.

    Args:
        model: may be on the meta device.
        name: as the recipe has it.
    """
    kind = type(model)
    if model.config.is_encoder_decoder:
        return  # its loss is ours (carelm.models.loss)
    forward = inspect.unwrap(kind.forward)
    if "is_decoder" in inspect.getsource(kind.__init__) and not model.config.is_decoder:
        raise UserError(
            f"model_name_or_path: {name} ({kind.__name__}) sees the tokens that it is to predict, as encoders do; take a "
            "decoder-only base"
        )
    sums = re.search(r"loss_function\([^)]*\*\*|num_items_in_batch", inspect.getsource(forward))
    if not sums or "logits_to_keep" not in inspect.signature(forward).parameters or not getattr(
        model, "accepts_loss_kwargs", True
    ):  # fmt: skip
        raise UserError(
            f"model_name_or_path: {kind.__name__} takes a mean over each batch and not over the tokens of a whole step: the "
            "curve would depend on the ranks; take another base"
        )


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


def check_shapes_in_4_bits(model: PreTrainedModel, name: str) -> None:
    """Raises UserError where weights that were saved in 4 bits are of another shape than the config says: packed as they are,
    transformers does not compare them."""
    from bitsandbytes.nn import Linear4bit

    for path, module in model.named_modules():
        state = getattr(module.weight, "quant_state", None) if isinstance(module, Linear4bit) else None
        if state is not None and list(state.shape) != (said := [module.out_features, module.in_features]):
            raise UserError(
                f"model_name_or_path: {path} is {list(state.shape)} in the files of {name}, and {said} by its config.json; get "
                "the base again, or take another one"
            )


def keep_cpu_weights_plain(model: PreTrainedModel, dtype: torch.dtype, may_dequantize: bool) -> PreTrainedModel:
    """On a CPU, a 4-bit base with its weights as bitsandbytes would compute with them, dequantised once for all steps.

    The values are the same; each forward and backward would else make them again. Where they must stay in 4 bits, bitsandbytes
    is kept from repacking them at the first forward without gradients: on CPUs with AVX512-BF16 it does so for good, and
    gradients after it are wrong (off by 91 % where it was measured).
    """
    from bitsandbytes.nn import Linear4bit

    held = [module for module in model.modules() if isinstance(module, Linear4bit)]
    if not held or held[0].weight.device.type != "cpu":
        return model
    needed = sum(module.in_features * module.out_features for module in held) * dtype.itemsize
    needed *= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # by all ranks of this machine, and all ranks do the same
    available = available_memory_bytes()
    if may_dequantize and not any_rank(needed > SHARE_OF_MEMORY * available, held[0].weight.device):
        say(f"the 4-bit base is dequantised once: {needed / 2**20:,.0f} MiB on this CPU")
        return model.dequantize(dtype)
    if may_dequantize:
        say(
            f"the base stays in 4 bits, which is slower on a CPU: dequantised it takes {needed / 2**20:,.0f} MiB of the "
            f"{available / 2**20:,.0f} MiB that are free"
        )
    for module in held:
        module.support_avx512bf16_for_cpu = False
    return model


def align_special_tokens(model: PreTrainedModel, chat: Chat) -> None:
    """Makes generation stop at the chat template's end of turn, and pad with the tokenizer's pad token."""
    align_generation(model.generation_config, chat)
    model.config.pad_token_id = chat.tokenizer.pad_token_id


def own_generation_config(recipe: Recipe) -> GenerationConfig:
    """The generation config that a base is loaded with, of which no `align_special_tokens` has changed anything."""
    own = load_generation_config(recipe.base, recipe.revision)
    return own or repaired(GenerationConfig.from_model_config(load_config(recipe)).to_diff_dict())


def align_generation(config: GenerationConfig, chat: Chat) -> None:
    """The same in a generation config alone."""
    stops = config.eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    config.eos_token_id = sorted({*stops, *chat.end_of_turn_ids})
    config.pad_token_id = chat.tokenizer.pad_token_id


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; a 4-bit weight counts for what it stands for, a ZeRO-3 shard for the whole."""
    trainable = total = 0
    for parameter in model.parameters():
        total += (number := _stands_for(parameter))
        trainable += number if parameter.requires_grad else 0
    return trainable, total


def _stands_for(parameter: torch.nn.Parameter) -> int:
    number = getattr(parameter, "ds_numel", parameter.numel())
    if type(parameter).__name__ == "Params4bit" and parameter.bnb_quantized:
        number *= 2 * parameter.element_size()
    return number


def flops_per_token(model: PreTrainedModel) -> int:
    """Floating-point operations of matrix products that training takes for each token: 4 for a frozen weight, 6 for a trained
    one (Kaplan et al. 2020, section 2.1: 2 forward, 2 for the gradient of its input, 2 for its own).

    A weight counts for what it stands for; an embedding that is only looked up in does not, and of experts those that a token
    goes to do. The products of attention, without weights, are left out, and the output layer is counted for every token.
    """
    head = getattr(model.get_output_embeddings(), "weight", None)
    active = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    flops = 0
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            shape = getattr(parameter, "ds_shape", parameter.shape)
            looked_up = isinstance(module, torch.nn.Embedding) or parameter is head  # a tied one is counted as the head
            if len(shape) < 2 or looked_up or "original_module" in name:  # PEFT computes with its copy of that
                continue
            share = active / shape[0] if active and len(shape) == 3 else 1
            flops += int(share * (6 if parameter.requires_grad else 4) * _stands_for(parameter))
    return flops + (0 if head is None else (6 if head.requires_grad else 4) * _stands_for(head))


def base_fingerprint(name_or_path: str, revision: str = "main") -> str:
    """A short hash that differs where the base's weights do.

    Of a folder: its config and, for every weight file, name, size, and the first and last MiB (the first holds the
    safetensors header with every tensor's name, shape and place). Of a Hub id: the id and revision.
    """
    digest = hashlib.sha256()
    folder = Path(name_or_path)
    if not folder.is_dir():
        return hashlib.sha256(f"{name_or_path}@{revision}".encode()).hexdigest()[:16]
    config = read_json(folder / "config.json")
    digest.update(json.dumps(config, sort_keys=True).encode())
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with open(file, "rb") as weights:
            digest.update(weights.read(2**20))
            weights.seek(max(0, size - 2**20))
            digest.update(weights.read())
    return digest.hexdigest()[:16]
