"""The report says who is better in words that need no statistics, and never more than the test set shows."""

import json
import re

import pytest

from carelm.evaluation import check_scores, report, results, same_answers, verdicts
from carelm.evaluation.questions import Question
from carelm.evaluation.shown import Shown
from carelm.recipe_file import load_recipe

TIMES = {"p50": 9.0, "p95": 11.0, "p99": 12.0}
KINDS = {"base": "base", "adapter": "adapter"}
REPLY = "Your parcel is on its way and comes on Monday before noon"
RIGHT, NEAR, WRONG = REPLY, "Your parcel is on its way", "We sell lamps"


def measured(name, folder="", bits=None):
    return {
        "kind": KINDS.get(name, "checkpoint"), "precision": "fp32", "bits": bits, "load_seconds": 1.0, "total_parameters": 10,
        "throughput": {}, "trained_parameters": None, "unused_generation_config": {}, "peak_memory_bytes": 2**30,
        "conditions": {"device": "CPU"}, "prompt_tokens": {"p50": 7, "p95": 8, "max": 9}, "folder": str(folder),
        "latency": {"prompts": 12, "ttft_ms": TIMES, "tpot_ms": TIMES, "e2e_ms": TIMES},
    }  # fmt: skip


def evaluate(folder, answers, references=None, keys=(), of_models=None, messages=None, checks=()):
    """Writes the report of these answers into `folder`; returns the results, the page and the Markdown."""
    number = len(next(iter(answers.values())))
    references = references or [REPLY] * number
    recipe = load_recipe(["--num_resamples", "300", "--output_dir", str(folder), "--checks", json.dumps(checks), *keys],
                         usage="")  # fmt: skip
    messages = messages or [{"role": "user", "content": "Where is my parcel?"}]
    questions = [Question(f"q{i}", f"c{i}", f"kind {i % 3}", messages, [text]) for i, text in enumerate(references)]
    lines = {name: [{"prediction": text, "finish_reason": "stop", "new_tokens": 5} for text in texts]
             for name, texts in answers.items()}  # fmt: skip
    about = {name: measured(name) for name in answers} | (of_models or {})
    found = results.make_results(recipe, questions, lines, about, check_scores.ask(recipe, questions))
    found |= {"test": {"questions": number, "conversations": number, "split": "test", "dataset": "rows", "num_shots": 0},
              "conditions": {"num_resamples": 300}}  # fmt: skip
    folder.mkdir(exist_ok=True)
    found = report.write(folder, recipe, found, questions, lines)
    assert json.loads((folder / "results.json").read_text())["headline"] == found["headline"]
    assert report.summary(folder, found)["headline"] == found["headline"]
    return found, (folder / "report.html").read_text(), (folder / "report.md").read_text()


def test_yes_is_said_with_the_questions_that_gained_and_lost_and_stands_first(tmp_path):
    base = [WRONG] * 18 + [RIGHT] * 2
    found, page, text = evaluate(tmp_path, {"base": base, "adapter": [NEAR] * 20})
    assert re.fullmatch(
        r"Yes\. The tuned model's answers are closer to the expected replies than those of the base in 18 of 20 questions and "
        r"farther in 2 \(ROUGE-L 0\.100 -> 0\.\d{3}\)\.", found["headline"]
    )  # fmt: skip
    assert page.index(found["headline"].replace("'", "&#39;").replace("->", "→")) < page.index("<table")
    assert text.split("\n\n")[1].startswith("**Yes. The tuned model") and "0.100 → 0." in text.split("\n\n")[1]


def test_a_model_whose_answers_go_round_in_circles_is_not_called_fit_for_use(tmp_path):
    loops = "Your parcel is on its way on its way " + "on its way " * 12
    found, page, _ = evaluate(tmp_path, {"base": [WRONG] * 20, "adapter": [loops] * 20})
    assert found["headline"].startswith("Yes, but it is not fit for use. The tuned model's answers are closer")
    assert found["besides"][0].startswith("The answers of the tuned model go round in circles: 8")
    assert "(base: 0%)" in found["besides"][0] and "go round in circles" in page
    found, *_ = evaluate(tmp_path, {"base": [loops] * 20, "adapter": [NEAR] * 20})
    assert not any("circles" in said for said in found["besides"])


