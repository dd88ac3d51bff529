"""Adapters with drawn weights, or taught one answer, as a run leaves them."""

from pathlib import Path

import torch

from carelm.chat.chat import Chat, make_chat
from carelm.models import adapters
from carelm.models.precision import choose_precision
from carelm.recipe import Recipe
from carelm.recipe_file import load_recipe, save_recipe


def make_adapter(folder: Path, *keys: str, scale: float = 0.02) -> Recipe:
    """An adapter of the demo's recipe whose weights are drawn, so that it differs from the base; no training."""
    recipe, chat, model = _begin(folder, keys)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    _save(folder, recipe, chat, model)
    return recipe


def make_taught_adapter(folder: Path, question: str, answer: str, *keys: str) -> Recipe:
    """An adapter of the demo's recipe that gives this answer to this question: two or three seconds of training on it alone."""
    recipe, chat, model = _begin(folder, ("--load_in_4bit", "false", *keys))
    turns = [{"role": "user", "content": question}]
    asked, answered = chat.prompt_ids(turns), chat.answer_ids(turns, {"role": "assistant", "content": answer})
    ids, labels = torch.tensor([asked + answered]), torch.tensor([[-100] * len(asked) + answered])
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    _save(folder, recipe, chat, model)
    return recipe


def _begin(folder: Path, keys: tuple[str, ...]) -> tuple[Recipe, Chat, torch.nn.Module]:
    recipe = load_recipe(["--output_dir", str(folder), *keys], usage="")
    chat = make_chat(recipe)
    return recipe, chat, adapters.load_model(recipe, chat, choose_precision("fp32"))


def _save(folder: Path, recipe: Recipe, chat: Chat, model: torch.nn.Module) -> None:
    model.save_pretrained(folder, save_embedding_layers=False)
    chat.tokenizer.save_pretrained(folder)
    model.get_base_model().generation_config.save_pretrained(folder)
    save_recipe(recipe, folder / "recipe.yaml")
