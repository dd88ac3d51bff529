"""What two conversations are compared by: the question, the conversation so far, the text."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from carelm.data.example import Example

LONG = 40  # characters: such a column of a question says so much that it is compared by itself
_KEYS = ("role", "content", "tool_calls", "name")  # ids of calls, weights and reasoning tell no conversations apart


class Comparison:
    """Compares conversations; the system message and the tools count where they are not the same in all rows."""

    def __init__(self, examples: Iterable[Example]):
        system, tools, self._system_counts, self._tools_count, self.have_turns = None, None, False, False, False
        for example in examples:
            system, tools = (_system(example), example.tools) if system is None else (system, tools)
            self._system_counts |= _system(example) != system
            self._tools_count |= example.tools != tools
            self.have_turns |= sum(m["role"] == "assistant" for m in (*example.prompt, *example.completion)) > 1

    @classmethod
    def of_two(cls, examples: list[Example], others: list[Example]) -> "Comparison":
        """For rows of two datasets: a system message that is the same in all rows of one is aside, whatever the other has."""
        both, one, other = cls([*examples, *others]), cls(examples), cls(others)
        both._system_counts = one._system_counts or other._system_counts
        both._tools_count = one._tools_count or other._tools_count
        return both

    def question(self, example: Example) -> str:
        """Everything before the answer, as JSON; `["What the user says"]` for a row with one turn."""
        return json.dumps(self._parts(example)[:-1], sort_keys=True, ensure_ascii=False)

    def text(self, example: Example) -> str:
        """The question as plain text, a message a line; without tools, which many rows share to the letter."""
        parts = [part for part in self._parts(example)[:-1] if isinstance(part, str) or "tools" not in part]
        return "\n".join(p if isinstance(p, str) else p.get("content") or json.dumps(p, sort_keys=True) for p in parts)

    def so_far(self, example: Example) -> Iterator[bytes]:
        """A digest of the conversation up to each answer, from the first one; the last is the whole conversation's."""
        digest = hashlib.blake2b(digest_size=16)
        for part in self._parts(example):
            digest.update(json.dumps(part, sort_keys=True).encode() + b"\n")
            if not isinstance(part, str) and part.get("role") == "assistant":
                yield digest.digest()

    def _parts(self, example: Example) -> list[Any]:
        messages = [*example.prompt, *example.completion]
        messages = messages if self._system_counts else messages[len(_system(example)) :]
        if example.words is not None:  # one question and its answer
            messages = [m | {"content": example.words} if m["role"] == "user" else m for m in messages]
        parts: list[Any] = [{"tools": example.tools}] if self._tools_count and example.tools else []
        for message in messages:
            part = {key: message[key] for key in _KEYS if message.get(key)}
            parts.append(message["content"] if message["role"] == "user" and "name" not in part else part)
        return parts


def asked(example: Example) -> str:
    """What the user says, without what a template puts around it."""
    texts = example.columns or [m["content"] for m in example.prompt if m["role"] == "user"]
    return "\n".join(texts).strip()


def without_template(examples: list[Example]) -> list[Example]:
    """The same rows of one recipe, compared by what their users say, as the templates of two recipes may differ. By themselves
    are compared the column that is longest over all rows, and any text of LONG characters: a title, a product or an intent
    that many questions share is none of them."""
    lengths = [sum(map(len, texts)) for texts in zip(*(e.columns for e in examples))]
    main = lengths.index(max(lengths)) if lengths else None

    def compared(e: Example) -> Example:
        alone = [text.strip() for i, text in enumerate(e.columns) if i == main or len(text.strip()) >= LONG]
        return replace(e, words=asked(e) if e.columns else e.words, alone=(*filter(None, alone or [asked(e)]),))

    return [compared(e) for e in examples]


def last_words(example: Example, number: int = 50) -> str:
    """The end of the question, to show to people: what the user says last."""
    asked = [m["content"] for m in example.prompt if m["role"] == "user"] or [""]
    return " ".join(asked[-1].split())[:number]


def first_words(text: str, number: int = 60) -> str:
    """The beginning of a text in one line, to show to people."""
    text = " ".join(text.split())
    return text if len(text) <= number else text[: number - 2].rstrip() + " …"


def _system(example: Example) -> list[str]:
    """The texts of the system messages that open a conversation."""
    found = []
    for message in example.prompt:
        if message["role"] != "system":
            break
        found.append(message["content"])
    return found
