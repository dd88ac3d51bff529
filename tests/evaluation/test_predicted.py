"""`predicted_columns`: at test time a column is what another run has answered, for that very question, or nothing is asked."""

import json
import os
import re
import runpy
import sys

import pytest
import yaml

from carelm.chat.chat import make_chat
from carelm.data.splits import make_examples
from carelm.errors import UserError
from carelm.evaluation import predicted
from carelm.evaluation.predicted import fill_in
from carelm.evaluation.questions import make_questions
from carelm.files import fingerprint, read_json
from carelm.recipe_file import check_identity, load_recipe, save_recipe

INTENTS = {"prompt_template": "{q}", "completion_template": "{intent}", "labels": ["track", "refund", "track_refund"],
           "primary_metric": "macro_f1", "system_prompt": "Name the intent."}  # fmt: skip
SUPPORT = {"prompt_template": "Query: {q}\nIntent: {intent}", "completion_template": "{a}"}
KEYS = {"model_name_or_path": "demo/base", "precision": "fp32", "num_resamples": 20, "num_latency_prompts": 1,
        "max_new_tokens": 4, "models": ["base"], "test_fraction": 0.3, "validation_fraction": 0.1,
        "max_length": 128}  # fmt: skip


class Files:
    """Rows in one file, a recipe that predicts their intents, and one that is told them."""

    def __init__(self, folder):
        self.folder, self.run, self.rows = folder, folder / "intents", folder / "rows.jsonl"
        intents = ["track", "refund", "track_refund"]
        self.write([{"q": f"Question {i}?", "intent": intents[i % 3], "a": f"Answer {i}."} for i in range(40)])

    def write(self, rows):
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(self, keys, *words, name="support", **more):
        path = self.folder / f"{name}.yaml"
        keys = KEYS | {"dataset_name": str(self.rows), "output_dir": str(self.folder / name)} | keys | more
        path.write_text(yaml.safe_dump(keys))
        return load_recipe(["--config", str(path), *words], usage="")

    def support(self, place=None, **more):
        return self.load(SUPPORT | {"predicted_columns": {"intent": str(place or self.run)}}, **more)

    def predict(self, answer, model="adapter", **keys):
        """The files that an evaluation of the other recipe leaves, with these answers: a function of the question."""
        recipe, eval = self.load(INTENTS | keys, name="intents"), self.run / "eval"
        eval.mkdir(parents=True, exist_ok=True)
        save_recipe(recipe, eval / "recipe.yaml")
        test = make_examples(recipe)[0]["test"]
        lines = [{"id": e.id, "question": e.prompt[-1]["content"], "made_by": f"hash of {e.id}"} for e in test]
        for line in lines:
            line["prediction"] = answer(line["question"])
        (eval / f"predictions-{model}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        key = fingerprint(sorted((line["id"], line["made_by"]) for line in lines))
        (eval / f"measured-{model}.json").write_text(json.dumps({"key": key}))
        (eval / "results.json").write_text(json.dumps({"test": {"questions": len(lines)}}))
        return eval / f"predictions-{model}.jsonl"


@pytest.fixture
def files(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("carelm.chat.chat.load_tokenizer", lambda *_, **__: tokenizer)
    return Files(tmp_path)


def asked(recipe):
    """The users' words in the test split, and what is known of the column."""
    examples, about = fill_in(recipe, make_examples(recipe)[0]["test"])
    return [e.prompt[-1]["content"] for e in examples], about["intent"]


def number(text):
    return int(re.search(r"\d+", text)[0])


def test_the_same_rows_are_test_rows_whatever_the_column_is_filled_with(files):
    ids = []
    for recipe in (files.load(INTENTS), files.support(), files.support("gold")):
        examples, _ = make_examples(recipe)
        ids.append({split: [e.id for e in of_split] for split, of_split in examples.items()})
    assert ids[0] == ids[1] == ids[2] and len(ids[0]["test"]) > 5


def test_test_rows_are_told_the_parsed_prediction_and_all_others_the_data_s_own(files):
    files.predict(lambda q: {0: "It is TRACK.", 1: "No idea"}.get(number(q) % 3, "track refund"))
    examples, _ = make_examples(files.support())
    for split in ("train", "validation"):
        assert all(f"Intent: {e.row['intent']}" in e.prompt[0]["content"] for e in examples[split])
    questions, about = asked(files.support())
    told = {0: "track", 1: "", 2: "track_refund"}
    assert questions == [f"Query: {e.row['q']}\nIntent: {told[number(e.row['q']) % 3]}" for e in examples["test"]]
    unparsable = sum(number(q) % 3 == 1 for q in questions)
    assert (about["rows"], about["unparsable"], about["rows_with_gold"]) == (len(questions), unparsable, len(questions))
    assert about["accuracy"] == 1 - unparsable / len(questions) and 0 < unparsable < len(questions)
    assert (
        f"{about['accuracy']:.3f} of {len(questions)} are the data's own, and {unparsable} without" in about["sentence"]
    )


def test_gold_is_said_to_be_an_upper_bound(files):
    questions, about = asked(files.support("gold"))
    assert all(f"Intent: {('track', 'refund', 'track_refund')[number(q) % 3]}" in q for q in questions)
    assert about["from"] == "gold" and "an upper bound" in about["sentence"]


def test_rows_that_ask_the_same_have_the_same_prediction_also_where_the_other_recipe_dropped_them(files):
    rows = [{"q": f"Question {i}?", "intent": "track", "a": f"Answer {k}."} for i in range(20) for k in range(2)]
    files.write(rows)
    answers = files.predict(lambda q: "refund" if number(q) % 2 else "track")
    questions, about = asked(files.support())
    assert len(questions) == 2 * len(answers.read_text().splitlines())
    assert all(("refund" in q) == bool(number(q) % 2) for q in questions)


def test_without_labels_the_answer_is_taken_as_it_is_and_a_test_file_needs_no_such_column(files):
    folder = files.folder / "rows"
    folder.mkdir()
    files.rows.rename(folder / "train.jsonl")
    test = [{"q": f"New {i}?", "a": "Yes."} for i in range(3)]
    (folder / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in test))
    files.rows = folder
    with pytest.raises(UserError, match="prompt_template: .*test.jsonl has no column 'intent'"):
        make_examples(files.load(SUPPORT))
    (folder / "train.jsonl").write_text((folder / "train.jsonl").read_text() + '{"q": "Odd?", "a": "Yes."}\n')
    examples, reports = make_examples(files.support())
    assert reports["train"].dropped == {"empty column 'intent'": 1} and len(examples["test"]) == 3
    (folder / "test.jsonl").write_text("".join(json.dumps(row | {"intent": ""}) + "\n" for row in test))
    files.predict(lambda q: f" {{about}} {q}\nmore ", labels=[], primary_metric="rougeL", completion_template="{a}")
    questions, about = asked(files.support())
    assert questions[0] == "Query: New 0?\nIntent: {about} New 0?\nmore"
    assert about["accuracy"] is None and "the data has none to compare them with" in about["sentence"]


def test_the_other_template_its_tags_and_a_model_s_own_file_are_heeded(files):
    other = {"prompt_template": "[{priority}] Name it: {q}", "tag_column": "q", "urgent_words": ["7"]}
    file = files.predict(lambda q: "track" if q.startswith("[HIGH]") else "refund", model="base", **other)
    with pytest.raises(
        UserError, match="no predictions-adapter.jsonl; name one of these files: predictions-base.jsonl"
    ):
        asked(files.support())
    questions, about = asked(files.support(file))
    assert all(("track" in q) == (number(q) == 7) for q in questions) and about["from"] == str(file)


def test_lines_of_an_earlier_evaluation_do_not_count(files):
    file = files.predict(lambda q: "track")
    whole = file.read_text().splitlines()
    key = fingerprint(sorted((f"rows.jsonl:{i}", "x") for i in range(2)))
    line = {"question": "Question 1?", "prediction": "track", "made_by": "x"}
    asked_now = [json.dumps(line | {"id": f"rows.jsonl:{i}"}) for i in range(2)]
    file.write_text("\n".join(asked_now + whole))
    file.with_name("measured-adapter.json").write_text(json.dumps({"key": key}))
    file.with_name("results.json").write_text(json.dumps({"test": {"questions": 2}}))
    with pytest.raises(UserError, match=rf"{len(whole)} of {len(whole)} test rows have no prediction"):
        asked(files.support())


def test_however_many_lines_of_earlier_evaluations_there_are_the_answers_are_hashed_once(files, monkeypatch):
    file = files.predict(lambda q: "track")
    with open(file, "a") as earlier:
        for i in range(100):
            earlier.write(json.dumps({"id": f"x{i}", "question": "q", "prediction": "p", "made_by": "x"}) + "\n")
    hashed = []
    monkeypatch.setattr(predicted, "fingerprint", lambda *parts: hashed.append(parts) or fingerprint(*parts))
    assert asked(files.support())[1]["accuracy"] > 0 and len(hashed) == 1


def test_an_answer_may_hold_what_other_programs_take_for_a_line_s_end(files):
    file = files.predict(lambda q: "track\u2028or refund")
    file.write_text(file.read_text().replace("\\u2028", "\u2028"))  # as the evaluator writes it
    assert all(q.endswith("Intent: refund") for q in asked(files.support())[0])


def test_what_makes_predictions_doubtful_is_said(files):
    file = files.predict(lambda q: "track", keep_test_questions=True)
    assert "it may have been trained on them" in asked(files.support())[1]["sentence"]
    weights = files.run / "adapter_model.safetensors"
    weights.touch()
    os.utime(weights, (file.stat().st_mtime - 9, file.stat().st_mtime - 9))
    assert "weights are newer" not in asked(files.support())[1]["sentence"]
    os.utime(weights, (file.stat().st_mtime + 9, file.stat().st_mtime + 9))
    assert "weights are newer than these answers: evaluate it again." in asked(files.support())[1]["sentence"]


def damage(file, what):
    eval = file.parent
    lines = file.read_text().splitlines()
    match what:
        case "no evaluation":
            eval.rename(eval.with_name("other"))
        case "not finished":
            (eval / "measured-adapter.json").unlink()
        case "no report":
            (eval / "results.json").unlink()
        case "no recipe":
            (eval / "recipe.yaml").unlink()
        case "recipe cut off":
            (eval / "recipe.yaml").write_text("labels: [a")
        case "half a line":
            file.write_text("\n".join([*lines[:-1], lines[-1][:20]]))
        case "no json objects":
            file.write_text("[1]\n")
        case "empty":
            file.write_text("")
        case "a line less":
            file.write_text("\n".join(lines[:-1]))
        case "messages":
            recipe = eval / "recipe.yaml"
            recipe.write_text(recipe.read_text().replace("prompt_template: '{q}'", "prompt_template: null"))
        case "other split":
            return {"split_seed": 7}
        case "other column":
            recipe = eval / "recipe.yaml"
            recipe.write_text(recipe.read_text().replace("'{q}'", "'{text}'"))
        case "labels written otherwise":
            recipe = eval / "recipe.yaml"
            recipe.write_text(recipe.read_text().replace("- track\n", "- Track\n").replace("- refund\n", "- Refund\n")
                              .replace("- track_refund\n", "- Track a refund\n"))  # fmt: skip
    return {}


@pytest.mark.parametrize(
    "what, line",
    [
        ("no evaluation", "has no predictions-adapter.jsonl; evaluate that run with eval/run.py"),
        ("not finished", "is not of a finished evaluation; evaluate that run"),
        ("no report", "is not of a finished evaluation; evaluate that run"),
        ("no recipe", "is not of a finished evaluation; evaluate that run"),
        ("recipe cut off", "recipe.yaml is damaged; evaluate that run again"),
        ("half a line", "is damaged"),
        ("no json objects", "is damaged"),
        ("empty", "is not as its evaluation has left it"),
        ("a line less", "is not as its evaluation has left it"),
        ("messages", "has no prompt_template, by which its questions would be known"),
        (
            "other split",
            r"\d+ of \d+ test rows have no prediction in .* \(first rows.jsonl:\d+\); both recipes need the same",
        ),
        ("other column", r"(\d+) of \1 test rows have no prediction"),
        ("labels written otherwise", r"none of the labels .* \(Track, Refund, Track a refund\) stands in the column"),
    ],
)
def test_what_does_not_join_is_one_line(files, what, line):
    keys = damage(files.predict(lambda q: "track"), what)
    with pytest.raises(UserError, match=f"^predicted_columns: intent: .*{line}") as caught:
        asked(files.support(**keys))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys, line",
    [
        ({"predicted_columns": {"mood": "x"}}, r"'mood' is no column of prompt_template \(its: q, intent\)"),
        ({"predicted_columns": {"intent": None}}, "intent: None is no folder or file; gold takes"),
        ({"predicted_columns": {"intent": ["a"]}}, r"intent: \['a'\] is no folder or file"),
        ({"predicted_columns": {"q": "x", "intent": "x"}}, "prompt_template has no other column"),
        ({"system_prompt": "About {intent}."}, "'intent' stands in system_prompt too"),
        ({"completion_template": "{a} {intent}"}, "'intent' stands in completion_template too"),
        ({"tag_column": "intent"}, "'intent' is a tag, or what tags are made of"),
        ({"predicted_columns": "outputs/intents"}, "'outputs/intents' is not of type dict"),
    ],
)
def test_a_column_that_cannot_be_predicted_is_one_line(files, keys, line):
    with pytest.raises(UserError, match=f"predicted_columns: {line}"):
        files.load(SUPPORT | {"predicted_columns": {"intent": "x"}} | keys)


