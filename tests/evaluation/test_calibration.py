"""Temperatures, calibration errors, precision and recall, thresholds and word overlap against figures made by hand."""

import numpy as np
import pytest

from carelm.data.label_form import Form
from carelm.evaluation import calibration, label_results, overlap, scores
from carelm.evaluation.questions import Question
from carelm.recipe_file import load_recipe


def test_the_temperature_that_made_the_labels_is_found():
    random = np.random.default_rng(0)
    real = random.normal(size=(20000, 3)) * 2
    true = np.array([random.choice(3, p=p) for p in calibration.probabilities(real)])
    for factor in (0.4, 1.0, 5.0):
        found = calibration.fit_temperature(real * factor, true)
        assert found == pytest.approx(factor, rel=0.05)
        after = calibration.negative_log_likelihood(calibration.probabilities(real * factor, found), true)
        for other in (found * 0.9, found * 1.1):
            assert after < calibration.negative_log_likelihood(calibration.probabilities(real * factor, other), true)


def test_labels_that_are_always_right_and_always_wrong_have_a_temperature_at_the_end_of_its_range():
    sure = np.array([[0.0, -3.0], [-2.0, 0.0]])
    assert calibration.fit_temperature(sure, np.array([0, 1])) == pytest.approx(1 / 100)
    assert calibration.fit_temperature(sure, np.array([1, 0])) == pytest.approx(100)


def test_the_calibration_error_is_the_mean_distance_over_bins_of_equal_counts():
    confidence = np.concatenate([np.linspace(0.5, 0.6, 30), np.linspace(0.8, 0.9, 30)])
    right = np.array([True] * 15 + [False] * 15 + [True] * 30)
    random = np.random.default_rng(1).permutation(60)
    bins = calibration.reliability(confidence[random], right[random])
    assert len(bins) == 15 and {b["questions"] for b in bins} == {4}
    by_hand = [abs(b["accuracy"] - b["confidence"]) for b in bins]
    assert calibration.expected_calibration_error(bins) == pytest.approx(np.mean(by_hand))
    assert len(calibration.reliability(confidence[:3], right[:3])) == 3


def test_equal_confidences_are_in_one_bin_whatever_the_order_of_the_questions():
    """The test file may have all of one label first: a model that always says 0.6 and is right in 6 of 10 is calibrated."""
    right = np.array([True] * 60 + [False] * 40)
    [one] = calibration.reliability(np.full(100, 0.6), right)
    assert one == {"confidence": pytest.approx(0.6), "accuracy": 0.6, "questions": 100}
    assert calibration.expected_calibration_error([one]) == pytest.approx(0)


def test_a_temperature_that_makes_all_probabilities_one_does_not_hide_which_labels_are_surer():
    """All validation rows are right, so that the temperature is 0.01; of the test rows the surer ones are."""
    recipe = load_recipe(["--labels", "yes", "no"], usage="")
    asked = [Question(f"q{i}", f"c{i}", "none", [], [recipe.labels[i % 2]]) for i in range(100)]
    margin, is_yes = np.linspace(1, 5, 100), np.arange(100) % 2 == 0
    known = {"validation": np.where(is_yes, margin, -margin), "test": np.where(is_yes | (margin < 3), margin, -margin)}
    known = {split: np.stack([odds / 2, -odds / 2], 1) for split, odds in known.items()}
    labelled = label_results.Labelled(None, asked, {"model": known})
    found = label_results.certainty(recipe, asked, labelled, "model", scores.draws(100, 100, 0))
    assert found["calibration"]["temperature"] == pytest.approx(0.01)
    curve = {round(point["recall"], 2): point["precision"] for point in found["precision_recall"]["curve"]}
    assert curve[0.5] == 1 and curve[1] == pytest.approx(50 / 75)


def certain(validation, test, *keys):
    """What `certainty` finds for labels yes and no of these log-odds, each true where it is said, and its cautions."""
    recipe = load_recipe(["--labels", "yes", "no", *keys], usage="")
    questions, known = [], {}
    for split, rows in (("validation", validation), ("test", test)):
        odds = np.array([value for value, _ in rows], float)
        known[split] = np.stack([odds / 2, -odds / 2], 1)
        questions.append(
            [Question(f"q{i}", f"c{i}", "none", [], ["yes" if y else "no"]) for i, (_, y) in enumerate(rows)]
        )
    labelled = label_results.Labelled(Form(("yes", "no"), False, "", ""), questions[0], {"model": known})
    found = label_results.certainty(recipe, questions[1], labelled, "model", scores.draws(len(test), 1000, 0))
    said = label_results.validation_cautions(recipe, labelled) + label_results.cautions(labelled, {"model": found})
    return found, " ".join(said)


SURE = [(4, True)] * 40 + [(1, False)] * 30 + [(1, True)] * 30  # decides from 4 on


