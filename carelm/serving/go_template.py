"""A chat template told in Go's template language, which Ollama renders prompts with.

The chat template is a program of its own: what it writes around the texts of a few conversations is looked at, and written down
by role. Where a conversation then comes out as other token ids, it cannot be told.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from carelm.chat.chat import Chat
from carelm.errors import UserError

SYSTEM, USER, ANSWER, NEXT = (f"Qz{name}zQ" for name in ("System", "User", "Answer", "Next"))
TOKENS = re.compile(r"\{\{ (.*?) \}\}")


class Untold(Exception):
    """Why a chat template cannot be told in Go's language."""


@dataclass(frozen=True)
class Pieces:
    """What stands before and behind each role's text.

    Attributes:
        head: in front of a conversation without a system message.
        system: None where the chat template takes none.
        after_system: in front of a user's text that follows the system message.
        ask: behind the last message.
    """

    head: str
    system: tuple[str, str] | None
    after_system: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    ask: str


def tell(chat: Chat, *, adds_bos: bool) -> str:
    """The template in Go's language.

    Args:
        adds_bos: whether who renders it puts the tokenizer's first token in front.

    Raises:
        Untold: where a conversation would come out otherwise than the chat template writes it.
    """
    pieces = _find(chat)
    bos = chat.tokenizer.bos_token if adds_bos else ""
    if bos:
        pieces = _without(bos, pieces)
    template = _write(pieces)
    for turns in (1, 2, 5):
        for system in (None, "Be kind.\nBe brief.") if pieces.system else (None,):
            messages = conversation(turns, system)
            ids = chat.tokenizer(bos + render(template, messages), add_special_tokens=False)["input_ids"]
            if ids != chat.prompt_ids(messages):
                what = f"a conversation of {turns} turns {'with' if system else 'without'} a system message"
                raise Untold(f"{what} comes out as other token ids")
    return template


def conversation(turns: int, system: str | None) -> list[dict[str, Any]]:
    """One with this many questions, which ends in the last of them."""
    messages = [{"role": "system", "content": system}] if system else []
    for turn in range(turns):
        if turn:
            messages.append({"role": "assistant", "content": f"It is on its way.\n\n{turn}) Thanks, 1234 & <b>!"})
        messages.append({"role": "user", "content": f"Where is my order no. {turn}98765?\nI'm waiting – still…"})
    return messages


def _find(chat: Chat) -> Pieces:
    def text(*contents: str, for_answer: bool = False) -> str:
        roles = {SYSTEM: "system", ANSWER: "assistant"}
        messages = [{"role": roles.get(content, "user"), "content": content} for content in contents]
        return chat.text(messages, for_answer=for_answer)

    def after(text: str, start: str, what: str) -> str:
        if not text.startswith(start):
            raise Untold(f"it writes {what} otherwise as the conversation goes on")
        return text[len(start) :]

    def split(text: str, *marks: str) -> list[str]:
        parts = []
        for mark in marks:
            if text.count(mark) != 1:
                raise Untold("it does not write each message once, in their order")
            part, _, text = text.partition(mark)
            parts.append(part)
        return [*parts, text]

    first, behind_user = split(text(USER), USER)
    ask = after(text(USER, for_answer=True), text(USER), "a question")
    _, behind_answer = split(text(USER, ANSWER).partition(USER)[2], ANSWER)
    before, to_answer, to_user, end = split(text(USER, ANSWER, NEXT, for_answer=True), USER, ANSWER, NEXT)
    before_answer = after(to_answer, behind_user, "a question")
    before_user = after(to_user, behind_answer, "an answer")
    if end != behind_user + ask or before != first or not first.endswith(before_user):
        raise Untold("it writes a question otherwise as the conversation goes on")
    head = first.removesuffix(before_user)
    try:
        before_system, to_first, _ = split(text(SYSTEM, USER, for_answer=True), SYSTEM, USER)
    except UserError:
        system, after_system = None, before_user
    else:
        after_system = before_user if to_first.endswith(before_user) else ""
        system = before_system, to_first.removesuffix(after_system)
    return Pieces(head, system, after_system, (before_user, behind_user), (before_answer, behind_answer), ask)