def test_another_place_of_the_predictions_is_the_same_run_and_no_predictions_are_another(files, tmp_path):
    save_recipe(files.support("outputs/one"), tmp_path / "recipe.yaml")
    check_identity(files.support("gold"), tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match="predicted_columns"):
        check_identity(files.load(SUPPORT), tmp_path / "recipe.yaml")


def evaluate(recipe, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["eval/run.py", "--config", str(recipe.output_dir.with_suffix(".yaml"))])
    runpy.run_path("eval/run.py", run_name="__main__")
    return recipe.output_dir / "eval"


def test_the_whole_way_from_one_evaluation_to_the_next(files, monkeypatch, capsys):
    eval = evaluate(files.load(INTENTS, name="intents"), monkeypatch)
    file = eval / "predictions-base.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines[1:]:  # the tiny base names no intent; the first answer stays as it is
        line["prediction"] = "refund"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = files.support(file)
    eval = evaluate(recipe, monkeypatch)
    results = read_json(eval / "results.json")
    about = results["test"]["predicted_columns"]["intent"]
    right = sum(line["references"] == ["refund"] for line in lines[1:])
    assert about["accuracy"] == right / len(lines) and about["unparsable"] == 1
    said = [json.loads(line)["question"] for line in (eval / "predictions-base.jsonl").read_text().splitlines()]
    assert [q.partition("Intent: ")[2] for q in said] == ["", *["refund"] * (len(lines) - 1)]
    assert results["cautions"][0] == about["sentence"] and about["sentence"] in capsys.readouterr().err
    for name in ("report.md", "report.html"):
        assert f"for all {len(lines)} test rows" in (eval / name).read_text()
    assert (
        make_questions(recipe, make_chat(recipe))[1]["predicted_columns"]["intent"] == about
    )  # before any model is there
