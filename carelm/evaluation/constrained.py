"""Labels that are chosen, not read: every label of the recipe, end of turn included, is scored behind the prompt, or behind
the reason that the model wrote where the completion template has one before the label."""

import sys
from typing import TYPE_CHECKING

import numpy as np
import torch

from carelm import ranks
from carelm.chat.chat import Chat
from carelm.data.label_form import Form
from carelm.errors import UserError
from carelm.evaluation.asked import Prepared
from carelm.evaluation.label_file import log_probabilities, open_file, said
from carelm.evaluation.questions import Question
from carelm.models.key_values import causal_model
from carelm.models.likelihood import score_answers
from carelm.recipe import Recipe
from carelm.training.stops import HangWatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def missing(part: Prepared, form: Form) -> bool:
    """Whether label scores are not there, or not those of the answers that are."""
    file = open_file(part.file, form, said(part.file, form))
    return len(file.read()) < len(file.made_by)


def score_labels(
    recipe: Recipe, part: Prepared, form: Form, model: "PreTrainedModel", device: torch.device, watch: HangWatch
) -> dict[str, float]:
    """This rank scores the labels of every so-manieth question that is left; the free answers are there. Returns how many
    `examples` were left, and the `seconds` of the slowest rank."""
    answers = ranks.share(said(part.file, form) if ranks.rank() == 0 else None)
    file = open_file(part.file, form, answers)
    done = ranks.share(file.open() if ranks.rank() == 0 else None)
    left = sorted((i for i, q in enumerate(part.questions) if q.id not in done), key=lambda i: -len(part.prompts[i]))
    share = left[ranks.rank() :: ranks.world_size()]
    positions = getattr(causal_model(model).config.get_text_config(), "max_position_embeddings", None) or 2**31
    asked = []
    for i in share:
        room = positions - recipe.virtual_tokens - len(part.prompts[i])
        reason = form.reason(answers.get(part.questions[i].id, ""))
        asked.append((i, *answers_with(part.chat, form, part.questions[i], reason, room)))

    def keep(k: int, log_probabilities: list[float]) -> None:
        watch.look()
        i, reason, _ = asked[k]
        question = part.questions[i].id
        file.append({"id": question, "reason": reason, "log_probabilities": dict(zip(form.labels, log_probabilities)),
                     "made_by": file.made_by[question]})  # fmt: skip

    seconds = score_answers(
        model, [part.prompts[i] for i in share], [ids for _, _, ids in asked], device=device, done=keep,
        max_batch_tokens=recipe.max_batch_tokens, show=f"{part.candidate.name}: labels" if ranks.rank() == 0 else None,
    )  # fmt: skip
    watch.pause()
    return {"examples": len(left), "seconds": round(max(ranks.gather(seconds)), 3)}


def answers_with(chat: Chat, form: Form, question: Question, reason: str, room: int) -> tuple[str, list[list[int]]]:
    """The reason, shorter where the model has no more `room` in tokens, and the ids of the answer with each label."""
    while True:
        try:
            ids = [
                chat.answer_ids(
                    question.messages,
                    {"role": "assistant", "content": form.answer(label, reason)},
                    tools=question.tools,
                )
                for label in form.labels
            ]
        except UserError as error:
            if not reason:
                raise
            print(f"carelm: rank {ranks.rank()}: {question.id}: the label is scored without the reason, which cannot be "
                  f"rendered: {error}", file=sys.stderr, flush=True)  # fmt: skip
            reason = ""
            continue
        if len({tuple(one) for one in ids}) < len(ids):
            raise UserError(
                f"labels: two of {', '.join(form.labels)} are the same tokens to {chat.tokenizer.name_or_path}"
            )
        over = max(map(len, ids)) - room
        if over <= 0 or not reason:
            return reason, ids
        reason = reason[:-over]


def read(asked: Prepared) -> dict[str, np.ndarray]:
    """The log-probabilities of the labels by split, float64 [questions, labels]; all of them are there (rank 0 only)."""
    parts = {"test": asked, **({"validation": asked.validation} if asked.validation else {})}
    return {
        split: log_probabilities(open_file(part.file, part.form, said(part.file, part.form)).close(), part.form)
        for split, part in parts.items()
    }