def test_of_few_decided_questions_the_share_that_is_right_has_a_wide_interval():
    """Of resamples a fifth or so would hold none of them, and the others all say 1."""
    found, cautions = certain(SURE, [(4, True)] * 2 + [(1, False)] * 98)
    assert (found["decided"]["questions"], found["decided"]["share"]["value"]) == (2, 0.02)
    assert found["decided"]["precision"] == {"value": 1.0, "low": pytest.approx(0.342, abs=1e-3), "high": 1.0}
    assert found["decided"]["share"]["low"] == pytest.approx(0.0055, abs=1e-4)
    nothing, _ = certain(SURE, [(1, False)] * 100)  # of which no resample holds one either
    assert nothing["decided"]["share"] == {"value": 0.0, "low": 0.0, "high": pytest.approx(0.037, abs=1e-3)}
    found, more = certain(SURE, [(4, True)] * 70 + [(4, False)] * 30)
    assert found["decided"]["precision"]["low"] == pytest.approx(0.604, abs=1e-3)
    assert found["decided"]["precision"]["high"] == pytest.approx(0.781, abs=1e-3)
    assert (
        "Do not let model decide such questions alone: where it is sure, it is right in 70% of them" in more
        and "unlike these" in more
        and "where it is sure" not in cautions
    )


def test_resamples_without_a_positive_question_do_not_count_as_a_precision_of_none():
    found, _ = certain(SURE, [(4, True)] + [(1, False)] * 99)
    assert found["precision_recall"]["average_precision"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert all(point["low"] == 1 for point in found["precision_recall"]["curve"])
    found, _ = certain(SURE, [(1, False)] * 100)
    assert found["precision_recall"]["average_precision"]["value"] == 0


def test_a_temperature_at_the_bound_of_its_search_is_said():
    test = [(1, True), (1, False)] * 30
    for validation, line in (
        (
            [(3, True), (-3, False)] * 30,
            "nearly all are right (the temperature ends at the bound of its search, 0.01)",
        ),
        (
            [(3, False), (-3, True)] * 30,
            "labels are no better than a guess (the temperature ends at the bound of its search, 100)",
        ),
    ):
        assert line in certain(validation, test)[1]
    assert "bound" not in certain(SURE, test)[1]


def test_validation_questions_with_other_columns_than_the_test_have_a_caution():
    test, column = [(1, True), (1, False)] * 30, ["--prompt_template", "{q} {intent}", "--completion_template", "{a}",
                                                             "--predicted_columns"]  # fmt: skip
    assert "the data's own intent, the test" in certain(SURE, test, *column, "{intent: outputs/intents}")[1]
    assert "the data's own" not in certain(SURE, test, *column, "{intent: gold}")[1]


def test_average_precision_and_the_curve_are_those_of_a_count_by_hand_and_ties_are_decided_together():
    score, positive = np.array([0.9, 0.8, 0.8, 0.3]), np.array([True, False, True, False])
    owner, drawn = np.arange(4), np.array([[1, 1, 1, 1], [2, 0, 1, 1], [0, 2, 0, 2]], np.uint8)
    average, precision, resampled = calibration.precision_recall(score, positive, owner, drawn)
    assert average.value == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)
    assert precision[0] == 1 and precision[9] == 1 and precision[10] == precision[19] == pytest.approx(2 / 3)
    assert average.resampled == pytest.approx([average.value, 1.0]) and resampled.shape == (2, 20)


def test_the_threshold_is_the_lowest_from_which_on_enough_is_right():
    score = np.array([0.99, 0.9, 0.8, 0.8, 0.2])
    assert calibration.threshold_for(0.75, score, np.array([True, False, True, True, False])) == 0.8
    assert calibration.threshold_for(0.95, score, np.array([True, True, True, False, False])) == 0.9
    assert calibration.threshold_for(0.95, score, np.array([False, True, True, True, True])) is None


def asked(*pairs):
    return [Question(str(i), str(i), "none", [], ["yes"], compared=pair) for i, pair in enumerate(pairs)]


def test_words_overlap_whatever_their_case_and_in_scripts_without_spaces():
    both, shorter = overlap.MEASURES
    questions = asked(("Where is my order?", "My ORDER, where"), ("退款", "我要退款"), ("", "a"), ("lamp", "kettle"))
    assert overlap.overlaps(questions, both).tolist() == [3 / 4, 2 / 4, 0, 0]
    assert overlap.overlaps(questions, shorter).tolist() == [1, 1, 0, 0]


def test_the_threshold_of_overlap_is_the_best_of_all_that_there_are():
    random = np.random.default_rng(2)
    for _ in range(20):
        found = random.integers(0, 8, 40) / 8
        positive = random.random(40) < found
        threshold = overlap.choose_threshold(found, positive)

        def macro_f1(at, found=found, positive=positive):
            given = ["yes" if value >= at else "no" for value in found]
            table = scores.label_scores(given, ["yes" if p else "no" for p in positive], ["yes", "no"])["macro_f1"]
            return float(table.score(table.table.sum(0)))

        assert macro_f1(threshold) == pytest.approx(max(macro_f1(at) for at in np.unique(found)))
        assert threshold not in found or threshold == found.min()


def test_a_temperature_at_its_bound_is_said_with_the_validation_questions_of_the_run_that_fitted_it():
    model = {"calibration": {"temperature": 100.0, "validation_questions": 60}}
    (caution,) = label_results.cautions(label_results.Labelled(), {"r16": model})
    assert "r16: how sure it is of a label says nothing here" in caution and "on the 60 validation questions" in caution