def _without(bos: str, pieces: Pieces) -> Pieces:
    """What is left to write where `bos` stands in front of every prompt."""
    beginnings = [pieces.head + pieces.user[0], *([pieces.system[0]] if pieces.system else [])]
    if not all(text.startswith(bos) for text in beginnings):
        raise Untold(f"Ollama puts {bos} in front of every prompt, which it does not write")
    if not pieces.head.startswith(bos):
        raise Untold(f"{bos} begins every question")
    system = pieces.system and (pieces.system[0].removeprefix(bos), pieces.system[1])
    return replace(pieces, head=pieces.head.removeprefix(bos), system=system)


def _write(pieces: Pieces) -> str:
    """The template, of which `render` knows every word."""
    texts = [pieces.head, *(pieces.system or ()), pieces.after_system, *pieces.user, *pieces.assistant, pieces.ask]
    for text in texts:
        if "{{" in text or "}}" in text or '"""' in text:
            raise Untold("it writes double braces or three quotes, which end a text there")
        if bad := [sign for sign in text if not (sign.isprintable() or sign in "\n\t")]:
            raise Untold(f"it writes {bad[0]!r}, which a Modelfile does not keep")
    before_user, behind_user = pieces.user
    head, system = pieces.head, ""
    if pieces.system:
        before_system, behind_system = pieces.system
        if before_system.startswith(head):
            before_system = before_system.removeprefix(head)
        elif head:  # of its own where there is no system message
            head = "{{ if not .System }}" + head + "{{ end }}"
        system = '{{ if eq .Role "system" }}' + before_system + "{{ .Content }}" + behind_system
        if pieces.after_system != before_user:
            before_user = (
                "{{ if and $.System (eq $i 1) }}" + pieces.after_system + "{{ else }}" + before_user + "{{ end }}"
            )
    user = '{{ if eq .Role "user" }}' + before_user + "{{ .Content }}" + behind_user
    assistant = '{{ else if eq .Role "assistant" }}' + "{{ .Content }}".join(pieces.assistant)
    user = "{{ else" + user.removeprefix("{{") if system else user
    return f"{head}{{{{ range $i, $_ := .Messages }}}}{system}{user}{assistant}{{{{ end }}}}{{{{ end }}}}{pieces.ask}"


def render(template: str, messages: list[dict[str, Any]]) -> str:
    """What Go's text/template makes of a template that `tell` has written, with the values that Ollama gives it: the messages,
    and in `.System` the texts of the system messages."""
    words = TOKENS.split(template)  # texts, with what stands in braces between them
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")

    def holds(condition: str, i: int) -> bool:
        if role := re.fullmatch(r'eq \.Role "(\w+)"', condition):
            return messages[i]["role"] == role[1]
        return {"not .System": not system, "and $.System (eq $i 1)": bool(system) and i == 1}[condition]

    def block(at: int, i: int, shown: bool) -> tuple[str, int]:
        """The text from the word at `at` on, up to the `end` or `else` that closes it, and where that stands."""
        text = words[at] if shown else ""
        at += 1
        while at < len(words) and words[at] != "end" and not words[at].startswith("else"):
            word = words[at]
            if word == ".Content":
                text += messages[i]["content"] if shown else ""
            elif word.startswith("range"):
                for one in range(len(messages)):
                    inner, end = block(at + 1, one, shown)
                    text += inner
                at = end
            else:
                inner, at = branches(at, i, shown)
                text += inner
            text += words[at + 1] if shown else ""
            at += 2
        return text, at

    def branches(at: int, i: int, shown: bool) -> tuple[str, int]:
        text, is_open = "", shown
        while words[at] != "end":
            condition = words[at].removeprefix("else").strip().removeprefix("if ")
            takes = is_open and (not condition or holds(condition, i))
            inner, at = block(at + 1, i, takes)
            text += inner
            is_open = is_open and not takes
        return text, at

    return block(0, 0, True)[0]
