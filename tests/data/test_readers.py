"""Files of every format give the same rows; what is wrong in one is a line with file and row."""

import csv
import gzip
import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from small_rows import error_of, odd_rows, pairs, turns_of, write_jsonl

from carelm.data.readers import read_file
from carelm.data.splits import make_examples
from carelm.errors import UserError


def write_formats(folder):
    """The same rows in every format, and as two files of one split."""
    rows = odd_rows()
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "utf16.jsonl").write_text((folder / "rows.jsonl").read_text("utf-8"), encoding="utf-16", newline="\n")
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "nested.json").write_text(json.dumps({"about": "x", "labels": ["a"], "rows": rows}), encoding="utf-8")
    for name, encoding, separator in (("rows.csv", "utf-8-sig", ","), ("semicolons.csv", "utf-8", ";"),
                                      ("Excel.CSV", "utf-16", "\t"), ("rows.tsv", "utf-16-le", "\t")):  # fmt: skip
        with open(folder / name, "w", encoding=encoding, newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer"], delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
    for name in ("rows.jsonl", "rows.json", "rows.csv"):
        (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    (folder / "lang=en").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "lang=en/rows.parquet")
    write_jsonl(folder / "parts/train-00000-of-00002.jsonl", rows[:2])
    write_jsonl(folder / "parts/train-00001-of-00002.jsonl", rows[2:])
    write_jsonl(folder / "one/train.jsonl", rows)


FORMATS = ("rows.jsonl", "utf16.jsonl", "rows.json", "nested.json", "rows.csv", "semicolons.csv", "Excel.CSV", "rows.tsv",
           "rows.jsonl.gz", "rows.json.gz", "rows.csv.gz", "lang=en/rows.parquet", "parts", "parts/*.jsonl", "one")  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_folder_and_glob_gives_the_same_text_to_the_byte(tmp_path, make, name):
    write_formats(tmp_path)
    expected = [
        ([{"role": "user", "content": row["question"]}], [{"role": "assistant", "content": row["answer"]}])
        for row in odd_rows()
    ]
    assert turns_of(make(tmp_path / name)) == expected


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("rows.jsonl", b'{"question": "a", "answer": "b"}\n\n{"question": \n', "rows.jsonl:3"),
        ("rows.jsonl", b'{"question": "a", "answer": "b"}\n["a"]\n', "rows.jsonl:2"),
        ("rows.jsonl", b'{"question": "a", "answer": "b"}\n{"question": "\xff", "answer": "b"}\n', "rows.jsonl:2: not UTF-8"),
        ("rows.jsonl", b'{"question": "a", "answer": "b"}\n{"question": "\\ud83d", "answer": "b"}\n', "rows.jsonl:2"),
        ("rows.jsonl", b'{"answer": "a"}\n{"answer": "a", "x": {"b": 1, "b": 2}}\n', "rows.jsonl:2: the key 'b' .* twice"),
        ("rows.jsonl", b'{"answer": ' + b"9" * 5000 + b"}\n", "rows.jsonl:1"),
        ("rows.jsonl", b"[" * 100_000, "rows.jsonl:1"),
        ("rows.json", b'{"question": "a"}\n{"question": "b"}', "rows.json.*one object a line is .jsonl"),
        ("rows.json", b'["a"]', "rows.json: entry 1"),
        ("rows.json", b'{"rows": [{"answer": "a"}, 7]}', "rows.json: entry 2 of the list 'rows'"),
        ("rows.json", b'{"question": {"0": "a"}, "answer": {"0": "b"}}', "rows.json.*its keys: question, answer"),
        ("rows.json", b'{"data": {"train": [{"answer": "a"}]}}', "rows.json.*its keys: data"),
        ("rows.json", b'[{"answer": "a"}, {"answer": "a", "answer": "b"}]', "rows.json:2: the key 'answer' .* twice"),
        ("rows.json", b'{"train": [{"answer": "a"}], "train": []}', "rows.json: the key 'train' .* twice"),
        ("rows.csv", b"question,answer\na,b\nc,d, or e\n", "rows.csv:2: the row's fields are 3, the header's 2"),
        ("rows.csv", b"question;answer;n\na;b;1\n\nc;d\n", "rows.csv:2: the row's fields are 2, the header's 3"),
        ("rows.csv", b'question,answer\na,"b" c\n', "rows.csv: not CSV on line 2"),
        ("rows.csv", b'question,answer\na,"b\n\nc,d\n', "rows.csv: not CSV"),
        ("rows.csv", b"question,answer,question\na,b,c\n", "rows.csv: the header has the column 'question' 2 times"),
        ("rows.csv", b'a,"b\nc","b\nc"\n1,2,3\n', r"rows.csv: the header has the column 'b.nc' 2 times"),
        ("rows.csv", b"question,answer,,\na,b,c,d\n", "rows.csv: .* columns without a name"),
        ("rows.csv", b"question,answer\na,b\nc,\0d\n", "rows.csv: a NUL character on line 3"),
        ("rows.csv", b"question;answer,n\na;b,c\n", "rows.csv: .* commas or semicolons"),
        ("rows.csv", b"PK\x03\x04\x14\x00" * 9, "rows.csv: no text but an Excel workbook"),
        ("rows.csv", b"question,answer\n", "rows.csv has no rows"),
        ("rows.csv.gz", gzip.compress(b"question,answer\na,b\n" * 99, mtime=0)[:-20], "rows.csv.gz cannot be read"),
        ("rows.csv.gz", b"question,answer\na,b\n", "rows.csv.gz cannot be read"),
        ("rows.parquet", b"PAR1", "rows.parquet"),
        ("rows.txt", b"a", "rows.txt"),
        ("rows.jsonl", b"", "rows.jsonl has no rows"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_is_named_with_the_row(tmp_path, make, name, content, named):
    (tmp_path / name).write_bytes(content)
    assert re.search(named, error_of(make(tmp_path / name)))


def test_a_parquet_column_that_is_there_twice_is_refused(tmp_path):
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["answer", "answer"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="'answer' is there 2 times"):
        read_file(tmp_path / "rows.parquet", "rows.parquet")


# CSV as programs write it

WESTERN = [
    "Größe,Straße,„Über“ – 5 € bei José",
    "Où est l’été?,C’est à Besançon « ça » …,œuvre",
    "¿Dónde está?,Aquí ¡niño! nº 5,1ª",
    "Informações não,três opções,você",
    "Var är åäö?,På Ångström,møte",
    "20 m²,30 m³/h,25 °C ±2 ½ © Foo®",
]
OTHERS = [
    ("Где мой заказ?,Он в пути,а", "cp1251"),
    ("Gdzie jest zamówienie?,Już w drodze,możesz śledzić", "cp1250"),
    ("Kde je objednávka?,Už je na cestě,můžete sledovat", "cp1250"),
    ("Hol van a rendelés?,A futár később jön,idő", "cp1250"),
    ("Sipariş nerede?,Yolda,teşekkür", "cp1254"),
    ("Πού είναι;,Στον δρόμο,α", "cp1253"),
    ("注文はどこですか,配送中です,はい", "shift_jis"),
    ("我的订单在哪里,正在路上,好", "gbk"),
    ("Größe,für Öl,Straße", "mac_roman"),
    ("Größe,für Öl,Straße", "cp850"),
]


@pytest.mark.parametrize("line", WESTERN)
def test_a_western_csv_file_in_cp1252_is_read_and_said(tmp_path, make, line):
    (tmp_path / "train.csv").write_bytes(f"question,answer,n\n{line}\n".encode("cp1252"))
    examples, reports = make_examples(make(tmp_path))
    question, answer, _ = line.split(",")
    (example,) = examples["train"]
    assert [m["content"] for m in example.prompt + example.completion] == [question, answer]
    (note,) = reports["train"].notes
    assert note.startswith("train.csv is read as cp1252 (such as ")


@pytest.mark.parametrize(("line", "encoding"), OTHERS, ids=lambda value: value.split(",")[0])
def test_a_csv_file_in_an_encoding_that_is_not_certain_is_refused(tmp_path, make, line, encoding):
    (tmp_path / "train.csv").write_bytes(f"question,answer,n\n{line}\n".encode(encoding))
    assert "train.csv: not UTF-8 on line 2" in error_of(make(tmp_path))


def test_json_in_utf_16_is_read_and_said(tmp_path, make):
    for name in ("train.jsonl", "train.json"):
        for encoding in ("utf-16", "utf-16-le", "utf-16-be"):  # with a byte order mark, and without
            text = json.dumps(pairs(1)[0] if name == "train.jsonl" else pairs(1))
            (tmp_path / name).write_text(text, encoding=encoding)
            assert make_examples(make(tmp_path / name))[1]["train"].notes == [f"{name} is read as UTF-16"]


def test_a_file_of_two_encodings_is_refused(tmp_path, make):
    (tmp_path / "train.csv").write_bytes("question,answer\ncafé,a\n".encode() + "été,b\n".encode("cp1252"))
    assert "train.csv: not UTF-8 on line 3" in error_of(make(tmp_path))


SEMICOLONS = "train.csv is read as columns separated by semicolons"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("train.csv", b"question,answer\na;b,c\td\n", []),
        ("train.csv", b"question;answer\na;b,c\n", [SEMICOLONS]),
        ("train.csv", b"sep=;\r\nquestion;answer\r\na;b\r\n", [SEMICOLONS]),
        ("train.csv", b'"question"\t"answer"\na\tb, c; d\n', ["train.csv is read as columns separated by tabs"]),
        ("train.tsv", b"question\tanswer\na\tb\n", []),
        ("train.csv", b'question;answer;"note, if any"\na;b;c, d\ne;f;\n', [SEMICOLONS]),
        ("train.csv", b"question,answer,,\n\na,b,,\n  \n\n", []),
        ("train.csv", b",question,answer\n0,a,b\n", []),
        ("train.csv", b"question,answer\ra,b\r", []),
    ],
)  # fmt: skip
def test_what_separates_columns_is_found_and_said(tmp_path, make, name, content, said):
    (tmp_path / name).write_bytes(content)
    examples, reports = make_examples(make(tmp_path))
    assert examples["train"][0].prompt[0]["content"][0] == "a" and reports["train"].notes == said


