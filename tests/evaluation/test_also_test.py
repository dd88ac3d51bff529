"""`also_test`: the models of one recipe on the test questions of others, beside its own."""

import json
import runpy
import shutil
import sys
from dataclasses import replace

import pytest
import yaml

from carelm.data.leaks import find_leaks
from carelm.errors import UserError
from carelm.evaluation import answers, candidates
from carelm.evaluation.question_sets import make_question_sets
from carelm.recipe_file import load_also_tests, load_recipe

SHOP = {"prompt_template": "Query: {q}", "completion_template": "{a}"}


def write_rows(folder, train, test):
    folder.mkdir(parents=True)
    for split, rows in (("train", train), ("test", test)):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture
def files(tmp_path):
    """A shop's recipe that also tests a clinic's, each over a few rows of its own."""
    shop = write_rows(
        tmp_path / "rows/shop",
        [{"q": f"Where is parcel {i} that I have ordered?", "a": "It is on its way."} for i in range(8)]
        + [{"q": "How is a burn on the hand treated at home?", "a": "Ask a nurse."}],
        [{"q": f"Is lamp {i} in stock?", "a": "Yes."} for i in range(3)],
    )
    clinic = write_rows(
        tmp_path / "rows/clinic",
        [{"question": f"Train {i}?", "answer": "No.", "urgent": "no"} for i in range(4)],
        [{"question": "How is a burn on the hand treated at home?!", "answer": "Cool it: no.", "urgent": "no"},
         {"question": "What is fever?", "answer": "Heat: yes.", "urgent": "yes"}],
    )  # fmt: skip
    keys = {"model_name_or_path": "demo/base", "precision": "fp32", "num_resamples": 50, "num_latency_prompts": 1,
            "max_new_tokens": 4, "models": ["base", "base@bf16"], "output_dir": str(tmp_path / "run")}  # fmt: skip
    recipes = {
        "shop": keys | SHOP | {"dataset_name": shop, "also_test": [str(tmp_path / "clinic.yaml")], "max_length": 128},
        "clinic": {"model_name_or_path": "no/such", "dataset_name": clinic, "prompt_template": "{question}",
                   "completion_template": "{answer}", "labels": ["yes", "no"], "primary_metric": "accuracy",
                   "max_new_tokens": 6, "max_length": 96, "learning_rate": 3.0,
                   "checks": [{"name": "short", "pattern": "^.{0,200}$"}]},
    }  # fmt: skip
    for name, values in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return tmp_path


def load(files, *keys):
    return load_recipe(["--config", str(files / "shop.yaml"), *keys], usage="")


def test_the_other_recipe_gives_data_labels_lengths_and_metric_and_this_one_the_models(files):
    recipe = load(files, "--split_seed", "7")
    (other,) = load_also_tests(recipe).values()
    assert (other.prompt_template, other.labels, other.primary_metric) == ("{question}", ["yes", "no"], "accuracy")
    assert (other.max_new_tokens, other.max_length, other.split_seed) == (6, 96, 42)
    assert (other.base, other.models, other.output_dir) == (recipe.base, recipe.models, recipe.output_dir)
    assert other.training["learning_rate"] == recipe.training["learning_rate"] != 3
    assert recipe.max_length == 128 and recipe.labels == []


def test_other_data_may_stand_in_the_place_of_the_recipes(files):
    (files / "odd=name.yaml").write_text((files / "clinic.yaml").read_text())
    recipe = load(files, "--also_test", f"{files}/clinic.yaml=elsewhere/rows=1", f"{files}/odd=name.yaml")
    found = load_also_tests(recipe)
    assert found["clinic"].dataset_name == "elsewhere/rows=1" and found["odd=name"].dataset_name.endswith("rows/clinic")


@pytest.mark.parametrize("own, others, counts", [(None, 5, 5), (2, 5, 2), (5, 2, 2), (2, None, 2), (None, None, None)])
def test_the_smaller_limit_of_test_rows_counts(files, own, others, counts):
    with open(files / "clinic.yaml", "a") as file:
        file.write(f"max_eval_samples: {'null' if others is None else others}\n")
    recipe = load(files, *([] if own is None else ["--max_eval_samples", str(own)]))
    assert load_also_tests(recipe)["clinic"].max_eval_samples == counts


