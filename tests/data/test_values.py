"""What a cell holds becomes text by one rule, is counted where it is missing, or is refused with its column and row."""

import csv
import datetime
import decimal
import json
import re

import numpy as np
import pandas
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_rows import MESSAGES, error_of, pairs, turns_of, write_jsonl, write_parquet

from carelm.data import splits
from carelm.data.example import NoAnswer
from carelm.data.rows import to_example
from carelm.data.values import as_text, is_empty
from carelm.errors import UserError
from carelm.recipe import Recipe


def test_other_columns_are_filled_in_as_they_are(tmp_path, make):
    rows = [{"question": "Which {{sizes}}?", "stock": {"größe": [38, 40]}, "answer": "38", "n": 7, "none": None}]
    recipe = make(
        write_jsonl(tmp_path / "rows.jsonl", rows),
        prompt_template="{question} {{kept}} {stock} {n}{none}",
        system_prompt="Row {n}.",
        optional_columns=["none"],
        category_column="n",
        id_column="n",
    )
    (example,) = splits.make_examples(recipe)[0]["train"]
    assert example.prompt == [
        {"role": "system", "content": "Row 7."},
        {"role": "user", "content": 'Which {{sizes}}? {kept} {"größe": [38, 40]} 7'},
    ]
    assert (example.category, example.id, example.source) == ("7", "7", "rows.jsonl:1")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (" as it\r\nis ", " as it\r\nis "),
        ("nan", "nan"),  # in a list or a message; see below for columns
        (None, None),
        (float("nan"), None),
        (decimal.Decimal("NaN"), None),
        (pandas.NaT, None),
        (True, "true"),
        (7, "7"),
        (7.0, "7"),
        (-0.0, "0"),
        (7.25, "7.25"),
        (1e300, "1e+300"),
        (decimal.Decimal("4.50"), "4.50"),
        (decimal.Decimal("1E+3"), "1000"),
        (datetime.date(2024, 5, 1), "2024-05-01"),
        (datetime.datetime(2024, 5, 1, 12, 30), "2024-05-01 12:30:00"),
        (pandas.Timestamp("2024-05-01 12:30"), "2024-05-01 12:30:00"),
        (datetime.time(12, 30), "12:30:00"),
        (datetime.timedelta(hours=2), "2:00:00"),
        (pandas.Timedelta(hours=2), "2:00:00"),
        (pandas.Timedelta("nat"), None),
        (np.int64(7), "7"),
        (np.float32(0.5), "0.5"),
        (np.bool_(True), "true"),
        (np.str_("a"), "a"),
        (np.array([1.0, 2.5]), "[1, 2.5]"),
        ([], "[]"),
        (["ü", None, {"day": datetime.date(2024, 5, 1), "none": None}], '["ü", null, {"day": "2024-05-01"}]'),
        ({"price": decimal.Decimal("4.50"), "in": True}, '{"price": "4.50", "in": true}'),
    ],
)
def test_every_kind_of_value_has_one_text(value, text):
    assert as_text(value, "here") == text


@pytest.mark.parametrize("value", [b"raw", float("inf"), decimal.Decimal("-Infinity"), {1, 2}, [b"raw"], object()])
def test_what_cannot_be_text_is_refused(value):
    with pytest.raises(UserError, match="^here holds an? "):
        as_text(value, "here")


@settings(max_examples=100, deadline=None)
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_floats_text_is_the_same_number(value):
    assert float(as_text(value, "here")) == value


def test_an_object_whose_members_are_all_missing_is_empty():
    assert is_empty({"a": None, "b": {"c": None}}) and is_empty(float("nan")) and is_empty("") and is_empty({})
    assert not is_empty({"a": []}) and not is_empty({"a": ""}) and not is_empty(0) and not is_empty(False)


def test_parquet_columns_of_every_kind_are_text(tmp_path, make):
    rows = [
        {"question": "Which?", "answer": "One.", "day": datetime.datetime(2024, 5, 1, 12), "price": decimal.Decimal("4.50"),
         "n": number, "open": True, "sizes": [38, 40], "at": {"town": "Ulm", "zip": zip_}}
        for number, zip_ in ((1, None), (2, "89073"), (None, None))
    ]  # fmt: skip
    path = write_parquet(tmp_path / "rows.parquet", rows)
    recipe = make(path, prompt_template="{question} {day} {price} {n} {open} {sizes} {at}", max_empty_share=0.5)
    examples, reports = splits.make_examples(recipe)
    assert [e.prompt[0]["content"] for e in examples["train"]] == [
        'Which? 2024-05-01 12:00:00 4.50 1 true [38, 40] {"town": "Ulm"}',
        'Which? 2024-05-01 12:00:00 4.50 2 true [38, 40] {"town": "Ulm", "zip": "89073"}',
    ]
    assert reports["train"].dropped == {"empty column 'n'": 1}


