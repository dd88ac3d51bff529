"""train/embedder.py: an embedder learns from past questions which passages answer them, and is kept only if it finds more."""

import json
import runpy
import sys
from itertools import combinations

import numpy as np
import pytest
from conftest import PROJECT
from small_index import SENTENCES, make_embedder

from carelm.errors import UserError
from carelm.recipe_file import load_recipe
from carelm.retrieval import tuning
from carelm.retrieval.embedder import Embedder
from carelm.retrieval.gold import Asked
from carelm.retrieval.past_questions import past_questions
from carelm.retrieval.update import update


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def shop(tmp_path):
    """Five passages, and questions in the words of the passage before the one that answers them: none is found by meaning."""
    write(tmp_path / "faq.jsonl", [{"number": str(k), "text": text} for k, text in enumerate(SENTENCES)])
    asked = {"train": [], "validation": [], "test": []}
    for k, text in enumerate(SENTENCES):
        answer = SENTENCES[(k + 1) % 5]
        words = combinations(text.rstrip(".").lower().split(), 3)
        for number, of_one in enumerate(list(words)[:20]):
            split = ("train", "train", "validation", "test")[number % 4]
            row = {"q": " ".join(of_one), "a": answer, "about": str((k + 1) % 5)}
            asked[split].append(row | {"id": f"{split}-{k}-{number}"})
    for split, rows in asked.items():
        write(tmp_path / f"rows/{split}.jsonl", rows)
    make_embedder(tmp_path / "embedder")
    recipe = {
        "model_name_or_path": "demo/base", "documents": [str(tmp_path / "faq.jsonl")], "passage_template": "{text}",
        "dataset_name": str(tmp_path / "rows"), "prompt_template": "{q}", "completion_template": "{a}", "id_column": "id",
        "gold_passages": {"number": "about"}, "embedder": str(tmp_path / "embedder"), "retriever": "dense",
        "output_dir": str(tmp_path / "run"), "num_resamples": 200,
    }  # fmt: skip
    (tmp_path / "shop.yaml").write_text(json.dumps(recipe))
    update(load_recipe(["--config", str(tmp_path / "shop.yaml")], usage=""))
    return tmp_path


@pytest.fixture
def run(shop, monkeypatch, capsys):
    def run(*words):
        command = [str(PROJECT / "train/embedder.py"), "--config", str(shop / "shop.yaml"), *words]
        monkeypatch.setattr(sys, "argv", command)
        runpy.run_path(sys.argv[0])["main"]()
        return capsys.readouterr()

    return run


def test_one_that_finds_more_is_kept_and_searches_what_the_recipe_then_names(shop, run):
    told = run("--learning_rate", "0.05", "--epochs", "200")
    result = json.loads(told.out.splitlines()[-1])
    folder = shop / "run/embedder"
    assert result["kept"] == str(folder) and f"serve/index.py --config {shop / 'shop.yaml'} --embedder" in told.err
    scores = {name: result["validation"][name]["recall@1"]["value"] for name in ("before", "tuned")}
    assert scores["before"] < 0.3 and scores["tuned"] > 0.7 and result["validation"]["differences"]["MRR@10"]["low"] > 0
    about = json.loads((folder / "source.json").read_text())
    assert about["validation"] == result["validation"] and about["of"] == Embedder(shop / "embedder").fingerprint
    words = ["--config", str(shop / "shop.yaml"), "--embedder", str(folder)]
    update(load_recipe(words, usage=""))
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match="output_dir: .*embedder is there already"):
        run()
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before


def test_one_that_finds_no_more_is_not_kept_and_that_is_said(shop, run):
    told = run("--learning_rate", "1e-12")
    result = json.loads(told.out.splitlines()[-1])
    assert result["kept"] is None and "is not significantly better, and it is not kept" in told.err
    assert result["validation"]["differences"]["MRR@10"]["difference"] == 0 and not (shop / "run/embedder").exists()


def test_a_few_questions_decide_nothing(shop, run):
    rows = (shop / "rows/validation.jsonl").read_text().splitlines(keepends=True)
    (shop / "rows/validation.jsonl").write_text("".join(rows[:9]))
    told = run("--learning_rate", "0.05", "--epochs", "200")
    result = json.loads(told.out.splitlines()[-1])
    assert result["kept"] is None and "9 validation questions are too few to tell" in told.err
    assert result["validation"]["tuned"]["MRR@10"]["value"] > result["validation"]["before"]["MRR@10"]["value"]


def test_the_words_of_past_answers_say_which_passages_hold_them(shop):
    keys = ["--config", str(shop / "shop.yaml"), "--gold_passages", "{}"]
    recipe = load_recipe(keys, usage="")
    texts = load_recipe(["--config", str(shop / "shop.yaml")], usage="")
    from carelm.retrieval.index import open_index

    passages = open_index(texts).passages()
    by_words = past_questions(recipe, texts, passages, ("train", "validation"))
    by_columns = past_questions(texts, None, passages, ("train", "validation"))
    golds = {one.text: one.gold for one in by_columns["train"]}
    assert len(by_words["train"]) > len(golds) / 2 and by_words["validation"]
    assert all(golds[one.text] == one.gold for one in by_words["train"])
    with pytest.raises(UserError, match="gold_passages: it is empty; .* --questions RECIPE"):
        past_questions(recipe, None, passages, ("train",))


def test_a_passage_that_may_answer_too_is_neither_drawn_to_nor_pushed_away(tmp_path):
    texts = {str(k): text for k, text in enumerate(SENTENCES[:3])}
    moved = {}
    for also in (set(), {"1"}):
        model = make_embedder(tmp_path / f"e{len(also)}").model
        before = model.encode(SENTENCES[0]) @ model.encode(texts["1"])
        asked = [Asked("a", SENTENCES[0], {"0"}, also=also)]
        tuning.tune(model, asked, texts, [["1"]], epochs=64, learning_rate=0.01, seed=0)
        moved[len(also)] = model.encode(SENTENCES[0]) @ model.encode(texts["1"]) - before
    assert moved[0] < 0 and moved[1] == pytest.approx(0, abs=1e-3)


def test_the_same_seed_makes_the_same_embedder(tmp_path):
    made = []
    for number in range(2):
        model = make_embedder(tmp_path / f"e{number}").model
        asked = [Asked(str(k), text, {str((k + 1) % 5)}) for k, text in enumerate(SENTENCES)]
        texts = {str(k): text for k, text in enumerate(SENTENCES)}
        tuning.tune(model, asked, texts, [["0"]] * 5, epochs=100, learning_rate=0.01, seed=3)
        made.append(model.encode([*SENTENCES]))
    assert np.array_equal(*made)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--epochs", "0"], "--epochs: 0.0 is not above 0"),
        (["--retriever", "bm25"], "retriever: passages are found by their words alone"),
        (["--gold_passages", '{"number": "q"}'], "gold_passages: no question of train has a passage"),
    ],
)
def test_what_cannot_be_tuned_is_one_line(run, words, said):
    with pytest.raises(UserError, match=said):
        run(*words)
