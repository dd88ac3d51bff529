"""What is trained: an adapter on a frozen base, or the base itself."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from transformers import PreTrainedModel, set_seed
from trl import ModelConfig

from carelm.chat.chat import Chat
from carelm.errors import UserError, first_line
from carelm.models import start, targets
from carelm.models.attention import use_recomputed_attention
from carelm.models.base import (
    align_special_tokens,
    auto_class,
    check_architecture,
    load_base,
    load_config,
    no_language_model,
)
from carelm.models.lora import use_fused_lora
from carelm.models.loss import use_chunked_loss, use_summed_loss
from carelm.models.norms import use_fused_norms
from carelm.models.precision import Precision
from carelm.ranks import say
from carelm.recipe import Recipe


def check_base(recipe: Recipe, goes_on: bool = False) -> PreTrainedModel:
    """What can be wrong with base and adapter, found on the meta device, before any weights and any output.

    Args:
        goes_on: the run has checkpoints, and does not look at the recipe's `adapter` any more.

    Returns:
        the base on the meta device.

    Raises:
        UserError: where there is no such base, only pickled weights, or none of the adapter's target modules.
    """
    trust = recipe.training.get("trust_remote_code", False)
    config = load_config(recipe)
    try:
        with torch.device("meta"):
            model = auto_class(config).from_config(  # which changes the config that it is given
                copy.deepcopy(config),
                trust_remote_code=trust,
                attn_implementation=recipe.model.get("attn_implementation"),
            )
    except ImportError as error:
        raise UserError(f"attn_implementation: {first_line(error)}") from None
    except Exception as error:  # each architecture raises its own
        raise no_language_model(recipe, error) from None
    check_architecture(model, recipe.model["model_name_or_path"])
    held = getattr(config, "quantization_config", None) or {}
    held = held if isinstance(held, dict) else held.to_dict()
    bits = 4 if held.get("load_in_4bit") else 8 if held.get("load_in_8bit") else None
    if held and (bits is None or bits != recipe.bits):
        mend = f"set load_in_{bits}bit: true" if bits else "take its original in whole weights"
        raise UserError(f"model_name_or_path: {recipe.base} is quantised already ({held.get('quant_method')}); {mend}")
    if recipe.method == "lora":
        targets.check_names(model, recipe)
        with torch.device("meta"):
            settings = adapter_config(recipe, model) if recipe.adapter else None
            targets.check_patterns(changed := add_adapter(model, recipe), recipe)
        if recipe.adapter and not goes_on:
            start.check_start(changed, settings, recipe)
    elif recipe.adapter and not goes_on:
        start.check_start(model, adapter_config(recipe, model), recipe)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and recipe.max_length > positions:
        say(f"max_length {recipe.max_length} is beyond the {positions} positions that the base was trained on")
    return model


def adapter_config(recipe: Recipe, model: PreTrainedModel) -> PeftConfig:
    """PEFT's configuration of the recipe's method (lora or prompt_tuning) for this base."""
    model_args = ModelConfig(**recipe.model)
    task = TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else TaskType.CAUSAL_LM
    if recipe.method == "prompt_tuning":
        text = recipe.prompt_tuning_init_text
        return PromptTuningConfig(
            task_type=task,
            num_transformer_submodules=1,  # of an encoder-decoder the encoder alone
            num_virtual_tokens=recipe.num_virtual_tokens,
            # PEFT's default draws from N(0, 1), some fifty times the size of word embeddings.
            prompt_tuning_init=PromptTuningInit.TEXT if text else PromptTuningInit.SAMPLE_VOCAB,
            prompt_tuning_init_text=text,
            tokenizer_name_or_path=recipe.base if text else None,
        )
    return LoraConfig(
        task_type=task,
        r=model_args.lora_r,
        lora_alpha=model_args.lora_alpha,
        lora_dropout=model_args.lora_dropout,
        target_modules=targets.target_names(model, recipe),
        target_parameters=model_args.lora_target_parameters,
        modules_to_save=model_args.lora_modules_to_save,
        use_rslora=model_args.use_rslora,
        use_dora=model_args.use_dora,
        exclude_modules=targets.exclude_names(model, recipe),
        layers_to_transform=recipe.layers_to_transform,
        layers_pattern=recipe.layers_pattern or None,
        rank_pattern=recipe.rank_pattern or {},
        alpha_pattern=recipe.alpha_pattern or {},
        init_lora_weights="gaussian" if recipe.init_lora_weights == "gaussian" else True,
    )


def add_adapter(model: PreTrainedModel, recipe: Recipe, zero_stage: int = 0) -> PeftModel:
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
        model = get_peft_model(model, adapter_config(recipe, model), autocast_adapter_dtype=fp32_weights)
    except (ValueError, TypeError) as error:
        raise UserError(f"method {recipe.method}, lora_target_modules: {first_line(error)}") from None
    # PEFT leaves lora_modules_to_save in the base's dtype, and a soft prompt in fp32.
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    if recipe.init_lora_weights == "orthogonal":
        targets.start_orthogonal(model)
    return model


def load_adapter(model: PreTrainedModel | PeftModel, folder: Path, name: str = "default") -> PeftModel:
    """The adapter of a folder on its base, or under another name beside those that are on it already.

    Raises:
        UserError: where its file lacks a tensor or holds one that has no place there: PEFT leaves the first as it is before any
            training, and the second out.
    """
    base, misfit = model.name_or_path, None
    try:
        if isinstance(model, PeftModel):
            model.load_adapter(str(folder), name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    except (RuntimeError, ValueError) as error:
        misfit = " ".join(str(error).split())[:300]
    else:
        known = model.state_dict()
        wanted = get_peft_model_state_dict(
            model, state_dict=known, adapter_name=name, save_embedding_layers=False
        ).keys()
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            held = set(file.keys())
        # Embeddings beside an adapter, as PEFT keeps them.
        unused = {name for name in held - wanted if name not in known and not name.endswith(".base_layer.weight")}
        if odd := sorted((wanted - held) | unused):
            where = "for no part of that base" if odd[0] in held else "missing"
            misfit = f"{len(odd)} tensors, such as {odd[0]}, are {where}"
    if misfit:
        raise UserError(f"models: {folder} belongs to another base than {base}, or its file is not whole ({misfit})")
    return model


def load_model(
    recipe: Recipe, chat: Chat, precision: Precision, zero_stage: int = 0, begun: dict[str, Any] | None = None
) -> PreTrainedModel | PeftModel:
    """What is trained: the base alone (`full`) or with a new adapter, told where an answer ends, its loss taken in chunks.

    Args:
        begun: the completion mark of the checkpoint whose weights are loaded later on, with what an earlier start of the run
            has found (`use_chunked_loss`); none where the run begins.
    """
    # ZeRO-3 shares out the 4-bit weights as they are, on a CPU as on a GPU.
    base = load_base(recipe, precision, may_dequantize=zero_stage != 3)
    align_special_tokens(base, chat)
    if precision.name == "bf16" and base.device.type == "cpu":
        use_recomputed_attention(base)
    if torch.cuda.is_available():
        use_fused_norms(base)
    model = base if recipe.method == "full" else add_adapter(base, recipe, zero_stage)
    if recipe.adapter and not begun:
        start.load_start(model, recipe)
    for module in model.modules():
        if isinstance(module, LoraLayer) and precision.name != "fp32" and zero_stage == 0:
            module.cast_input_dtype_enabled = False  # autocast would take back the cast to the adapter's fp32
    if zero_stage != 3:  # whose hooks gather what each part needs around its own forward
        use_fused_lora(model)
    label_smoothing = recipe.training.get("label_smoothing_factor") or 0.0
    if base.config.is_encoder_decoder:
        use_summed_loss(base, label_smoothing)
        return model
    use_chunked_loss(base, label_smoothing, zero_stage=zero_stage, is_chunked=(begun or {}).get("is_loss_chunked"))
    return model
