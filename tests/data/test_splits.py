"""Validation and test hold no question and no conversation of train, and keep the rows that the data gives them."""

import hashlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_rows import MESSAGES, chat, pairs, write_jsonl

from carelm.data import splits
from carelm.data.near_duplicates import NearDuplicates, grams
from carelm.data.report import format_report
from carelm.data.split_names import SPLITS
from carelm.recipe_file import load_recipe

CUT = {"validation_fraction": 0.2, "test_fraction": 0.2}


def ids_by_split(recipe):
    return {split: [e.id for e in examples] for split, examples in splits.make_examples(recipe)[0].items()}


# By name


def test_splits_by_name_stay_as_they_are(tmp_path, make):
    write_jsonl(tmp_path / "folder/train.jsonl", pairs(30))
    write_jsonl(tmp_path / "folder/dev.jsonl", pairs(5, start=100))
    write_jsonl(tmp_path / "folder/test.jsonl", pairs(4, start=200))
    write_jsonl(tmp_path / "folder/test_extra.jsonl", pairs(4, start=300))
    recipe = make(tmp_path / "folder", dataset_validation_split="dev", validation_fraction=0.5, test_fraction=0.3)
    examples, _ = splits.make_examples(recipe)
    assert {split: len(e) for split, e in examples.items()} == {"train": 30, "validation": 5, "test": 4}


def test_questions_in_train_and_test_are_named_and_removed_or_kept_on_demand(tmp_path, make):
    write_jsonl(tmp_path / "folder/train.jsonl", pairs(10))
    write_jsonl(tmp_path / "folder/test.jsonl", [pairs(1, start=4)[0] | {"answer": "Other."}, *pairs(3, start=20)])
    examples, reports = splits.make_examples(make(tmp_path / "folder"))
    assert len(examples["train"]) == 9 and "Question 4?" not in {e.prompt[0]["content"] for e in examples["train"]}
    assert reports["train"].dropped == {"question also in validation or test": 1}
    assert "train.jsonl:5" in reports["train"].first_in_other_split[0]
    assert "Question 4?" in reports["train"].first_in_other_split[0]

    examples, reports = splits.make_examples(make(tmp_path / "folder", keep_test_questions=True))
    assert len(examples["train"]) == 10 and reports["train"].dropped == {}
    assert reports["train"].fitted == {"question also in validation or test, kept": 1}


# By fraction


def test_splits_by_fraction_hold_every_row_once_and_depend_on_the_seed_alone(tmp_path, make):
    rows = pairs(400)
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    keys = {"validation_fraction": 0.1, "test_fraction": 0.2, "id_column": "n"}
    first = ids_by_split(make(path, **keys))
    assert sorted(i for ids in first.values() for i in ids) == sorted(str(n) for n in range(400))
    assert 20 <= len(first["validation"]) <= 60 and 50 <= len(first["test"]) <= 110
    assert ids_by_split(make(path, **keys)) == first
    assert ids_by_split(make(path, **keys, split_seed=1)) != first
    backwards = ids_by_split(make(write_jsonl(tmp_path / "backwards.jsonl", rows[::-1]), **keys))
    assert {split: set(ids) for split, ids in backwards.items()} == {split: set(ids) for split, ids in first.items()}
    more = ids_by_split(make(write_jsonl(tmp_path / "more.jsonl", [*pairs(50, start=400), *rows]), **keys))
    assert all(set(first[split]) <= set(more[split]) for split in first)


def test_splits_by_fraction_keep_one_question_on_one_side(tmp_path, make):
    rows = [{"question": f"Question {i % 20}?", "answer": f"Answer {i}."} for i in range(200)]
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", rows), validation_fraction=0.2, test_fraction=0.2)
    examples, reports = splits.make_examples(recipe)
    sides = [{e.prompt[0]["content"] for e in examples[split]} for split in SPLITS]
    assert all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])
    assert reports["train"].dropped == {} and sum(len(e) for e in examples.values()) == 200


