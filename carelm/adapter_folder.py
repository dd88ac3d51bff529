"""The folder of an adapter that a run goes on from, and what its configuration decides. Imports no torch."""

from pathlib import Path
from typing import Any

from carelm.errors import UserError
from carelm.files import fingerprint, locate, read_json
from carelm.ranks import say
from carelm.recipe import Recipe

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Keys of a recipe by PEFT's names for them.
OF_LORA = {
    "r": "lora_r", "lora_alpha": "lora_alpha", "target_modules": "lora_target_modules",
    "target_parameters": "lora_target_parameters", "modules_to_save": "lora_modules_to_save", "use_rslora": "use_rslora",
    "use_dora": "use_dora", "exclude_modules": "exclude_modules", "layers_to_transform": "layers_to_transform",
    "layers_pattern": "layers_pattern", "rank_pattern": "rank_pattern", "alpha_pattern": "alpha_pattern",
}  # fmt: skip


def decided_keys(folder: Path) -> dict[str, Any]:
    """The keys of a recipe that an adapter decides, with their values; empty for no adapter, and for one of another kind.

    Raises:
        UserError: where its configuration is damaged.
    """
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise UserError(f"adapter: {folder / CONFIG} is no JSON object; make or copy the adapter again")
    if config.get("peft_type") == "PROMPT_TUNING":
        return {"method": "prompt_tuning", "num_virtual_tokens": config.get("num_virtual_tokens")}
    if config.get("peft_type") == "LORA":
        return {"method": "lora", **{key: _plain(config.get(name)) for name, key in OF_LORA.items()}}
    return {}


def decided_of_run(adapter: str, saved: dict[str, Any]) -> dict[str, Any]:
    """`decided_keys` of an adapter that a recipe names; where it is gone, as the run that began with it has saved them."""
    folder = Path(locate(adapter))
    if (folder / CONFIG).exists() or saved.get("adapter") != adapter:
        return decided_keys(folder)
    return {key: saved[key] for key in ("method", "num_virtual_tokens", *OF_LORA.values()) if key in saved}


def check_adapter(recipe: Recipe) -> None:
    """Whether the adapter that a run begins with is there, and the recipe says nothing else than it does.

    Raises:
        UserError: where it is no adapter of a method of CareLM, lies in the run's own folder, or a key differs.
    """
    name, folder, out = recipe.adapter, Path(locate(recipe.adapter)), recipe.output_dir.resolve()
    if not folder.is_dir():
        raise UserError(f"adapter: there is no folder {name}")
    if out == folder.resolve() or out in folder.resolve().parents:
        raise UserError(f"adapter: {name} lies in output_dir, where this run writes; set another output_dir")
    if not (folder / CONFIG).exists():
        if (folder / "config.json").exists():
            raise UserError(
                f"adapter: {name} is a whole model (merged, or a full fine-tune); set model_name_or_path to it, and leave out "
                "adapter"
            )
        raise UserError(f"adapter: {name} holds no {CONFIG}; name the folder of a finished run, or a checkpoint in it")
    if not (folder / WEIGHTS).exists():
        raise UserError(f"adapter: {name} has no {WEIGHTS}; train it to its end, pickled weights are not loaded")
    decided, keys = decided_keys(folder), recipe.keys()
    if not decided:
        kind = read_json(folder / CONFIG).get("peft_type")
        raise UserError(f"adapter: {name} is of the kind {kind}; those of lora and prompt_tuning can be gone on with")
    for key, value in decided.items():
        # Modules have several names (all-linear): carelm.models.start compares what they come to.
        if key != "lora_target_modules" and _plain(keys.get(key)) != _plain(value):
            raise UserError(
                f"{key}: {keys.get(key)!r} is not what the adapter {name} has, {value!r}; leave it out, the adapter decides it"
            )
    for key, default in (("init_lora_weights", "true"), ("prompt_tuning_init_text", None)):
        if keys[key] != default:
            say(f"{key} is not used: the weights begin as those of {name}")


def adapter_fingerprint(folder: Path) -> str:
    """A hash of an adapter's weights and settings."""
    return fingerprint(*((folder / name).read_bytes() for name in (WEIGHTS, CONFIG)))


def start_fingerprint(recipe: Recipe) -> str | None:
    """That of the adapter that a run begins with; None where it begins with a new one, or the folder is gone."""
    folder = Path(locate(recipe.adapter)) if recipe.adapter else None
    return (
        adapter_fingerprint(folder) if folder and (folder / WEIGHTS).exists() and (folder / CONFIG).exists() else None
    )


def check_unchanged(recipe: Recipe, begun_with: str | None, checkpoint: Path) -> None:
    """Whether the adapter that a run began with is still the one that its checkpoint names; one that is gone is not needed.

    Raises:
        UserError: where there is another one now, which the run has not begun with.
    """
    if (now := start_fingerprint(recipe)) is None:
        say(f"the adapter {recipe.adapter} is not here any more; {checkpoint} has all that is needed of it")
    elif now != begun_with:
        raise UserError(
            f"adapter: {recipe.adapter} is not what {checkpoint} began with (fingerprint {begun_with}, now {now}); put that "
            "back or move this one away to go on from there, or begin anew from this one with --restart (the old run is kept)"
        )


def _plain(value: Any) -> Any:
    """A value as a recipe has it: PEFT keeps names in no order, one of them as a text, and none as an empty list or object."""
    if isinstance(value, list):
        value = sorted(value, key=str)
    return value or None