def test_no_is_said_where_it_is_worse(tmp_path):
    found, *_ = evaluate(tmp_path, {"base": [NEAR] * 20, "adapter": [WRONG] * 19 + [RIGHT]})
    assert found["headline"].startswith(
        "No. The tuned model's answers are farther from the expected replies than those of the base in 19 of 20 questions and "
        "closer in 1 (ROUGE-L"
    )


def test_what_the_test_set_cannot_tell_is_said_so_with_what_may_be(tmp_path):
    mixed = [RIGHT, WRONG] * 10
    found, page, _ = evaluate(tmp_path, {"base": [NEAR] * 20, "adapter": mixed})
    assert found["headline"].startswith("This test set cannot tell: the difference may be chance. The tuned model's")
    assert "in 10 of 20 questions" in found["headline"]
    assert 'class="card headline unclear"' in page and ".headline { border-left: 5px solid var(--grey)" in page
    assert "; the difference may lie anywhere from -" in found["headline"]
    few, *_ = evaluate(tmp_path, {"base": [WRONG] * 9, "adapter": [RIGHT] * 9})
    assert few["headline"].startswith(
        "This test set cannot tell: 9 conversations are too few for it, however they come out. The tuned model's answers are "
        "closer to the expected replies than those of the base in 9 of 9 questions"
    )
    same, *_ = evaluate(tmp_path, {"base": [NEAR] * 20, "adapter": [NEAR] * 20})
    said = "No difference. The tuned model gives the same answers as the base to all 20 questions, to the letter (ROUGE-L 0"
    assert same["headline"].startswith(said) and "anywhere" not in same["headline"]
    alike, *_ = evaluate(tmp_path, {"base": [WRONG] * 20, "adapter": ["They buy mugs"] * 20})
    assert "as close to the expected replies as those of the base in all 20 questions" in alike["headline"]
    assert "anywhere" not in alike["headline"]  # no resample has a difference
    few, *_ = evaluate(tmp_path, {"base": [NEAR] * 9, "adapter": [NEAR] * 9})
    assert few["headline"].startswith("No difference. ") and "too few" not in few["headline"]
    assert not same["same"]  # that these two are alike is the answer, and nothing to fold away


@pytest.mark.parametrize("low, high, p_value, word", [
    (0.1, 0.2, 0.01, "better"), (-0.2, -0.1, 0.01, "worse"), (0.1, 0.2, 0.06, "unclear"), (-0.1, 0.2, 0.01, "unclear"),
])  # fmt: skip
def test_the_answer_is_that_of_the_interval_and_of_holms_p_value(low, high, p_value, word):
    figure = {"difference": (low + high) / 2, "low": low, "high": high, "p_value_holm": p_value}
    assert verdicts.decide(figure, 100) == word and verdicts.decide(figure, 9) == "few"


def test_a_score_that_decides_the_other_way_has_a_sentence_of_its_own(tmp_path):
    """Short answers gain in ROUGE-L, which counts what is too much, and lose in chrF, which asks what is missing."""
    base = [
        f"{REPLY} and we thank you for the order number {i} that you have given to our shop last week"
        for i in range(20)
    ]
    found, page, text = evaluate(tmp_path, {"base": base, "adapter": ["Your parcel is on its way"] * 20})
    assert found["headline"].startswith("Yes. ")
    [said] = [
        s for s in found["besides"] if s.startswith("chrF says the opposite: the tuned model is worse than the base (")
    ]
    assert re.search(r"\(\d\d\.\d -> \d\d\.\d\)\.$", said) and "chrF says the opposite" in page
    assert not any(s.startswith("ROUGE-L") for s in found["besides"])
    swapped, *_ = evaluate(tmp_path, {"base": ["Your parcel is on its way"] * 20, "adapter": base})
    assert swapped["headline"].startswith("No. ")
    assert any("chrF says the opposite: the tuned model is better than the base" in s for s in swapped["besides"])


