"""A threshold is chosen on some questions and reported on others; its curve is whole."""

import numpy as np
import pytest

from carelm.retrieval.refusals import at, by_folds, choose, curve, refused

ANSWERABLE = np.array([0.2, 0.5, 0.6, 0.7, 0.8, 0.8, 0.9, 0.9, 0.95, 1.0])
UNANSWERABLE = np.array([0.1, 0.1, 0.3, 0.3, 0.4, 0.5, 0.55, 0.6, 0.7, 0.9])


@pytest.mark.parametrize("share, threshold, below", [(0.1, 0.35, 1), (0.2, 0.55, 2), (0.05, 0.2, 0), (0.6, 0.85, 6)])
def test_no_more_answerable_questions_than_wanted_lie_below_the_threshold(share, threshold, below):
    assert choose(ANSWERABLE, share) == pytest.approx(threshold)
    assert (ANSWERABLE < choose(ANSWERABLE, share)).sum() == below


def test_equal_confidences_are_decided_together_and_not_against_the_wish():
    assert (np.full(10, 0.5) < choose(np.full(10, 0.5), 0.3)).sum() == 0


def test_the_curve_holds_for_each_cost_the_most_that_is_refused():
    points = curve(ANSWERABLE, UNANSWERABLE)
    assert points[0] == {"threshold": 0.2, "false_refusals": 0.0, "refused": 0.2}
    assert [p["false_refusals"] for p in points] == sorted({p["false_refusals"] for p in points})
    assert at(points, 0.1) == {"threshold": 0.5, "false_refusals": 0.1, "refused": 0.5}
    assert at(points[1:], 0.05) is None
    assert refused(ANSWERABLE < 0.55)["refused"] == 2


def test_what_the_model_refuses_is_refused_at_every_threshold():
    answerable, unanswerable = np.where(np.arange(10) < 3, 0, ANSWERABLE), np.where(np.arange(10) < 6, 0, UNANSWERABLE)
    points = curve(answerable, unanswerable)
    assert (points[0]["false_refusals"], points[0]["refused"]) == (0.3, pytest.approx(0.8))
    assert (answerable < choose(answerable, 0.1)).sum() == 3
    told = by_folds(answerable, unanswerable, 0.1, seed=0)
    assert (told["answerable"]["refused"], told["unanswerable"]["refused"]) == (3, 6)


def test_each_tenth_of_the_questions_is_decided_by_what_the_others_have_chosen():
    order = np.linspace(0, 1, 400)
    found = by_folds(order, order - 0.5, 0.1, seed=0)
    assert len(found["thresholds"]) == 10 and len(set(found["thresholds"])) > 1
    assert 0.07 < found["answerable"]["value"] < 0.13 and 0.55 < found["unanswerable"]["value"] < 0.65
    assert found["answerable"]["questions"] == found["unanswerable"]["questions"] == 400
    # the lowest lies below the threshold of all others though none of them may: it has not chosen its own
    assert by_folds(order, order, 0.0, seed=0)["answerable"]["refused"] >= 1
