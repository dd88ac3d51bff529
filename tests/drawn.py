"""Adapters with drawn weights, as a run leaves them."""

from pathlib import Path

import torch

from carelm.chat.chat import make_chat
from carelm.models import adapters
from carelm.models.precision import choose_precision
from carelm.recipe import Recipe
from carelm.recipe_file import load_recipe, save_recipe


def make_adapter(folder: Path, *keys: str, scale: float = 0.02) -> Recipe:
    """An adapter of the demo's recipe whose weights are drawn, so that it differs from the base; no training."""
    recipe = load_recipe(["--output_dir", str(folder), *keys], usage="")
    chat = make_chat(recipe)
    model = adapters.load_model(recipe, chat, choose_precision("fp32"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, save_embedding_layers=False)
    chat.tokenizer.save_pretrained(folder)
    model.get_base_model().generation_config.save_pretrained(folder)
    save_recipe(recipe, folder / "recipe.yaml")
    return recipe