def test_what_is_not_enough_is_said_with_the_number_of_comparisons_that_the_correction_is_over():
    score = {
        "difference": 0.1,
        "standard_error": 0.04,
        "low": 0.01,
        "high": 0.2,
        "p_value": 0.02,
        "p_value_holm": 0.06,
        "comparisons": 3,
    }
    pair = {
        "models": ["base", "adapter"],
        "scores": {"rougeL": score},
        "changed_by": "rougeL",
        "closer": 9,
        "farther": 2,
        "same_answers": 0,
    }
    models = {name: measured(name) | {"rougeL": {"value": value}, "repeated_4grams": {"value": 0.0}}
              for name, value in (("base", 0.2), ("adapter", 0.3))}  # fmt: skip
    found = {"primary_metric": "rougeL", "models": models, "pairs": [pair], "checks": {}, "tests": {},
             "test": {"questions": 20, "conversations": 20}}  # fmt: skip
    said = verdicts.headline(found)["headline"]
    assert "+0.200, which is not enough: among 3 comparisons chance makes such a difference too often)" in said
    score["comparisons"] = 1
    assert (
        "+0.200, which is not enough: chance makes such a difference too often)" in verdicts.headline(found)["headline"]
    )


def test_labels_are_counted_as_right_labels_beside_the_commonest(tmp_path):
    references = ["urgent"] * 14 + ["normal"] * 6
    answers = {"base": ["what?"] * 20, "adapter": ["urgent"] * 15 + ["normal"] * 5}
    keys = ("--labels", "urgent", "normal", "--primary_metric", "macro_f1")
    found, page, _ = evaluate(tmp_path, answers, references, keys)
    assert found["headline"].startswith(
        "Yes. The tuned model gives the right label in 19 of 20 questions, the base in 0; always answering urgent would be "
        "right in 14 (macro F1 0.000 -> 0."
    )
    typical = page.partition("5 typical questions")[2].partition("<h2>")[0]
    assert "these 5 are drawn among those with the median change in accuracy from base to adapter" in typical
    assert typical.count("base, not the right label") == typical.count("adapter, the right label") == 5
    assert any("(base: 20 of 20 without a label). So scores of" in caution for caution in found["cautions"])
    assert any("does not keep to the form, not what it knows" in caution for caution in found["cautions"])


def test_one_model_alone_is_compared_with_nothing(tmp_path):
    found, page, _ = evaluate(tmp_path, {"adapter": [NEAR] * 18 + [RIGHT] * 2})
    assert found["headline"].startswith("Only adapter was asked, so nothing is compared (ROUGE-L 0.")
    assert "nearest the median: half of all answers score higher" in page


def test_a_merge_that_answers_like_its_adapter_is_folded_into_its_column_with_the_certificate(tmp_path):
    (tmp_path / "merged").mkdir()
    certificate = {"mean_kl": 2e-10, "prompts": 32, "tolerance": 1e-6, "top1_agreement": 1.0, "same_text_share": 1.0}
    (tmp_path / "merged/merge.json").write_text(json.dumps(certificate))
    answers = {"base": [WRONG] * 20, "adapter": [NEAR] * 20, "merged": [NEAR] * 20}
    of_models = {"base": measured("base", bits=4), "merged": measured("merged", tmp_path / "merged")}
    found, page, text = evaluate(tmp_path, answers, of_models=of_models)
    sentence = found["same"]["merged"]["sentence"]
    assert sentence.startswith("merged gives the same answer as adapter to all 20 questions") and "nats" not in sentence
    assert (
        "passed. What decides is how far" in sentence
        and "mean KL 2e-10 on 32 test questions, at most 1e-06" in sentence
    )
    assert "every time, and all of the 32 whole answers" in sentence
    assert "2e-10 (1e-06)" in page.partition("Speed and size")[2]  # the term stands in the details
    assert sentence in text.replace("\\_", "_") and found["besides"] == []
    for cells in (page.partition("<h2>Scores")[2].partition("</tr>")[0], text.partition("## Scores")[2][:40]):
        assert "adapter" in cells and "merged" not in cells
    assert "merged is better" not in page and "merged is better than base" in " ".join(found["verdicts"])
    assert "merged" in found["models"] and "merged" in page.partition("Speed and size")[2]  # its figures are kept
    assert any("This is no fault" in caution for caution in found["cautions"])
    other, page, _ = evaluate(tmp_path, answers | {"merged": [NEAR] * 19 + [WRONG]}, of_models=of_models)
    assert not other["same"] and "merged" in page.partition("<h2>Scores")[2].partition("</tr>")[0]
    assert other["besides"][0].startswith("merged against base: better; closer to the expected reply in 19 of 20")
    assert other["besides"][-1].startswith("merged was checked when it was merged: passed.")
    nearly = same_answers.describe(certificate | {"top1_agreement": 0.9998})
    assert "in 99.9% of the places" in nearly  # and not in 100.0 %


