"""Every file that a name, a folder or a glob reaches is used, or named as not used."""

import os

import datasets
import pytest
from small_rows import error_of, pairs, prepare, write_jsonl

from carelm.data.splits import make_examples


def files_of(recipe):
    """{"train": [names], ...} and what is said of the others."""
    _, reports = make_examples(recipe)
    return {split: list(report.files) for split, report in reports.items()}, reports["train"].notes


def write(folder, *names):
    """A file of two rows of its own under each name."""
    for i, name in enumerate(names):
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True)
        elif path.suffix.lower() in (".jsonl", ".json"):
            write_jsonl(path, pairs(2, start=10 * i))
            if path.suffix.lower() == ".json":
                path.write_text("[" + ",".join(path.read_text().splitlines()) + "]")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"question,answer\nQuestion {i}?,Yes {i}.\nAnd {i}?,No {i}.\n")


@pytest.mark.parametrize("word", ["validation", "valid", "val", "dev", "eval", "Val", "DEV"])
def test_validation_goes_by_the_names_that_people_use(tmp_path, make, word):
    write(tmp_path, "train.jsonl", "test.jsonl", f"{word}.jsonl")
    used, said = files_of(make(tmp_path, validation_fraction=0.5))
    assert used == {"train": ["train.jsonl"], "validation": [f"{word}.jsonl"], "test": ["test.jsonl"]} and said == []


@pytest.mark.parametrize(
    "two", [("val.csv", "dev.jsonl"), ("validation.csv", "valid-1.csv"), ("val/a.csv", "eval.csv")]
)
def test_two_names_for_one_split_are_refused(tmp_path, make, two):
    write(tmp_path, "train.jsonl", *two)
    message = error_of(make(tmp_path))
    assert message.startswith("dataset_validation_split") and all(name in message for name in two)
    name = two[1].removesuffix(".csv").removesuffix(".jsonl").removesuffix("-1")
    used, said = files_of(make(tmp_path, dataset_validation_split=name))
    assert used["validation"] == [two[1]] and said == [f"not used: {two[0]}"]


@pytest.mark.parametrize(
    "names",
    [
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
        ["train-00000-of-00001-b42a775f407cee45.csv"],
        ["train-1.csv", "train-2.csv", "train-10.csv"],
        ["train.csv", "train2.csv"],
        ["train_00.jsonl", "train_01.jsonl"],
        ["train_part1.csv", "train_part2.csv", "train-part-b.csv"],
        ["train.shard3.csv"],
        ["Train.CSV", "TRAIN_2.csv"],
        ["training.jsonl"],
        ["train/x.csv", "train/deeper/y.csv"],
        ["data/train.csv"],
        ["data/train/x.csv", "data/train/y.jsonl"],
        ["data/train-00000-of-00001.csv"],
        ["rows.csv"],
        ["my_train.csv"],
        ["part-00000-a1.csv", "part-00001-a1.csv"],
        ["train.csv/part-0.csv", "train.csv/part-1.csv"],
        ["train-2024-01.csv", "train-2024-02.csv"],
    ],
)
def test_shards_and_folders_of_one_split_are_used_whole(tmp_path, make, names):
    write(tmp_path, *names)
    used, said = files_of(make(tmp_path))
    assert sorted(used["train"]) == sorted(names) and said == []


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (
            ["shop_train.csv", "shop_dev.csv", "shop-notes.csv"],
            {"train": "shop_train.csv", "validation": "shop_dev.csv"},
        ),
        (["a-train-v2.csv", "a-test-v2.csv", "val.ods"], {"train": "a-train-v2.csv", "test": "a-test-v2.csv"}),
        (["train.csv", "blood_test.csv"], {"train": "train.csv"}),
        (["train.csv", "test.csv", "test_extra.csv"], {"train": "train.csv", "test": "test.csv"}),
        (["train.csv", "old/train.csv", "train/test.csv"], {"train": "train.csv"}),
        (["train.csv", "train copy.csv", "train (1).csv"], {"train": "train.csv"}),
        (["train.csv", "test.xlsx", "val.txt", "val.zip", "a.arrow", "b.csv.bz2"], {"train": "train.csv"}),
    ],
)
def test_what_is_not_used_is_named_in_one_line(tmp_path, make, names, expected):
    write(tmp_path, *names)
    used, (said,) = files_of(make(tmp_path))
    assert used == {split: [name] for split, name in expected.items()}
    assert said.startswith("not used: ")
    for name in names:
        assert (name in said.removeprefix("not used: ").split(", ")) == (
            name not in expected.values() and not name.startswith("old/")
        )
    assert ("old/" in said) == any(name.startswith("old/") for name in names)


def test_what_is_no_data_is_not_named(tmp_path, make):
    write(
        tmp_path,
        "train.csv",
        ".hidden.csv",
        ".git/train.csv",
        "README.md",
        "LICENSE.txt",
        "make.py",
        "dataset_infos.json",
    )
    assert files_of(make(tmp_path)) == ({"train": ["train.csv"]}, [])


