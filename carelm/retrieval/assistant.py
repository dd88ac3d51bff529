"""The shop assistant, less the model: what is looked up for a conversation, what the model is asked, which marks are shown.

The server and whoever measures it use the same functions. Imports no torch.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from carelm.chat.grounding import DONT_KNOW, Grounded, fit, lines_about, marks, says_unknown, without_false_marks
from carelm.recipe import Recipe
from carelm.retrieval.retriever import Found, Retriever

# Words of a message up to which it is looked up together with the one before it: of the ways tried the best on the follow-up
# questions of demo/data's train split. Of test's 51 it finds the right passage among four for 92 %, the last alone 67 %.
SHORT = 6
BEFORE = 100  # words of the one before it: an embedder reads the beginning of a text, and the short one is to be read
# The end of a text that may yet become a mark, with the blanks in front of it, which go where it is a false one.
UNDECIDED = re.compile(r"[^\S\n]*(?:\[[\d\s,;]*)?$")


class Assistant:
    """Looks up what a conversation is about.

    Args:
        recipe: names the index, the number of passages, and the threshold below which nothing is known.
    """

    def __init__(self, recipe: Recipe):
        """Raises UserError where the index is not there, half built, or of another embedder."""
        self.recipe, self.retriever = recipe, Retriever(recipe)

    def look_up(self, messages: Sequence[Mapping[str, Any]], filters: dict[str, str] | None = None) -> list[Found]:
        """The passages for the last question, the best first.

        Raises:
            UserError: for a filter that the index does not have.
        """
        return self.retriever.search(query_of(messages), self.recipe.num_passages, filters)

    def knows(self, found: Sequence[Found]) -> bool:
        """Whether the model is asked of these passages: there is one, and the best is not below `answer_threshold`."""
        return bool(found) and max(f.confidence for f in found) >= (self.recipe.answer_threshold or 0)

    def consult(
        self, messages: Sequence[Mapping[str, Any]], filters: dict[str, str], customer: Mapping[str, Any]
    ) -> tuple[list[Found], bool]:
        """The passages that the model is to answer from, and whether it is asked at all: for these, or where they say nothing
        for what is known of the customer, whose fields are compared with the question as passages are.

        Raises:
            UserError: for a filter that the index does not have.
        """
        if self.knows(found := self.look_up(messages, filters)):
            return found, True
        sure = self.retriever.confidence_of(query_of(messages), lines_about(customer))
        return [], sure > 0 and sure >= (self.recipe.answer_threshold or 0)

    def filters(self) -> dict[str, list[str]]:
        """The columns that a search can be narrowed by, each with the values that occur."""
        return self.retriever.index.filter_values


def query_of(messages: Sequence[Mapping[str, Any]]) -> str:
    """What is looked up for a conversation: its last question, with the one before it where it is too short to stand alone
    ("And if I lost it?")."""
    *before, last = [m["content"] for m in messages if m["role"] == "user"]
    if not before or len(last.split()) > SHORT:
        return last
    words = before[-1].split()
    return f"{before[-1] if len(words) <= BEFORE else ' '.join(words[:BEFORE])}\n{last}"


def put_in(
    messages: Sequence[Mapping[str, Any]],
    found: Sequence[Found],
    customer: Mapping[str, Any] | None,
    fits: Callable[[str], bool],
) -> tuple[list[dict[str, Any]], Grounded]:
    """The conversation with the passages in its last turn, the user's: as many as `fits` says of that turn."""
    last = messages[-1]
    grounded = fit(last["content"], [f.passage for f in found], fits, customer)
    return [*map(dict, messages[:-1]), {**last, "content": grounded.text}], grounded


def sources(found: Sequence[Found]) -> list[dict[str, Any]]:
    """What a client is told of the passages, in the order of their numbers."""
    return [
        {
            "number": number, "document": f.passage.document, "title": f.passage.title, "product": f.passage.product,
            "page": f.passage.page, "heading": f.passage.heading, "passage": f.passage.text,
            "score": round(f.score, 4), "confidence": round(f.confidence, 4),
        }
        for number, f in enumerate(found, 1)
    ]  # fmt: skip


class TrueMarks:
    """An answer as it comes, less the marks that name none of its passages; what may become a mark waits until that is known.

    Attributes:
        text: what has been let through; after `end` all of it.
    """

    def __init__(self, passages: int):
        self.passages, self.text, self._held = passages, "", ""

    def add(self, piece: str) -> str:
        """What may be shown with this piece."""
        self._held += piece
        at = UNDECIDED.search(self._held).start()
        ready, self._held = self._held[:at], self._held[at:]
        return self._let(ready)

    def end(self) -> str:
        """What is left when no more comes."""
        ready, self._held = self._held, ""
        return self._let(ready)

    def _let(self, ready: str) -> str:
        shown = without_false_marks(ready, self.passages)
        self.text += shown
        return shown


def outcome(answer: str) -> dict[str, Any]:
    """What is to be said of an answer beside its text: the numbers of the passages that it cites, and whether it knows."""
    return {"answer": answer, "cited": marks(answer), "knows": not says_unknown(answer)}


REFUSAL = outcome(DONT_KNOW)