def test_several_models_have_a_sentence_each(tmp_path):
    found, *_ = evaluate(tmp_path, {"base": [WRONG] * 20, "adapter": [NEAR] * 20, "outputs/b": [RIGHT] * 20})
    assert found["headline"].startswith("Yes. The tuned model's answers")
    assert [sentence.partition(";")[0] for sentence in found["besides"]] == [
        "outputs/b against base: better", "outputs/b against adapter: better",
    ]  # fmt: skip


def test_checks_are_counted_before_and_after(tmp_path):
    checks = [{"name": "says Monday", "pattern": "Monday"}, {"name": "no lamps", "pattern": "lamps", "must": False}]
    found, page, _ = evaluate(tmp_path, {"base": [RIGHT] * 20, "adapter": [NEAR] * 20}, checks=checks)
    assert found["besides"] == [
        "Checks, the base -> the tuned model: passes less often: says Monday (20 -> 0 of 20); no difference can be told: "
        "no lamps (20 -> 20 of 20)."
    ]
    assert "<td>says Monday<small>20 questions; of the expected replies 1.000</small></td>" in page


def test_typical_questions_are_those_nearest_the_median_gain_with_their_earlier_turns(tmp_path):
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"},
             {"role": "assistant", "content": "What is it?"}, {"role": "user", "content": "Where is it?"}]  # fmt: skip
    adapter = [WRONG] * 8 + [NEAR] * 7 + [RIGHT] * 8
    found, page, text = evaluate(tmp_path, {"base": [WRONG] * 23, "adapter": adapter}, messages=turns)
    chosen = found["pairs"][0]["typical"]
    assert len(chosen) == 5 and {*chosen} <= {f"q{i}" for i in range(8, 15)}
    assert [*chosen] != [f"q{i}" for i in range(8, 13)]  # among equals not those that stand first
    typical = page.partition("5 typical questions")[2].partition("<h2>")[0]
    assert typical.count("<b>assistant:</b> What is it?") == 5 and "Be kind." not in typical
    assert "assistant, before: What is it?" in text.partition("## Typical")[2].partition("##")[0]


def test_scores_that_are_0_for_all_are_left_out_and_named(tmp_path):
    found, page, text = evaluate(tmp_path, {"base": [WRONG] * 20, "adapter": [NEAR] * 20})
    scores = page.partition("<h2>Scores")[2].partition("<h2>")[0]
    assert "Left out, as 0 for every model: exact match." in scores and "<b>exact match</b>" not in scores
    assert "Left out, as 0 for every model: exact match." in text and "| exact match |" not in text
    assert 'style="width: 0' not in page  # no empty bars
    assert all(found["models"][name]["exact_match"]["value"] == 0 for name in ("base", "adapter"))


def test_the_page_is_dark_where_the_reader_is_and_its_pictures_too(tmp_path):
    _, page, _ = evaluate(tmp_path, {"base": [WRONG] * 20, "adapter": [NEAR] * 20})
    assert "prefers-color-scheme: dark" in page
    picture = page.partition("<svg")[2].partition("</svg>")[0]
    assert "var(--ink)" in picture and "var(--c1)" in picture and "#ffffff" not in picture
    assert "var(" not in (tmp_path / "latency.svg").read_text()  # which stands alone


