"""Passages: what a document is cut into, what is found, and what stands in front of a question. Imports no torch."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Passage:
    """A piece of a document, with where it stands there.

    Attributes:
        id: the same for as long as its document does not change, whatever other documents do.
        document: the name of its file, as it is shown.
        page: its page, counted from 1; None where the format has none.
        columns: of a row of a table, all of its columns.
    """

    id: str
    document: str
    title: str | None
    page: int | None
    heading: str | None
    product: str | None
    text: str
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def indexed(self) -> str:
        """What is searched: the text, and in front of it what it belongs to."""
        return "\n".join(filter(None, (self.title, self.product, self.heading, self.text)))