def test_max_samples_draws_the_same_rows_each_time_and_counts_the_rest(tmp_path, make):
    write_jsonl(tmp_path / "folder/train.jsonl", pairs(50))
    write_jsonl(tmp_path / "folder/validation.jsonl", pairs(20, start=100))
    write_jsonl(tmp_path / "folder/test.jsonl", pairs(20, start=200))
    recipe = make(tmp_path / "folder", max_samples=10, max_eval_samples=5)
    examples, reports = splits.make_examples(recipe)
    assert {split: len(e) for split, e in examples.items()} == {"train": 10, "validation": 5, "test": 5}
    assert reports["train"].dropped == {"beyond max_samples": 40}
    assert reports["test"].dropped == {"beyond max_eval_samples": 15}
    sources = [e.source for e in examples["train"]]
    assert [e.source for e in splits.make_examples(recipe)[0]["train"]] == sources
    assert sources != [f"train.jsonl:{i}" for i in range(1, 11)]
    other = make(tmp_path / "folder", max_samples=10, split_seed=1)
    assert [e.source for e in splits.make_examples(other)[0]["train"]] != sources


# What a question is


def documents(number, name="Document", questions=2):
    """Conversations about a document each, with few different questions."""
    return [
        {
            "messages": chat(
                ("system", f"{name} {i}."), ("user", f"Question {i % questions}?"), ("assistant", f"Answer {i}.")
            )
        }
        for i in range(number)
    ]


def test_a_system_message_that_differs_between_rows_is_part_of_the_question(tmp_path, make):
    path = write_jsonl(tmp_path / "rows.jsonl", documents(200))
    examples, reports = splits.make_examples(make(path, **MESSAGES, **CUT))
    assert all(15 <= len(examples[split]) <= 65 for split in ("validation", "test"))
    assert reports["train"].dropped == {}
    write_jsonl(tmp_path / "named/train.jsonl", documents(20))
    write_jsonl(tmp_path / "named/test.jsonl", [*documents(9, "Other document"), *documents(1)])
    examples, reports = splits.make_examples(make(tmp_path / "named", **MESSAGES))
    assert len(examples["train"]) == 19 and len(examples["test"]) == 10
    assert reports["train"].dropped == {"question also in validation or test": 1}


def test_a_system_message_that_is_the_same_in_all_rows_is_aside(tmp_path, make):
    path = write_jsonl(tmp_path / "rows.jsonl", pairs(200))
    plain = ids_by_split(make(path, **CUT))
    assert ids_by_split(make(path, **CUT, system_prompt="Be kind.")) == plain
    turns = [{"messages": chat(("user", row["question"]), ("assistant", row["answer"]))} for row in pairs(200)]
    write_jsonl(path, [{"messages": [{"role": "system", "content": "Be kind."}, *row["messages"]]} for row in turns])
    assert ids_by_split(make(path, **CUT, **MESSAGES)) == plain


