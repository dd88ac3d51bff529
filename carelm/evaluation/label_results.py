"""Label scores -> what `results.json` says of labels: chosen from the list, how sure, what they decide, and the baselines."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from carelm.data.label_form import Form
from carelm.data.labels import parse_label
from carelm.evaluation import calibration, overlap, scores
from carelm.evaluation.predicted import GOLD
from carelm.evaluation.questions import Question
from carelm.evaluation.scores import CONSTRAINED, Scored, Statistics
from carelm.recipe import Recipe

PRECISION = 0.95  # at which a help desk lets labels decide
CERTAINTY = ("calibration", "precision_recall", "decided")  # what `certainty` finds
FEWEST_VALIDATION = 50  # questions, below which a temperature or threshold says little


@dataclass(frozen=True)
class Labelled:
    """What is known of labels beside the free answers.

    Attributes:
        form: how answers hold their labels; None where labels are read from free answers alone.
        validation: the validation split's questions.
        log_probabilities: for each model and split ("test", "validation") those of the labels, [questions, labels].
        known: for each model what an earlier evaluation has found by `certainty`; the others' is found here.
    """

    form: Form | None = None
    validation: list[Question] = field(default_factory=list)
    log_probabilities: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    known: dict[str, dict[str, Any]] = field(default_factory=dict)


def constrained_scores(
    recipe: Recipe, questions: list[Question], labelled: Labelled, model: str
) -> dict[str, Statistics]:
    """Accuracy and macro F1 of the likeliest labels, with a row for each question; none where the model's are not scored."""
    if model not in labelled.log_probabilities:
        return {}
    likeliest = labelled.log_probabilities[model]["test"].argmax(1)
    given = [recipe.labels[k] for k in likeliest]
    return scores.label_scores(given, [recipe.labels[k] for k in _true(recipe, questions)], recipe.labels, CONSTRAINED)


def certainty(
    recipe: Recipe, questions: list[Question], labelled: Labelled, model: str, drawn: np.ndarray
) -> dict[str, Any]:
    """How far one model's probabilities can be trusted: `calibration`, for two labels `precision_recall`, and `decided`, the
    share of the test questions that is left to the model at a precision of 0.95.

    The temperature and the threshold are chosen on the validation questions, and all else is of the test questions. What is
    decided is, of two labels, every question that gets the first one with a probability from the threshold on; of more labels,
    every question whose likeliest label has one.

    Args:
        drawn: how often each conversation is in each resample, [resamples, conversations].
    """
    if model in labelled.known:
        return labelled.known[model]
    found = labelled.log_probabilities[model]
    true, probability = _true(recipe, questions), calibration.probabilities(found["test"])
    about: dict[str, Any] = {"calibration": {"before": _reliability(probability, true)}}
    conversations = [q.conversation for q in questions]
    names = {name: k for k, name in enumerate(sorted(set(conversations)))}
    if labelled.validation:
        of_validation = _true(recipe, labelled.validation)
        temperature = calibration.fit_temperature(found["validation"], of_validation)
        probability = calibration.probabilities(found["test"], temperature)
        about["calibration"] |= {
            "temperature": temperature,
            "validation_questions": len(of_validation),
            "after": _reliability(probability, true),
        }
        decidable = (_decidable(found[split], temperature, of_split)
                     for split, of_split in (("validation", of_validation), ("test", true)))  # fmt: skip
        about["decided"] = _decided(*decidable, conversations)
    if len(recipe.labels) == 2:
        owner = np.array([names[name] for name in conversations])
        odds = calibration.log_odds(found["test"], np.zeros_like(true))
        average, precision, resampled = calibration.precision_recall(odds, true == 0, owner, drawn)
        low, high = np.percentile(resampled, (2.5, 97.5), axis=0)
        about["precision_recall"] = {
            "positive": recipe.labels[0],
            "average_precision": scores.interval(average),
            "curve": [
                dict(zip(("recall", "precision", "low", "high"), map(float, point)))
                for point in zip(calibration.RECALLS, precision, low, high)
            ],
        }
    return about


