"""A run that goes on from an adapter: whether it fits the base, and its weights in place of new ones."""

from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel

from carelm.adapter_folder import CONFIG, OF_LORA, WEIGHTS, decided_keys
from carelm.errors import UserError, first_line
from carelm.files import locate, read_json
from carelm.models.base import base_fingerprint
from carelm.models.finite import not_finite_in
from carelm.ranks import say
from carelm.recipe import Recipe

# What is the recipe's, is compared elsewhere, or says how the first weights were drawn; PEFT writes some of it itself.
FREE = {
    *OF_LORA, "lora_dropout", "fan_in_fan_out", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping",
    "peft_version", "task_type", "num_virtual_tokens", "prompt_tuning_init", "prompt_tuning_init_text",
    "tokenizer_name_or_path", "tokenizer_kwargs", "token_dim", "num_layers", "num_attention_heads",
    "num_transformer_submodules",
}  # fmt: skip
PROMPT = "prompt_embeddings"


def check_start(model: PreTrainedModel | PeftModel, config: PeftConfig, recipe: Recipe) -> None:
    """Whether the recipe's `adapter` can be gone on with.

    Args:
        model: on the meta device; with the recipe's adapter for lora, the base alone for prompt_tuning.
        config: of that adapter.

    Raises:
        UserError: where it was trained on another base, changes other modules, has settings that CareLM has no key for, or its
            file is damaged.
    """
    folder = Path(locate(recipe.adapter))
    _check_base(recipe, folder)
    try:
        theirs = PeftConfig.from_pretrained(folder).to_dict()
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"adapter: {folder / CONFIG} cannot be read ({first_line(error)})") from None
    if (start := theirs.pop("init_lora_weights", True)) not in (True, False, "gaussian", "orthogonal"):
        raise UserError(f"adapter: {folder} began as {start}, which has changed the base; it cannot be gone on with")
    ours = config.to_dict()
    if odd := sorted(key for key in theirs.keys() - FREE if theirs[key] != ours.get(key)):
        raise UserError(f"adapter: {folder} has {odd[0]}: {theirs[odd[0]]!r}, which a run of CareLM has no key for")
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            held = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no dictionary
        bad, total = not_finite_in(folder / WEIGHTS)
    except SafetensorError as error:
        raise UserError(f"adapter: {folder / WEIGHTS} is damaged ({error}); make or copy the adapter again") from None
    if bad:
        raise UserError(f"adapter: {folder} holds NaN or infinity in {len(bad)} of {total} tensors, such as {bad[0]}")
    if recipe.method == "prompt_tuning":
        wanted = {PROMPT: [recipe.num_virtual_tokens, model.get_input_embeddings().embedding_dim]}
    else:
        state = model.state_dict()
        fitting = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
        wanted = {name: list(tensor.shape) for name, tensor in fitting.items()}
        # Embeddings beside an adapter, as PEFT keeps them.
        held = {n: shape for n, shape in held.items() if n not in state and not n.endswith(".base_layer.weight")}
    for name in sorted(wanted.keys() | held.keys()):
        if wanted.get(name) == held.get(name):
            continue
        named, own = recipe.model.get("lora_target_modules"), decided_keys(folder).get("lora_target_modules")
        if (name not in held or name not in wanted) and sorted(named or []) != (own or []):
            raise UserError(
                f"lora_target_modules: {named} are not the modules that the adapter {recipe.adapter} changes ({own}; such as "
                f"{name}); leave it out, the adapter decides it"
            )
        raise UserError(
            f"adapter: {folder} does not fit {recipe.base}: {name} is {held.get(name, 'missing')} there and "
            f"{wanted.get(name, 'nothing')} on this base"
        )


def _check_base(recipe: Recipe, folder: Path) -> None:
    metrics = read_json(folder / "train_metrics.json") or read_json(folder / "complete.json")
    named, trained_on = read_json(folder / CONFIG).get("base_model_name_or_path"), metrics.get("base_fingerprint")
    is_named = named in (recipe.base, recipe.model["model_name_or_path"]) or locate(str(named)) == recipe.base
    if trained_on is None and not is_named and Path(locate(str(named))).is_dir():
        trained_on = base_fingerprint(locate(str(named)))
    if trained_on is None and not is_named:
        say(f"whether the adapter {recipe.adapter} was trained on {recipe.base} is not known: it names {named}")
    now = base_fingerprint(recipe.base, recipe.revision)
    if trained_on not in (None, now):
        raise UserError(
            f"adapter: {recipe.adapter} was trained on another base than {recipe.base} (fingerprint {trained_on}, here {now}); "
            f"set model_name_or_path to its own, {named}"
        )
    if metrics.get("bits", recipe.bits) != recipe.bits:
        held = {None: "in whole weights"}
        was, now = (held.get(bits, f"in {bits} bits") for bits in (metrics["bits"], recipe.bits))
        say(f"the adapter {recipe.adapter} was trained on a base {was}, this one is {now}: its first loss is another")


@torch.no_grad()
def load_start(model: PeftModel, recipe: Recipe) -> None:
    """Puts the weights of the recipe's `adapter` in place of the new ones, in the dtype that these have."""
    stored = load_file(Path(locate(recipe.adapter)) / WEIGHTS)
    if recipe.method == "prompt_tuning":
        model.prompt_encoder["default"].embedding.weight.copy_(stored[PROMPT])
        return
    own = get_peft_model_state_dict(model, save_embedding_layers=False)  # shares its memory with the model
    for name, tensor in own.items():
        tensor.copy_(stored[name])
