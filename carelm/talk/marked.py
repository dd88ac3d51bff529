"""The command that trains on answers that people marked good, in a chat or on the server's page. Imports no torch."""

from pathlib import Path

from carelm.data.split_names import SPLITS
from carelm.data.templates import template_columns
from carelm.keys import RETRIEVAL_KEYS, SERVING_KEYS
from carelm.next_steps import without
from carelm.recipe import Recipe


def training_words(recipe: Recipe, file: Path, words: list[str], ending: str) -> list[str]:
    """`words`, which name the recipe on a command line, with other rows: the good answers of this file, and the adapter to go
    on from where there is one. The run's folder gets this ending."""
    folder = recipe.output_dir
    keys = {**training_keys(recipe, file), "output_dir": f"{folder}-{ending}"}
    if (folder / "adapter_config.json").exists() and recipe.method == "lora":
        keys["adapter"] = str(folder)
    kept = without(
        words, *keys, *SERVING_KEYS, *RETRIEVAL_KEYS, "max_new_tokens", "temperature", "top_p"
    )  # what training does not read
    return [*kept, *(word for key, value in keys.items() for word in (f"--{key}", value))]


def training_keys(recipe: Recipe, file: Path) -> dict[str, str]:
    """The keys that train on the good answers of this file, under this recipe: what the recipe asks of its own rows and this
    file does not have is taken out. All of them are trained: there are few."""
    keys = {"dataset_name": str(file), "row_filter": '{"mark": "good"}'}
    keys |= {"validation_fraction": "0", "test_fraction": "0"}
    keys["messages_column"] = recipe.messages_column or "messages"
    if recipe.early_stopping_patience:  # which needs validation rows
        keys["early_stopping_patience"] = "null"
    for split in SPLITS:
        if getattr(recipe, f"dataset_{split}_split") != split:
            keys[f"dataset_{split}_split"] = split
    keys |= {
        key: "[]"
        for key in ("optional_columns", "reference_columns", "overlap_columns", "urgent_words")
        if getattr(recipe, key)
    }
    keys |= {key: "" for key in ("tools_column", "tag_column") if getattr(recipe, key)}
    if recipe.predicted_columns:
        keys["predicted_columns"] = "{}"
    if template_columns(recipe.system_prompt or "", "system_prompt"):
        keys["system_prompt"] = ""
    return keys
