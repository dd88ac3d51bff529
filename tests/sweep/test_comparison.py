"""The comparison of runs: their answers joined by question, the same draws for all, and what cannot be compared refused."""

import dataclasses
import json
import re

import pytest
import yaml

from carelm.data.label_form import find_form
from carelm.errors import UserError
from carelm.evaluation import label_file, scores
from carelm.evaluation.comparison import Compared, compare
from carelm.evaluation.predictions import PredictionFile
from carelm.evaluation.questions import Question
from carelm.recipe_file import load_recipe

TIMES = {"p50": 9.0, "p95": 11.0, "p99": 12.0}
MEASURED = {
    "kind": "adapter", "folder": "run", "precision": "fp32", "bits": None, "load_seconds": 1.0, "total_parameters": 100,
    "trained_parameters": 1,
    "unused_generation_config": {}, "peak_memory_bytes": 2**30, "prompt_tokens": {"p50": 7, "p95": 8, "max": 9},
    "conditions": {"device": "CPU"}, "latency": {"prompts": 2, "ttft_ms": TIMES, "tpot_ms": TIMES, "e2e_ms": TIMES},
    "throughput": {"examples": 20, "of_examples": 20, "examples_per_second": 3.0, "tokens_per_second": 9.0, "batch_size": 4},
}  # fmt: skip
TRAINED = {
    "eval_loss": 2.5, "eval_loss_before": 4.0, "global_step": 7, "num_train_tokens": 700, "tokens_per_second": 50.0,
    "wall_seconds": 14.0, "peak_memory_bytes": 2**31, "trainable_parameters": 1, "total_parameters": 100,
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """A run as training and evaluation leave it: `answers` and `references` for 20 questions, and those of the base."""

    def run(name, answer, *words, reference="Lamp {0} is in aisle {0}.", base=None, order=1, **keys) -> Compared:
        recipe = load_recipe(["--output_dir", str(tmp_path / name), *words], usage="")
        folder = recipe.output_dir / "eval"
        folder.mkdir(parents=True)
        models = {}
        for model, text in (("base", base), ("adapter", answer)):
            if text:
                models[model] = answered(folder, model, text, reference, order)
        test = {"questions": 20, "conversations": 10, "split": "test", "dataset": "rows"}
        results = {"models": models, "test": test, "conditions": {}, "tests": {}, "data_cautions": []}
        (folder / "results.json").write_text(json.dumps(results))
        (recipe.output_dir / "train_metrics.json").write_text(json.dumps(TRAINED))
        state = {"state": "finished", "error": "", "is_trained": True, "is_evaluated": True}
        return Compared(name=name, recipe=recipe, axes={"lora_r": 4}, **{**state, **keys})

    return run


def answered(folder, model, text, reference, order=1) -> dict:
    """Writes a model's answers, {0} being the question's number, and returns its figures."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        {"id": f"q{i}", "conversation": f"c{i // 2}", "category": "lamps", "question": f"Where is lamp {i}?",
         "prediction": text.format(i), "references": [reference.format(i, ("same", "other")[i % 2])], "new_tokens": 6,
         "prompt_tokens": 5, "finish_reason": "stop", "made_by": text}
        for i in range(20)
    ][::order]  # fmt: skip
    (folder / f"predictions-{model}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return MEASURED


def change_results(one: Compared, change) -> None:
    file = one.recipe.output_dir / "eval/results.json"
    results = json.loads(file.read_text())
    change(results)
    file.write_text(json.dumps(results))


def score_labels(one: Compared, right: int, temperature: float, model: str = "adapter") -> Compared:
    """Writes label scores of a model's answers, of which the first so many are right, and what its evaluation would say."""
    folder, recipe = one.recipe.output_dir / "eval", one.recipe
    lines = [json.loads(line) for line in (folder / f"predictions-{model}.jsonl").read_text().splitlines()]
    questions = [Question(x["id"], x["conversation"], "", [], x["references"]) for x in lines]
    form = find_form(recipe, map(Question.expected, questions))
    answers = PredictionFile(folder / f"predictions-{model}.jsonl", {x["id"]: x["made_by"] for x in lines})
    file = label_file.open_file(answers, form, label_file.said(answers, form))
    for k, question in enumerate(questions):
        true = form.true_label(question.references[0])
        scores = {label: -0.1 if (label == true) == (k < right) else -2.5 for label in recipe.labels}
        file.append(
            {"id": question.id, "reason": "", "log_probabilities": scores, "made_by": file.made_by[question.id]}
        )
    bins = {"expected_calibration_error": 0.2, "negative_log_likelihood": 0.5, "bins": []}
    known = {"before": bins, "after": bins, "temperature": temperature, "validation_questions": 60}
    figures = {"constrained_macro_f1": {}, "calibration": known}
    change_results(one, lambda results: results["models"][model].update(figures))
    return one


def compared(tmp_path, *runs) -> dict:
    assert compare(tmp_path, "lamps", list(runs)) == json.loads((tmp_path / "comparison.json").read_text())
    return json.loads((tmp_path / "comparison.json").read_text())


def test_answers_are_joined_by_question_whatever_their_order(run, tmp_path):
    found = compared(tmp_path, run("a", "Lamp {0} is in aisle {0}."), run("b", "Lamp {0} is in aisle {0}.", order=-1))
    assert [model["rougeL"]["value"] for model in found["models"].values()] == [1.0, 1.0]
    assert found["pairs"][0]["scores"]["rougeL"]["difference"] == 0


def test_a_base_that_was_asked_the_same_stands_there_once_and_first(run, tmp_path):
    runs = [
        run("a", "Lamp {0}", base="I am a lamp"),
        run("b", "aisle {0}", base="I am a lamp"),
        run("c", "x", base="Lamp?"),
    ]
    assert list(compared(tmp_path, *runs)["models"]) == ["a/base", "c/base", "a", "b", "c"]
    assert list(compared(tmp_path, *runs[:2])["models"]) == ["base", "a", "b"]


def test_all_pairs_are_compared_on_the_same_draws_with_holm_over_all_of_them(run, tmp_path, monkeypatch):
    drawn = []
    draws = scores.draws
    monkeypatch.setattr(scores, "draws", lambda number, *rest: drawn.append((number, *rest)) or draws(number, *rest))
    texts = ["Lamp {0} is in aisle {0}.", "Lamp {0} is here.", "aisle", "Lamp", "in aisle {0}", "is in aisle {0}."]
    found = compared(tmp_path, *(run(f"r{k}", text) for k, text in enumerate(texts)))
    assert drawn[0] == (10, 1500, 42)  # conversations, 100 for each of 15 pairs, split_seed
    assert len(found["pairs"]) == 15 and found["best"] == "r0"
    adjusted = scores.holm([pair["scores"]["rougeL"]["p_value"] for pair in found["pairs"]])
    assert [pair["scores"]["rougeL"]["p_value_holm"] for pair in found["pairs"]] == adjusted
    assert [v for v in found["verdicts"] if "r0" in v] == found["verdicts"] and len(found["verdicts"]) == 5


def test_the_table_has_the_deciding_score_first_then_the_difference_to_the_best_and_what_it_costs(run, tmp_path):
    runs = [run("a", "Lamp {0} is in aisle {0}."), run("b", "Lamp {0} is here."),
            run("c", "", state="failed", error="error: no rows")]  # fmt: skip
    compared(tmp_path, *runs)
    table = (tmp_path / "comparison.md").read_text().partition("## The runs")[2].partition("##")[0].split("\n")
    head, a, b, c = (re.split(r" *\| *", line)[1:-1] for line in table if line.startswith("|") and "---" not in line)
    assert head[:4] == ["run", "ROUGE-L (decides)", "difference to a", "validation loss"]
    assert a[2] == "best" and re.fullmatch(r"-0\.4\d\d \(-0\.\d+ to -0\.\d+; p \S+\)", b[2])
    assert b[4:] == ["9.0 (p95 11.0)", "1.00", "1.000% (1)", "14.0 (7 steps)", "2.00", "50"]
    assert c[0] == "c (failed)" and "error: no rows" in (tmp_path / "comparison.html").read_text()


def test_without_answers_the_losses_are_compared(run, tmp_path):
    found = compared(tmp_path, run("a", "x", is_evaluated=False), run("b", "y", is_evaluated=False))
    assert (found["models"], found["best"]) == ({}, "a")
    assert "validation loss (decides)" in (tmp_path / "comparison.html").read_text()


def with_vocabulary(one: Compared, *words: str) -> Compared:
    model = {"type": "BPE", "vocab": {word: k for k, word in enumerate(words)}}
    (one.recipe.output_dir / "tokenizer.json").write_text(json.dumps({"model": model, "padding": one.name}))
    return one


def test_losses_under_other_tokenizers_are_said_not_to_compare_and_decide_nothing(run, tmp_path):
    answer = "Lamp {0} is here."
    runs = [with_vocabulary(run("a", answer), "x", "y"), with_vocabulary(run("b", answer), "x", "y"),
            with_vocabulary(run("c", answer), "x", "z")]  # fmt: skip
    found = compared(tmp_path, *runs[:2])
    assert not any("tokenizers" in caution for caution in found["cautions"])
    found = compared(tmp_path, *runs)
    assert found["cautions"][-1].endswith("as each is a mean over tokens of its own: a, b; c.")
    assert "validation loss (other tokenizers: not to compare)" in (tmp_path / "comparison.md").read_text()
    found = compared(tmp_path, *(dataclasses.replace(one, is_evaluated=False) for one in runs))
    assert found["best"] is None and "losses under several tokenizers do not compare" in found["headline"]


LABELS = ("--labels", "same", "other", "--primary_metric", "rougeL")


def test_other_references_with_the_same_labels_are_compared_by_labels_alone_which_is_said(run, tmp_path):
    runs = [run("with", "It fits: same", *LABELS, reference="Lamp {0} is the lamp: same"),
            run("without", "other", *LABELS, reference="same")]  # fmt: skip
    found = compared(tmp_path, *runs)
    assert found["models"]["with"]["accuracy"]["value"] == 1 and found["models"]["without"]["accuracy"]["value"] == 0
    assert "rougeL" not in found["models"]["with"] and found["primary_metric"] == "macro_f1"
    assert any("only label scores are compared" in caution for caution in found["cautions"])


CHOSEN = ("--labels", "same", "other", "--primary_metric", "constrained_macro_f1", "--prompt_template", "{q}")
WITH = (*CHOSEN, "--completion_template", "Reason: {why}\nLabel: {label}")
WITHOUT = (*CHOSEN, "--completion_template", "{label}")


def with_and_without(run) -> list[Compared]:
    """One answers with its reason and the other with the label alone."""
    reference = "Reason: lamp {0}\nLabel: {1}"
    return [score_labels(run("with", "Reason: a lamp\nLabel: same", *WITH, reference=reference), 20, 2.5),
            score_labels(run("without", "same", *WITHOUT, reference="{1}", order=-1), 15, 1.5)]  # fmt: skip


def test_labels_that_the_models_choose_decide_also_between_answers_with_a_reason_and_without(run, tmp_path):
    found = compared(tmp_path, *with_and_without(run))
    assert found["primary_metric"] == "constrained_macro_f1" and found["best"] == "with"
    accuracies = [model["constrained_accuracy"]["value"] for model in found["models"].values()]
    assert accuracies == [1.0, 0.75] and found["pairs"][0]["scores"]["constrained_accuracy"]["difference"] == -0.25
    assert found["models"]["without"]["constrained_confusion"]["same"] == {"same": 7, "other": 3, "unparsable": 0}
    assert "macro F1, constrained (decides)" in (tmp_path / "comparison.md").read_text()


def test_the_page_has_of_all_pairs_and_confusions_those_of_the_deciding_score(run, tmp_path):
    compared(tmp_path, *with_and_without(run))
    for page in ((tmp_path / f"comparison.{suffix}").read_text() for suffix in ("md", "html")):
        assert "Labels, with, the likeliest of the list" in page and "Labels, with, as written" not in page
        assert page.count("without less with") == 1 and "the others stand in comparison.json" in page


def test_what_holds_for_each_run_is_said_where_it_is_not_the_same_in_all(run, tmp_path):
    runs = [run("a", "Lamp {0}", "--max_new_tokens", "8"), run("b", "aisle {0}", "--max_new_tokens", "96")]
    for one, number in zip(runs, (8, 96)):
        change_results(one, lambda r, n=number: r.update(conditions={"max_new_tokens": n, "seed": 42}))
    found = compared(tmp_path, *runs)
    assert found["conditions"] == {"max_new_tokens": {"a": 8, "b": 96}, "seed": 42, "num_resamples": 1000}
    assert "max_new_tokens is not the same in all runs: a 8, b 96." in found["cautions"]


def test_checks_that_all_runs_have_are_compared(run, tmp_path):
    check = "[{name: its number, when: 'lamp (?P<n>[0-9]+)', pattern: '(?P=n)'}]"
    found = compared(tmp_path, run("a", "aisle {0}", "--checks", check), run("b", "Aisle", "--checks", check))
    assert [m["value"] for m in found["checks"]["its number"]["models"].values()] == [1, 0]
    assert "## Checks" in (tmp_path / "comparison.md").read_text()
    runs = [run("c", "aisle {0}", "--checks", check), run("d", "Aisle")]
    assert any("checks are not about the same answers" in caution for caution in compared(tmp_path, *runs)["cautions"])


def test_what_a_run_warns_of_its_data_is_carried_with_the_runs_name_and_once_where_all_do(run, tmp_path):
    runs = [run("a", "Lamp {0}"), run("b", "aisle {0}"), run("c", "in {0}"), run("d", "is")]
    leaks, few = "The run has gone on from x: its adapter may have seen test questions.", "5 validation questions."
    for one, said in zip(runs, ([few, leaks], [few, "intent: predicted."], [leaks, few])):
        change_results(one, lambda results, said=said: results.update(data_cautions=said))
    carried = [few, f"a, c: {leaks}", "b: intent: predicted."]
    assert compared(tmp_path, *runs[:3])["cautions"][:3] == carried
    assert compared(tmp_path, runs[0])["cautions"][:2] == [few, leaks]
    change_results(runs[3], lambda results: results.pop("data_cautions"))
    assert "d: An earlier version has evaluated it: see" in compared(tmp_path, *runs)["cautions"][3]


def test_what_a_run_warns_of_the_data_of_an_also_test_stands_in_that_test(also_tested, tmp_path):
    few = "No validation questions."
    change_results(also_tested[1], lambda results: results["tests"]["clinic"].update(data_cautions=[few]))
    found = compared(tmp_path, *also_tested)
    assert found["tests"]["clinic"]["cautions"][0] == f"b: {few}" and f"b: {few}" not in found["cautions"]


def test_a_base_whose_labels_are_scored_in_another_form_is_another(run, tmp_path):
    """The prompt is the same, and so is the free answer to it; the label stands behind a reason or alone."""
    runs = [run("with", "Reason: a lamp\nLabel: same", *WITH, reference="Reason: lamp {0}\nLabel: {1}", base="hm"),
            run("without", "same", *WITHOUT, reference="{1}", base="hm"),
            run("again", "other", *WITHOUT, reference="{1}", base="hm")]  # fmt: skip
    for one, right in zip(runs, (20, 10, 10)):
        score_labels(score_labels(one, 15, 1.5), right, 1.5, "base")
    found = compared(tmp_path, *runs)["models"]
    assert list(found) == ["with/base", "without/base", "with", "without", "again"]
    assert [found[name]["constrained_accuracy"]["value"] for name in ("with/base", "without/base")] == [1.0, 0.5]


def test_a_test_that_the_first_run_was_not_asked_has_the_base_of_the_next(also_tested, tmp_path):
    change_results(also_tested[0], lambda results: results.update(tests={}))
    found = compared(tmp_path, *also_tested)
    assert list(found["models"]) == ["base", "a", "b", "c"]
    assert list(found["tests"]["clinic"]["models"]) == ["base", "b", "c"]


def test_runs_with_the_same_answers_are_said_to_be_the_same(run, tmp_path):
    found = compared(tmp_path, run("a", "Lamp {0}"), run("b", "Lamp {0}"), run("c", "no"))
    assert found["headline"].endswith("It is better than c. Its answers are those of b, to the letter.")


def test_a_score_by_which_the_best_run_is_worse_is_said(run, tmp_path):
    """Short answers gain in ROUGE-L and lose in chrF."""
    reference = "Your parcel {0} is on its way and comes on Monday before noon"
    more = " and we thank you for the order that you have given to our shop last week again"
    found = compared(tmp_path, run("long", reference + more, reference=reference),
                     run("short", "Your parcel {0} is on its way", reference=reference))  # fmt: skip
    assert found["headline"].startswith("short scores highest") and "It is better than long" in found["headline"]
    assert any(said.startswith("chrF says the opposite: short is worse than long (") for said in found["besides"])


def test_the_baseline_of_word_overlap_stands_beside_runs_that_share_it(run, tmp_path):
    runs = [run(name, "same", *LABELS, reference="{1}") for name in ("a", "b")]
    score = {"value": 0.94, "low": 0.9, "high": 0.97}
    counts = {label: {"same": 5, "other": 5, "unparsable": 0} for label in ("same", "other")}
    for k, one in enumerate(runs):
        overlap = {
            "threshold": 0.4,
            "validation_questions": 60,
            "accuracy": score,
            "macro_f1": score,
            "confusion": counts,
        }
        overlap |= {"differences": {"adapter": {"macro_f1": {"difference": k}}}}
        change_results(one, lambda results, overlap=overlap: results.update(baselines={"word overlap": overlap}))
    compared(tmp_path, *runs)
    page = (tmp_path / "comparison.md").read_text()
    assert "| word overlap | from 0.40 on, chosen on 60 validation rows | 0.940 (0.900 to 0.970) |" in page
    assert "Against the baselines" not in page


def test_long_names_may_break_after_an_axis_and_one_line_says_whose_answers_were_cut(run, tmp_path):
    runs = [run("lora_r=4,lora_alpha=8", "Lamp {0}"), run("b", "aisle 1,000 {0}")]
    for one in runs:
        file = one.recipe.output_dir / "eval/predictions-adapter.jsonl"
        file.write_text(file.read_text().replace('"stop"', '"length"'))
    cut = "Most answers are cut off at max_new_tokens: lora_r=4,lora_alpha=8 (20 of 20), b (20 of 20). Set it higher."
    assert cut in compared(tmp_path, *runs)["cautions"]
    page = (tmp_path / "comparison.html").read_text()
    assert cut.replace("4,", "4,<wbr>") in page and "lora_r=4,<wbr>lora_alpha=8</th>" in page
    assert "aisle 1,000" in page


def test_each_run_keeps_the_temperature_that_its_own_validation_rows_gave(run, tmp_path):
    found = compared(tmp_path, *with_and_without(run))
    assert [model["calibration"]["temperature"] for model in found["models"].values()] == [2.5, 1.5]
    sure = (tmp_path / "comparison.md").read_text().partition("## How sure the labels are")[2].partition("##")[0]
    assert "| with | 0.200 | 0.200 | 2.50 |" in sure and "| without | 0.200 | 0.200 | 1.50 |" in sure


def test_where_one_run_has_no_scores_of_labels_those_that_are_read_decide_which_is_said(run, tmp_path):
    scored = score_labels(run("a", "same", *WITHOUT, reference="{1}"), 15, 1.0)
    found = compared(tmp_path, scored, run("b", "same", *WITHOUT, reference="{1}"))
    assert found["primary_metric"] == "macro_f1" and "constrained_macro_f1" in found["models"]["a"]
    assert "macro F1, constrained cannot be had of all runs: macro F1 decides here." in found["cautions"]


def test_scores_of_labels_that_belong_to_other_answers_are_refused(run, tmp_path):
    one, other = with_and_without(run)
    file = one.recipe.output_dir / "eval/predictions-adapter.jsonl"
    file.write_text(file.read_text().replace('"prediction": "Reason: a', '"prediction": "Reason: no', 3))
    with pytest.raises(UserError, match="with: 3 of 20 answers of adapter have no label scores; evaluate it again"):
        compare(tmp_path, "lamps", [one, other])


def test_other_labels_are_refused(run, tmp_path):
    turned = ("--labels", "other", "same", "--primary_metric", "rougeL")
    runs = [run("a", "x", *LABELS, reference="{1}"), run("b", "y", *turned, reference="{1}")]
    with pytest.raises(UserError, match="a and b have other labels; give all runs the same, in one order"):
        compare(tmp_path, "lamps", runs)


@pytest.fixture
def also_tested(run, tmp_path):
    """Three runs that were asked a clinic's questions too."""
    keys = {
        "prompt_template": "{q}",
        "completion_template": "{a}",
        "dataset_name": "clinic",
        "primary_metric": "rouge1",
    }
    (tmp_path / "clinic.yaml").write_text(yaml.safe_dump(keys))
    runs = []
    for k, (name, text) in enumerate({"a": "Rest {0}.", "b": "Cool it, burn {0}.", "c": "Nothing"}.items()):
        one = run(name, "Lamp {0} is here.", "--also_test", str(tmp_path / "clinic.yaml"), base="I am a lamp")
        folder = one.recipe.output_dir / "eval/clinic"
        models = {model: answered(folder, model, words, "Cool the burn {0}.") for model, words in
                  (("base", "What?"), ("adapter", text))}  # fmt: skip
        test = {"questions": 20, "conversations": 10, "split": "test", "dataset": "clinic",
                "leaks": {"sentence": f"{k // 2} of 9 training rows are near-duplicates."}}  # fmt: skip
        about = {"clinic": {"models": models, "test": test, "data_cautions": []}}
        change_results(one, lambda results, about=about: results.update(tests=about))
        runs.append(one)
    return runs


def test_each_test_of_also_test_is_compared_for_itself_by_its_own_metric(also_tested, tmp_path):
    found = compared(tmp_path, *also_tested)
    clinic = found["tests"]["clinic"]
    assert (found["primary_metric"], clinic["primary_metric"]) == ("rougeL", "rouge1") and clinic["best"] == "b"
    assert list(clinic["models"]) == ["base", "a", "b", "c"] and len(clinic["pairs"]) == 6
    for score in ("rouge1", "chrf"):
        adjusted = scores.holm([pair["scores"][score]["p_value"] for pair in clinic["pairs"]])
        assert [pair["scores"][score]["p_value_holm"] for pair in clinic["pairs"]] == adjusted
    assert len(clinic["verdicts"]) == 3 and all("b" in verdict.split() for verdict in clinic["verdicts"])


def test_the_table_of_the_runs_and_a_section_show_what_became_of_each_elsewhere(also_tested, tmp_path):
    compared(tmp_path, *also_tested)
    page = (tmp_path / "comparison.md").read_text()
    head = page.partition("## The runs")[2].strip().split("\n")[0]
    assert "| clinic: ROUGE-1 |" in head
    section = page.partition("## Elsewhere: clinic")[2].partition("##")[0]
    assert "a, b: 0 of 9 training rows are near-duplicates. c: 1 of 9" in section
    assert "ROUGE-1 (decides)" in section and " less " not in section
    [row] = [line for line in section.split("\n") if line.startswith("| difference to b |")]
    assert re.fullmatch(r"(\| [^|]+){2}\| -\S+ \(.*; p \S+\) \| best \| -\S+ \(.*; p \S+\) \|", row)


def test_a_test_with_other_questions_is_refused_and_one_that_a_run_was_not_asked_is_said(also_tested, tmp_path):
    *others, last = also_tested
    file = last.recipe.output_dir / "eval/clinic/predictions-adapter.jsonl"
    file.write_text(file.read_text().replace('"q7"', '"z7"'))
    with pytest.raises(UserError, match="also_test: clinic: comparison: a and c were asked other questions"):
        compare(tmp_path, "lamps", also_tested)
    change_results(last, lambda results: results.update(tests={}))
    clinic = compared(tmp_path, *also_tested)["tests"]["clinic"]
    assert list(clinic["models"]) == ["base", "a", "b"] and "c was not asked clinic." in clinic["cautions"]


def test_answers_that_come_to_no_label_have_a_column_that_says_so(run, tmp_path):
    compared(tmp_path, run("a", "hm", *LABELS, reference="{1}"))
    page = (tmp_path / "comparison.md").read_text()
    assert "| true \\ answered | same | other | no label |" in page and "| same | 0 | 0 | 10 |" in page


def test_validation_rows_are_no_matter_of_a_comparison(run, tmp_path):
    keys = (*LABELS, "--overlap_columns", "one", "two")
    found = compared(tmp_path, run("a", "same", *keys, reference="same"), run("b", "other", *keys, reference="same"))
    assert not any("validation" in caution for caution in found["cautions"])


def test_an_endpoint_is_compared_with_what_its_evaluation_knows_of_it(run, tmp_path):
    one = run("a", "Lamp {0} is here.")
    folder = one.recipe.output_dir / "eval"
    (folder / "predictions-api:x.jsonl").write_text((folder / "predictions-adapter.jsonl").read_text())
    (folder / "measured-api:x.json").write_text("{}")
    about = json.loads((folder / "results.json").read_text())
    about["models"]["api:x"] = MEASURED | {
        "kind": "api", "peak_memory_bytes": None, "latency": {"prompts": 0, "ttft_ms": {}, "tpot_ms": {}, "e2e_ms": {}}
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps(about))
    assert list(compared(tmp_path, one)["models"]) == ["a", "a/api:x"]


@pytest.mark.parametrize(
    "words, reference, said",
    [
        ((), "Lamp {0} is upstairs.", "q0 has other references in b than in a; give all runs the same test rows"),
        (LABELS, "This one: other", r"q0 has other references in b than in a \(labels same and other\)"),
    ],
)
def test_other_references_are_refused(run, tmp_path, words, reference, said):
    runs = [run("a", "x", *words, reference="Lamp {0}: same"), run("b", "y", *words, reference=reference)]
    with pytest.raises(UserError, match=said):
        compare(tmp_path, "lamps", runs)
    assert not (tmp_path / "comparison.html").exists()


@pytest.mark.parametrize("change, said", [({"id": "z"}, "a and b were asked other questions"),
                                          ({"conversation": "z"}, "q3 is of another conversation in b than in a")])  # fmt: skip
def test_other_questions_and_conversations_are_refused(run, tmp_path, change, said):
    runs = [run("a", "x"), run("b", "y")]
    file = tmp_path / "b/eval/predictions-adapter.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[3] |= change
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(UserError, match=said):
        compare(tmp_path, "lamps", runs)
