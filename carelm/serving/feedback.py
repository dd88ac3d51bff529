"""What people think of answers, as rows to train on: appended to outputs/NAME/feedback.jsonl."""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from carelm.data.masking import clean, clean_turns
from carelm.recipe import FEEDBACK, Recipe
from carelm.serving.requests import MOST_MESSAGES, Message, Strict, to_functions, to_messages


def says_something(text: str) -> str:
    if not text.strip():
        raise ValueError("it says nothing")
    return text


Text = Annotated[str, AfterValidator(says_something)]  # a good row without an answer would be refused by the data step


class Feedback(Strict):
    """A body of POST /v1/feedback: the conversation up to the answer, the answer, and what was thought of it."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES), AfterValidator(to_messages)]
    tools: Annotated[list[dict[str, Any]], AfterValidator(to_functions)] = []
    answer: Text
    mark: Literal["good", "bad"] | None = None
    whole: bool = True  # whether the answer had its end: it was not stopped, cut off or broken off
    comment: str | None = None
    edited: Text | None = None

    @model_validator(mode="after")
    def is_fit_to_train(self) -> Self:
        if self.mark == "good" and not self.whole and not self.edited:
            raise ValueError(
                "mark: an answer that is not whole would teach to end like that; send it as it should be, edited"
            )
        return self

    def row(self, recipe: Recipe, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """The row: of the conversation, as training has it, the answer alone is trained, as edited where it was, which makes it
        good; one that was bad, and not edited, is not trained. What people say is masked as the recipe has it."""
        before = [m | {"train": False} if m["role"] == "assistant" else m for m in messages]
        answer: dict[str, Any] = {"role": "assistant", "content": self.edited or self.answer}
        if self.mark == "bad" and not self.edited:
            answer["train"] = False
        (answer,) = clean_turns(recipe, [answer])
        row: dict[str, Any] = {"id": f"feedback/{time.time_ns()}", "messages": [*before, answer]}
        if self.tools:
            row["tools"] = self.tools
        if self.edited:
            row["draft"] = clean(recipe, self.answer)
        comment = self.comment and clean(recipe, self.comment)
        mark = "good" if self.edited else self.mark
        return row | {"mark": mark, "comment": comment, "model": self.model}


def append(folder: Path, row: dict[str, Any]) -> Path:
    """Appends a row; one of several processes at a time, whole or not at all.

    Raises:
        OSError: where there is no room or no permission; the file is as before then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    with open(folder / FEEDBACK, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        end = os.fstat(file.fileno()).st_size
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), end)
            raise
    return folder / FEEDBACK
