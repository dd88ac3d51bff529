"""The index of passages: a LanceDB table in a folder of versions, with BM25 over their words and, where there is an embedder,
their vectors."""

import dataclasses
import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from carelm.errors import UserError
from carelm.recipe import Recipe
from carelm.retrieval.embedder import Embedder, check_installed
from carelm.retrieval.passages import Passage
from carelm.retrieval.versions import current, how_to_build, open_current, reason_of

if TYPE_CHECKING:
    import pyarrow

MANIFEST, TABLE = "manifest.json", "passages"
COLUMNS = tuple(field.name for field in dataclasses.fields(Passage))
ALWAYS_FILTERED = ("product", "document")
FLAT = (
    50_000  # passages up to which all vectors are compared: 20 ms on two cores; above it those near the question's are
)
MOST_LISTED = 1000  # values of a column
PROBED = 32  # parts of an approximate index that are searched


def index_folder(recipe: Recipe, name: str = TABLE) -> Path:
    """Where the index of this recipe's passages lies, or of its tickets."""
    return Path(recipe.index or recipe.output_dir / "index") / name


class Index:
    """A version of the index, as it was when it was opened, whatever is built since. Any thread may search it.

    Attributes:
        manifest: what it was made of: files, settings, embedder, filters, the number of passages.
    """

    def __init__(self, folder: Path):
        """Raises UserError where there is none that is whole."""
        check_installed("lancedb")
        import lancedb

        self.folder = folder
        self.version, self._lock = open_current(folder)
        try:
            self.manifest = json.loads((self.version / MANIFEST).read_text(encoding="utf-8"))
            self.table = lancedb.connect(str(self.version)).open_table(TABLE)
            self.table.head(1)  # of data that is not there opening tells nothing
        except (RuntimeError, OSError, ValueError) as error:
            self.close()
            raise UserError(
                f"index: {self.version} is damaged ({reason_of(error)}); make it: {how_to_build()}"
            ) from None
        self.filters: dict[str, str] = self.manifest["filters"]

    def close(self) -> None:
        """Lets a later build take this version away."""
        self._lock.close()

    def is_current(self) -> bool:
        return current(self.folder) == int(self.version.name)

    def check_embedder(self, embedder: Embedder | None) -> None:
        """Raises UserError where the passages were embedded by another one, or by none."""
        own = self.manifest["embedder"]
        if embedder is not None and (own is None or own["fingerprint"] != embedder.fingerprint):
            made = f"another embedder ({own['name']})" if own else "no embedder"
            raise UserError(
                f"index: {self.folder} was made with {made}, the recipe's is {embedder.folder}; make it: {how_to_build()}"
            )

    def by_words(self, query: str, number: int, where: str | None = None) -> "pyarrow.Table":
        """The passages that BM25 puts first, and `_score`; those without a word of the query are not among them."""
        from lancedb.query import MatchQuery

        found = self.table.search(MatchQuery(query, "indexed"), query_type="fts")
        return self._limited(found, number, where, "_score")

    def by_meaning(self, vector: np.ndarray, number: int, where: str | None = None) -> "pyarrow.Table":
        """The passages whose vectors are nearest, and `_distance`: 1 less the cosine."""
        found = self.table.search(vector, vector_column_name="vector").distance_type("cosine")
        if self.manifest["passages"] > FLAT:
            found = found.nprobes(PROBED)
        return self._limited(found, number, where, "_distance")

    def where(self, filters: dict[str, str] | None) -> str | None:
        """The condition that a row has these values in these columns.

        Raises:
            UserError: for a column that is no filter of this index.
        """
        parts = []
        for name, value in (filters or {}).items():
            if name not in self.filters:
                raise UserError(f"filters: '{name}' is no filter of the index (its: {', '.join(self.filters)})")
            parts.append(f"{self.filters[name]} = '{str(value).replace(chr(39), chr(39) * 2)}'")
        return " AND ".join(parts) or None

    @cached_property
    def filter_values(self) -> dict[str, list[str]]:
        """The values that occur in each column that a search can be narrowed by, sorted; none of a column that has more than
        `MOST_LISTED`, of which nobody chooses from a list."""
        columns = self.table.search().select([*self.filters.values()]).to_arrow()
        values = {name: columns[column].unique().drop_null().to_pylist() for name, column in self.filters.items()}
        return {name: sorted(filter(None, own)) if len(own) <= MOST_LISTED else [] for name, own in values.items()}

    def passages(self) -> list[Passage]:
        return [to_passage(row) for row in self.table.to_arrow().select([*COLUMNS]).to_pylist()]

    def _limited(self, found: Any, number: int, where: str | None, score: str) -> "pyarrow.Table":
        if where:
            found = found.where(where, prefilter=True)
        vector = ["vector"] if self.manifest["embedder"] else []
        return found.select([*COLUMNS, *vector, score]).limit(number).to_arrow()


def to_passage(row: dict[str, Any]) -> Passage:
    return Passage(**{name: row[name] for name in COLUMNS} | {"columns": json.loads(row["columns"])})


def open_index(recipe: Recipe, name: str = TABLE) -> Index:
    """The recipe's index; raises UserError where there is none that is whole."""
    return Index(index_folder(recipe, name))
