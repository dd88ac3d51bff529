"""A conversation with one or several models: its turns, what was thought of their answers, and both as rows to train on.

Imports no torch.
"""

import contextlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from carelm.data.masking import clean
from carelm.errors import UserError
from carelm.files import write_whole
from carelm.recipe import CHATS, Recipe

CUT = {"length": "cut off at max_new_tokens", "cancelled": "ended by Ctrl-C"}  # by finish_reason


@dataclass
class Said:
    """A model's answer; `mark` is "good", "bad" or None."""

    text: str
    finish_reason: str
    mark: str | None = None


@dataclass
class Turn:
    """What was asked, and the answers by model; one that said nothing has none."""

    number: int
    question: str
    answers: dict[str, Said] = field(default_factory=dict)


class Session:
    """The conversation of now, each model with its own answers before it, and the rows of what was said earlier.

    Args:
        recipe: masks what is said, and names the run's folder.
        models: their names.
        started: when, as it stands in the rows' ids and in the name of the file.

    Attributes:
        system: the system message, or None.
        undone: how many turns were taken back.
        undone_rows: how many marked answers were in them; these stay in what is saved.
    """

    def __init__(self, recipe: Recipe, models: list[str], system: str | None, started: str):
        self.recipe, self.models, self.system, self.started = recipe, models, system, started
        self.turns: list[Turn] = []
        self.undone = self.undone_rows = 0
        self._earlier: list[dict[str, Any]] = []
        self._number = 0
        self._own_name = recipe.output_dir / CHATS / f"chat-{started}.jsonl"
        self._written: dict[Path, str] = {}  # the newest last

    def messages(self, model: str, before: int | None = None) -> list[dict[str, Any]]:
        """What this model has been told and has said, up to the turn with this index."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for turn in self.turns[:before]:
            if said := turn.answers.get(model):
                messages.append({"role": "user", "content": turn.question})
                messages.append({"role": "assistant", "content": clean(self.recipe, said.text)})  # as in rows
        return messages

    def add(self, question: str, answers: dict[str, Said]) -> None:
        """A turn, unless all were silent."""
        if answers:
            self._number += 1
            self.turns.append(Turn(self._number, question, answers))

    def undo(self) -> int:
        """Takes back the last turn; its marked answers, which are counted, stay in what is saved.

        Raises:
            UserError: where there is none.
        """
        if not self.turns:
            raise UserError("/undo: there is no turn to take back")
        marked = [row for row in self._rows_of(len(self.turns) - 1) if row["mark"]]
        self._earlier += marked
        self.undone_rows += len(marked)
        self.turns.pop()
        self.undone += 1
        return len(marked)

    def begin_anew(self, system: str | None) -> None:
        """A new conversation under this system message; the rows of the old one are kept."""
        self._earlier = self.rows()
        self.turns, self.system = [], system

    def mark(self, mark: str, model: str) -> str:
        """Marks the last answer of a model ("": of the only one), whose name is returned.

        Raises:
            UserError: where there is no such answer, several models have one, or a good one is not whole: trained on, it would
                teach to end in the middle.
        """
        if not self.turns:
            raise UserError(f"/{mark}: there is no answer yet")
        answers = self.turns[-1].answers
        if not model and len(self.models) > 1:
            whose = " or ".join(f"/{mark} {name}" for name in self.models)
            raise UserError(f"/{mark}: {len(self.models)} models have answered; say whose answer: {whose}")
        model = model or self.models[0]
        if model not in answers:
            there = ", ".join(answers)
            raise UserError(f"/{mark}: there is no last answer of '{model}' (there: {there})")
        if mark == "good" and (why := CUT.get(answers[model].finish_reason)):
            raise UserError(f"/good: the last answer of {model} was {why}, and is not whole; ask again")
        answers[model].mark = mark
        return model

    def rows(self) -> list[dict[str, Any]]:
        """One row an answer: the conversation up to it, of which it alone is trained."""
        return self._earlier + [row for index in range(len(self.turns)) for row in self._rows_of(index)]

    def _rows_of(self, index: int) -> list[dict[str, Any]]:
        turn, rows = self.turns[index], []
        for model, said in turn.answers.items():
            before = [
                m | {"train": False} if m["role"] == "assistant" else m for m in self.messages(model, before=index)
            ]
            asked, answer = {"role": "user", "content": turn.question}, {"role": "assistant", "content": said.text}
            rows.append({
                "id": f"{self.started}/{turn.number}/{model}",
                "model": model,
                "mark": said.mark,
                "finish_reason": said.finish_reason,
                "messages": [*before, asked, answer],
            })  # fmt: skip
        return rows

    @property
    def is_saved(self) -> bool:
        """Whether every mark stands in a file."""
        text = self._text()
        return text in self._written.values() or not any(row["mark"] for row in self.rows())

    def _text(self) -> str:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows())

    def save(self, name: str = "") -> Path:
        """Writes all rows to this .jsonl file, or to the one that was written last, or to one in the run's folder that is named
        by the session's start; only what this session has written itself is written over.

        Raises:
            UserError: where there is nothing to save, another file of that name, or no room.
        """
        if not self.rows():
            raise UserError("/save: nothing has been said yet")
        path = Path(os.path.expanduser(name)) if name else next(reversed(self._written), self._own_name)
        if path.suffix != ".jsonl":
            raise UserError(f"/save: {path} does not end in .jsonl, by which training knows such files; name it so")
        path, text = path.absolute(), self._text()
        try:
            if path == self._own_name.absolute():
                path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists() and path.read_text(encoding="utf-8") != self._written.get(path):
                raise UserError(f"/save: {path} is there already and stays as it is; name another file")
            write_whole(path, text)
        except (OSError, UnicodeError) as error:
            with contextlib.suppress(OSError):
                path.with_name(path.name + ".partial").unlink()
            raise UserError(f"/save: {path} cannot be written ({error}); the chat goes on, name another file") from None
        self._written.pop(path, None)
        self._written[path] = text
        return path
