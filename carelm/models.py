"""How a base, a quantised base and an adapter are loaded; the one place where precision is chosen."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, PeftConfig, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from trl import ModelConfig

from carelm.chat import Chat
from carelm.ranks import say
from carelm.recipe import Recipe, UserError

if TYPE_CHECKING:
    from peft import PeftModel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Precision:
    """What the run computes in (bf16, fp16 or fp32), and why."""

    name: str
    reason: str

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.name]


def choose_precision(requested: str, *, training: bool = True) -> Precision:
    """The recipe's precision, or for `auto` the best that the hardware really has.

    `torch.cuda.is_bf16_supported()` is true on a T4, where bf16 is emulated; the compute capability decides instead.

    Raises:
        UserError: where the hardware lacks the precision that was asked for.
    """
    if not torch.cuda.is_available():
        if requested == "fp16" and training:
            raise UserError("precision: a CPU does not train in fp16; set precision: auto, fp32 or bf16")
        return Precision("fp32" if requested == "auto" else requested, "CPU" if requested == "auto" else "asked for")
    capability = torch.cuda.get_device_capability()
    has_bf16 = capability >= (8, 0)
    card = f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}"
    if requested == "bf16" and not has_bf16:
        raise UserError(f"precision: bf16 needs compute capability 8.0, this is {card}; set precision: auto or fp16")
    if requested != "auto":
        return Precision(requested, "asked for")
    return Precision("bf16" if has_bf16 else "fp16", card)


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


def check_base(recipe: Recipe) -> None:
    """What can be wrong with base and adapter, found on the meta device, before any weights and any output.

    Raises:
        UserError: where there is no such base, only pickled weights, or none of the adapter's target modules.
    """
    trust = recipe.training.get("trust_remote_code", False)
    config = load_config(recipe)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model_name_or_path: {recipe.base} is no causal language model ({reason})") from None
    if not getattr(model, "accepts_loss_kwargs", True):
        raise UserError(
            f"model_name_or_path: {type(model).__name__} takes a mean over each batch and not over the tokens of a whole step: "
            "the curve would depend on the ranks; take another base"
        )
    held = getattr(config, "quantization_config", None) or {}
    held = held if isinstance(held, dict) else held.to_dict()
    bits = 4 if held.get("load_in_4bit") else 8 if held.get("load_in_8bit") else None
    if held and (bits is None or bits != recipe.bits):
        mend = f"set load_in_{bits}bit: true" if bits else "take its original in whole weights"
        raise UserError(f"model_name_or_path: {recipe.base} is quantised already ({held.get('quant_method')}); {mend}")
    if recipe.method == "lora":
        with torch.device("meta"):
            add_adapter(model, recipe)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and recipe.max_length > positions:
        say(f"max_length {recipe.max_length} is beyond the {positions} positions that the base was trained on")


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


def adapter_config(recipe: Recipe) -> PeftConfig:
    """PEFT's configuration of the recipe's method (lora or prompt_tuning)."""
    model_args = ModelConfig(**recipe.model)
    if recipe.method == "prompt_tuning":
        text = recipe.prompt_tuning_init_text
        return PromptTuningConfig(
            task_type=TaskType.CAUSAL_LM,
            num_virtual_tokens=recipe.num_virtual_tokens,
            # PEFT's default draws from N(0, 1), some fifty times the size of word embeddings.
            prompt_tuning_init=PromptTuningInit.TEXT if text else PromptTuningInit.SAMPLE_VOCAB,
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=recipe.base if text else None,
        )
    return LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=model_args.lora_target_modules,
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
    )


def add_adapter(model: PreTrainedModel, recipe: Recipe, zero_stage: int = 0) -> "PeftModel":
    """Freezes the base and puts a new adapter on it, the same one for the same seed on every rank.

    Raises:
        UserError: where the base has no such target modules.
    """
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    set_seed(recipe.seed)
    # ZeRO-3 gathers parameters of one dtype only (https://github.com/deepspeedai/DeepSpeed/issues/8072); DeepSpeed keeps
    # fp32 masters itself. Elsewhere trainable weights are fp32 (https://github.com/huggingface/transformers/issues/23165).
    fp32_weights = not (zero_stage == 3 and recipe.bits is None)
    dtype = torch.float32 if fp32_weights else model.dtype
    try:
        model = get_peft_model(model, adapter_config(recipe), autocast_adapter_dtype=fp32_weights)
    except (ValueError, TypeError) as error:
        raise UserError(f"method {recipe.method}, lora_target_modules: {str(error).strip().splitlines()[0]}") from None
    # PEFT leaves lora_modules_to_save in the base's dtype, and a soft prompt in fp32.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return model


def load_model(recipe: Recipe, chat: Chat, precision: Precision, zero_stage: int = 0) -> "PreTrainedModel | PeftModel":
    """What is trained: the base alone (`full`) or with a new adapter, and told where an answer ends."""
    model = load_base(recipe, precision)
    align_special_tokens(model, chat)
    return model if recipe.method == "full" else add_adapter(model, recipe, zero_stage)


def align_special_tokens(model: PreTrainedModel, chat: Chat) -> None:
    """Makes generation stop at the chat template's end of turn, and pad with the tokenizer's pad token."""
    stops = model.generation_config.eos_token_id
    stops = [stops] if isinstance(stops, int) else list(stops or [])
    model.generation_config.eos_token_id = sorted({*stops, chat.end_of_turn_id})
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