def test_parquets_short_numbers_keep_their_digits_and_maps_are_objects(tmp_path, make):
    prices = pyarrow.struct({"each": pyarrow.float32(), "half": pyarrow.float16(), "none": pyarrow.float32()})
    table = pyarrow.table({
        "question": ["Price?"], "answer": ["Low."], "price": pyarrow.array([19.99], pyarrow.float32()),
        "nested": pyarrow.array([[{"each": 19.99, "half": np.float16(0.1)}, None]], pyarrow.list_(prices)),
        "by town": pyarrow.array([[("ulm", 4.2)]], pyarrow.map_(pyarrow.string(), pyarrow.float32())),
        "coded": pyarrow.array([0.7], pyarrow.float32()).dictionary_encode(),
        "stock": pyarrow.array([[("ulm", 3), ("bonn", None)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    })  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    ((prompt, _),) = turns_of(
        make(tmp_path / "rows.parquet", prompt_template="{price} {stock} {nested} {by town} {coded}")
    )
    assert prompt[0]["content"] == '19.99 {"ulm": 3} [{"each": 19.99, "half": 0.1}, null] {"ulm": 4.2} 0.7'


def test_a_value_that_python_cannot_hold_is_one_line(tmp_path, make):
    maps = pyarrow.map_(pyarrow.string(), pyarrow.string())
    for column, named in (
        (pyarrow.array([[("ulm", "a"), ("ulm", "b")]], maps), "'ulm'"),
        (pyarrow.array([10**18], pyarrow.timestamp("us")), "out of range"),
    ):
        table = pyarrow.table({"question": ["Price?"], "answer": ["Low."], "when": column})
        pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
        assert re.search(f"rows.parquet: a value cannot be read.*{named}", error_of(make(tmp_path / "rows.parquet")))


def test_a_value_that_cannot_be_text_is_refused_with_its_column_and_row(tmp_path, make):
    rows = [{"question": "a", "answer": "b", "raw": None}, {"question": "c", "answer": "d", "raw": b"x"}]
    recipe = make(
        write_parquet(tmp_path / "rows.parquet", rows), prompt_template="{question}{raw}", optional_columns=["raw"]
    )
    assert error_of(recipe).startswith("rows.parquet:2: column 'raw' holds a value of type bytes")
    write_jsonl(tmp_path / "rows.jsonl", [{"question": "a", "answer": float("-inf")}])
    assert error_of(make(tmp_path / "rows.jsonl")).startswith("rows.jsonl:1: column 'answer' holds an infinite number")


CELL = st.none() | st.booleans() | st.floats() | st.text() | st.lists(st.floats()) | st.binary() | st.datetimes()


@settings(max_examples=100, deadline=None)
@given(question=CELL, answer=CELL, other=CELL)
def test_no_row_whatever_it_holds_ends_in_a_traceback(question, answer, other):
    recipe = Recipe(prompt_template="{q} {o}", completion_template="{a}", optional_columns=["o"], training={}, model={})
    try:
        example = to_example(recipe, "rows.csv:1", {"q": question, "a": answer, "o": other})
    except NoAnswer:
        return
    except UserError as error:
        assert str(error).startswith("rows.csv:1: column '") and "\n" not in str(error)
        return
    assert example.prompt[0]["content"].strip() and example.completion[0]["content"].strip()


# Missing values


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_missing_answers_and_questions_are_counted_in_every_format(tmp_path, make, suffix):
    frame = pandas.DataFrame(pairs(40))[["question", "answer"]]
    frame.loc[[3, 7], "answer"] = None
    frame.loc[5, "question"] = None
    path = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        frame.to_csv(path, index=False, na_rep="nan")
    elif suffix == "jsonl":  # as json.dumps writes a NaN
        write_jsonl(
            path,
            [{k: float("nan") if v is None or v != v else v for k, v in r.items()} for r in frame.to_dict("records")],
        )
    else:
        frame.to_parquet(path)
    examples, reports = splits.make_examples(make(path))
    assert len(examples["train"]) == 37
    assert reports["train"].dropped == {"empty answer": 2, "empty column 'question'": 1}
    first = {what: source.rpartition(":")[2] for what, source in reports["train"].first_dropped.items()}
    assert first == {"empty answer": "4", "empty column 'question'": "6"}


@pytest.mark.parametrize("text", ["nan", "NaN", "NaT", "<NA>", "None", "null", "NULL"])
def test_the_text_of_a_missing_value_is_missing_where_nobody_can_have_meant_it(tmp_path, make, text):
    rows = [{"question": "a", "answer": f" {text} "}, {"question": "b", "answer": f"{text} here"}]
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], *(row.values() for row in rows)])
    write_jsonl(tmp_path / "rows.jsonl", rows)
    is_word = text in ("None", "null", "NULL")  # JSON has a null of its own: there these are words
    for name, kept in (("rows.csv", 1), ("rows.jsonl", 2 if is_word else 1)):
        assert len(turns_of(make(tmp_path / name, max_empty_share=0.5))) == kept
        assert len(turns_of(make(tmp_path / name, labels=[text, "b"]))) == 2  # one of the labels


