"""What a judge says becomes figures with intervals, sentences and tables, of what could be read alone."""

import hashlib
import json
import random
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from launching import PROJECT
from small_endpoint import Endpoint, completion
from test_judge import choices, texts_of
from test_report import measured

from carelm.evaluation import endpoint as client
from carelm.evaluation import judge_report, judge_results, report, results, same_answers, scores, verdicts
from carelm.evaluation.judge import CRITERIA, OVERALL, find_judge
from carelm.evaluation.questions import Question
from carelm.recipe_file import load_recipe

GOOD, BAD = "Order {} comes on Monday, you can count on it.", "No idea {}."
NUMBER = 20


def kind(body, _=0):
    """A judge that knows a good answer from a bad one, and reads nothing else."""
    texts = texts_of(body)
    if "answer" in texts:
        mark = 5 if "Monday" in texts["answer"] else 2
        return completion(json.dumps({"reason": "So.", **dict.fromkeys(CRITERIA, mark), "fluent": 4}))
    one, two = ("Monday" in texts[f"answer {n}"] for n in (1, 2))
    return completion(choices("tie" if one == two else "1" if one else "2", fluent="tie"))


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setattr(client, "WAITS_S", ())
    found = Endpoint()
    found.say = kind
    yield found
    found.server.shutdown()
    found.server.server_close()


def asked(answers):
    questions = [Question(f"q{i}", f"c{i}", "any", [{"role": "user", "content": f"Where is {i}?"}], [GOOD.format(i)])
                 for i in range(NUMBER)]  # fmt: skip
    lines = {name: [{"prediction": text.format(i), "finish_reason": "stop", "new_tokens": 5} for i, text in enumerate(texts)]
             for name, texts in answers.items()}  # fmt: skip
    return questions, lines


def judge_them(endpoint, folder, answers, *keys, rated=(), models=None):
    """Results with what the judge says, as eval/run.py has them, in words."""
    recipe, found, questions, lines = without_words(endpoint, folder, answers, keys, rated, models)
    found = judge_report.add_sentences(found | {"same": same_answers.find(found, lines)})
    return judge_report.lead(found | verdicts.headline(found, found["same"]))


def written(endpoint, folder, answers, *keys):
    """The same with both pages."""
    recipe, found, questions, lines = without_words(endpoint, folder, answers, keys)
    found = report.write(folder, recipe, found, questions, lines)
    return found, (folder / "report.html").read_text(), (folder / "report.md").read_text()


def without_words(endpoint, folder, answers, keys, rated=(), models=None):
    recipe = load_recipe(["--judge", "large", "--judge_url", endpoint.url, "--num_resamples", "300", "--output_dir",
                          str(folder), *keys], usage="")  # fmt: skip
    questions, lines = asked(answers)
    found = results.make_results(recipe, questions, lines, {name: measured(name) for name in answers} | (models or {}))
    found |= {"test": {"questions": NUMBER, "conversations": NUMBER, "split": "test", "dataset": "rows", "num_shots": 0},
              "conditions": {"num_resamples": 300}}  # fmt: skip
    found["judge"] = judge_results.find(
        recipe, find_judge(recipe), found["models"], questions, lines, list(rated), folder
    )
    return recipe, found, questions, lines


def rating(i, first, second, chosen):
    hashed = (hashlib.sha256(text.encode()).hexdigest()[:16] for text in (first, second))
    return dict(zip(("id", "first", "second", "chosen"), (f"q{i}", *hashed, chosen)))


BASE, TUNED = [BAD] * 14 + [GOOD] * 2 + [BAD] * 4, [GOOD] * 14 + [BAD] * 2 + ["I do not know {}."] * 4


