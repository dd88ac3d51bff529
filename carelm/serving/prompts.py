"""What clients ask, as the model is to read it: the conversation as training has it, cut to the window."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from carelm.chat.grounding import Grounded
from carelm.chat.question import as_trained, form_of, system_message
from carelm.errors import UserError
from carelm.recipe import Recipe
from carelm.retrieval.assistant import put_in
from carelm.retrieval.retriever import Found
from carelm.serving.requests import Problem
from carelm.talk.speaker import Speaker


@dataclass(frozen=True)
class Asked:
    """A prompt and what became of its conversation.

    Attributes:
        ids: the prompt's token ids.
        dropped: so many messages have gone so that it fits the window.
        is_cut: whether its longest message has been cut at its end.
    """

    ids: list[int]
    dropped: int = 0
    is_cut: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """What a reply says of it."""
        said = {"x-dropped-messages": str(self.dropped)} if self.dropped else {}
        return said | ({"x-message-cut": "the longest message, at its end"} if self.is_cut else {})

    @property
    def in_short(self) -> str:
        """What a line of the log says of it."""
        dropped = f", {self.dropped} messages dropped" if self.dropped else ""
        return dropped + (", the longest message cut" if self.is_cut else "")


class Prompts:
    """Makes prompts by the recipe's templates, tags and masks."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.system, self.tagged_system = system_message(recipe)
        # Long texts take their time, and a tokenizer is used by one thread at a time.
        self._thread = ThreadPoolExecutor(1, "prompts")

    def as_trained(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The conversation as training has it.

        Raises:
            Problem: 400, where a message is not what the template is filled in with.
        """
        try:
            return as_trained(self.recipe, turns, self.system, self.tagged_system)
        except UserError as error:  # it names columns and holds no text
            form = form_of(self.recipe)
            content = f'; each message of a user\'s is sent as "content": {json.dumps(form)}' if form else ""
            raise Problem(400, f"messages: {error}{content}", param="messages", code="messages") from None

    async def make(
        self, turns: list[dict[str, Any]], speaker: Speaker, *, tools: list[dict] | None, longest_answer: int | None
    ) -> Asked:
        """The prompt of a conversation, made beside the event loop.

        Raises:
            Problem: 400, where the template refuses the conversation, or the window has no room.
        """
        make = partial(self._make, turns, speaker, tools, longest_answer)
        return await asyncio.get_running_loop().run_in_executor(self._thread, make)

    async def ground(
        self, turns: list[dict[str, Any]], found: list[Found], customer: dict[str, Any], speaker: Speaker
    ) -> tuple[list[dict[str, Any]], Grounded]:
        """The conversation with passages in its last turn, as many as fit the window beside the question; where none is found,
        with what is known of the customer.

        Raises:
            Problem: 400, where not even the beginning of a passage fits, or the customer does not.
        """
        system = [turn for turn in turns if turn["role"] == "system"]

        def fits(text: str) -> bool:
            asked = self.as_trained([*system, {"role": "user", "content": text}])
            return speaker.chat.holds(asked, speaker.limit)

        def put() -> tuple[list[dict[str, Any]], Grounded, bool]:
            messages, grounded = put_in(turns, found, customer, fits)
            return messages, grounded, bool(grounded.shown) or (not found and fits(grounded.text))

        try:
            messages, grounded, has_room = await asyncio.get_running_loop().run_in_executor(self._thread, put)
        except UserError:
            raise Problem(
                400, "messages: the model's chat template does not take this conversation", param="messages",
                code="chat_template",
            ) from None  # fmt: skip
        if not has_room:
            raise Problem(
                400, f"messages: the last one leaves no room for passages in the window of {speaker.limit} tokens; ask it in "
                "fewer words, with less about the customer", param="messages", code="context_length_exceeded",
            )  # fmt: skip
        return messages, grounded

    def _make(
        self, turns: list[dict[str, Any]], speaker: Speaker, tools: list[dict] | None, longest_answer: int | None
    ) -> Asked:
        limit = speaker.limit_for(longest_answer)
        fits = (
            f"with {speaker.positions - speaker.limit} or less the whole window of {speaker.limit} tokens is left to it"
        )
        if limit < 1:
            raise Problem(
                400, f"max_tokens: no room is left for a prompt in the {speaker.positions} positions of {speaker.name}; {fits}",
                param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        messages = self.as_trained(turns)
        try:
            prompt = speaker.chat.fit_prompt(messages, limit, tools=tools)
        except UserError as error:
            if str(error).startswith("max_length"):
                raise Problem(
                    400, f"messages: no part of them fits the window of {limit} tokens that max_length and max_tokens leave; "
                    f"as max_tokens {fits}",
                    param="messages", code="context_length_exceeded",
                ) from None  # fmt: skip
            if tools and _takes(messages, speaker, limit):
                raise Problem(
                    400, "tools: the model's chat template has no place for them; leave them out",
                    param="tools", code="chat_template",
                ) from None  # fmt: skip
            raise Problem(
                400, "messages: the model's chat template does not take this conversation: its roles, their order, or a text "
                "that it would change or leave out", param="messages", code="chat_template",
            ) from None  # fmt: skip
        return Asked(prompt.ids, len(messages) - len(prompt.messages), prompt.change == "prompt cut")


def _takes(messages: list[dict[str, Any]], speaker: Speaker, limit: int) -> bool:
    """Whether the template takes this conversation without tools."""
    try:
        speaker.chat.fit_prompt(messages, limit)
    except UserError:
        return False
    return True
