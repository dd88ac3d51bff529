"""A model of a comparison with what it is asked."""

from dataclasses import dataclass
from typing import Any

from carelm.chat.chat import Chat
from carelm.data.label_form import Form
from carelm.evaluation.candidates import Candidate
from carelm.evaluation.predictions import PredictionFile
from carelm.evaluation.questions import Question
from carelm.models.decoding import Decoding


@dataclass(frozen=True)
class Prepared:
    """A model and what it is asked, rendered by its own tokenizer.

    Attributes:
        prompts: token ids of each question.
        lengths: p50, p95 and max of them, and how many did not fit.
        file: where its answers are kept.
        form: how its answers hold their labels, where these are scored.
        validation: the same for the validation split's questions, where there are such and labels are scored.
    """

    candidate: Candidate
    chat: Chat
    decoding: Decoding
    questions: list[Question]
    prompts: list[list[int]]
    lengths: dict[str, Any]
    file: PredictionFile
    form: Form | None = None
    validation: "Prepared | None" = None