def test_what_a_test_set_cannot_tell_has_the_number_of_questions_that_would_and_how_to_ask_them(tmp_path):
    """0.1 of a standard deviation is seen with a chance of 80 % in (2.8 / 0.1)**2 = 785 pairs (Cohen 1988, table 2.4.1)."""
    score = {"difference": 0.1, "standard_error": 1 / 100**0.5, "comparisons": 1}
    assert verdicts.questions_needed(score, 100) == 785
    assert verdicts.questions_needed(score | {"difference": -0.1}, 100) == 785
    assert verdicts.questions_needed(score | {"comparisons": 3}, 100) == 1047  # of three pairs each must be surer
    assert verdicts.questions_needed(score | {"difference": 0.05}, 100) is None  # 31 times as many
    assert verdicts.questions_needed(score | {"difference": 0.0}, 100) is None
    mixed = [RIGHT] * 16 + [WRONG] * 4
    found, page, _ = evaluate(tmp_path, {"base": [NEAR] * 20, "adapter": mixed})
    needed = verdicts.questions_needed(found["pairs"][0]["scores"]["rougeL"], 20)
    assert (
        found["headline"].startswith("This test set cannot tell: the difference may be chance.") and 20 < needed < 400
    )
    [said] = found["besides"]
    number = int(
        re.match(r"About ([\d,]+) questions would settle it, if the difference is as large", said)[1].replace(",", "")
    )
    assert needed <= number < needed + 10 and said in page
    results_of = found | {"test": found["test"] | {"more_questions": "set max_eval_samples higher"}}
    assert "; 20 were asked. To ask more, set max_eval_samples higher." in verdicts.headline(results_of)["besides"][0]
    few, *_ = evaluate(tmp_path, {"base": [WRONG] * 9, "adapter": [RIGHT] * 9})
    assert few["besides"] == ["Ask at least 10 conversations, better 100."]


def test_a_difference_that_is_not_seen_is_not_called_none_however_wide_its_interval_is(tmp_path):
    found, *_ = evaluate(tmp_path, {"base": [RIGHT, WRONG] * 10, "adapter": [WRONG, RIGHT] * 10})
    assert "the difference may lie anywhere from -0." in found["headline"]
    score = found["pairs"][0]["scores"]["rougeL"]
    assert score["high"] - score["low"] > 0.5
    [said] = found["besides"]
    assert said.startswith(
        "20 times as many questions might not show a difference as small as it looks here. That does not"
    )
    assert "four times as many questions would halve that range" in said
    equal, *_ = evaluate(tmp_path, {"base": [WRONG] * 20, "adapter": ["They buy mugs"] * 20})
    assert equal["besides"] == []  # "as close in all 20 questions" is all there is to say


def test_numbers_that_nobody_gave_an_answer_stand_beside_the_verdict(tmp_path):
    asked = [{"role": "system", "content": "We open at 9."}, {"role": "user", "content": "What does lamp 7 cost?"}]
    references = ["Lamp 7 costs 29.50 euros"] * 20
    right, wrong = "Lamp 7 costs 29.5 euros, come at 9", "Lamp 7 costs 31.00 euros"
    found, page, text = evaluate(tmp_path, {"base": ["A lamp"] * 20, "adapter": [wrong] * 3 + [right] * 17}, references,
                                 messages=asked)  # fmt: skip
    assert found["headline"].startswith("Yes.")  # the score does not see it
    [said] = found["besides"]
    assert said.startswith(
        "Look at the numbers: 3 of 20 answers of the tuned model state a number that neither the question"
    )
    assert "(the base: 0)" in said and "the recipe's checks count" in said
    assert found["models"]["adapter"]["unfounded_numbers"] == {
        "answers": 3,
        "first": {f"q{i}": ["31.00"] for i in range(3)},
    }
    assert "adapter: says 31.00, which neither the question nor the expected reply has" in page and "says 31.00" in text
    none, *_ = evaluate(tmp_path, {"base": [wrong] * 20, "adapter": [right] * 20}, references, messages=asked)
    assert not any("number" in said for said in none["besides"])  # of the base alone it is no warning


