"""Whether two tickets are the same: a finished ticket-matching run says so, with a probability, and with its reason where it
has one."""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from carelm.chat.question import asked_columns, compose, system_message
from carelm.data.label_form import form_of
from carelm.errors import UserError
from carelm.evaluation import calibration
from carelm.evaluation.candidates import find
from carelm.evaluation.constrained import answers_with
from carelm.evaluation.questions import Question
from carelm.files import locate, read_json
from carelm.models.decoding import Decoding
from carelm.models.generation import generate_all
from carelm.models.likelihood import score_answers
from carelm.models.precision import choose_precision
from carelm.ranks import say
from carelm.recipe_file import load_recipe

CHARACTERS = 8  # of a token at most, as good as always: what is longer than so many times the window is cut at once


@dataclass(frozen=True)
class Judgement:
    """What is said of a pair.

    Attributes:
        same: whether the recipe's first label is the likeliest.
        probability: of that label; calibrated where the run has been evaluated with validation rows.
        reason: what the model writes before the label; None where its recipe has no reason.
    """

    same: bool
    probability: float
    reason: str | None


class Matcher:
    """A finished run whose prompt has two columns (the new ticket, then the past one) and whose first label means the same.
    Several threads may ask it; it answers one at a time.

    Args:
        folder: of the run, as train/sft.py leaves it.
    """

    def __init__(self, folder: str):
        """Raises UserError where it is no such run, before any weights are loaded."""
        path = Path(locate(folder))
        if not (path / "recipe.yaml").is_file():
            raise UserError(
                f"matcher: {folder} is no folder of a finished run (no recipe.yaml); name one of train/sft.py"
            )
        self.recipe = load_recipe(["--config", str(path / "recipe.yaml"), "--output_dir", str(path)], usage="")
        columns = asked_columns(self.recipe)
        if len(columns) != 2 or len(self.recipe.labels) < 2:
            raise UserError(
                f"matcher: {folder} does not match tickets (its prompt_template has {len(columns)} columns, and there are "
                f"{len(self.recipe.labels)} labels); two columns and labels are needed, as in recipes/ticket_matching.yaml"
            )
        candidate = find(self.recipe, str(path), is_own=True)
        if self.recipe.precision == "auto" and not torch.cuda.is_available():
            candidate = candidate.computing_in(choose_precision("auto", path, training=False).name)
        candidate.check_base()
        self.form, self._candidate, self._lock = form_of(self.recipe), candidate, threading.Lock()
        self.chat = candidate.make_chat()
        self._system = system_message(self.recipe)[0]
        self._limit = candidate.prompt_limit(self.recipe, self.chat)
        self.temperature = _temperature(path)
        if self.temperature is None:
            say(f"matcher: {folder} is not calibrated, its probabilities are the model's own; evaluate it on validation rows: "
                f"accelerate launch eval/run.py --config {path / 'recipe.yaml'}")  # fmt: skip

    def load(self) -> None:
        self._model, about = self._candidate.load(self.chat, None)
        self._device = next(p for p in self._model.parameters() if p.device.type != "meta").device
        say(
            f"matcher: {about['folder']}, {about['precision']}, on {self._device}, loaded in {about['load_seconds']:.1f} s"
        )

    def judge(self, new: str, past: Sequence[str]) -> list[Judgement]:
        """Whether the new ticket is the same as each of the past ones."""
        with self._lock:
            return self._judge([self._messages(new, one) for one in past])

    def _judge(self, pairs: list[list[dict[str, Any]]]) -> list[Judgement]:
        prompts = [self.chat.prompt_ids(messages) for messages in pairs]
        tokens, reasons = self.recipe.max_batch_tokens, [""] * len(pairs)
        if self.form.has_reason:
            said: dict[int, str] = {}
            generate_all(
                self._model, self.chat, prompts, Decoding(self.recipe.max_new_tokens, 0.0, 1.0, 0), device=self._device,
                max_batch_tokens=tokens, done=lambda k, answer: said.__setitem__(k, answer.text),
            )  # fmt: skip
            reasons = [self.form.reason(said[k]) for k in range(len(pairs))]
        answers = [
            answers_with(self.chat, self.form, Question(str(k), "", "", messages, []), reason, self._room(prompt))[1]
            for k, (messages, reason, prompt) in enumerate(zip(pairs, reasons, prompts))
        ]
        found: dict[int, list[float]] = {}
        score_answers(
            self._model, prompts, answers, device=self._device, max_batch_tokens=tokens, done=found.__setitem__
        )
        scores = np.array([found[k] for k in range(len(pairs))]).reshape(len(pairs), -1)
        chances = calibration.probabilities(scores, self.temperature or 1.0)
        return [
            Judgement(bool(own.argmax() == 0), float(own[0]), _shown(reason) if self.form.has_reason else None)
            for own, reason in zip(chances, reasons)
        ]

    def _messages(self, new: str, past: str) -> list[dict[str, Any]]:
        """The pair as training has it; the longer of the two is cut at its end where the window has no room."""
        texts = [text[: CHARACTERS * self._limit] for text in (new, past)]
        while True:
            messages = [{"role": "user", "content": compose(self.recipe, texts)}]
            messages = [{"role": "system", "content": self._system}, *messages] if self._system else messages
            over = len(self.chat.prompt_ids(messages)) - self._limit
            if over <= 0:
                return messages
            longer = texts.index(max(texts, key=len))
            texts[longer] = texts[longer][:-over].rstrip()
            if not texts[longer]:
                raise UserError(f"matcher: max_length {self.recipe.max_length} leaves no room for two tickets")

    def _room(self, prompt: list[int]) -> int:
        return self._candidate.positions(self.recipe, self.chat) - self.recipe.virtual_tokens - len(prompt)


def _temperature(folder: Path) -> float | None:
    """The one that the run's evaluation has chosen for its adapter, or its whole model, on validation rows."""
    models = read_json(folder / "eval/results.json").get("models", {})
    of_run = [models[name] for name in ("adapter", "merged", folder.resolve().name) if name in models]
    return next((t for model in of_run if (t := model.get("calibration", {}).get("temperature"))), None)


def _shown(reason: str) -> str:
    """The reason without the word that the template puts in front of it."""
    return reason.strip().removeprefix("Reason:").strip()
