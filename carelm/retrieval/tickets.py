"""Past tickets: the index of their questions, and those that a new ticket is like, with what resolved them."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from carelm.data.sources import is_hub_id, load_splits, recipe_keys_about_data
from carelm.data.split_files import find_files
from carelm.data.splits import make_examples
from carelm.data.values import cell_text
from carelm.recipe import Recipe
from carelm.recipe_file import load_named
from carelm.retrieval.content import FileReport
from carelm.retrieval.embedder import find_embedder
from carelm.retrieval.index import index_folder
from carelm.retrieval.matcher import Matcher
from carelm.retrieval.passages import Passage
from carelm.retrieval.retriever import Retriever
from carelm.retrieval.update import Content, Report, build

TABLE = "tickets"


@dataclass(frozen=True)
class Match:
    """A past ticket that is like a new one.

    Attributes:
        score: what matches are ordered by; it compares those of one ticket.
        confidence: the retriever's, 0 to 1; it compares tickets.
        same, probability, reason: the matcher's; None without one.
    """

    ticket_id: str
    question: str
    resolution: str
    score: float
    confidence: float
    same: bool | None = None
    probability: float | None = None
    reason: str | None = None


def update_tickets(recipe: Recipe) -> Report:
    """The index of the past tickets, made or brought up to date: each training row of the recipe that `tickets` names, searched
    by what its users say.

    Raises:
        UserError: where there is no ticket, and where the disk does not take the index.
    """
    past = load_named("tickets", recipe.tickets)
    files = [] if is_hub_id(past.dataset_name) else [
        Path(file) for of_split in find_files(past).by_split.values() for file in of_split.values()
    ]  # fmt: skip

    def read(name: str) -> tuple[list[Passage], dict[str, Any]]:
        passages = read_tickets(past)
        return passages, dataclasses.asdict(FileReport(documents=len(passages), passages=len(passages)))

    settings = {"recipe": recipe_keys_about_data(past), "product_column": past.product_column}
    return build(index_folder(recipe, TABLE), Content({past.name: files}, read, settings), find_embedder(recipe))


def read_tickets(past: Recipe) -> list[Passage]:
    """A passage for each training row: what the users say in it, and in its column `resolution` what they are answered."""
    products = {}
    if past.product_column:
        rows = load_splits(past)[0]["train"]
        products = {source: cell_text(row, past.product_column, source) for source, row in rows}
    found = []
    for example in make_examples(past)[0]["train"]:
        messages = example.prompt + example.completion
        question, resolution = (
            "\n".join(m["content"] for m in messages if m["role"] == role and m["content"])
            for role in ("user", "assistant")
        )
        found.append(
            Passage(
                example.id,
                past.name,
                None,
                None,
                None,
                products.get(example.source),
                question,
                {"resolution": resolution},
            )
        )
    return found


class Tickets:
    """Finds past tickets.

    Attributes:
        matcher: says of each whether it is the same; None where the recipe names none.
    """

    def __init__(self, recipe: Recipe):
        """Raises UserError where the index is not there, or the matcher is none."""
        self.retriever = Retriever(recipe, TABLE)
        self.matcher = Matcher(recipe.matcher) if recipe.matcher else None

    def products(self) -> list[str]:
        return self.retriever.index.filter_values["product"]

    def match(self, text: str, number: int, product: str | None = None) -> list[Match]:
        """The past tickets that are most like this one, the best first."""
        found = self.retriever.search(text, number, {"product": product} if product else None)
        matches = [
            Match(
                f.passage.id, f.passage.text, f.passage.columns["resolution"], round(f.score, 4), round(f.confidence, 4)
            )
            for f in found
        ]
        if not self.matcher or not matches:
            return matches
        judged = self.matcher.judge(text, [match.question for match in matches])
        return [dataclasses.replace(match, **dataclasses.asdict(own)) for match, own in zip(matches, judged)]
