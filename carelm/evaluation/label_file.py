"""The file of one model's label scores, beside its answers. Imports no torch."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from carelm.data.label_form import Form
from carelm.evaluation.predictions import PredictionFile
from carelm.files import fingerprint


def open_file(answers: PredictionFile, form: Form, said: dict[str, str]) -> PredictionFile:
    """The file of label scores, {"id", "reason", "log_probabilities", "made_by"} a line.

    Args:
        said: the free answers by id, where a reason is asked for.
    """
    made_by = {
        question: fingerprint(made_by, form.labels, form.between, form.behind, said.get(question))
        for question, made_by in answers.made_by.items()
    }
    return PredictionFile(answers.path.with_name(answers.path.name.replace("predictions", "labels", 1)), made_by)


def said(answers: PredictionFile, form: Form) -> dict[str, str]:
    """The free answers that are there, by id; none where no reason is asked for."""
    return {i: line["prediction"] for i, line in answers.read().items()} if form.has_reason else {}


def log_probabilities(lines: Iterable[dict[str, Any]], form: Form) -> np.ndarray:
    """Those of the labels, in the form's order, float64 [lines, labels]."""
    return np.array([[line["log_probabilities"][label] for label in form.labels] for line in lines])