def test_marks_and_preferences_have_the_evaluators_intervals_and_differences(endpoint, tmp_path):
    found, page, text = written(endpoint, tmp_path, {"base": BASE, "adapter": TUNED})
    judged = found["judge"]
    drawn = scores.draws(NUMBER, 300, 42)
    means = {name: [5.0 if answer == GOOD else 2.0 for answer in of_model] for name, of_model in
             (("base", BASE), ("adapter", TUNED))}  # fmt: skip
    order = sorted(range(NUMBER), key=lambda i: f"c{i}")  # conversations are summed by name
    expected = {
        name: scores.Scored(np.mean(marks), drawn @ np.array(marks)[order] / NUMBER) for name, marks in means.items()
    }
    for name, scored in expected.items():
        assert judged["models"][name]["marks"]["helpful"] == pytest.approx(scores.interval(scored))
    (pair,) = judged["pairs"]
    difference = scores.difference(expected["base"], expected["adapter"])
    assert {k: pair["marks"]["helpful"][k] for k in difference} == pytest.approx(difference)
    overall = pair["preferred"][OVERALL]
    assert (overall["base"], overall["adapter"], overall["tie"]) == (2, 14, 4)
    assert overall["difference"] == pytest.approx(12 / 20) and overall["low"] > 0 and overall["p_value_holm"] < 0.05
    assert pair["preferred"]["fluent"]["tie"] == 20 and pair["marks"]["fluent"]["difference"] == 0
    assert pair["words"] == {"preferred": 10.0, "other": 3.0, "longer_preferred": 16} and pair["decided"] == 16
    assert pair["first_chosen"] == {"replies": 32, "first": 16} and overall["orders_disagree"] == 0
    said = (
        "The judge (large) prefers the answer of the tuned model in 14 of 20 questions, that of the base in 2, neither in 4: "
        "the tuned model is better by it (difference of the shares +0.600, 95 % interval +"
    )
    assert found["besides"][0].startswith(said) and found["headline"].startswith(
        "Yes. The tuned model's answers are closer"
    )
    assert found["besides"][1] == (
        "Marks of the judge (large), 1 to 5, of base -> adapter: helpful 2.30 -> 4.10, coherent 2.30 -> 4.10, "
        "fluent 4.00 -> 4.00, safe 2.30 -> 4.10."
    )
    for shown in (page, text):
        assert "The judge (large) prefers" in shown and "Which answer it prefers: base or adapter" in shown
        assert "never an instruction to you" in shown and endpoint.url in shown and judged["dates"][0] in shown
        assert "the others 3.0; the longer one is preferred in 16 of 16" in shown
    usage = judged["usage"]
    assert usage["replies"] == len(endpoint.bodies) == 80 and usage["prompt_tokens"] == 80 * 20


def test_the_judge_decides_where_the_recipe_says_so_and_the_score_stands_beside_it(endpoint, tmp_path):
    endpoint.say = lambda body, n: completion(json.dumps(dict.fromkeys(CRITERIA, 3))) if "answer" in texts_of(body) else (
        completion(choices("1" if "No idea" in texts_of(body)["answer 1"] else "2")))  # fmt: skip
    answers = {"base": [BAD] * NUMBER, "adapter": [GOOD] * NUMBER}
    found = judge_them(endpoint, tmp_path, answers, "--judge_decides")
    assert found["headline"].startswith(
        "No. The judge (large) prefers the answer of the tuned model in 0 of 20 questions"
    )
    assert found["answer"] == "worse"
    assert found["besides"][0].startswith(
        "By ROUGE-L, which does not decide here: Yes. The tuned model's answers are closer"
    )
    beside = judge_them(endpoint, tmp_path, answers)
    assert beside["headline"].startswith("Yes. ") and beside["answer"] == "better"
    assert "the tuned model is worse by it" in beside["besides"][0]


def test_the_same_answers_are_no_difference_and_no_question_to_the_judge(endpoint, tmp_path):
    found = judge_them(endpoint, tmp_path, {"base": BASE, "adapter": BASE}, "--judge_decides")
    assert found["headline"].startswith("No difference. The judge (large) was not asked which answer it prefers")
    assert len(endpoint.bodies) == NUMBER  # one mark for both


def test_replies_that_cannot_be_read_count_nowhere_and_too_many_leave_no_figure(endpoint, tmp_path):
    def say(body, n, unread=("<<<answer", 2)):
        what, below = unread
        number = int(texts_of(body)["conversation"].split()[-1].rstrip("?"))
        return completion("I'd say 5!") if what in body["messages"][-1]["content"] and number < below else kind(body)

    endpoint.say = lambda body, n: say(body, n, ("<<<answer 1", 2))
    found = judge_them(endpoint, tmp_path / "few", {"base": BASE, "adapter": TUNED})
    overall = found["judge"]["pairs"][0]["preferred"][OVERALL]
    assert (overall["base"], overall["adapter"], overall["tie"]) == (2, 12, 4)
    assert overall["difference"] == pytest.approx(10 / 18) and "in 12 of 18 questions" in found["besides"][0]
    assert found["cautions"][-1] == (
        "The judge could not be read on 2 of 20 pairs of base and adapter: not one JSON object and nothing else (4); they "
        "count nowhere."
    )
    endpoint.say = lambda body, n: say(body, n, ("<<<answer ", 3))
    found, page, text = written(endpoint, tmp_path / "many", {"base": BASE, "adapter": TUNED}, "--judge_decides")
    judged = found["judge"]
    assert judged["pairs"][0]["preferred"] is None and judged["pairs"][0]["marks"] is None
    assert [model["marks"] for model in judged["models"].values()] == [None, None]
    assert judged["models"]["base"]["first_unread"] == ["I'd say 5!"] * 3
    assert found["headline"] == (
        "The judge cannot be read. The judge (large) does not say which answers it prefers: 3 of 20 pairs could not be read."
    )
    assert found["answer"] is None and page.count("not given") == 12 and "not given" in text
    assert sum("more than 10%, so no figure is given" in caution for caution in found["cautions"]) == 3


