"""Whether a conversation's text holds every message of it."""

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from carelm.chat.tokens import strings
from carelm.errors import UserError


class Part(NamedTuple):
    """A text of a conversation that its rendering must hold: which message's (from 1; 0 for the tools), and what of it."""

    message: int
    what: str
    text: str


class Presence:
    """Checks renderings of one template; what it does with each shape of conversation (roles and keys) is looked at once."""

    def __init__(self, write: Callable[[list[dict], list[dict] | None, bool], str]):
        self.write = write
        self.known: dict[Any, tuple[str | None, bool]] = {}

    def check(
        self, text: str, messages: list[dict], tools: list[dict] | None, *, for_answer: bool, thoughts: set[int]
    ) -> bool:
        """Whether `text`, the rendering of these messages and tools, leaves out the reasoning of earlier answers; all else of
        theirs must stand there.

        Args:
            for_answer: whether it ends in the generation prompt.
            thoughts: the indices of messages whose reasoning must stand there too.

        Raises:
            UserError: where another text of theirs does not.
        """
        shape = (_shape(messages), tools is not None, for_answer, frozenset(thoughts))
        if shape not in self.known:
            self.known[shape] = self._find_missing(messages, tools, for_answer, thoughts)
        missing, forgets = self.known[shape]
        if missing:
            raise UserError(f"the chat template does not write {missing}, or set a chat_template_path that writes it")
        wanted = [*_parts(messages, tools, thoughts)]
        everything = [part.text for part in wanted]
        if _in_order(text, everything):
            return forgets
        for part in wanted:
            needed = sum(other.count(part.text) for other in everything)
            if sum(text.count(form) for form in _forms(part.text)) < needed:
                places = [_describe(other, messages) for other in wanted if part.text in other.text]
                raise UserError(
                    f"the chat template cuts or changes {part.text[:60]!r}, {' or '.join(dict.fromkeys(places))}; take it out "
                    "of the row, or set another chat_template_path"
                )
        return forgets

    def _find_missing(
        self, messages: list[dict], tools: list[dict] | None, for_answer: bool, thoughts: set[int]
    ) -> tuple[str | None, bool]:
        """What the template does not write of a conversation like this one whose texts are marks, each its own; and whether it
        leaves out reasoning that need not stand there."""
        number = iter(range(10**6))

        def mark() -> str:
            return f"Qz{next(number)}zQ"

        marked = []
        for message in messages:
            message = dict(message)
            for key in ("content", "reasoning_content"):
                if isinstance(message.get(key), str) and message[key].strip():
                    message[key] = mark()
            if message.get("tool_calls"):
                message["tool_calls"] = [_marked_call(call, mark) for call in message["tool_calls"]]
            marked.append(message)
        marked_tools = tools and [_named(tool, mark()) for tool in tools]
        try:
            text = self.write(marked, marked_tools, for_answer)
        except UserError:
            return None, False  # it looks into the texts: those of every row are looked at all the same
        needed = {*_parts(marked, marked_tools, thoughts)}
        everything = _parts(marked, marked_tools, set(range(len(marked))))
        lost = [part for part in everything if part.text not in text]
        missing = next((part for part in lost if part in needed), None)
        what = missing and f"{_describe(missing, messages)}; {_way_out(missing, messages)}"
        return what, any(part not in needed for part in lost)


def _describe(part: Part, messages: list[dict]) -> str:
    if not part.message:
        return "the row's tools"
    role = messages[part.message - 1]["role"]
    what = "the text" if part.what == "content" else f"'{part.what}'"
    return f"{what} of messages of role {role} (message {part.message} of the conversation)"


def _way_out(part: Part, messages: list[dict]) -> str:
    if not part.message:
        return 'set tools_column: "" to train without them'
    if messages[part.message - 1]["role"] == "system":
        return "take it out of the row or the system_prompt"
    return "take such rows out of the data (row_filter, where a column tells them)"


def _shape(messages: list[dict]) -> tuple:
    return tuple(
        (
            m["role"],
            bool((m.get("content") or "").strip()),
            bool(m.get("reasoning_content")),
            len(m.get("tool_calls") or ()),
        )
        for m in messages
    )


def _parts(messages: list[dict], tools: list[dict] | None, thoughts: set[int]) -> Iterator[Part]:
    for tool in tools or []:
        yield Part(0, "tools", _function(tool).get("name") or "")
    for i, message in enumerate(messages):
        found = [("reasoning_content", message.get("reasoning_content") or "")] if i in thoughts else []
        found.append(("content", message.get("content") or ""))
        for call in message.get("tool_calls") or []:
            function = _function(call)
            # Of the arguments the texts: numbers and the like may be written in several ways.
            texts = [function.get("name") or "", *strings(_arguments(function), keys=False)]
            found += [("tool_calls", text) for text in texts]
        yield from (Part(i + 1, what, text.strip()) for what, text in found if text.strip())


def _function(call: dict) -> dict:
    return call.get("function") or call


def _arguments(function: dict) -> Any:
    arguments = function.get("arguments")
    try:
        return json.loads(arguments) if isinstance(arguments, str) else arguments
    except json.JSONDecodeError:
        return arguments


def _marked_call(call: dict, mark: Callable[[], str]) -> dict:
    function = dict(_function(call), name=mark(), arguments={"key": mark()})
    return dict(call, function=function) if "function" in call else function


def _named(tool: dict, name: str) -> dict:
    return dict(tool, function=dict(tool["function"], name=name)) if "function" in tool else dict(tool, name=name)


def _in_order(text: str, wanted: list[str]) -> bool:
    """Whether all stand there one after another: then each has a place of its own."""
    position = 0
    for one in wanted:
        found = text.find(one, position)
        if found < 0:
            return False
        position = found + len(one)
    return True


def _forms(text: str) -> set[str]:
    """A text as it is, and escaped as JSON (once, or twice where arguments are text in JSON) and Python do."""
    escaped = {json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1]}
    twice = {json.dumps(form, ensure_ascii=False)[1:-1] for form in escaped}
    return {text, repr(text)[1:-1], *escaped, *twice}