def baselines(
    recipe: Recipe, questions: list[Question], labelled: Labelled, drawn: np.ndarray
) -> tuple[dict[str, dict[str, Scored]], dict[str, Any]]:
    """The scores of the word overlap of `overlap_columns`, on the same resamples as the models', and what to know of it; none
    where the recipe names no such columns or there are no validation rows."""
    if not recipe.overlap_columns or not labelled.validation:
        return {}, {}
    scored, about = {}, {}
    for name in overlap.MEASURES:
        threshold = overlap.choose_threshold(
            overlap.overlaps(labelled.validation, name), _true(recipe, labelled.validation) == 0
        )
        given = [recipe.labels[int(value < threshold)] for value in overlap.overlaps(questions, name)]
        true = [recipe.labels[k] for k in _true(recipe, questions)]
        # it has one answer to each question, with which the models' free and constrained ones are both compared
        turns = {
            k: v
            for prefix in ("", CONSTRAINED)
            for k, v in scores.label_scores(given, true, recipe.labels, prefix).items()
        }
        scored[name] = scores.resample(scores.by_conversation(turns, [q.conversation for q in questions]), drawn)
        about[name] = {"threshold": threshold, "validation_questions": len(labelled.validation),
                       **{score: scores.interval(scored[name][score]) for score in ("accuracy", "macro_f1")},
                       "confusion": scores.confusion(turns, recipe.labels), "differences": {}}  # fmt: skip
    return scored, about


def validation_cautions(recipe: Recipe, labelled: Labelled) -> list[str]:
    """What is wrong with the validation questions that temperatures and thresholds are chosen on."""
    found, number = [], len(labelled.validation)
    if (labelled.form or recipe.overlap_columns) and number < FEWEST_VALIDATION:
        instead = (
            "labels are neither calibrated nor thresholds chosen"
            if not number
            else "thresholds and temperatures say little"
        )
        found.append(
            f"{number or 'No'} validation questions: {instead}; set validation_fraction or max_eval_samples higher."
        )
    others = [column for column, place in recipe.predicted_columns.items() if place != GOLD]
    if labelled.form and number and others:
        found.append(
            f"The validation questions have the data's own {', '.join(others)}, the test questions have predictions: the "
            "temperatures and the thresholds of the labels were chosen on other questions than they are used on."
        )
    return found


def cautions(labelled: Labelled, models: dict[str, Any]) -> list[str]:
    """What the figures of certainty do not say by themselves."""
    found, number = [], len(labelled.validation)
    for name, model in models.items():
        temperature, decided = model.get("calibration", {}).get("temperature"), model.get("decided", {})
        if temperature and abs(np.log(temperature)) > np.log(calibration.WIDEST_TEMPERATURE) - 1e-3:
            how = "all or nearly all are right" if temperature < 1 else "labels are no better than a guess"
            of = model["calibration"].get("validation_questions", number)  # of runs that are compared, each one's own
            found.append(
                f"{name}: how sure it is of a label says nothing here, as on the {of} validation questions {how} (the "
                f"temperature ends at the bound of its search, {temperature:.3g})."
            )
        if decided.get("threshold", 0) is None:
            found.append(
                f"{name} should decide no question alone: however sure it is, it is not {PRECISION:.0%} right on the "
                "validation questions."
            )
        elif decided.get("precision", {}).get("high", 1) < PRECISION:
            found.append(
                f"Do not let {name} decide such questions alone: where it is sure, it is right in "
                f"{decided['precision']['value']:.0%} of them, and in {PRECISION:.0%} of the validation questions, which are "
                "unlike these. Validation rows like them give a threshold that holds (see How sure the labels are)."
            )
    return found


def _true(recipe: Recipe, questions: list[Question]) -> np.ndarray:
    return np.array([recipe.labels.index(parse_label(q.references[0], recipe.labels)) for q in questions])


def _reliability(probability: np.ndarray, true: np.ndarray) -> dict[str, Any]:
    bins = calibration.reliability(probability.max(1), probability.argmax(1) == true)
    return {
        "expected_calibration_error": calibration.expected_calibration_error(bins),
        "negative_log_likelihood": calibration.negative_log_likelihood(probability, true),
        "bins": bins,
    }


def _decidable(log_probabilities: np.ndarray, temperature: float, true: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The log-odds by which a question is decided, and whether it would be rightly."""
    two = log_probabilities.shape[1] == 2
    label = np.zeros_like(true) if two else log_probabilities.argmax(1)
    return calibration.log_odds(log_probabilities, label, temperature), label == true


def _decided(
    validation: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    conversations: list[str],
) -> dict[str, Any]:
    threshold = calibration.threshold_for(PRECISION, *validation)
    odds, right = test
    decided = odds >= (np.inf if threshold is None else threshold)
    share = scores.wilson_interval(float(decided.mean()), len({*conversations}))
    figures = {"share": share, "questions": int(decided.sum())}
    if decided.any():
        number = len({conversations[k] for k in np.flatnonzero(decided)})
        figures["precision"] = scores.wilson_interval(float(right[decided].mean()), number)
    probability = None if threshold is None else float(np.exp(-np.logaddexp(0, -threshold)))
    return {"at_precision": PRECISION, "threshold": probability, **figures}