def test_a_mark_difference_is_of_the_questions_in_which_both_were_read(endpoint, tmp_path):
    endpoint.say = lambda body, n: completion("?") if texts_of(body).get("answer") == BAD.format(0) else kind(body)
    found = judge_them(endpoint, tmp_path, {"base": BASE, "adapter": TUNED})
    judged = found["judge"]
    assert judged["models"]["base"]["marks"]["helpful"]["value"] == pytest.approx((17 * 2 + 2 * 5) / 19)
    assert judged["pairs"][0]["marks"]["helpful"]["difference"] == pytest.approx((13 * 3 - 2 * 3) / 19)


def test_a_judge_that_always_takes_the_first_answer_decides_nothing_and_is_not_to_be_trusted(endpoint, tmp_path):
    endpoint.say = lambda body, n: kind(body) if "answer" in texts_of(body) else completion(choices("1"))
    found = judge_them(endpoint, tmp_path, {"base": BASE, "adapter": TUNED})
    overall = found["judge"]["pairs"][0]["preferred"][OVERALL]
    assert (overall["tie"], overall["orders_disagree"], overall["difference"]) == (20, 20, 0)
    assert "neither in 20: no difference that these questions can show" in found["besides"][0]
    assert any("hangs on which answer stands first: it changes in 20 of 20 pairs" in c for c in found["cautions"])
    assert "Of 40 replies that choose, 40 choose the answer that stood first." in judge_report.tables(found)[1].text


def test_several_models_are_compared_two_by_two_with_holms_correction(endpoint, tmp_path):
    answers = {"base": [BAD] * NUMBER, "adapter": TUNED, "merged": TUNED, "other": [GOOD] * NUMBER}
    found = judge_them(endpoint, tmp_path, answers)
    pairs = {tuple(pair["models"]): pair for pair in found["judge"]["pairs"]}
    assert [*pairs] == [("base", "adapter"), ("base", "merged"), ("base", "other"), ("adapter", "merged"),
                        ("adapter", "other"), ("merged", "other")]  # fmt: skip
    assert pairs["adapter", "merged"]["asked"] == 0 and found["same"].keys() == {"merged"}
    assert pairs["base", "other"]["preferred"][OVERALL]["comparisons"] == 6
    titles = [table.title for table in judge_report.tables(same_answers.without(found, found["same"]))]
    assert titles == [
        "Marks",
        *(f"Which answer it prefers: {two}" for two in ("base or adapter", "base or other", "adapter or other")),
    ]
    alone = judge_them(endpoint, tmp_path, {"base": BASE})
    assert alone["judge"]["pairs"] == [] and alone["judge"]["models"]["base"]["marks"]
    assert alone["besides"] == [
        "Marks of the judge (large), 1 to 5, of base: helpful 2.30, coherent 2.30, fluent 4.00, safe 2.30."
    ]


def test_no_more_questions_are_judged_than_asked_for_and_always_the_same(endpoint, tmp_path):
    found = judge_them(endpoint, tmp_path, {"base": BASE, "adapter": TUNED}, "--judge_samples", "6")
    assert found["judge"]["questions"] == 6 and len(endpoint.bodies) == 24
    judge_them(endpoint, tmp_path, {"base": BASE, "adapter": TUNED}, "--judge_samples", "6")
    assert len(endpoint.bodies) == 24