# JSON objects that hold lists


def test_each_list_of_a_json_object_is_the_split_of_its_key(tmp_path, make):
    lists = {"Test": pairs(3), "about": {"by": "us"}, "labels": ["a", "b"], "train": pairs(9, 10), "dev": pairs(2, 30)}
    path = tmp_path / "all.json"
    path.write_text(json.dumps(lists))
    (tmp_path / "readme.txt").write_text("a")
    for name in (path, tmp_path, tmp_path / "*.json"):
        examples, reports = make_examples(make(name))
        assert {split: len(e) for split, e in examples.items()} == {"train": 9, "validation": 2, "test": 3}
        assert reports["validation"].files == {"all.json: dev": 2}
        assert examples["test"][0].source == "all.json:Test:1"


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (("train", "extra"), "extra"),
        (("a", "b"), "a, b"),
        (("test",), "no 'train' (there: test)"),
        (("train", "val", "dev"), "val"),
        (("train", "valid", "validation"), "dataset_validation_split: valid"),
    ],
)
def test_lists_that_are_no_splits_are_refused_with_their_keys(tmp_path, make, keys, named):
    (tmp_path / "all.json").write_text(json.dumps({key: pairs(2, 10 * i) for i, key in enumerate(keys)}))
    assert named in error_of(make(tmp_path / "all.json"))


