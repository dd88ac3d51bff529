"""`checks` of a recipe and what answers are like without a reference: shares with intervals, and bad patterns in one line."""

import json
import re

import numpy as np
import pytest

from carelm import answer_checks
from carelm.errors import UserError
from carelm.evaluation import check_scores, repetition, report, results
from carelm.evaluation.questions import Question
from carelm.recipe_file import load_recipe

ORDER = {"name": "its order number", "when": r"(?i)order (?P<order>\w+)", "pattern": r"\b(?P=order)\b"}
PRICE = {"name": "no price", "pattern": r"\d+ ?(?:€|EUR)", "must": False}
EMERGENCY = {"name": "112", "when": "chest pain|faint", "pattern": 112}


def recipe_with(*checks, **keys):
    words = [word for key, value in keys.items() for word in (f"--{key}", str(value))]
    return load_recipe(["--num_resamples", "200", "--checks", json.dumps(checks), *words], usage="")


def asked(*texts):
    return [Question(f"q{i}", f"c{i}", "any", [{"role": "user", "content": text}], ["Order A-1, 112."]) for i, text in
            enumerate(texts)]  # fmt: skip


def lines(*texts):
    return [{"prediction": text, "finish_reason": "stop", "new_tokens": 1 + len(text.split())} for text in texts]


def share(recipe, questions, **models):
    found, cautions = check_scores.score(check_scores.ask(recipe, questions), questions, models, 200, 0)
    return found, cautions


def test_a_named_group_of_the_question_is_what_the_answer_must_hold():
    questions = asked("Where is order A7?", "Cancel ORDER b.8", "order A7+", "Hello")
    found, _ = share(recipe_with(ORDER), questions, base=lines("A7 is sent", "b", "A77", "x"), tuned=lines(*"????"))
    check = found["its order number"]
    assert check["questions"] == 3 and check["models"]["base"]["value"] == pytest.approx(2 / 3)
    assert check["models"]["base"]["failed"] == ["q2"] and check["models"]["tuned"]["value"] == 0
    (pair,) = check["pairs"]
    assert pair["models"] == ["base", "tuned"] and pair["difference"] == pytest.approx(-2 / 3)
    assert pair["low"] <= pair["difference"] <= pair["high"] and 0 < pair["p_value_holm"] <= 1


def test_what_the_question_says_is_text_and_no_pattern():
    check = {"name": "code", "when": r"code (?P<code>\S+)", "pattern": "(?P=code)$"}
    found, _ = share(recipe_with(check), asked("code a.c", "code (["), base=lines("abc", "it is (["))
    assert found["code"]["models"]["base"]["failed"] == ["q0"]


def test_a_check_is_not_about_questions_whose_group_took_no_part():
    check = {"name": "name", "when": r"order \d+(?: for (?P<who>\w+))?", "pattern": "(?P=who)"}
    found, _ = share(recipe_with(check), asked("order 1", "order 2 for Bo"), base=lines("", "Bo"))
    assert found["name"]["questions"] == 1 and found["name"]["models"]["base"]["value"] == 1


def test_must_not_and_must_false_say_the_same():
    questions, said = asked("How much?", "And now?"), lines("5 EUR", "I cannot say")
    for words in ({"must": False}, {"must_not": True}):
        found, _ = share(recipe_with({"name": "no price", "pattern": r"\d+ ?EUR"} | words), questions, base=said)
        assert found["no price"]["models"]["base"]["failed"] == ["q0"]


def test_the_interval_of_a_share_is_of_the_conversations_that_a_check_is_about_and_wide_where_they_are_few():
    """Resamples of two that passed would be all alike, and the interval nothing."""
    questions = asked(*["Hello"] * 50, "chest pain", "I faint")
    found, _ = share(recipe_with(EMERGENCY), questions, base=lines(*["x"] * 50, "Call 112", "Sleep"))
    model = found["112"]["models"]["base"]
    assert [model[end] for end in ("low", "value", "high")] == pytest.approx([0.0945, 0.5, 0.9055], abs=1e-4)
    assert found["112"]["conversations"] == 2


def test_composed_and_decomposed_letters_are_the_same_to_a_pattern():
    for composed, decomposed in (("Grüße", "Gru\u0308ße"), ("Gru\u0308ße", "Grüße")):
        check = {"name": "greets", "pattern": composed}
        found, _ = share(recipe_with(check), asked("Hallo"), base=lines(decomposed))
        assert found["greets"]["models"]["base"]["value"] == 1


@pytest.mark.parametrize("check, problem", [
    ({"name": "a", "pattern": "("}, r"checks: 'a': pattern: '\(' is no regular expression \(missing \)"),
    ({"name": "a", "pattern": "x", "when": "[a"}, r"checks: 'a': when: '\[a' is no regular expression"),
    ({"name": "a", "pattern": "(?P=order)"}, r"\(\?P=order\) refers to no group; name it in `when`"),
    ({"name": "a", "pattern": "(?P=order)", "when": r"(?P<number>\d)"}, r"\(\?P=order\) refers to no group"),
    ({"name": "a", "pattern": "(" * 4000 + ")" * 4000}, "is no regular expression"),
    ({"name": "a", "patern": "x"}, "unknown key 'patern'; did you mean 'pattern'"),
    ({"name": "a"}, "number 1 has no pattern"),
    ({"pattern": "a"}, "number 1 has no name"),
    ({"name": "a", "pattern": ["a"]}, "number 1: pattern: .* is no text"),
    ({"name": "a", "pattern": "x", "must": "y"}, "must: 'y' is neither true nor false"),
    ({"name": "a", "pattern": "x", "must": True, "must_not": True}, "set only one of them"),
    ("order", "number 1 is 'order'; write name and pattern"),
], ids=range(12))  # fmt: skip
def test_a_check_that_is_none_is_one_line_before_anything_is_read(check, problem):
    with pytest.raises(UserError, match=problem) as caught:
        recipe_with(check)
    assert "\n" not in str(caught.value)