@pytest.mark.parametrize("named, problem", [
    (["none.yaml"], "recipe none.yaml cannot be read (No such file or directory)"),
    (["{0}/clinic.yaml", "{0}/../{1}/clinic.yaml"], "also_test: {0}/../{1}/clinic.yaml stands there twice; remove one"),
    (["{0}/shop.yaml"], "also_test: {0}/shop.yaml has also_test itself; name its recipes here too, and a recipe without it"),
    (["{0}/clinic.yaml", "{0}/rows/clinic.yaml"], "also_test: two are called 'clinic'; rename one of the files"),
    (["{0}"], "recipe {0} cannot be read (Is a directory)"),
    (["{0}/rows/shop/test.jsonl"], "recipe {0}/rows/shop/test.jsonl line 2 is not YAML"),
    (["{0}/wrong.yaml"], "{0}/wrong.yaml: unknown key 'lables'; did you mean 'labels'?"),
    (["{0}/half.yaml"], "also_test: {0}/half.yaml: prompt_template is set and completion_template is not: they go together"),
])  # fmt: skip
def test_a_recipe_that_cannot_be_tested_is_one_line(files, named, problem):
    (files / "rows/clinic.yaml").write_text((files / "clinic.yaml").read_text())
    (files / "wrong.yaml").write_text("lables: [a]\n")
    (files / "half.yaml").write_text("prompt_template: '{q}'\n")
    named, problem = ([text.format(files, files.name) for text in texts] for texts in (named, [problem]))
    with pytest.raises(UserError) as caught:
        load_also_tests(load(files, "--also_test", *named))
    assert str(caught.value).startswith(problem[0]) and "\n" not in str(caught.value)


def test_training_rows_that_are_nearly_test_questions_are_counted_without_the_templates_words(files):
    recipe = load(files)
    leaks = find_leaks(recipe, load_also_tests(recipe)["clinic"])
    assert (leaks["training_rows"], leaks["near_duplicates"]) == (9, 1)
    assert leaks["first"] == ["train.jsonl:9 and test.jsonl:1"]


@pytest.mark.parametrize("templates", [("Query: {q}\nIntent: {i}", "{q}"), ("{q}", "Intent {i}: {q}")])
def test_they_are_found_where_one_of_the_two_templates_has_more_columns(files, templates):
    asked = [{"q": f"Cancel my order {i}!", "i": "TRACK_ORDER", "a": "Done."} for i in "ab"]
    other = [{"q": "Where do I see what the lamps cost?", "i": "TRACK_ORDER", "a": "Here."}]
    data = [write_rows(files / "t", [*asked, *other], other), write_rows(files / "u", other, asked)]
    keys = {"completion_template": "{a}", "validation_fraction": 0, "also_test": []}
    trained, tested = (
        replace(load(files), dataset_name=where, prompt_template=template, **keys)
        for where, template in zip(data, templates)
    )
    assert find_leaks(trained, tested)["near_duplicates"] == 2