def test_a_template_column_that_is_empty_counts_unless_the_recipe_says_that_it_may_be(tmp_path, make):
    rows = [{"question": f"Do {i}.", "input": ("", None, " ", "this")[i % 4], "answer": "Done."} for i in range(20)]
    del rows[1]["input"]
    keys = {"prompt_template": "{question}\n{input}", "completion_template": "{answer}"}
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    message = error_of(make(path, **keys))
    assert "15 of 20" in message and "15 empty column 'input'" in message and "optional_columns" in message
    examples, reports = splits.make_examples(make(path, **keys, max_empty_share=0.75))
    assert len(examples["train"]) == 5 and [*reports["train"].first_dropped.values()] == ["rows.jsonl:1"]
    examples, reports = splits.make_examples(make(path, **keys, optional_columns=["input"]))
    assert len(examples["train"]) == 20 and not reports["train"].dropped
    assert [e.prompt[0]["content"] for e in examples["train"][:4]] == ["Do 0.\n", "Do 1.\n", "Do 2.\n ", "Do 3.\nthis"]
    with pytest.raises(UserError, match="optional_columns: 'inptu' .*question, input, answer"):
        make(path, **keys, optional_columns=["inptu"])


def test_a_question_or_system_message_of_optional_columns_alone(tmp_path, make):
    rows = [{"question": "", "answer": "b", "system": "Be kind."}, {"question": "c", "answer": "d", "system": None}]
    keys = {"system_prompt": "{system}", "optional_columns": ["question", "system"], "max_empty_share": 0.5}
    examples, reports = splits.make_examples(make(write_jsonl(tmp_path / "rows.jsonl", rows), **keys))
    assert [e.prompt for e in examples["train"]] == [[{"role": "user", "content": "c"}]]
    assert reports["train"].dropped == {"empty question": 1}


def test_a_file_of_a_glob_that_lacks_a_column_is_named(tmp_path, make):
    write_jsonl(tmp_path / "a.jsonl", pairs(3))
    write_jsonl(tmp_path / "b.jsonl", [{"Question": "a", "answer": "b"}])
    message = error_of(make(tmp_path / "*.jsonl"))
    assert message.startswith("prompt_template: b.jsonl has no column 'question' (there: Question, answer)")
    write_jsonl(tmp_path / "b.jsonl", [{"question": "a", "answer": "b"}])
    recipe = make(tmp_path / "*.jsonl", prompt_template="{question}{n}", optional_columns=["n"])
    assert len(turns_of(recipe)) == 4


# Other places that read cells


def test_ids_categories_filters_and_references_follow_the_same_rule(tmp_path, make):
    rows = [
        {"question": f"q{i}", "answer": "a", "id": id_, "kind": kind, "best": best}
        for i, (id_, kind, best) in enumerate([(1.0, 2.0, 3.0), (None, True, None), (float("nan"), False, 4.5)])
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    examples, _ = splits.make_examples(make(path, id_column="id", category_column="kind"))
    assert [(e.id, e.category) for e in examples["train"]] == [
        ("1", "2"), ("rows.jsonl:2", "true"), ("rows.jsonl:3", "false"),
    ]  # fmt: skip
    assert [p[0]["content"] for p, _ in turns_of(make(path, row_filter={"kind": 2}))] == ["q0"]
    assert [p[0]["content"] for p, _ in turns_of(make(path, row_filter={"kind": [True, 2]}))] == ["q0", "q1"]
    assert [p[0]["content"] for p, _ in turns_of(make(path, row_filter={"id": None}))] == ["q1", "q2"]
    (tmp_path / "rows.csv").write_text("question,answer,kind\nq0,a,True\nq1,a,FALSE\n")
    assert [p[0]["content"] for p, _ in turns_of(make(tmp_path / "rows.csv", row_filter={"kind": False}))] == ["q1"]
    write_jsonl(tmp_path / "both/train.jsonl", pairs(2))
    write_jsonl(tmp_path / "both/test.jsonl", rows)
    recipe = make(tmp_path / "both", reference_columns=["best"], max_empty_share=0.5)
    assert [e.references for e in splits.make_examples(recipe)[0]["test"]] == [("3",), ("4.5",)]


def test_messages_that_are_missing_are_rows_without_an_answer(tmp_path, make):
    messages = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["messages"], [messages], ["nan"], ["None"], ["[]"], ["NaN"]])
    examples, reports = splits.make_examples(make(tmp_path / "rows.csv", **MESSAGES, max_empty_share=0.9))
    assert len(examples["train"]) == 1 and reports["train"].dropped == {"no assistant turn": 4}