def test_two_checks_of_one_name_are_refused():
    with pytest.raises(UserError, match="checks: 'no price' stands there twice"):
        recipe_with(PRICE, PRICE | {"name": " no  price"})


def test_a_check_that_is_about_no_question_is_refused_with_their_number():
    with pytest.raises(UserError, match=r"checks: '112': `when` matches 0 of the 2 test questions"):
        check_scores.ask(recipe_with(EMERGENCY), asked("Hello", "Where is my parcel?"))


def test_how_many_questions_a_check_is_about_is_said_with_what_the_references_do(capsys):
    check_scores.ask(recipe_with(PRICE, EMERGENCY), asked("Hello", "chest pain"))
    said = capsys.readouterr().err
    assert "'no price': about 2 of 2 questions, 100% of their references pass" in said
    assert "'112': about 1 of 2 questions" in said


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(answer_checks, "SECONDS_PER_TEXT", 0.05)


def test_a_pattern_that_takes_too_long_on_the_question_is_refused_with_its_row(impatient):
    check = {"name": "slow", "when": "(a|aa)+$", "pattern": "x"}
    with pytest.raises(UserError, match="checks: 'slow': its pattern takes too long on test row q1"):
        check_scores.ask(recipe_with(check), asked("a", "a" * 60 + "b"))


def test_a_pattern_that_takes_too_long_on_an_answer_loses_that_check_alone(impatient):
    recipe = recipe_with({"name": "slow", "pattern": "(a|aa)+$"}, PRICE)
    found, (caution,) = share(recipe, asked("Hello", "Hi"), base=lines("b", "a" * 60 + "b"))
    assert [*found] == ["no price"]
    assert "'slow' is left out: its pattern takes too long on the answer of base to q1" in caution


def test_runs_of_four_words_that_come_again_are_counted_within_one_answer():
    turns = repetition.per_turn(["a b c d a b c d", "A b C d", "a b", "我要退款我要退款"], [9, 5, 3, 9])
    assert turns["repeated_4grams"].table.tolist() == [[1, 5], [0, 1], [0, 0], [1, 5]]
    assert turns["answer_words"].table[:, 0].tolist() == [8, 4, 2, 8]
    table = turns["repeated_4grams"]
    assert float(table.score(table.table.sum(0))) == pytest.approx(2 / 11)
    assert float(table.score(np.zeros(2))) == 0  # nobody said four words


def test_the_report_shows_checks_repetition_and_length_with_intervals_and_differences(tmp_path):
    recipe = recipe_with(ORDER, EMERGENCY, output_dir=tmp_path)
    questions = asked(*[f"Where is order A{i}?" for i in range(12)], "chest pain")
    said = {"base": lines(*["It is here. " * 5] * 13), "tuned": lines(*[f"A{i} is here." for i in range(12)], "112")}
    times = {"p50": 9.0, "p95": 11.0, "p99": 12.0}
    measured = {
        "kind": "base", "folder": "", "precision": "fp32", "bits": None, "load_seconds": 1.0,
        "total_parameters": 10, "throughput": {}, "trained_parameters": None, "unused_generation_config": {},
        "peak_memory_bytes": 2**30, "conditions": {},
        "prompt_tokens": {"p50": 7, "p95": 8, "max": 9},
        "latency": {"prompts": 12, "ttft_ms": times, "tpot_ms": times, "e2e_ms": times},
    }  # fmt: skip
    found = results.make_results(
        recipe, questions, said, dict.fromkeys(said, measured), check_scores.ask(recipe, questions)
    )
    found |= {"test": {"questions": 13, "conversations": 13, "split": "test", "dataset": "rows"},
              "conditions": {"num_resamples": 200}}  # fmt: skip
    report.write(tmp_path, recipe, found, questions, said)
    kept = json.loads((tmp_path / "results.json").read_text())
    tuned = kept["checks"]["its order number"]["models"]["tuned"]
    assert (tuned["value"], tuned["high"]) == (1, 1) and 0.7 < tuned["low"] < 0.8
    assert kept["models"]["base"]["repeated_4grams"]["value"] == pytest.approx(9 / 12)
    assert kept["pairs"][0]["scores"]["answer_words"]["difference"] < -10
    shown = (tmp_path / "report.md").read_text()
    assert (
        "| its order number | 12 | 0.000 | 0.000 (0.000 to 0.242) | 1.000 (0.758 to 1.000) | +1.000 (+1.000 to" in shown
    )
    assert "| 112 | 1 | 1.000 | 0.000 (too few for an interval) | 1.000 (too few for an interval) | +1.000 |" in shown
    assert "| repeated 4-grams | 0.750 (0.750 to 0.750) | 0.000 (0.000 to 0.000) |" in shown
    page = (tmp_path / "report.html").read_text()
    assert re.search("<td[^>]*>its order number</td><td[^>]*>12</td>", page) and ">answer length, tokens</td>" in page