@pytest.mark.parametrize("differs", ["tool", "assistant", "tools", "user"])
def test_all_that_stands_before_the_answer_is_the_question(tmp_path, make, differs):
    def row(text):
        values = dict.fromkeys(("user", "assistant", "tool", "tools"), "one") | {differs: text}
        call = {"type": "function", "function": {"name": "find", "arguments": {"about": values["assistant"]}}}
        messages = [
            {"role": "user", "content": values["user"]},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        messages += [{"role": "tool", "content": values["tool"]}, {"role": "user", "content": "And?"}]
        tool = {"type": "function", "function": {"name": "find", "description": values["tools"], "parameters": {}}}
        return {"messages": [*messages, {"role": "assistant", "content": f"Answer {text}."}], "tools": [tool]}

    write_jsonl(tmp_path / "folder/train.jsonl", [row("one"), row("two")])
    answered = row("two")
    answered["messages"][-1]["content"] = "Otherwise."
    write_jsonl(tmp_path / "folder/test.jsonl", [answered])
    for trained_turns in ("last", "all"):
        examples, reports = splits.make_examples(make(tmp_path / "folder", **MESSAGES, trained_turns=trained_turns))
        assert [e.completion[-1]["content"] for e in examples["train"]] == ["Answer one."]
        assert reports["train"].dropped == {"question also in validation or test": 1}


# Conversations


def unrolled(number, turns=3, name="Customer"):
    """Conversations with a row for each of their answers."""
    for i in range(number):
        said = [s for t in range(turns) for s in (("user", f"{name} {i} asks {t}"), ("assistant", f"Reply {t} to {i}"))]
        for t in range(turns):
            yield {"id": f"c{i}", "messages": chat(*said[: 2 * t + 2])}


def customers(examples):
    return {e.prompt[0]["content"].rsplit(" ", 2)[0] for e in examples}


def on_one_side(examples):
    sides = [customers(examples[split]) for split in SPLITS]
    return all(sides) and not (sides[0] & sides[1] or sides[0] & sides[2] or sides[1] & sides[2])


@pytest.mark.parametrize("trained_turns", ["last", "all"])
def test_a_conversation_and_its_beginning_are_on_one_side(tmp_path, make, trained_turns):
    rows = list(unrolled(60))
    random.Random(0).shuffle(rows)
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", rows), **MESSAGES, **CUT, trained_turns=trained_turns)
    examples, reports = splits.make_examples(recipe)
    assert on_one_side(examples) and sum(map(len, examples.values())) == 180
    assert reports["train"].dropped == {} and reports["train"].unused == {"column id": 180}


def test_a_conversation_of_a_small_file_is_on_one_side_too(tmp_path, make):
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", unrolled(12)), **MESSAGES, **CUT)
    examples, reports = splits.make_examples(recipe)
    assert on_one_side(examples) and reports["train"].unused == {"column id": 36}


def test_rows_of_one_id_are_on_one_side_of_a_cut(tmp_path, make):
    rows = [{"id": i % 50, "messages": chat(("user", f"Customer {i % 50} writes {i}"), ("assistant", f"Reply {i}"))}
            for i in range(150)]  # fmt: skip
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    assert on_one_side(splits.make_examples(make(path, **MESSAGES, **CUT, id_column="id"))[0])
    assert not on_one_side(splits.make_examples(make(path, **MESSAGES, **CUT))[0])


def test_an_id_says_nothing_in_another_file_or_split(tmp_path, make):
    for name in ("a", "b", "c"):
        rows = [{"id": i, "question": f"Question {i} of {name}?", "answer": "Yes."} for i in range(100)]
        write_jsonl(tmp_path / f"files/{name}.jsonl", rows)
        write_jsonl(tmp_path / f"named/{dict(a='train', b='validation', c='test')[name]}.jsonl", rows)
    keys = {"id_column": "id", **CUT}
    together, apart = (
        ids_by_split(make(tmp_path / "files/*.jsonl", **keys)),
        ids_by_split(make(tmp_path / "files/*.jsonl", **CUT)),
    )
    assert sorted(map(len, together.values())) == sorted(map(len, apart.values()))
    examples, reports = splits.make_examples(make(tmp_path / "named", **keys))
    assert [len(examples[split]) for split in SPLITS] == [100, 100, 100] and reports["train"].dropped == {}


def test_an_id_or_beginning_of_more_than_5_percent_of_the_rows_ties_nothing_and_is_reported(tmp_path, make):
    greeted = [{"id": "web", "messages": chat(("user", "Hi"), ("assistant", "Hello"), *((m["role"], m["content"])
                for m in row["messages"]))} for row in unrolled(100, turns=1)]  # fmt: skip
    rows = [{"id": "web", "messages": chat(("user", "Hi"), ("assistant", "Hello"))}, *greeted]
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", rows), **MESSAGES, **CUT, id_column="id")
    examples, reports = splits.make_examples(recipe)
    assert all(len(examples[split]) >= 10 for split in SPLITS) and reports["train"].dropped == {}
    notes = "; ".join(reports["train"].notes)
    assert "101 of 101 rows have the id web: too many" in notes
    assert "101 of 101 rows begin as rows.jsonl:1 does: too many" in notes
    assert "too many" in format_report({s: vars(r) for s, r in reports.items()})


def test_ties_that_make_a_group_of_more_than_5_percent_are_not_held(tmp_path, make):
    rows = [{"id": f"x{i // 2}", "question": f"Question {(i + 1) // 2}?", "answer": f"Answer {i}."} for i in range(100)]
    recipe = make(write_jsonl(tmp_path / "rows.jsonl", rows), **CUT, id_column="id")
    examples, reports = splits.make_examples(recipe)
    assert all(len(examples[split]) >= 8 for split in SPLITS)
    held_out = sum(len(examples[split]) for split in ("validation", "test"))
    assert reports["train"].notes == [
        f"less {held_out} rows held out for validation and test",
        "100 of 100 rows hang together by ids and beginnings, first rows.jsonl:1: too many to keep on one side",
    ]
    questions = [{e.prompt[0]["content"] for e in examples[split]} for split in SPLITS]
    assert not questions[0] & questions[1] and not questions[0] & questions[2]


def test_a_question_of_more_than_5_percent_of_the_rows_stays_on_one_side_and_is_reported(tmp_path, make):
    rows = [*pairs(60), *({"question": "Tell me a joke.", "answer": f"Joke {i}."} for i in range(40))]
    examples, reports = splits.make_examples(make(write_jsonl(tmp_path / "rows.jsonl", rows), **CUT))
    sides = [split for split in SPLITS if any(e.prompt[0]["content"].startswith("Tell") for e in examples[split])]
    assert len(sides) == 1 and reports["train"].dropped == {}
    assert reports["train"].notes[1:] == ["40 of 100 rows ask the same, and are on one side (Tell me a joke.)"]


@pytest.mark.parametrize("longer_in", ["train", "test"])
def test_between_named_splits_conversations_are_compared_by_content(tmp_path, make, longer_in):
    rows, other = list(unrolled(30, turns=2)), list(unrolled(30, name="Caller"))
    longer, shorter = rows[1], rows[0]
    of_test = shorter if longer_in == "train" else longer
    write_jsonl(tmp_path / "folder/train.jsonl", [*rows[2:], longer if longer_in == "train" else shorter])
    write_jsonl(tmp_path / "folder/test.jsonl", [*other, of_test])
    examples, reports = splits.make_examples(make(tmp_path / "folder", **MESSAGES))
    assert len(examples["test"]) == 91 and len(examples["train"]) == 58
    assert reports["train"].dropped == {"conversation also in validation or test": 1}
    assert reports["train"].first_in_other_split[0].startswith("train.jsonl:59 Customer 0 asks")
    examples, reports = splits.make_examples(make(tmp_path / "folder", **MESSAGES, keep_test_questions=True))
    assert len(examples["train"]) == 59
    assert reports["train"].fitted == {"conversation also in validation or test, kept": 1}


def test_a_greeting_in_test_takes_no_conversations_out_of_train(tmp_path, make):
    hello = (("user", "Hi"), ("assistant", "Hello"))
    rows = [{"messages": chat(*hello, ("user", f"Question {i}?"), ("assistant", f"Answer {i}."))} for i in range(40)]
    write_jsonl(tmp_path / "folder/train.jsonl", rows)
    write_jsonl(tmp_path / "folder/test.jsonl", [{"messages": chat(*hello)}])
    examples, reports = splits.make_examples(make(tmp_path / "folder", **MESSAGES))
    assert len(examples["train"]) == 40
    assert reports["train"].notes == [
        "40 rows share a beginning with validation or test that is too common to take them out"
    ]


# Near-duplicates


def pair(similarity):
    """Two texts of 100 5-grams in all, of which they share the given number."""
    letters = [chr(0x4E00 + i) for i in range(400)]  # each stands once, so that every 5-gram does
    return "".join(letters[: similarity + 4]), "".join(letters[: similarity + 4] + letters[200 : 300 - similarity])


@pytest.mark.parametrize(("similarity", "is_near"), [(88, False), (89, False), (90, True), (91, True), (97, True)])
def test_questions_that_share_nine_tenths_of_their_5_grams_are_named_and_dropped_on_demand(
    tmp_path, make, similarity, is_near
):
    asked, held_out = pair(similarity)
    assert len(grams(asked) & grams(held_out)) / len(grams(asked) | grams(held_out)) == similarity / 100
    write_jsonl(tmp_path / "folder/train.jsonl", [*pairs(9), {"question": asked, "answer": "a"}])
    write_jsonl(tmp_path / "folder/test.jsonl", [*pairs(3, start=70), {"question": held_out, "answer": "b"}])
    examples, reports = splits.make_examples(make(tmp_path / "folder"))
    assert len(examples["train"]) == 10 and reports["train"].near_duplicates == is_near
    if is_near:
        named = f"train.jsonl:10 and test.jsonl:4 (0.{similarity}"
        assert reports["train"].first_near_duplicates[0].startswith(named)
        shown = format_report({"train": vars(reports["train"])})
        assert "1 question is nearly one of validation or test, still trained on" in shown
        assert f"\n{'':<13}{named} alike): '{asked[:58]} …'\n" in shown
    examples, reports = splits.make_examples(make(tmp_path / "folder", drop_near_duplicates=True))
    assert len(examples["train"]) == 10 - is_near
    assert reports["train"].dropped == ({"near-duplicates of validation or test": 1} if is_near else {})
    assert ("validation or test, taken out:" in format_report({"train": vars(reports["train"])})) == is_near


def test_case_blanks_and_width_make_no_other_question(tmp_path, make):
    write_jsonl(
        tmp_path / "folder/train.jsonl", [*pairs(3), {"question": " WHERE is\tmy  ｏｒｄｅｒ?\n", "answer": "a"}]
    )
    write_jsonl(tmp_path / "folder/test.jsonl", [{"question": "Where is my order?", "answer": "b"}])
    _, reports = splits.make_examples(make(tmp_path / "folder"))
    assert reports["train"].near_duplicates == 1 and "(1.00 alike)" in reports["train"].first_near_duplicates[0]


@given(st.lists(st.text("ab ", max_size=60), min_size=1, max_size=12), st.data())
@settings(max_examples=200, deadline=None)
def test_no_near_duplicate_is_missed_and_none_is_invented(held_out, data):
    index = NearDuplicates(held_out)
    text = data.draw(st.one_of(st.text("ab ", max_size=60), st.sampled_from(held_out).map(lambda t: t[1:]),
                               st.sampled_from(held_out).map(lambda t: t * 2)))  # fmt: skip
    own = grams(text)
    near = {i for i, other in enumerate(map(grams, held_out)) if 10 * len(own & other) >= 9 * len(own | other)}
    found = index.find(text)
    assert (found[0] in near) if near else (found is None)


# Real rows


def digest(examples):
    return hashlib.sha256("\n".join(e.id for e in examples).encode()).hexdigest()[:16]


def real_examples(name, rows):
    recipe = load_recipe(["--config", f"recipes/datasets/{name}.yaml", "--dataset_name", str(rows)], usage="")
    return splits.make_examples(recipe)


def test_rows_without_ids_are_held_out_by_their_question_alone_as_ever(carelm_data):
    examples, _ = real_examples("bitext_support", carelm_data / "bitext_support")
    assert digest(examples["validation"]) == "b779633b24ee8031" and len(examples["test"]) == 300
    examples, _ = real_examples("bitext_support", carelm_data / "bitext_support/train.jsonl")
    assert (digest(examples["validation"]), digest(examples["test"])) == ("c86ea8d0b9ef0072", "da152ed50160bb3d")


@pytest.mark.parametrize(("name", "of_test"), [("mts_dialog", 200), ("sgd", 188), ("medquad", 461)])
def test_named_test_rows_are_all_kept_and_take_none_out_of_train(carelm_data, name, of_test):
    examples, reports = real_examples(name, carelm_data / name)
    assert len(examples["test"]) == of_test and reports["test"].dropped == {}
    assert reports["train"].dropped.keys() <= {"duplicate"}
