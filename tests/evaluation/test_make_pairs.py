"""train/make_pairs.py: the best and the worst of a model's answers to training questions, and what people marked, as pairs."""

import json
import runpy
import shlex
import sys

import numpy as np
import pytest
from conftest import PROJECT
from small_endpoint import Endpoint, completion

from carelm.data.rows import used_columns
from carelm.data.splits import make_examples
from carelm.errors import UserError
from carelm.evaluation.pairs import choose, score
from carelm.evaluation.questions import Question
from carelm.recipe_file import load_recipe
from carelm.talk.marked_pairs import pairs_of
from carelm.training import runs


def asked(*texts):
    return [
        Question(f"q{k}", f"q{k}", "none", [{"role": "user", "content": t}], ["It is 7."]) for k, t in enumerate(texts)
    ]


def lines(*texts, tokens=5, ends="stop"):
    return [{"prediction": text, "new_tokens": tokens, "finish_reason": ends} for text in texts]


def test_the_best_and_the_worst_answer_are_a_pair_and_answers_worth_the_same_are_counted():
    drawn = [lines("a", "b"), lines("c", "d"), lines("e", "f")]
    (pair,), without = choose(asked("one", "two"), drawn, np.array([[0.5, 1], [0, 1], [1, 1]]), "m")
    assert (pair.chosen, pair.rejected, pair.chosen_score, pair.rejected_score) == ("e", "c", 1.0, 0.0)
    assert without == {"all its answers are worth the same": 1}


def test_of_several_as_good_those_of_nearest_length_are_taken():
    drawn = [lines("long", tokens=40), lines("short", tokens=9), lines("bad", tokens=10)]
    (pair,), _ = choose(asked("one"), drawn, np.array([[1], [1], [0]]), "m")
    assert pair.chosen == "short"


def test_what_was_cut_off_is_neither_better_nor_worse_and_a_question_without_a_rule_gives_no_pair():
    drawn = [lines("a", "b"), lines("c", "d", ends="length"), lines(" ", "e")]
    pairs, without = choose(asked("one", "two"), drawn, np.array([[1, np.nan], [0, np.nan], [0, np.nan]]), "m")
    assert not pairs and without == {"fewer than two whole answers": 1, "the rule says nothing of it": 1}


def test_checks_give_the_share_that_passes_of_those_about_the_question(make, tmp_path):
    recipe = make("rows.jsonl", checks=[
        {"name": "number", "when": r"order (?P<n>\d+)", "pattern": "(?P=n)"}, {"name": "polite", "pattern": "please"},
    ])  # fmt: skip
    drawn = [lines("please, 12", "no"), lines("12", "please")]
    assert score(recipe, "checks", asked("order 12", "hello"), drawn, tmp_path).tolist() == [[1.0, 0.0], [0.5, 1.0]]


def test_a_metric_compares_each_answer_with_the_reference(make, tmp_path):
    worth = score(make("rows.jsonl"), "rougeL", asked("one"), [lines("It is 7."), lines("No")], tmp_path)
    assert worth.tolist() == [[1.0], [0.0]]


def test_a_judges_marks_are_what_an_answer_is_worth_and_nothing_where_it_says_none(make, tmp_path):
    endpoint = Endpoint()

    def say(body, _):
        text = body["messages"][-1]["content"]
        marks = dict.fromkeys(("helpful", "coherent", "fluent", "safe"), 5 if "right" in text else 2)
        return completion("no idea" if "odd" in text else json.dumps({"reason": "so"} | marks | {"safe": 5}))

    endpoint.say = say
    recipe = make("rows.jsonl", judge="big", judge_url=endpoint.url)
    worth = score(recipe, "judge", asked("one"), [lines("right"), lines("wrong"), lines("odd")], tmp_path)
    assert worth[:2].tolist() == [[5.0], [2.75]] and np.isnan(worth[2])


