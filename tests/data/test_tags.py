"""{priority} and {sentiment} in templates: made of the customer's words, the same wherever a prompt is made."""

import importlib.util
import itertools
from pathlib import Path

import pytest
import yaml
from small_rows import write_jsonl

from carelm.data import splits, tags
from carelm.errors import UserError
from carelm.files import locate
from carelm.recipe_file import load_recipe

TEMPLATE = "[PRIORITY: {priority}] [SENTIMENT: {sentiment}] {question}"
TEXTS = [
    "My parcel is broken, this is terrible. I need it ASAP!",
    "Thank you, what a great shop.",
    "Where do I change my address?",
    "Das ist eine Katastrophe, wo bleibt mein Paket?",
]
TAGGED = [("HIGH", "NEGATIVE"), ("NORMAL", "POSITIVE"), ("NORMAL", "NEUTRAL"), ("NORMAL", "NEUTRAL")]


@pytest.fixture
def rows(tmp_path):
    return write_jsonl(tmp_path / "rows.jsonl", [{"question": text, "answer": f"Answer {i}."} for i, text in
                                                  enumerate(TEXTS)])  # fmt: skip


@pytest.fixture
def tagged(make, rows):
    def tagged(**keys):
        return make(rows, **{"prompt_template": TEMPLATE, "tag_column": "question", "urgent_words": ["asap"]} | keys)

    return tagged


def test_tags_stand_where_the_template_writes_them(tagged):
    recipe = tagged()
    examples, reports = splits.make_examples(recipe)
    said = [example.prompt[0]["content"] for example in examples["train"]]
    assert said == [f"[PRIORITY: {p}] [SENTIMENT: {s}] {text}" for (p, s), text in zip(TAGGED, TEXTS)]
    assert [tags.make_tags(recipe, text) for text in TEXTS] == [dict(zip(tags.TAGS, own)) for own in TAGGED]
    assert {"priority: 1 HIGH, 3 NORMAL", "sentiment: 1 NEGATIVE, 2 NEUTRAL, 1 POSITIVE",
            "sentiment: 1 of 4 rows are not English and count as NEUTRAL"} <= {*reports["train"].notes}  # fmt: skip


def test_only_the_tags_that_a_template_names_are_made(tagged, monkeypatch):
    monkeypatch.setattr(tags, "sentiment", None)
    recipe = tagged(prompt_template="{priority}: {question}")
    assert tags.make_tags(recipe, "asap") == {"priority": "HIGH"}
    assert splits.make_examples(recipe)[0]["train"][0].prompt[0]["content"].startswith("HIGH: My parcel")


def test_tags_may_stand_in_the_system_prompt(tagged):
    recipe = tagged(prompt_template="{question}", system_prompt="The customer's mood is {sentiment}.")
    assert splits.make_examples(recipe)[0]["train"][1].prompt[0]["content"] == "The customer's mood is POSITIVE."


def test_a_row_is_in_the_same_split_with_tags_and_without(make, tmp_path):
    many = [{"question": f"{text} Order {i}.", "answer": str(i)} for i in range(30) for text in TEXTS]
    file, keys = write_jsonl(tmp_path / "many.jsonl", many), {"tag_column": "question", "urgent_words": ["asap"]}
    ids = []
    for template in (TEMPLATE, "{question}"):
        examples, _ = splits.make_examples(make(file, test_fraction=0.3, prompt_template=template, **keys))
        ids.append({split: [example.id for example in examples[split]] for split in examples})
    assert ids[0] == ids[1] and 10 < len(ids[0]["test"]) < 60


@pytest.mark.parametrize("word, text, is_urgent", [
    ("urgent", "URGENT!", True),
    ("urgent", "nonurgent", False),
    ("as soon as possible", "As soon\nas  possible", True),
    ("911", "call 9112", False),
    ("紧急", "这是紧急情况", True),
    ("straße", "in der STRASSE", True),
    ("c++", "my c++ app", True),
])  # fmt: skip
def test_an_urgent_word_counts_where_it_stands_by_itself(word, text, is_urgent):
    assert (tags.priority(text, [word]) == "HIGH") == is_urgent


@pytest.mark.parametrize("text, is_english", [
    ("refund please", True), ("I can't login, it hasn't worked", True), ("pls help, my order got lost", True),
    ("Je suis très déçu de votre service", False), ("No he recibido mi pedido", False), ("Где мой заказ?", False),
    ("我的订单在哪里", False), ("12345", False), ("", False),
])  # fmt: skip
def test_a_text_is_english_by_its_words(text, is_english):
    assert tags.is_english(text) == is_english


@pytest.mark.parametrize("keys, problem", [
    ({"urgent_words": []}, "urgent_words is not set: {priority} is HIGH where"),
    ({"tag_column": None}, "urgent_words: set tag_column too, the column with the customer's words"),
    ({"urgent_words": ["asap", " "]}, "urgent_words: ' ' holds no letter and no digit"),
])  # fmt: skip
def test_tags_without_what_they_are_made_of_are_one_line(tagged, keys, problem):
    with pytest.raises(UserError) as caught:
        tagged(**keys)
    assert str(caught.value).startswith(problem)


def test_sentiment_without_textblob_is_one_line_with_the_command(tagged, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs TextBlob, which is not installed: pip install -e '\.\[tags\]'"):
        tagged()


@pytest.mark.parametrize("keys, problem", [
    ({"tag_column": "text"}, r"tag_column: rows\.jsonl has no column 'text' \(there: answer, question\)"),
    ({"tag_column": None, "urgent_words": []}, r"has no column 'priority' .*; the tag of that name needs tag_column"),
])  # fmt: skip
def test_tags_without_their_column_are_one_line(tagged, keys, problem):
    with pytest.raises(UserError, match=problem):
        splits.make_examples(tagged(**keys))


def test_the_ready_sweep_is_one_run_without_tags_and_one_with_both():
    sweep = yaml.safe_load(Path(locate("recipes/sweeps/tags.yaml")).read_text())
    named = []
    for run in sweep["runs"]:
        words = [["--" + key, *([value] if isinstance(value, str) else value)] for key, value in
                 (sweep["overrides"] | run).items() if key != "name"]  # fmt: skip
        recipe = load_recipe(["--config", sweep["recipe"], *itertools.chain(*words)], usage="")
        named.append(tags.used_tags(recipe))
    assert named == [[], ["priority", "sentiment"]]


def test_a_column_of_a_tags_name_is_a_column_without_tag_column_and_refused_beside_it(make, tmp_path):
    file = write_jsonl(
        tmp_path / "own.jsonl", [{"question": f"q{i}", "answer": "a", "priority": "low"} for i in range(3)]
    )
    examples, _ = splits.make_examples(make(file, prompt_template="{priority} {question}"))
    assert examples["train"][0].prompt[0]["content"] == "low q0"
    with pytest.raises(
        UserError, match=r"own\.jsonl has a column 'priority' of its own; rename it, or leave tag_column"
    ):
        splits.make_examples(
            make(file, prompt_template="{priority} {question}", tag_column="question", urgent_words=["now"])
        )
