"""train/make_rows.py: from a recipe's questions and the index of its documents to rows in their splits, or one line."""

import json
import runpy
import sys

import pytest
from conftest import PROJECT

from carelm.chat.grounding import DONT_KNOW, marks, passages_in
from carelm.errors import UserError
from carelm.recipe_file import load_recipe

THINGS = ["lamp", "mat", "kettle", "towel", "clock", "bag", "knife", "apron", "vase", "shelf", "chair", "boots"]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def shop(tmp_path):
    """Documents, questions about them in three splits, and a recipe for each of the two."""
    goods = [{"name": f"Harbour {t}", "price": 10 + k, "stuff": f"stuff{k}"} for k, t in enumerate(THINGS)]
    write(tmp_path / "goods.jsonl", goods)
    for split, phrase in (
        ("train", "What does the {} cost?"),
        ("validation", "How much is the {}?"),
        ("test", "Is the {} dear?"),
    ):
        rows = [
            {
                "id": f"{split}-{k}",
                "q": phrase.format(g["name"]),
                "a": f"The {g['name']} costs {g['price']} euros, of {g['stuff']}.",
            }
            for k, g in enumerate(goods)
        ]
        write(
            tmp_path / "asked" / f"{split}.jsonl",
            [*rows, {"id": "x", "q": f"Who are you, {split}?", "a": "A quiet voice."}],
        )
    asked = {
        "dataset_name": str(tmp_path / "asked"),
        "prompt_template": "{q}",
        "completion_template": "{a}",
        "id_column": "id",
    }
    (tmp_path / "asked.yaml").write_text(json.dumps(asked | {"model_name_or_path": "demo/base"}))
    grounded = {
        "model_name_or_path": "demo/base", "documents": [str(tmp_path / "goods.jsonl")], "title_column": "name",
        "passage_template": "{name} costs {price} euros. It is of {stuff}.", "retriever": "bm25", "num_passages": 3,
        "dataset_name": str(tmp_path / "rows"), "messages_column": "messages", "output_dir": str(tmp_path / "out"),
    }  # fmt: skip
    (tmp_path / "grounded.yaml").write_text(json.dumps(grounded))
    return tmp_path


@pytest.fixture
def run(shop, monkeypatch, capsys):
    def run(*words, questions="asked.yaml"):
        keys = ["--config", str(shop / "grounded.yaml"), "--questions", str(shop / questions)]
        monkeypatch.setattr(sys, "argv", [str(PROJECT / "train/make_rows.py"), *keys, *words])
        runpy.run_path(sys.argv[0])["main"]()
        return capsys.readouterr()

    return run


def index(shop):
    pytest.importorskip("lancedb")
    from carelm.retrieval.update import update

    update(load_recipe(["--config", str(shop / "grounded.yaml")], usage=""))


def test_questions_become_rows_in_their_splits_with_what_the_index_finds(shop, run):
    index(shop)
    told = run("--held_out", "0.5", "--left_out", "1")
    result = json.loads(told.out.splitlines()[-1])
    assert result["answerable"] == dict.fromkeys(("train", "validation", "test"), "12 of 13")
    assert (
        result["rows"] == {"train": 12, "validation": 24, "test": 24}
        and result["left_out"]["answer in no passage"] == 3
    )
    rows = {s: [json.loads(line) for line in open(shop / f"rows/{s}.jsonl")] for s in ("train", "validation", "test")}
    golds = {split: {gold for row in of_split for gold in row["gold"]} for split, of_split in rows.items()}
    assert not golds["train"] & golds["test"] and len(golds["train"] | golds["test"]) == len(golds["validation"]) == 12
    for split, of_split in rows.items():
        for row in of_split:
            question, answer = (message["content"] for message in row["messages"])
            assert row["id"].startswith(split) and len(passages_in(question)) == row["num_passages"] == len(
                row["passages"]
            )
            named = [row["passages"][n - 1] for n in marks(answer)]
            assert named == [g for g in row["gold"] if g in row["passages"]] or not row["answerable"]
            assert row["answerable"] or (answer == DONT_KNOW and not set(row["gold"]) & {*row["passages"]})
    assert {row["condition"] for row in rows["train"]} == {"gold", "left out"}
    assert "train.jsonl" in "".join(p.name for p in (shop / "rows").iterdir()) and "eval/grounding.py" in told.err
    assert "messages_column" not in told.err and told.err.count("--id_column id --category_column condition") == 3
    first = (shop / "rows/train.jsonl").read_bytes()
    run("--held_out", "0.5", "--left_out", "1")  # over its own rows
    assert (shop / "rows/train.jsonl").read_bytes() == first


def test_training_rows_may_have_more_passages_than_are_served(shop, run):
    index(shop)
    run("--num_passages", "1", "--train_passages", "3")
    rows = {s: [json.loads(line) for line in open(shop / f"rows/{s}.jsonl")] for s in ("train", "validation", "test")}
    most = {split: max(row["num_passages"] for row in of_split) for split, of_split in rows.items()}
    assert most == {"train": 3, "validation": 1, "test": 1}


def test_what_cannot_be_made_is_one_line(shop, run):
    with pytest.raises(UserError, match="--train_passages: 0 is not above 0"):
        run("--train_passages", "0")
    with pytest.raises(UserError, match="--left_out: 1.5 is no share; give a number from 0 to 1"):
        run("--left_out", "1.5")
    with pytest.raises(UserError, match="documents: the recipe names none"):
        run("--documents", "[]")
    with pytest.raises(UserError, match="--questions: .*nowhere"):
        run(questions="nowhere.yaml")
    with pytest.raises(UserError, match="dataset_name: .* holds other data; name another folder for the rows"):
        run("--dataset_name", str(shop / "asked"))
    with pytest.raises(UserError, match="index"):
        run()
    index(shop)
    (shop / "odd.yaml").write_text((shop / "asked.yaml").read_text().replace("{a}", "{id} nobody knows"))
    with pytest.raises(
        UserError, match="--questions: no question of train is left .39 answer in no passage.; give documents"
    ):
        run(questions="odd.yaml")