@pytest.fixture
def shop(tmp_path, monkeypatch, capsys):
    """A recipe over the demo's base and rows in three splits, and the launched file."""
    for split, number in (("train", 12), ("validation", 10), ("test", 3)):
        rows = [
            {"q": f"Where is {split} parcel {k}?", "a": f"Parcel {k} of {split} is on its way."} for k in range(number)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    keys = {
        "model_name_or_path": "demo/base", "precision": "fp32", "dataset_name": str(tmp_path / "*.jsonl"),
        "prompt_template": "{q}", "completion_template": "{a}", "max_new_tokens": 72, "output_dir": str(tmp_path / "out"),
        "checks": [{"name": "says parcel", "pattern": "(?i)the|a"}],
    }  # fmt: skip
    (tmp_path / "shop.yaml").write_text(json.dumps(keys))

    def run(*words, file="make_pairs.py"):
        argv = [str(PROJECT / "train" / file), "--config", str(tmp_path / "shop.yaml"), *words]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(argv[0])["main"]()
        return capsys.readouterr()

    return run


def read(folder, split):
    return [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]


def test_pairs_are_of_training_and_validation_questions_and_the_test_rows_stay_answers(shop, tmp_path):
    told = shop("--pairs", "--by", "chrf", "--num_answers", "3", file="make_rows.py")
    pairs, about = tmp_path / "out-pairs", json.loads(told.out.splitlines()[-1])
    for split in ("train", "validation"):
        rows = read(pairs, split)
        assert rows and len(rows) == about["rows"][split]
        for row in rows:
            assert split in row["prompt"][-1]["content"] and row["chosen_score"] > row["rejected_score"]
            assert row["chosen"] != row["rejected"] and row["chosen_by"] == row["rejected_by"] == "base"
    tested = read(pairs, "test")
    assert [row["chosen"] for row in tested] == [f"Parcel {k} of test is on its way." for k in range(3)]
    assert not any("rejected" in row for row in tested)
    words = shlex.split(told.err.splitlines()[-1].partition("train/sft.py ")[2])
    examples, _ = make_examples(load_recipe(words, usage=""))
    assert [e.rejected[-1]["content"] for e in examples["train"]] == [row["rejected"] for row in read(pairs, "train")]
    assert len(examples["test"]) == 3 and "--learning_rate" in words
    written = (pairs / "train.jsonl").read_text()
    again = shop("--by", "chrf", "--num_answers", "3")
    assert again.err.count("nothing to do") == 6 and (pairs / "train.jsonl").read_text() == written
    runs.find_finished(load_recipe(["--config", str(tmp_path / "shop.yaml")], usage=""))  # training may begin there


@pytest.mark.parametrize("line", ['{"prompt": "A?", "chosen": "Yes.", "rejected": "No."}', "no JSON"])
def test_pairs_that_somebody_wrote_are_not_written_over(shop, tmp_path, line):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.jsonl").write_text(line)
    with pytest.raises(UserError, match="--to: .*mine holds other data"):
        shop("--to", str(tmp_path / "mine"))


@pytest.mark.parametrize(
    "words, line",
    [
        (["--num_answers", "1"], "--num_answers: of 1 none is better than another"),
        (["--by", "taste"], "--by: 'taste' is none of checks, judge, rouge1"),
        (["--by", "judge"], "judge: it names no model"),
        (["--to", "{tmp}"], "--to: .* holds other data"),
        (["--model", "adaptor"], "models: 'adaptor': there is no folder adaptor; did you mean 'adapter'"),
        (["--feedback"], "--feedback: there is no .*feedback.jsonl"),
    ],
)
def test_what_cannot_give_pairs_is_one_line_before_any_weights(shop, tmp_path, words, line):
    with pytest.raises(UserError, match=line):
        shop(*[word.replace("{tmp}", str(tmp_path)) for word in words])


@pytest.mark.parametrize("name", ["ticket_matching", *(f"datasets/{n}" for n in ("chatdoctor5k", "marked", "tau_retail",
                                                                                  "rqe_question_pairs"))])  # fmt: skip
def test_what_learns_from_the_pairs_wants_no_column_and_no_split_that_they_do_not_have(tmp_path, name):
    make_pairs = runpy.run_path(str(PROJECT / "train/make_pairs.py"))
    words = ["--config", str(PROJECT / "recipes" / f"{name}.yaml")]
    recipe = load_recipe(words, usage="")
    made = load_recipe([*make_pairs["training_words"](recipe, tmp_path, words)], usage="")
    assert used_columns(made) - {"tools", "functions"} == {"id", "category", "prompt", "chosen", "rejected"}
    assert made.dataset_train_split == "train" and not made.also_train and not made.row_filter


def marked(question, answer, mark, **keys):
    said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": "feedback/1", "messages": said, "mark": mark, "comment": None, "model": "adapter"} | keys


@pytest.mark.parametrize(("rejected", "said"), [("one two three", ""), ("so it goes " * 3, "are far shorter")])
def test_sides_of_unlike_length_are_said(shop, tmp_path, capsys, rejected, said):
    make_pairs = runpy.run_path(str(PROJECT / "train/make_pairs.py"))
    recipe = load_recipe(["--output_dir", str(tmp_path / "run")], usage="")
    row = {"id": "a", "category": None, "prompt": [], "chosen": "one two three", "rejected": rejected}
    make_pairs["write"](recipe, tmp_path / "pairs", {"train": [row]}, {"without_pair": {}})
    assert said in capsys.readouterr().err if said else "are far" not in capsys.readouterr().err


def test_marks_and_edits_of_one_conversation_become_pairs(shop, tmp_path):
    rows = [
        marked("Where is it?", "On its way.", "good"), marked("Where is it?", "No idea.", "bad"),
        marked("And now?", "It is here.", "good", draft="here"), marked("Hm?", "Yes.", "good"),
        marked("Both?", "So.", "good"), marked("Both?", "So.", "bad"),
        marked("Where is test parcel 1?", "There.", "good"), marked("Where is test parcel 1?", "Nowhere.", "bad"),
    ]  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out/feedback.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = shop("--feedback")
    found = [(r["prompt"][0]["content"], r["chosen"], r["rejected"]) for r in read(tmp_path / "out-pairs", "train")]
    assert found == [("Where is it?", "On its way.", "No idea."), ("And now?", "It is here.", "here")]
    assert json.loads(told.out.splitlines()[-1])["without_pair"] == {
        "no good answer beside a bad one, and none edited": 1, "marked both ways": 1, "asked in validation or test": 1,
    }  # fmt: skip


def test_marks_by_the_server_itself_are_read(tmp_path, make):
    from carelm.serving.feedback import Feedback, append

    recipe, asked_by = make("rows.jsonl"), [{"role": "user", "content": "Where is it?"}]
    for body in (
        {"answer": "Soon.", "mark": "good"},
        {"answer": "Dunno.", "mark": "bad"},
        {"answer": "so", "edited": "So."},
    ):
        append(tmp_path, Feedback(model="base", messages=asked_by, **body).row(recipe, asked_by))
    pairs, without = pairs_of(tmp_path / "feedback.jsonl", [])
    assert {(p["chosen"], p["rejected"]) for p in pairs} == {("Soon.", "Dunno."), ("So.", "Dunno."), ("So.", "so")}
    assert not without


def test_the_expected_answer_can_be_one_of_them(tokenizer):
    from carelm.chat.chat import Chat
    from carelm.evaluation.pairs import expected

    chat, questions = Chat(tokenizer, trained_turns="last", max_length=64), asked("one")
    drawn = [lines("No."), expected(chat, questions)]
    (pair,), _ = choose(questions, drawn, np.array([[0], [1]]), "adapter")
    assert (pair.chosen, pair.chosen_by, pair.rejected, pair.rejected_by) == ("It is 7.", "data", "No.", "adapter")
