"""Finds the passages that a question is about: by their words (BM25), by their meaning (vectors), or by both."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from carelm.errors import UserError
from carelm.ranks import say
from carelm.recipe import Recipe
from carelm.retrieval.embedder import find_embedder
from carelm.retrieval.index import COLUMNS, TABLE, Index, open_index, to_passage
from carelm.retrieval.passages import Passage

POOL = 100  # passages that each way puts first, of which a hybrid score chooses
HALF_SURE = 10.0  # BM25 score whose confidence is a half, where there are no vectors


@dataclass(frozen=True)
class Found:
    """A passage that was found.

    Attributes:
        score: what passages are ordered by; it compares those of one question.
        confidence: 0 to 1, that this passage is about the question; it compares questions: the cosine of the two, or where
            there are no vectors s / (s + 10) of the BM25 score s.
    """

    passage: Passage
    score: float
    confidence: float


class Retriever:
    """Searches the recipe's index; a version that is built meanwhile is searched from the next question on."""

    def __init__(self, recipe: Recipe, name: str = TABLE):
        """Raises UserError where the index is not there, or of another embedder than the recipe's."""
        self.recipe = recipe
        self.embedder = find_embedder(recipe)
        self.way = recipe.retriever if self.embedder else "bm25"
        self.index = open_index(recipe, name)
        self.index.check_embedder(self.embedder)
        if self.embedder:
            self.embedder.precision = self.index.manifest["embedder"]["precision"]
        self._name, self._said = name, ""

    def search(self, query: str, number: int, filters: dict[str, str] | None = None) -> list[Found]:
        """The best passages, the best first; fewer where no others have a word of the query, or these filters.

        Raises:
            UserError: for a filter that the index does not have.
        """
        return self.search_many([query], number, filters)[0]

    def search_many(
        self, queries: Sequence[str], number: int, filters: dict[str, str] | None = None
    ) -> list[list[Found]]:
        index = self._newest()
        where = index.where(filters)
        vectors = self.embedder.embed(queries, questions=True) if self.embedder and queries else [None] * len(queries)
        return [self._search(index, query, vector, number, where) for query, vector in zip(queries, vectors)]

    def confidence_of(self, query: str, texts: Sequence[str]) -> float:
        """That the likest of these texts, which are in no index, is about the query; 0 without vectors to compare."""
        if not (self.embedder and texts and query.strip()):
            return 0.0
        vector = self.embedder.embed([query], questions=True)[0]
        return float(np.clip(self.embedder.embed(texts) @ vector, 0, 1).max())

    def _search(
        self, index: Index, query: str, vector: np.ndarray | None, number: int, where: str | None
    ) -> list[Found]:
        import pyarrow

        if not query.strip():
            return []
        found = []
        if self.way != "dense":
            found.append(index.by_words(query, max(POOL, number), where))
        if self.way != "bm25":
            found.append(index.by_meaning(vector, max(POOL, number), where))
        words = dict(zip(found[0]["id"].to_pylist(), found[0]["_score"].to_pylist())) if self.way != "dense" else {}
        rows = pyarrow.concat_tables(found, promote_options="default")
        if not rows.num_rows:
            return []
        rows = rows.take(sorted({id: row for row, id in enumerate(rows["id"].to_pylist())}.values()))
        ids = rows["id"].to_pylist()
        of_words = np.array([words.get(id, 0.0) for id in ids])
        if vector is None:
            scores, sure = of_words, of_words / (of_words + HALF_SURE)
        else:
            vectors = rows["vector"].combine_chunks().flatten().to_numpy().reshape(len(ids), -1)
            sure = np.clip(vectors @ vector, 0, 1)
            dense = self.recipe.dense_weight if self.way == "hybrid" else float(self.way == "dense")
            # Of the ways to add the two up this one was the best on rows to choose by (benchmarks/retrieval.py): a cosine is
            # between 0 and 1 already, and BM25's scores have no bound, so the question's highest is 1 (Bruch et al. 2023,
            # https://doi.org/10.1145/3596512).
            scores = dense * sure + (1 - dense) * of_words / max(1e-9, of_words.max())
        best = np.argsort(-scores, kind="stable")[:number].tolist()
        passages = map(to_passage, rows.select([*COLUMNS]).take(best).to_pylist())
        return [Found(passage, float(scores[row]), float(sure[row])) for passage, row in zip(passages, best)]

    def _newest(self) -> Index:
        """The current version; the one that is open where the current one cannot be searched with this embedder."""
        if not self.index.is_current():
            try:
                newer = open_index(self.recipe, self._name)
                newer.check_embedder(self.embedder)
                self.index = (
                    newer  # another thread may be searching the other one, which is closed with its last reader
                )
            except UserError as error:
                if str(error) != self._said:
                    say(f"{error}; until then what was opened is searched")
                self._said = str(error)
        return self.index