def test_a_shard_that_is_not_here_is_said(tmp_path, make):
    write(tmp_path, "train-00000-of-00003.csv", "train-00002-of-00003.csv")
    assert files_of(make(tmp_path))[1] == ["2 of 3 parts are here"]


def test_a_key_of_the_recipe_chooses_another_file(tmp_path, make):
    write(tmp_path, "train.csv", "test.csv", "test_hard.csv", "dev.csv")
    used, said = files_of(make(tmp_path, dataset_test_split="test_hard", dataset_validation_split="test"))
    assert used == {"train": ["train.csv"], "validation": ["test.csv"], "test": ["test_hard.csv"]}
    assert said == ["not used: dev.csv"]


def test_a_split_that_the_recipe_names_and_that_is_not_there_is_refused(tmp_path, make):
    write(tmp_path, "train.csv", "val.csv")
    for key in ("dataset_validation_split", "dataset_test_split"):
        assert error_of(make(tmp_path, **{key: "holdout"})).startswith(f"{key}: ")


def test_a_file_that_comes_later_is_named_though_the_data_was_prepared(tmp_path, make):
    write(tmp_path / "folder", "train.csv")
    assert prepare(make(tmp_path / "folder")).report["train"]["notes"] == []
    write(tmp_path / "folder", "val.xlsx")
    assert prepare(make(tmp_path / "folder")).report["train"]["notes"] == ["not used: val.xlsx"]


@pytest.mark.parametrize(
    ("pattern", "expected", "unused"),
    [
        ("*.csv", {"train": ["a.csv", "train_tickets.csv"], "test": ["test.csv"]}, []),
        ("*", {"train": ["a.csv", "train_tickets.csv", "train/x.csv"], "test": ["test.csv"]}, ["c.txt", "old/"]),
        ("**", {"train": ["a.csv", "old/b.csv", "train/deep/y.csv", "train/x.csv", "train_tickets.csv"],
                "test": ["test.csv"]}, ["c.txt"]),
        ("**/y.csv", {"train": ["train/deep/y.csv"]}, []),
        ("train/*.csv", {"train": ["x.csv"]}, []),
        ("?.csv", {"train": ["a.csv"]}, []),
    ],
)  # fmt: skip
def test_in_a_glob_a_file_without_a_splits_name_is_train(tmp_path, make, pattern, expected, unused):
    write(tmp_path, "a.csv", "train_tickets.csv", "test.csv", "c.txt", "old/b.csv", "train/x.csv")
    if "**" in pattern:
        (tmp_path / "train/deep").mkdir()
        (tmp_path / "train/deep/y.csv").write_text("question,answer\nDeep?,Yes.\n")
    used, said = files_of(make(tmp_path / pattern))
    assert {split: sorted(names) for split, names in used.items()} == {s: sorted(n) for s, n in expected.items()}
    assert said == ([f"not used: {', '.join(unused)}"] if unused else [])


def test_a_folder_called_train_is_all_train(tmp_path, make):
    write(tmp_path, "train/a.csv", "train/b.csv", "test/a.csv")
    assert files_of(make(tmp_path / "train")) == ({"train": ["a.csv", "b.csv"]}, [])
    assert files_of(make(tmp_path)) == ({"train": ["train/a.csv", "train/b.csv"], "test": ["test/a.csv"]}, [])


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["a.csv", "b.csv"], "(there: a.csv, b.csv); --dataset_name"),
        (["test.csv"], "no file of a split 'train' (there: test.csv)"),
        (["train.xlsx"], "(there: train.xlsx); what is read: .jsonl"),
        (["v1/train.csv", "v2/train.csv"], "(there: v1/, v2/); name one of these folders"),
        (["train_test.csv", "b.csv"], "there: b.csv, train_test.csv"),
        (["a_train.csv", "a_test.csv", "b_train.csv", "b_test.csv"], "several data sets"),
        (["train.csv", "train.jsonl"], "train.csv and train.jsonl are one name in two formats"),
        (["../"], "there: nothing"),
    ],
)
def test_a_folder_without_a_clear_train_split_is_refused_with_what_is_there(tmp_path, make, names, named):
    folder = tmp_path / "folder"
    folder.mkdir()
    write(folder, *(name for name in names if name != "../"))
    assert named in error_of(make(folder))


def test_what_could_have_been_meant_by_a_file_that_is_not_there_is_said(tmp_path, make):
    for name in ("tickets.csv", "tickets-2.csv", "notes.txt"):
        write_jsonl(tmp_path / "shop" / name, [])
    said = error_of(make(tmp_path / "shop/Tikets.csv"))
    assert said.endswith(f"did you mean {tmp_path}/shop/tickets.csv or {tmp_path}/shop/tickets-2.csv?")
    assert error_of(make(tmp_path / "shop/x.csv")).endswith(
        f"; data files in {tmp_path}/shop: tickets-2.csv, tickets.csv"
    )
    assert error_of(make(tmp_path / "shap/x.csv")).endswith(f", and no folder {tmp_path}/shap")