def test_an_empty_list_of_a_split_is_no_reason_to_cut_one(tmp_path, make):
    (tmp_path / "all.json").write_text(json.dumps({"train": pairs(4), "test": [], "errors": []}))
    assert "the test split of" in error_of(make(tmp_path / "all.json", test_fraction=0.5))


def test_a_json_file_whose_name_and_keys_say_different_splits_is_refused(tmp_path, make):
    (tmp_path / "train.json").write_text(json.dumps({"train": pairs(2), "test": pairs(2, 10)}))
    assert "name says train" in error_of(make(tmp_path))
    (tmp_path / "train.json").write_text(json.dumps({"train": pairs(2)}))
    assert len(turns_of(make(tmp_path))) == 2


def test_a_list_that_the_recipe_passes_over_is_named(tmp_path, make):
    lists = {"train": pairs(4), "test": pairs(2, 10), "hard": pairs(3, 20)}
    (tmp_path / "all.json").write_text(json.dumps(lists))
    examples, reports = make_examples(make(tmp_path, dataset_test_split="hard"))
    assert len(examples["test"]) == 3 and reports["train"].notes == ["not used: all.json: test"]


def test_a_title_above_the_names_of_the_columns_and_a_second_mark_are_told(tmp_path, make):
    (tmp_path / "title.csv").write_text("Export of 13 Feb\n\nquestion,answer\nHow?,So.\n")
    message = error_of(make(tmp_path / "title.csv"))
    assert "(it begins 'question')" in message and message.endswith("names: take out what stands above them")
    (tmp_path / "marks.csv").write_bytes(2 * b"\xef\xbb\xbf" + b"question,answer\nHow?,So.\n")
    assert turns_of(make(tmp_path / "marks.csv"))[0][0][0]["content"] == "How?"


def test_a_line_that_is_cut_within_a_text_is_told(tmp_path, make):
    (tmp_path / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": "a", "answer": "b\n')
    message = error_of(make(tmp_path / "rows.jsonl"))
    assert "rows.jsonl:2: not JSON (" in message and " at at " not in message and "it is cut, or a line end" in message