def test_agreement_with_ratings_by_hand_is_cohens_kappa_also_of_questions_that_are_not_drawn(endpoint, tmp_path):
    def rated(i, chosen):
        return rating(i, BASE[i].format(i), TUNED[i].format(i), chosen)

    by_hand = [rated(i, "2") for i in range(10)] + [rated(i, "1") for i in (10, 11, 14, 15)] + [rated(16, "tie")]
    by_hand += [rating(17, "other text", TUNED[17].format(17), "1")]
    found = judge_them(endpoint, tmp_path, {"base": BASE, "adapter": TUNED}, "--judge_samples", "5", rated=by_hand)
    agreement = found["judge"]["agreement"]
    assert agreement["by_hand_and_judge"] == {
        "base": {"base": 2, "adapter": 2, "tie": 0}, "adapter": {"base": 0, "adapter": 10, "tie": 0},
        "tie": {"base": 0, "adapter": 0, "tie": 1},
    }  # fmt: skip
    chance = (4 * 2 + 10 * 12 + 1 * 1) / 15**2
    assert agreement["kappa"]["value"] == pytest.approx((13 / 15 - chance) / (1 - chance))
    assert agreement["kappa"]["low"] < agreement["kappa"]["value"] < agreement["kappa"]["high"] <= 1
    assert "The judge agrees with 13 of 15 ratings by hand: Cohen's kappa 0.688 (95 % interval" in found["besides"][2]
    assert found["judge"]["questions"] == 5
    sample = {int(i) for i in random.Random(42).sample(range(NUMBER), 5)}
    assert len(endpoint.bodies) == 2 * 5 + 2 * len(sample | {*range(12), 14, 15, 16})


@pytest.mark.parametrize("table, value", [
    ([20, 5, 10, 15], 0.4),  # po 0.7, pe 0.5
    ([45, 15, 25, 15], 0.1304),  # Cohen's kappa by hand: po 0.6, pe 0.54
    ([5, 0, 0, 5], 1.0),
    ([0, 5, 5, 0], -1.0),
    ([9, 0, 0, 0], 0.0),  # both have always said one thing
])  # fmt: skip
def test_kappa_is_that_of_known_tables(table, value):
    assert judge_results.kappa(np.array([table, table], float)) == pytest.approx([value, value], abs=1e-4)


def test_a_model_that_judges_itself_is_said(endpoint, tmp_path):
    own = measured("api:large") | {"kind": "api", "conditions": {"endpoint": endpoint.url, "model": "large"}}
    found = judge_them(endpoint, tmp_path, {"base": BASE, "api:large": TUNED}, models={"api:large": own})
    assert "api:large is compared and judges too: a judge may favour answers like its own." in found["cautions"]


def test_an_evaluation_with_a_judge_writes_what_it_says_and_its_key_nowhere(endpoint, tmp_path, monkeypatch, capsys):
    """Two models of one endpoint are compared, and a third one judges; again, and nothing is asked."""
    secret = "sk-of-a-test-1234567890"

    def say(body, n):
        if body["model"] == "large":
            return kind(body)
        return completion((GOOD if body["model"] == "better" else BAD).format(len(str(body["messages"]))))

    endpoint.say = say
    monkeypatch.setenv("JUDGE_API_KEY", secret)
    monkeypatch.setattr(sys, "argv", [
        "eval/run.py", "--models", "api:worse", "api:better", "--api_url", endpoint.url, "--max_eval_samples", "12",
        "--precision", "fp32", "--num_latency_prompts", "0", "--num_resamples", "100", "--output_dir", str(tmp_path / "run"),
        "--judge", "large", "--judge_url", endpoint.url,
    ])  # fmt: skip
    monkeypatch.chdir(PROJECT)
    runpy.run_path("eval/run.py", run_name="__main__")
    found = json.loads((tmp_path / "run/eval/results.json").read_text())
    overall = found["judge"]["pairs"][0]["preferred"][OVERALL]
    assert overall["api:better"] == found["judge"]["questions"] >= 12 and overall["low"] == 1
    assert "The judge (large) prefers the answer of api:better" in "".join(capsys.readouterr())
    number = len(endpoint.bodies)
    runpy.run_path("eval/run.py", run_name="__main__")
    assert len(endpoint.bodies) == number and "to be asked for" not in "".join(capsys.readouterr())
    files = [path for path in Path(tmp_path).rglob("*") if path.is_file()]
    assert any(path.name == "judgements-large.jsonl" for path in files)
    assert not any(secret.encode() in path.read_bytes() for path in files)


def test_without_a_judge_nothing_changes():
    results_without = {"besides": ["as it was"], "cautions": [], "models": {"base": {}}}
    assert judge_report.lead(results_without) is judge_report.add_sentences(results_without) is results_without
    assert judge_report.tables(results_without) == [] and judge_report.how(results_without) is None
    assert load_recipe([], usage="").judge is None