def test_rows_that_an_earlier_run_was_trained_on_are_looked_for_among_the_test_questions(files, tmp_path):
    """Of an adapter that the run has gone on from, and of the one before that, which here went on from this very folder."""
    week, first = (tmp_path / name for name in ("week", "first"))
    rows = {"week": ["Is lamp 0 in stock?!", "Open?"], "first": ["Closed?", "Broken?"]}
    for folder, before in ((week, first), (first, week)):
        folder.mkdir()
        data = write_rows(tmp_path / f"data/{folder.name}", [{"q": q, "a": "Yes."} for q in rows[folder.name]], [])
        (tmp_path / f"data/{folder.name}/test.jsonl").unlink()
        keys = SHOP | {"dataset_name": data, "adapter": str(before), "test_fraction": 0, "validation_fraction": 0}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(keys))
        (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')

    def sentences(adapter=week):
        (own,) = make_question_sets(replace(load(files), adapter=str(adapter)), {})
        return own.about["earlier_leaks"]

    (one,) = sentences()
    assert one.startswith(
        f"The run has gone on from {week}, of which 1 of 2 training rows are near-duplicates of its test"
    )
    shutil.rmtree(tmp_path / "data/first")
    assert f"from {first}, and what that was trained on cannot be read here" in sentences()[1]
    shutil.rmtree(first)
    assert sentences()[1].startswith(
        f"The run has gone on from {first}, and what that was trained on cannot be told here"
    )
    assert make_question_sets(load(files), {})[0].about["earlier_leaks"] == []


def test_more_questions_of_another_recipe_want_another_training_only_where_it_is_trained_on(files):
    (files / "rows/clinic/test.jsonl").unlink()
    clinic = yaml.safe_load((files / "clinic.yaml").read_text()) | {"test_fraction": 0.5}
    (files / "clinic.yaml").write_text(yaml.safe_dump(clinic | {"labels": [], "primary_metric": "rougeL"}))

    def more(*keys):
        recipe = load(files, *keys)
        _, there = make_question_sets(recipe, load_also_tests(recipe))
        return there.about["more_questions"]

    assert more() == "add rows, or set test_fraction higher than 0.5 in its recipe"
    mixed = ("--also_train", json.dumps({str(files / "clinic.yaml"): "all"}))
    assert more(*mixed) == "add rows, or set test_fraction higher than 0.5, and train again in a new output_dir"


def test_validation_rows_that_two_tests_share_are_scored_once(files):
    rows = [{"question": f"Cough {i}?", "answer": "Rest: no.", "urgent": "no"} for i in range(3)]
    again = write_rows(
        files / "rows/night", [], [{"question": "A burn at night?", "answer": "Cool it: no.", "urgent": "no"}]
    )
    shutil.copy(files / "rows/clinic/train.jsonl", again)
    for folder in (files / "rows/clinic", files / "rows/night"):
        (folder / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    clinic = yaml.safe_load((files / "clinic.yaml").read_text()) | {"completion_template": "{urgent}"}
    (files / "clinic.yaml").write_text(yaml.safe_dump(clinic))
    (files / "night.yaml").write_text(yaml.safe_dump(clinic | {"dataset_name": again}))
    (files / "short.yaml").write_text(yaml.safe_dump(clinic | {"dataset_name": again, "max_new_tokens": 2}))
    tests = [str(files / f"{name}.yaml") for name in ("clinic", "night", "short")]
    recipe = load(files, "--also_test", *tests, "--models", "base")
    _, first, night, short = make_question_sets(recipe, load_also_tests(recipe))
    (base,) = candidates.find_candidates(recipe)

    def prepare(s, *earlier):
        return answers.prepare(
            s.recipe, base.asked_by(s.recipe), s.questions, files / s.name, s.form, s.validation, earlier
        )

    asked = prepare(first)
    assert len(asked.validation.questions) == 3
    assert prepare(night, asked).validation is asked.validation
    assert prepare(night).validation is not asked.validation and prepare(night, asked).file.path != asked.file.path
    assert prepare(short, asked).validation is not asked.validation  # asked in another way


def test_every_test_has_scores_pairs_and_a_section_of_its_own(files, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval/run.py", "--config", str(files / "shop.yaml")])
    runpy.run_path("eval/run.py", run_name="__main__")
    out = capsys.readouterr()
    assert "also_test: clinic: 1 of 9 training rows are near-duplicates of its test questions" in out.err
    results = json.loads((files / "run/eval/results.json").read_text())
    (clinic,) = results["tests"].values()
    assert (results["test"]["questions"], clinic["test"]["questions"]) == (3, 2)
    assert results["primary_metric"] == "rougeL" and clinic["primary_metric"] == "accuracy"
    assert "accuracy" not in results["models"]["base"] and "accuracy" in clinic["models"]["base"]
    assert [pair["models"] for pair in clinic["pairs"]] == [["base", "base@bf16"]]
    assert clinic["checks"]["short"]["models"]["base"]["value"] == 1 and not results["checks"]
    assert clinic["models"]["base"]["latency"]["prompts"] == 0 and results["models"]["base"]["latency"]["prompts"] == 1
    said = [json.loads(line) for line in (files / "run/eval/clinic/predictions-base.jsonl").read_text().splitlines()]
    assert [line["question"] for line in said] == ["How is a burn on the hand treated at home?!", "What is fever?"]
    assert max(line["new_tokens"] for line in said) == 6
    for name in ("report.md", "report.html"):
        shown = (files / "run/eval" / name).read_text()
        assert "Elsewhere: clinic" in shown and "Checks, clinic" in shown and "accuracy (decides)" in shown
    assert json.loads(out.out.splitlines()[-1])["tests"]["clinic"] == clinic["verdicts"]
    runpy.run_path("eval/run.py", run_name="__main__")  # nothing is answered again
    assert capsys.readouterr().err.count("answers are there; nothing to do") == 4
