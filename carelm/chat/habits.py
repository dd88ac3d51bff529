"""What a template does with every answer, found by marks in place of text."""

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from carelm.chat.template import write
from carelm.errors import UserError

if TYPE_CHECKING:
    from carelm.chat.tokens import Encoder

MARK, THOUGHT = "QzMarkzQ", "QzThoughtzQ"
QUESTION = {"role": "user", "content": "x"}


@dataclass(frozen=True)
class Habits:
    """How a template writes answers.

    Attributes:
        end_of_turn_id: the first special token after an answer's text.
        end_of_turn_ids: the same with the token that ends a tool call, where that is another.
        closings: what stands right before an answer's text, after its reasoning and without any; each may be in front of it.
        header: the one of them that holds no special token and closes no reasoning, so that it counts at the start only.
        thought: what opens an answer's reasoning behind the prompt ("" where the prompt does) and what closes it, or None.
        trailer: what stands between an answer's text and its end of turn.
        arguments_as_text: whether tool arguments must be handed over as JSON text.
        own_system: the system message that it writes itself into a conversation that has none; "" for none.
    """

    end_of_turn_id: int
    end_of_turn_ids: frozenset[int]
    closings: tuple[str, ...]
    header: str
    thought: tuple[str, str] | None
    trailer: str
    arguments_as_text: bool
    own_system: str


def find_habits(encoder: "Encoder") -> Habits:
    """Writes a few conversations of marks.

    Raises:
        UserError: where an answer's text is not written, or is followed by no special token.
    """
    try:
        before, text = _write(encoder, for_answer=True), _write(encoder, {"content": MARK})
    except UserError as error:
        raise UserError(f"chat_template_path: {error}") from None
    if MARK not in text:
        raise UserError(
            "chat_template_path: the chat template does not write an answer's text as it is; set another template"
        )
    tail = text.rpartition(MARK)[2]
    tail_ids = encoder.encode(tail)
    ends = [token for token in tail_ids if token in encoder.special_ids]
    if not ends:
        raise UserError(
            f"chat_template_path: the chat template ends an answer with {tail!r}, which holds no special token, so "
            "that the model could not learn to stop; set another template"
        )
    as_text, call = _write_call(encoder)
    of_call = [token for token in encoder.encode(call.rpartition(MARK)[2]) if token in encoder.special_ids]
    end_ids = {ends[0]} if ends[0] in of_call else {ends[0], *of_call[-1:]}
    lead = _between(text, before, MARK)
    try:
        thinking = _write(encoder, {"content": MARK, "reasoning_content": THOUGHT})
    except UserError:
        thinking = ""
    closing = _between(thinking, THOUGHT, MARK)
    if not closing and before.rstrip().endswith("<think>"):
        closing = "</think>"  # the prompt opens what the template does not write in an answer
    # A prompt that closes a thought itself, an empty one, lets no other begin.
    thought = (
        None if not closing or before.rstrip().endswith(closing) else (_between(thinking, before, THOUGHT), closing)
    )
    has_special = any(token in encoder.special_ids for token in encoder.encode(lead))
    return Habits(
        end_of_turn_id=ends[0],
        end_of_turn_ids=frozenset(end_ids),
        closings=tuple(filter(None, (closing, lead))),
        header="" if has_special or lead == closing else lead,
        thought=thought,
        trailer=encoder.decode(tail_ids[: tail_ids.index(ends[0])]).strip(),
        arguments_as_text=as_text,
        own_system=_own_system(encoder),
    )


def _write(encoder: "Encoder", answer: dict[str, Any] | None = None, for_answer: bool = False) -> str:
    messages = [QUESTION] + ([{"role": "assistant", **answer}] if answer else [])
    return write(encoder.tokenizer, messages, for_answer=for_answer)


def _own_system(encoder: "Encoder") -> str:
    """What stands without a system message in the place of one. A header, a date or a text that stands there in any case is
    none."""
    question = {"role": "user", "content": MARK}
    try:
        without = write(encoder.tokenizer, [question], for_answer=True)
        given = write(encoder.tokenizer, [{"role": "system", "content": THOUGHT}, question], for_answer=True)
    except UserError:
        return ""
    before, _, after = given.partition(THOUGHT)
    is_place = after and without.startswith(before) and without[len(before) :].endswith(after)
    return without[len(before) : len(without) - len(after)].strip() if is_place else ""


def _between(text: str, start: str, end: str) -> str:
    """What stands between the two, without the blanks around it; nothing where they are not both there."""
    _, found, rest = text.rpartition(start) if start else ("", "", "")
    return rest.partition(end)[0].strip() if found and end in rest else ""


def _write_call(encoder: "Encoder") -> tuple[bool, str]:
    """Whether tool arguments are to be text, and a tool call as the template then writes it ("" where it writes none)."""
    written = {}
    for as_text in (False, True):
        arguments = json.dumps({"key": MARK}) if as_text else {"key": MARK}
        call = {"type": "function", "id": "call12345", "function": {"name": "name", "arguments": arguments}}
        try:
            text = _write(encoder, {"content": "", "tool_calls": [call]})
        except UserError:
            continue
        if MARK in text:
            written[as_text] = text
    is_python = str({"key": MARK}) in written.get(False, "")  # an object put into the text as it is
    as_text = True in written and (False not in written or is_python)
    return as_text, written.get(as_text, "")
