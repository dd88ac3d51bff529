"""The model card of a finished run, and the push to the Hub."""

import os
from pathlib import Path
from typing import Any

from carelm.chat.encoder_decoder import is_encoder_decoder
from carelm.data.sources import is_hub_id
from carelm.errors import UserError, first_line
from carelm.files import locate
from carelm.ranks import say
from carelm.recipe import ANSWERS, CHATS, ENGINE_LOG, FEEDBACK, REFERENCE, Recipe
from carelm.recipe_file import load_recipe
from carelm.training import card
from carelm.training.checkpoint_folders import find_recipe

# Beside the result: some of it holds what people have said, or a shop's own documents.
NOT_PUSHED = [
    "checkpoint-*", "runs/*", "eval/*", "merged/*", "index/*", "embedder/*", f"{CHATS}/*", f"{ANSWERS}/*", FEEDBACK, ENGINE_LOG,
    REFERENCE, "*.partial", ".*",
]  # fmt: skip


def model_card(recipe: Recipe, metrics: dict[str, Any], report: dict[str, Any]) -> str:
    """README.md of the output folder: `card_notes`, what was trained on what, how, the figures and what it answers to
    `card_questions`, with the Hub's metadata on top."""
    import yaml

    method = recipe.method + (f" on a {recipe.bits}-bit base" if recipe.bits else "")
    method += f", on preferences (DPO, beta {recipe.beta:g})" if recipe.objective == "preferences" else ""
    base = recipe.model["model_name_or_path"]
    reads_apart = is_encoder_decoder(recipe.base, recipe.revision)
    head = {"library_name": "transformers" if recipe.method == "full" else "peft",
            "pipeline_tag": "text2text-generation" if reads_apart else "text-generation",
            "tags": ["carelm", "dpo" if recipe.objective == "preferences" else "sft", recipe.method]}  # fmt: skip
    # The Hub refuses a card that names what it cannot have.
    head |= {} if os.path.exists(recipe.base) else {"base_model": base}
    before = metrics.get("trained_before") or []
    datasets = [*_of_hub(recipe), *(name for run in before for name in run["of_hub"])]
    head |= {"datasets": [*dict.fromkeys(datasets)]} if datasets else {}
    used = ", ".join(f"{name} {part['used']:,} of {part['rows']:,}" for name, part in report.items())
    names = ("eval_loss_before", "eval_loss", "train_loss", "eval_chosen_loss_before", "eval_chosen_loss")
    losses = {key: metrics.get(key) and round(metrics[key], 4) for key in names}
    figures = [
        ("eval loss before", losses["eval_loss_before"]),
        ("eval loss", losses["eval_loss"]),
        ("train loss", losses["train_loss"]),
        ("loss of preferred answers before", losses["eval_chosen_loss_before"]),
        ("loss of preferred answers", losses["eval_chosen_loss"]),
        ("optimizer steps", metrics["global_step"]),
        ("trained tokens (of the answers)", metrics.get("num_trained_tokens")),
        ("tokens read (prompts too)", metrics["num_train_tokens"]),
        ("trained parameters", f"{metrics['trainable_parameters']:,} ({metrics['trainable_percent']} %)"),
        ("precision", metrics["precision"]),
        ("ranks, ZeRO stage", f"{metrics['world_size']}, {metrics['zero_stage']}"),
        ("wall seconds", round(metrics["wall_seconds"])),
    ]
    went_on = ""
    if recipe.adapter:
        of = [", ".join(f"`{name}`" for name in run["data"]) or "what is not known here" for run in before]
        learnt = f", which was trained on {', and before that on '.join(of)}" if of else ""
        went_on = f"It goes on from the adapter `{recipe.adapter}` (fingerprint {metrics['adapter_fingerprint']}){learnt}.\n\n"
    masked = ""
    if recipe.mask_personal_data:
        region = f" (of {recipe.phone_region}, and those with +)" if recipe.phone_region else " with +"
        masked = (
            f" E-mail addresses, phone numbers{region}, card numbers and IBANs in these rows were replaced by [EMAIL], "
            "[PHONE], [CARD] and [IBAN], as far as rules find them; names and postal addresses were not."
        )
    table = "\n".join(f"| {name} | {value} |" for name, value in figures if value is not None)
    keys = {k: v for k, v in recipe.keys().items() if v not in (None, [], {})}
    notes = f"{recipe.card_notes.strip()}\n\n" if (recipe.card_notes or "").strip() else ""
    settings = card.fence(yaml.safe_dump(keys, sort_keys=True, allow_unicode=True), "yaml")
    return f"""---
{yaml.safe_dump(head, sort_keys=False)}---

# {recipe.name}

{notes}A chat assistant fine-tuned with CareLM: {method}, from `{base}`.

{went_on}**Data.** `{recipe.dataset_name}`, rows used: {used}.{masked}

| figure | value |
|---|---|
{table}

Its answers can be wrong. Where they concern health or money, a person who answers for them should read them first.

{card.describe(recipe, metrics.get("card_answers", []))}## Recipe

{settings}
"""


def trained_before(recipe: Recipe) -> list[dict[str, Any]]:
    """What the adapters that a run has gone on from were trained on, the newest first: `adapter`, its folder as a recipe
    names it, `data`, all its datasets, and `of_hub`, those of the Hub. Both are empty where that is not known here, and nothing
    before it is."""
    runs: list[dict[str, Any]] = []
    while recipe.adapter and recipe.adapter not in [run["adapter"] for run in runs]:
        runs.append({"adapter": recipe.adapter, "data": [], "of_hub": []})
        if (file := find_recipe(Path(locate(recipe.adapter)))) is None:
            break
        try:
            recipe = load_recipe(["--config", str(file)], usage="")
        except UserError as error:
            say(f"what {recipe.adapter} was trained on is not known here ({error})")
            break
        runs[-1]["data"] = [r.dataset_name for r in (recipe, *recipe.mixed.values())]
        runs[-1]["of_hub"] = _of_hub(recipe)
    return runs


def _of_hub(recipe: Recipe) -> list[str]:
    return [name for r in (recipe, *recipe.mixed.values()) if is_hub_id(name := r.dataset_name)]


def push(recipe: Recipe) -> str:
    """Uploads the finished output folder, less what is not of the result; returns the repository's address.

    Raises:
        UserError: where the Hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError

    api = HfApi(token=recipe.training.get("hub_token"))
    # A name on the Hub cannot hold the + of outputs/A+B.
    name = recipe.training.get("hub_model_id") or recipe.output_dir.name.replace("+", "-")
    try:
        address = api.create_repo(name, private=recipe.training.get("hub_private_repo"), exist_ok=True)
        api.upload_folder(
            repo_id=address.repo_id,
            folder_path=recipe.output_dir,
            ignore_patterns=NOT_PUSHED,
            commit_message=f"{recipe.name}, fine-tuned with CareLM",
        )
    except (HTTPError, OSError, ValueError) as error:  # ValueError: a name or a card that the Hub would not take
        raise UserError(
            f"push_to_hub: the Hub refused {name} ({first_line(error)}); the run is finished and saved, and the same "
            "command tries again"
        ) from None
    return str(address)
