"""One conversation, as it comes out of a row."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Example:
    """One conversation: what is asked (`prompt`) and what is to be learnt (`completion`), as lists of messages."""

    prompt: list[dict[str, Any]]
    completion: list[dict[str, Any]]
    id: str
    category: str | None
    source: str  # file:row, for messages to people
    references: tuple[str, ...] = ()  # of a test row with several; else the completion is the reference
    compared: tuple[str, ...] = ()  # the texts of the recipe's `overlap_columns`
    tools: list[dict[str, Any]] | None = None  # what the model may call, as OpenAI writes it
    columns: tuple[str, ...] = ()  # the texts of the question's columns, without tags and predictions
    words: str | None = (
        None  # what the question is compared by, without template, where it has tags or predicted columns: its other columns
    )
    alone: tuple[str, ...] = ()  # those parts of it that are a question by themselves (`without_template`)
    row: dict[str, Any] | None = None  # as read, with predicted_columns
    unused: frozenset[str] = frozenset()  # keys of its messages that the recipe does not use
    rejected: list[dict[str, Any]] | None = None  # of a pair: the worse answer; the better one is `completion`


class NoAnswer(Exception):
    """A row that holds nothing to learn; the text says why."""


class SameAnswers(NoAnswer):
    """A pair whose two answers are the same text."""

    def __init__(self):
        super().__init__("both answers the same")