def test_data_is_looked_for_beside_the_recipe_that_names_it_where_it_is_not_here(tmp_path, make, monkeypatch):
    """`make` writes the recipe into tmp_path."""
    monkeypatch.chdir(write_jsonl(tmp_path / "here/other.jsonl", pairs(1)).parent)
    write_jsonl(tmp_path / "rows.jsonl", pairs(3))
    write_jsonl(tmp_path / "parts/a-1.jsonl", pairs(4))
    assert make("rows.jsonl").dataset_name == str(tmp_path / "rows.jsonl")
    assert len(make_examples(make("parts"))[0]["train"]) == len(make_examples(make("parts/*.jsonl"))[0]["train"]) == 4
    assert error_of(make("row.jsonl")).endswith(f"row.jsonl; did you mean {tmp_path}/rows.jsonl?")
    assert make("demo/data").dataset_name == "demo/data" and make("owner/name").dataset_name == "owner/name"
    write_jsonl(tmp_path / "here/rows.jsonl", pairs(2))
    assert make("rows.jsonl").dataset_name == "rows.jsonl" and len(make_examples(make("rows.jsonl"))[0]["train"]) == 2


def test_a_file_folder_or_split_that_is_not_there_is_named(tmp_path, make):
    assert "nowhere.jsonl" in error_of(make(tmp_path / "nowhere.jsonl"))
    assert "nowhere/*.csv" in error_of(make(tmp_path / "nowhere/*.csv"))
    write(tmp_path, "questions.jsonl", "products.jsonl")
    message = error_of(make(tmp_path))
    assert "dataset_train_split" in message and "questions.jsonl" in message
    used, said = files_of(make(tmp_path, dataset_train_split="questions"))
    assert used == {"train": ["questions.jsonl"]} and said == ["not used: products.jsonl"]


def test_a_file_that_is_reached_by_two_names_counts_once(tmp_path, make):
    write(tmp_path, "rows.csv")
    (tmp_path / "train.csv").symlink_to(tmp_path / "rows.csv")
    (tmp_path / "train-2.csv").symlink_to(tmp_path / "rows.csv")
    examples, reports = make_examples(make(tmp_path))
    assert len(examples["train"]) == 2 and len(reports["train"].files) == 1 and reports["train"].notes == []
    assert reports["train"].dropped == {}


def test_links_in_a_circle_and_pipes_are_not_followed(tmp_path, make):
    write(tmp_path, "train/a.csv")
    (tmp_path / "train/again").symlink_to(tmp_path / "train")
    os.mkfifo(tmp_path / "test.csv")
    assert files_of(make(tmp_path)) == ({"train": ["train/a.csv"]}, ["not used: test.csv"])


def test_a_file_without_rows_stands_in_the_report(tmp_path, make):
    write(tmp_path, "train-1.csv")
    (tmp_path / "train-2.csv").write_text("question,answer\n")
    _, reports = make_examples(make(tmp_path))
    assert reports["train"].files == {"train-1.csv": 2, "train-2.csv": 0}
    assert reports["train"].notes == ["no rows in train-2.csv"]


def test_rows_that_row_filter_leaves_out_are_said(tmp_path, make):
    write_jsonl(tmp_path / "train.jsonl", [row | {"lang": "en" if row["n"] < 3 else "de"} for row in pairs(10)])
    _, reports = make_examples(make(tmp_path, row_filter={"lang": "en"}))
    assert reports["train"].rows == 3 and reports["train"].notes == ["row_filter keeps 3 of 10 rows"]


# The Hub


@pytest.fixture
def hub(monkeypatch):
    """A Hub whose one dataset has the splits that are put into this dict."""
    splits = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: datasets.DatasetDict(splits))
    return splits


def test_splits_of_a_hub_dataset_go_by_the_same_names_and_unused_ones_are_named(hub, make):
    for i, name in enumerate(("train", "dev", "test", "test_hard", "unlabelled")):
        hub[name] = datasets.Dataset.from_list(pairs(i + 2, start=100 * i))
    examples, reports = make_examples(make("owner/name"))
    assert {split: len(e) for split, e in examples.items()} == {"train": 2, "validation": 3, "test": 4}
    assert reports["train"].notes == ["not used: test_hard, unlabelled"]
    assert reports["validation"].files == {"dev": 3}
    examples, reports = make_examples(make("owner/name", dataset_test_split="test_hard"))
    assert len(examples["test"]) == 5 and reports["train"].notes == ["not used: test, unlabelled"]


def test_two_hub_splits_of_one_meaning_and_no_train_are_refused(hub, make):
    hub["train"] = hub["valid"] = hub["dev"] = datasets.Dataset.from_list(pairs(2))
    assert "dev and valid" in error_of(make("owner/name"))
    hub.clear()
    hub["train_sft"] = datasets.Dataset.from_list(pairs(2))
    assert "no split 'train' (there: train_sft)" in error_of(make("owner/name"))


def test_a_workbook_is_told_how_it_is_saved(tmp_path, make):
    (tmp_path / "Tickets.XLSX").write_bytes(b"PK\x03\x04")
    assert error_of(make(tmp_path / "Tickets.XLSX")).endswith("; save it from the spreadsheet as CSV in UTF-8")