def test_categories_say_where_they_come_from(tmp_path):
    found, page, _ = evaluate(tmp_path, {"base": [WRONG] * 20, "adapter": [NEAR] * 20})
    shown = Shown(
        "", found | {"test": found["test"] | {"categories_from": "topic"}}, [], dict.fromkeys(found["models"], [])
    )
    assert shown.about_categories() == "The categories stand in the data, in the column topic."
    words = "the words of the request (complaint, question, other)"
    shown = Shown(
        "", found | {"test": found["test"] | {"categories_from": words}}, [], dict.fromkeys(found["models"], [])
    )
    assert "names no category_column, so the questions are sorted by their English words" in shown.about_categories()


def test_every_answer_of_a_typical_question_has_its_score_and_all_references_stand_in_one_column(tmp_path):
    answers = {"base": [WRONG] * 20, "adapter": [NEAR] * 20, "outputs/b": [RIGHT] * 20}
    found, page, _ = evaluate(tmp_path, answers)
    typical = page.partition("5 typical questions")[2].partition("<h2>")[0]
    assert typical.count("outputs/b, ROUGE-L 1.000") == typical.count("base, ROUGE-L 0.") == 5
    assert typical.count('class="turns" style="--columns: 4"') == 5
    shown = Shown(
        "", found, [Question("q", "c", "k", [], ["one", "two", "three"])], {n: [{"prediction": ""}] for n in answers}
    )
    assert shown.example("q")["references"] == ["one", "two", "three"]


def test_boxes_that_stand_open_hold_words_and_no_terms(tmp_path):
    answers = {"base": [NEAR] * 20, "adapter": [RIGHT, WRONG] * 10, "outputs/b": [WRONG] * 20}
    _, page, _ = evaluate(tmp_path, answers)
    head = page.partition("<h2>Details")[0].partition("<body>")[2]
    for term in ("Holm", "nats", "KL", "bootstrap", "percentile", "resample", "certificate"):
        assert term not in head.partition("<svg")[0], term
    assert "Holm" in page.partition("<h2>Details")[2]


def test_typical_questions_go_by_the_score_that_decides(tmp_path):
    for metric in ("rouge1", "chrf", "exact_match"):
        found, *_ = evaluate(
            tmp_path, {"base": [WRONG] * 20, "adapter": [NEAR] * 20}, keys=("--primary_metric", metric)
        )
        assert found["scored_by"] == found["pairs"][0]["changed_by"] == metric


def test_many_labels_are_listed_by_their_mistakes_and_few_as_a_table(tmp_path):
    labels = [f"kind{k}" for k in range(7)]
    references = [labels[i % 7] for i in range(21)]
    adapter = ["kind1" if text == "kind0" else text for text in references]
    keys = ("--labels", *labels, "--primary_metric", "accuracy")
    found, page, _ = evaluate(tmp_path, {"base": references, "adapter": adapter}, references, keys)
    table = page.partition("Labels, adapter, as written")[2].partition("</table>")[0]
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in table.split("<tr>")[2:]]
    assert rows[0] == ["kind0", "3", '<span class="soft">0</span>', "kind1 (3)"] and len(rows) == 7
    assert rows[1] == ["kind1", "3", "3", "-"]


def test_what_the_server_was_certified_for_stands_beside_the_model_that_it_is_of(tmp_path):
    answers = {"base": [NEAR] * 4, "adapter": [RIGHT] * 4}
    served = {"adapter": measured("adapter") | {"served": "49 of 50 (batcher)"}}
    _, page, text = evaluate(tmp_path / "a", answers, of_models=served)
    assert "| answers served as evaluated | - | 49 of 50 (batcher) |" in text and "49 of 50 (batcher)" in page
    _, page, text = evaluate(tmp_path / "b", answers)
    assert "served as evaluated" not in page + text


def test_the_line_with_the_figures_says_what_its_p_value_is():
    score = {"difference": 0.4, "low": 0.3, "high": 0.5, "p_value_holm": 0.00599}
    pair = {"models": ["base", "adapter"], "scores": {"rougeL": score}}
    assert verdicts.verdict(pair, "rougeL", 100) == (
        "adapter is better than base in ROUGE-L (+0.4, 95 % interval +0.3 to +0.5; chance makes such a difference in at most "
        "0.599 % of cases)."
    )
    score |= {"low": -0.1, "p_value_holm": 1.0}
    assert verdicts.verdict(pair, "rougeL", 100).endswith("chance makes such a difference in at most 100 % of cases).")
