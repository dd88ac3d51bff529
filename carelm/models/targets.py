"""Which modules of a base LoRA changes, by name and by layer, and with which ranks and first weights."""

import re
from collections.abc import Iterable

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from carelm.errors import UserError
from carelm.recipe import Recipe

ALL_LINEAR = "all-linear"


def check_names(model: PreTrainedModel, recipe: Recipe) -> None:
    """Raises UserError for a name or layer that the base does not have: PEFT trains the others without a word."""
    modules, parameters = ([name for name, _ in named] for named in (model.named_modules(), model.named_parameters()))
    for key, names, there in (
        ("lora_target_modules", recipe.model.get("lora_target_modules"), modules),
        ("lora_modules_to_save", recipe.model.get("lora_modules_to_save"), modules),
        ("lora_target_parameters", recipe.model.get("lora_target_parameters"), parameters),
        ("exclude_modules", recipe.exclude_modules, modules),
    ):
        if key == "lora_target_modules" and len(names or []) == 1:
            continue  # may be an expression, or all-linear; PEFT refuses one that matches nothing
        for name in names or []:
            is_expression = key == "exclude_modules" and len(names) == 1
            if not name or not _ends(there, name) and not (is_expression and any(re.fullmatch(name, n) for n in there)):
                those = linear_names(model) if key == "lora_target_modules" else there
                raise UserError(f"{key}: {type(model).__name__} has no '{name}' (there: {_last_parts(those)})")
    if recipe.layers_to_transform is not None:
        _check_layers(model, recipe, modules)


def _check_layers(model: PreTrainedModel, recipe: Recipe, modules: list[str]) -> None:
    numbered = [re.match(r"(?:^|.*?\.)([^.]+)\.\d+\.", name) for name in modules]
    for pattern in recipe.layers_pattern or []:
        if not any(_layer(name, [pattern]) for name in modules):
            there = ", ".join(sorted({match[1] for match in numbered if match}))
            raise UserError(f"layers_pattern: {type(model).__name__} has no layers '{pattern}' (there: {there})")
    names = target_names(model, recipe)
    matches = (
        _layer(name, recipe.layers_pattern) for name in modules if names is None or any(_ends([name], n) for n in names)
    )
    there = {int(match["number"]) for match in matches if match}
    if beyond := [number for number in recipe.layers_to_transform if number not in there]:
        listed = f"0 to {max(there)}" if there == {*range(len(there))} and there else ", ".join(map(str, sorted(there)))
        raise UserError(
            f"layers_to_transform: {type(model).__name__} has no target modules in a layer {beyond[0]} (there: "
            f"{listed or 'none'})"
        )


def check_patterns(model: PeftModel, recipe: Recipe) -> None:
    """Raises UserError for a pattern of ranks or alphas that is for no module, or where two say otherwise of one: which of them
    counts would follow from their order, and a saved adapter does not keep it."""
    changed = [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]
    for key in ("rank_pattern", "alpha_pattern"):
        patterns: dict[str, int] = getattr(recipe, key) or {}
        # as peft.utils.other.get_pattern_key matches them
        compiled = {pattern: re.compile(rf"(.*\.)?({pattern})$") for pattern in patterns}
        for pattern in patterns:
            if not any(map(compiled[pattern].match, changed)):
                raise UserError(
                    f"{key}: '{pattern}' is for no module that LoRA changes (there: {_last_parts(changed)})"
                )
        for name in changed:
            own = [pattern for pattern in patterns if compiled[pattern].match(name)]
            if len({patterns[pattern] for pattern in own}) > 1:
                raise UserError(f"{key}: '{own[0]}' and '{own[1]}' are both for {name}; let each module have one")


def target_names(model: PreTrainedModel, recipe: Recipe) -> list[str] | str | None:
    """`lora_target_modules` as PEFT takes them: a list of names, an expression or all-linear as one text.

    PEFT refuses `layers_to_transform` beside a text, and lets whole names pass whatever their layer. So all-linear is written
    out there to the names that its modules have in their layers (self_attn.q_proj ...).

    Raises:
        UserError: for an expression beside `layers_to_transform`.
    """
    names = recipe.model.get("lora_target_modules")
    if not names or len(names) > 1:
        return names
    is_all = names[0].lower() == ALL_LINEAR
    if not is_all and _ends((name for name, _ in model.named_modules()), names[0]):
        return names
    if recipe.layers_to_transform is None:
        return names[0]
    if not is_all:
        raise UserError(
            f"layers_to_transform: {type(model).__name__} has no module '{names[0]}' (lora_target_modules), and beside an "
            "expression PEFT takes no layers; write them into the expression, or name modules such as q_proj"
        )
    linear = linear_names(model)
    return sorted({name[match.end() :] for name in linear if (match := _layer(name, recipe.layers_pattern))})


def linear_names(model: PreTrainedModel) -> list[str]:
    """The linear modules but the output layer: what all-linear means."""
    head = model.get_output_embeddings()
    return [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)) and m is not head]


def exclude_names(model: PreTrainedModel, recipe: Recipe) -> list[str] | str | None:
    """`exclude_modules` as PEFT takes them: a list of names, or one expression as a text."""
    names = recipe.exclude_modules
    is_expression = names and len(names) == 1 and not _ends((name for name, _ in model.named_modules()), names[0])
    return names[0] if is_expression else names


@torch.no_grad()
def start_orthogonal(model: PeftModel) -> None:
    """Draws orthogonal A and B, whose product is zero (https://datta0.github.io/posts/rethink-lora-init/), for every layer.

    PEFT's own rounds them to the dtype that the base is held in: the product is not zero in bf16, and it fails on a base in
    4 or 8 bits.

    Raises:
        UserError: for an embedding among the target modules.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if "default" not in layer.lora_A:
            raise UserError(f"init_lora_weights: orthogonal is for linear modules alone, and {name} is none")
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight  # [r, inputs], [outputs, r]
        rows, _ = torch.linalg.qr(torch.randn(a.shape[0], a.shape[0], dtype=torch.float64))
        a.copy_((torch.randn(a.shape[1], a.shape[0] // 2, dtype=torch.float64) @ rows[0::2]).T / 10)
        b.copy_(torch.randn(b.shape[0], b.shape[1] // 2, dtype=torch.float64) @ rows[1::2] / 10)


def _layer(name: str, patterns: list[str] | None) -> re.Match | None:
    """Where a module's name has the number of its layer, as check_target_module_exists of peft.tuners.tuners_utils finds it."""
    if not patterns:
        return re.match(r".*?\.[^.]*\.(?P<number>\d+)\.", name)
    return next(filter(None, (re.match(rf"(?:^|.*?\.){p}\.(?P<number>\d+)\.", name) for p in patterns)), None)


def _ends(names: Iterable[str], part: str) -> bool:
    return any(f".{name}".endswith(f".{part}") for name in names)


def _last_parts(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.rpartition(".")[2] for name in names} - {""}))[:400]
