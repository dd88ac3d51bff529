"""Makes the index of a recipe's documents, or brings it up to date: what has not changed is not read again. Where the recipe
names past tickets (`tickets`), theirs too.

    python serve/index.py --config recipes/shop.yaml
    python serve/index.py --config recipes/shop.yaml --documents manuals/ "pages/*.html" catalogue.csv
    python serve/index.py --config recipes/shop.yaml --retriever bm25        # by words alone, without an embedder

The index is searched as it was until the new one is whole; a server that is running takes the new one with the next question.
What was read, dropped and could not be read is said, and one JSON object is the last line of standard output.

exit status: 0 the index is there, 2 something in the recipe, the documents or the disk is to be mended.
"""

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm import environment, quiet, ranks  # noqa: F401
from carelm.data.sources import stay_offline
from carelm.keys import RETRIEVAL_KEYS
from carelm.next_steps import say_next, words_of
from carelm.recipe_file import load_named, load_recipe
from carelm.retrieval.embedder import check_installed

if TYPE_CHECKING:
    from carelm.retrieval.update import Report


def main() -> None:
    recipe = load_recipe(sys.argv[1:], usage=__doc__, first=RETRIEVAL_KEYS)
    check_installed("lancedb")
    stay_offline(recipe, *([load_named("tickets", recipe.tickets)] if recipe.tickets else []), and_embedder=True)
    quiet.silence(has_gpu=False, is_first_rank=True)
    from carelm.retrieval.tickets import update_tickets
    from carelm.retrieval.update import update

    result = {}
    if recipe.documents or not recipe.tickets:
        result |= said(update(recipe))
    if recipe.tickets:
        result["tickets"] = said(update_tickets(recipe))
    ranks.print_result(result)
    if recipe.gold_passages:
        say_next(["eval/retrieval.py", *words_of(recipe, sys.argv[1:])])


def said(report: "Report") -> dict[str, Any]:
    """Says what was done, and returns it as JSON."""
    print(report.lines(), file=sys.stderr)
    counts = {"files": len(report.files), "unused": len(report.unused), "not_read": report.not_read}
    return {**dataclasses.asdict(report), **counts}


if __name__ == "__main__":
    ranks.run_main(main, kept="the index before stays as it is")
