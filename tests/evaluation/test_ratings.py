"""Blind pairs: the page does not say whose answer is whose, and what it saves is counted for the right model."""

import json
import re

import pytest

from carelm.errors import UserError
from carelm.evaluation import ratings
from carelm.evaluation.questions import Question
from carelm.evaluation.scores import wilson_interval
from carelm.recipe_file import load_recipe

MODELS = {"base": {"kind": "base"}, "adapter": {"kind": "adapter"}}
NUMBER = 40


@pytest.fixture
def asked():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    questions = [Question(f"q{i}", f"c{i}", "any", [*turns, {"role": "user", "content": f"Is <b>{i}</b> it?"}], ["It is."])
                 for i in range(NUMBER)]  # fmt: skip
    answers = {"base": "No, {0}", "adapter": "It is {0}"}
    lines = {name: [{"prediction": text.format(i) if i else "the same"} for i in range(NUMBER)]
             for name, text in answers.items()}  # fmt: skip
    return questions, lines


def pairs_of(page):
    (found,) = re.findall(r'<script type="application/json" id="pairs">(.*?)</script>', page.read_text())
    return json.loads(found)


def rate(folder, pairs, name, choose):
    kept = [{key: pair[key] for key in ("id", "first", "second")} | {"chosen": choose(pair)} for pair in pairs]
    (folder / name).write_text(json.dumps({"ratings": kept}))


def side_of(pair, word):
    return str(1 + [text.startswith(word) for text in pair["texts"]].index(True))


def test_the_page_asks_what_differs_with_drawn_sides_and_names_no_model(asked, tmp_path):
    page, number = ratings.write_page(tmp_path, "shop", MODELS, *asked, seed=3)
    pairs = pairs_of(page)
    assert number == len(pairs) == NUMBER - 1 and "q0" not in {pair["id"] for pair in pairs}
    sides = [side_of(pair, "It is") for pair in pairs]
    assert 8 < sides.count("1") < NUMBER - 8 and [pair["id"] for pair in pairs] != sorted(pair["id"] for pair in pairs)
    assert "adapter" not in page.read_text() and '"base"' not in page.read_text()
    assert pairs[0]["earlier"] == [{"role": "user", "text": "Hi"}, {"role": "assistant", "text": "Yes?"}]
    assert "<b>1</b> it" not in page.read_text()  # text of the data is no markup
    assert "http" not in page.read_text() and "src=" not in page.read_text()


def test_what_raters_save_is_counted_for_the_right_model_with_wilsons_interval(asked, tmp_path):
    pairs = pairs_of(ratings.write_page(tmp_path, "shop", MODELS, *asked, seed=3)[0])
    rate(tmp_path, pairs[:20], "ratings-ann.json", lambda pair: side_of(pair, "It is"))
    rate(
        tmp_path, pairs[15:30], "ratings.json", lambda pair: side_of(pair, "No" if int(pair["id"][1:]) % 5 else "It is")
    )
    rate(tmp_path, pairs[30:], "ratings-bo.json", lambda pair: "tie")
    found = ratings.count(ratings.load(tmp_path), MODELS, *asked)
    fives = sum(int(pair["id"][1:]) % 5 == 0 for pair in pairs[15:30])
    assert found["preferred"] == {"base": 15 - fives, "adapter": 20 + fives, "tie": 9}
    assert found["questions"] == 39 and found["share"] == wilson_interval((20 + fives) / 35, 30)
    said = (
        f"the answer of the tuned model was preferred in {20 + fives} of 44 ratings, that of the base in {15 - fives}, "
    )
    assert said in found["sentence"] and "% of those that chose; 95 % interval" in found["sentence"]


def test_ratings_of_answers_that_are_no_longer_there_do_not_count_which_is_said(asked, tmp_path):
    questions, lines = asked
    pairs = pairs_of(ratings.write_page(tmp_path, "shop", MODELS, *asked, seed=3)[0])
    rate(tmp_path, pairs, "ratings.json", lambda pair: side_of(pair, "It is"))
    lines["adapter"][1:11] = [{"prediction": "Maybe"}] * 10
    found = ratings.count(ratings.load(tmp_path), MODELS, questions, lines)
    assert found["preferred"] == {"base": 0, "adapter": 29, "tie": 0} and found["of_other_answers"] == 10
    assert "10 more are of other answers than are there now, and do not count" in found["sentence"]
    assert ratings.count([], MODELS, questions, lines) == {}


@pytest.mark.parametrize("text", ["", "[]", '{"ratings": [{"id": "q1"}]}', '{"ratings": 3}', "\xff",
                                  '{"ratings": [{"id": "q1", "first": "a", "second": "b", "chosen": "3"}]}'])  # fmt: skip
def test_a_file_that_the_page_did_not_save_is_named(text, tmp_path):
    (tmp_path / "ratings-x.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="ratings-x.json.*save it"):
        ratings.load(tmp_path)


def test_one_model_or_the_same_answers_are_nothing_to_rate(asked, tmp_path):
    questions, lines = asked
    with pytest.raises(UserError, match="rate: there is nothing to rate"):
        ratings.write_page(tmp_path, "shop", {"base": {"kind": "base"}}, questions, lines, 3)
    with pytest.raises(UserError, match="rate: there is nothing to rate"):
        ratings.write_page(tmp_path, "shop", MODELS, questions, {name: lines["base"] for name in MODELS}, 3)


def test_rate_is_a_word_of_the_command_line_alone():
    assert load_recipe(["--rate"], usage="").rate and not load_recipe([], usage="").rate
