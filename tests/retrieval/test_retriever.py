"""A question finds its passage by words, by meaning, or by both, among those that the filters leave."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from small_index import SENTENCES, content_of, make_embedder

from carelm.errors import UserError
from carelm.recipe_file import load_recipe
from carelm.retrieval.retriever import Retriever
from carelm.retrieval.update import build

COLUMNS = {
    "lamps.txt": {"product": 'O\'Neil "X" lamp', "color": "red"},
    "shop.txt": {"product": "kettle", "color": "blue"},
}


@pytest.fixture
def make(tmp_path):
    """A retriever of the small index; keys of the recipe as words of a command line."""
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "lamps.txt").write_text("\n".join(SENTENCES[:3]))
    (documents / "shop.txt").write_text("\n".join(SENTENCES[3:]))
    embedder = make_embedder(tmp_path / "embedder")

    def make(*words: str, embedder=embedder) -> Retriever:
        build(tmp_path / "index/passages", content_of(documents, COLUMNS), embedder)
        keys = ["--index", str(tmp_path / "index"), *words]
        keys += [] if "--embedder" in words else ["--embedder", str(tmp_path / "embedder")]
        return Retriever(load_recipe(keys, usage=""))

    make.documents = documents
    return make


@pytest.mark.parametrize("way", ["bm25", "dense", "hybrid"])
def test_each_way_finds_the_passage_and_says_where_it_is_from(make, way):
    retriever = make("--retriever", way)
    [best, *others] = retriever.search("How long does the battery last?", 3)
    assert best.passage.text == SENTENCES[2]
    assert (best.passage.document, best.passage.page, best.passage.columns) == ("lamps.txt", 3, COLUMNS["lamps.txt"])
    assert len(others) == (0 if way == "bm25" else 2)  # no other has one of the words
    assert all(0 <= found.confidence <= 1 and found.score <= best.score for found in others)


def test_stems_count_and_words_such_as_the_do_not(make):
    retriever = make("--retriever", "bm25")
    assert [found.passage.text for found in retriever.search("refunding", 3)] == [SENTENCES[3]]
    assert retriever.search("the of is", 3) == [] == retriever.search(" ", 3)


def test_a_hybrid_score_is_the_weighted_sum_of_the_cosine_and_of_bm25_over_its_highest(make):
    question = "Refunds for the kettle"
    by_words = {found.passage.id: found.score for found in make("--retriever", "bm25").search(question, 5)}
    by_meaning = {found.passage.id: found.confidence for found in make("--retriever", "dense").search(question, 5)}
    found = make("--retriever", "hybrid", "--dense_weight", "0.7").search(question, 5)
    assert len(found) == 5 and len(by_words) == 2
    for one in found:
        id = one.passage.id
        expected = 0.7 * by_meaning[id] + 0.3 * by_words.get(id, 0) / max(by_words.values())
        assert one.score == pytest.approx(expected, abs=1e-5) and one.confidence == pytest.approx(
            by_meaning[id], abs=1e-5
        )


@pytest.mark.parametrize("way", ["bm25", "dense", "hybrid"])
def test_filters_leave_the_passages_of_a_product_or_of_a_columns_value(make, way):
    retriever = make("--retriever", way)
    question = "battery, parcels, refunds, kettle"
    for filters in ({"product": COLUMNS["lamps.txt"]["product"]}, {"color": "red"}, {"document": "lamps.txt"}):
        found = retriever.search(question, 5, filters)
        assert found and {one.passage.document for one in found} == {"lamps.txt"}
    assert retriever.search(question, 5, {"color": "red", "product": "kettle"}) == []
    assert retriever.search(question, 5, {"product": "x' OR '1' = '1"}) == []
    with pytest.raises(UserError, match=r"filters: 'size' is no filter of the index \(its: product, document, color\)"):
        retriever.search(question, 5, {"size": "9"})


def test_the_values_of_a_filter_are_listed_unless_they_are_too_many_to_choose_from(make, monkeypatch):
    values = {
        "product": ['O\'Neil "X" lamp', "kettle"],
        "document": ["lamps.txt", "shop.txt"],
        "color": ["blue", "red"],
    }
    assert make("--retriever", "bm25").index.filter_values == values
    monkeypatch.setattr("carelm.retrieval.index.MOST_LISTED", 1)
    assert make("--retriever", "bm25").index.filter_values == dict.fromkeys(values, [])


def test_a_version_that_is_built_meanwhile_is_searched_from_the_next_question_on(make, tmp_path, capsys):
    retriever = make()
    (make.documents / "new.txt").write_text("The lamp has a cable.")
    assert not any(found.passage.document == "new.txt" for found in retriever.search("cable", 5))
    make()
    assert retriever.search("cable", 5)[0].passage.text == "The lamp has a cable."
    (make.documents / "new.txt").unlink()
    build(tmp_path / "index/passages", content_of(make.documents, COLUMNS), make_embedder(tmp_path / "other", seed=1))
    capsys.readouterr()
    for _ in range(2):
        assert retriever.search("cable", 5)[0].passage.text == "The lamp has a cable."
    assert capsys.readouterr().err.count("was made with another embedder") == 1


def test_threads_that_search_while_versions_change_see_one_of_them_whole(make):
    retriever, done = make("--retriever", "hybrid"), threading.Event()

    def search() -> set[frozenset[str]]:
        seen = set()
        while not done.is_set():
            found = retriever.search("lamp number", 9, {"document": "new.txt"})
            seen.add(frozenset(one.passage.text.split()[-1] for one in found))
        return seen

    with ThreadPoolExecutor(3) as threads:
        searches = [threads.submit(search) for _ in range(3)]
        for version in ("one", "two", "three"):
            (make.documents / "new.txt").write_text("\n".join(f"The lamp has number {k} {version}" for k in range(4)))
            make()
        done.set()
    seen = set().union(*(of_one.result() for of_one in searches))
    assert seen <= {frozenset(), frozenset({"one"}), frozenset({"two"}), frozenset({"three"})} and len(seen) > 1


def test_an_index_without_vectors_is_searched_by_words_alone(make, tmp_path):
    with pytest.raises(
        UserError, match="index: .* was made with no embedder, the recipe's is .*; make it: python serve/index.py"
    ):
        make(embedder=None)
    assert make("--retriever", "bm25", embedder=None).search("kettle", 1)[0].passage.text == SENTENCES[4]


def test_without_an_embedder_in_the_cache_words_alone_are_searched_and_it_is_said(make, capsys, monkeypatch):
    monkeypatch.setattr("carelm.retrieval.embedder.OWN_CACHE", "/nonexistent")
    retriever = make("--embedder", "auto", embedder=None)
    assert retriever.way == "bm25" and retriever.search("kettle", 1)[0].confidence < 0.5
    assert "by their words alone (BM25); python demo/embedder.py makes one" in capsys.readouterr().err
    with pytest.raises(UserError, match="embedder: .* is not in CareLM's cache"):
        make("--embedder", "auto", "--retriever", "dense")


@pytest.mark.parametrize("package", ["lancedb", "sentence_transformers"])
def test_without_its_packages_one_line_says_how_they_are_installed(make, monkeypatch, package):
    make()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"^{package} not installed: pip install -e '\.\[retrieval\]'$"):
        make()


def test_a_question_of_100_kb_is_answered(make):
    assert make().search("kettle battery " * 7000, 2)
