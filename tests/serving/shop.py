"""A small shop with documents of its own and an assistant that answers from them, for the tests of this room."""

import dataclasses
import json
from pathlib import Path

from drawn import make_adapter

from carelm.evaluation import candidates
from carelm.recipe import Recipe
from carelm.retrieval.assistant import Assistant
from carelm.retrieval.tickets import Tickets, update_tickets
from carelm.retrieval.update import update
from carelm.serving.engine import BatcherEngine
from carelm.serving.gateway import Gateway
from carelm.talk.speaker import Speaker

SHOP = "/v1/shop/chat"
RETURNS = "Unused lamps can come back within 30 days."
GOODS = [
    {"product": "Harbour lamp", "text": "The Harbour lamp costs 20 euros.", "room": "hall"},
    {
        "product": "Harbour kettle",
        "text": "The Harbour kettle costs 30 euros and boils in four minutes.",
        "room": "kitchen",
    },
]


def write_documents(folder: Path, texts: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in {"returns.md": f"# Returns\n\n## Lamps\n\n{RETURNS}\n", **(texts or {})}.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "goods.jsonl").write_text("".join(json.dumps(row) + "\n" for row in GOODS), encoding="utf-8")
    return folder


def shop_keys(documents: Path, *more: str) -> list[str]:
    return [
        "--max_new_tokens", "24", "--max_length", "512", "--load_in_4bit", "false", "--documents", str(documents),
        "--passage_template", "{text}", "--product_column", "product", "--filter_columns", "room", "--retriever", "bm25",
        *more,
    ]  # fmt: skip


def make_shop(folder: Path, texts: dict[str, str] | None = None, *more: str) -> Recipe:
    """A run with an adapter, and the index of a shop's documents."""
    recipe = make_adapter(folder / "run", *shop_keys(write_documents(folder / "documents", texts), *more))
    update(recipe)
    return recipe


def shop_gateway(recipe: Recipe, *names: str) -> Gateway:
    speakers = [Speaker(recipe, candidates.find(recipe, name)) for name in names]
    tickets = Tickets(recipe) if recipe.tickets else None
    return Gateway(recipe, speakers, BatcherEngine(recipe, speakers), Assistant(recipe), tickets)


def with_tickets(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe with two past tickets, and their index."""
    past = [
        {"asked": "My lamp flickers.", "answered": "We sent another bulb.", "product": "Harbour lamp"},
        {"asked": "The kettle is loud.", "answered": "Descale it.", "product": "Harbour kettle"},
    ]
    (folder / "past.jsonl").write_text("".join(json.dumps(row) + "\n" for row in past), encoding="utf-8")
    keys = {
        "dataset_name": str(folder / "past.jsonl"), "prompt_template": "{asked}", "completion_template": "{answered}",
        "product_column": "product", "validation_fraction": 0, "test_fraction": 0, "model_name_or_path": "demo/base",
    }  # fmt: skip
    (folder / "past.yaml").write_text(json.dumps(keys))
    recipe = dataclasses.replace(recipe, tickets=str(folder / "past.yaml"))
    update_tickets(recipe)
    return recipe


def events_of(reply) -> list[tuple[str, dict]]:
    """The events of a stream, each with its name."""
    found = []
    for block in reply.text.split("\n\n"):
        if block:
            name, data = block.split("\n")
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found
