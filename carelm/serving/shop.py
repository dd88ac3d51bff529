"""What a shop asks: answers from its documents, and past tickets that are like a new one.

POST /v1/shop/chat: an answer from the shop's own documents, with its sources, whole or as a stream of events.

sources   {"sources": [{"number", "document", "title", "product", "page", "heading", "passage", "score", "confidence"}],
           "asked": the user's turn as the model reads it, null where no model is asked}
token     {"text"}, as often as there is more
done      {"answer", "cited", "knows", "model", "finish_reason", "usage"}
error     {"error": ...}, in OpenAI's shape, in place of the rest
"""

import asyncio
import dataclasses
import secrets
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from carelm.chat.grounding import without_false_marks
from carelm.errors import UserError
from carelm.models.decoding import Decoding
from carelm.retrieval.assistant import REFUSAL, Assistant, TrueMarks, outcome, sources
from carelm.retrieval.tickets import Tickets
from carelm.serving.requests import MOST_MESSAGES, Message, Problem, Strict, parse, to_messages
from carelm.serving.turn import GONE, Turn
from carelm.serving.wire import ClientGone, read_body, unless_gone

if TYPE_CHECKING:
    from carelm.serving.gateway import Gateway

MOST_MATCHES = 20
MOST_FIELDS = 100  # of a customer: each is compared with the question


def of_a_user(messages: list[Message]) -> list[dict[str, Any]]:
    if messages[-1].role != "user":
        raise ValueError("the last message must be a user's")
    return to_messages(messages)


class ShopRequest(Strict):
    """A body of the route."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES), AfterValidator(of_a_user)]
    filters: dict[str, str] = {}
    customer: Annotated[dict[str, Any], Field(max_length=MOST_FIELDS)] = {}
    stream: bool = False
    model: str | None = None


class Shop:
    """The route."""

    def __init__(self, gateway: "Gateway", assistant: Assistant):
        self.gateway, self.assistant = gateway, assistant

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, recipe = self.gateway, self.gateway.recipe
        body = await read_body(Request(scope, receive), recipe.max_body_bytes)
        with gateway.place():
            asked = parse(ShopRequest, body)
            seed = secrets.randbits(63)
            turn = Turn(
                gateway, scope, receive, send, speaker=gateway.speaker(asked.model or gateway.engine.models[-1]), stops=[],
                decoding=Decoding(recipe.max_new_tokens, recipe.temperature, recipe.top_p, seed),
            )  # fmt: skip
            consultation = Consultation(self.assistant, asked, turn)
            await turn.deliver(consultation.stream if asked.stream else consultation.whole)


class Consultation:
    """One answer with its sources."""

    def __init__(self, assistant: Assistant, asked: ShopRequest, turn: Turn):
        self.assistant, self.asked, self.turn = assistant, asked, turn
        self.sources: list[dict[str, Any]] = []
        self.turn_text: str | None = None
        self.finish_reason = "stop"

    async def whole(self) -> None:
        await self._look_up()
        async for _ in self._texts():
            pass
        body = {**self._said(), **self._found()}
        await JSONResponse(body, headers=self.turn.headers)(self.turn.scope, self.turn.receive, self.turn.send)

    async def stream(self) -> None:
        await self._look_up()
        events = self.turn.events("error")
        await events.put(self._found(), "sources")
        async for piece in self._texts():
            if piece:
                await events.put({"text": piece}, "token")
        await events.put(self._said(), "done", is_last=True)

    async def _look_up(self) -> None:
        """Finds the passages and makes the prompt, where the model is to be asked."""
        messages, customer = self.asked.messages, self.asked.customer
        try:
            found, is_known = await asyncio.to_thread(self.assistant.consult, messages, self.asked.filters, customer)
        except UserError as error:
            raise Problem(400, str(error), param="filters", code="filters") from None
        if not is_known:
            return
        messages, grounded = await self.turn.gateway.prompts.ground(messages, found, customer, self.turn.speaker)
        self.sources, self.turn_text = sources(found[: grounded.shown]), grounded.text
        await self.turn.render(messages, None, None)

    async def _texts(self) -> AsyncIterator[str]:
        if self.turn_text is None:
            yield REFUSAL["answer"]
            return
        shown = TrueMarks(len(self.sources))
        async for piece in self.turn.texts():
            yield shown.add(piece)
        yield shown.end()
        self.finish_reason = self.turn.answer.finish_reason

    def _found(self) -> dict[str, Any]:
        return {"sources": self.sources, "asked": self.turn_text}

    def _said(self) -> dict[str, Any]:
        about = REFUSAL
        if self.turn_text is not None:
            about = outcome(without_false_marks(self.turn.answer.text, len(self.sources)))
        return {
            **about, "model": self.turn.speaker.name, "finish_reason": self.finish_reason, "usage": self.turn.usage(),
        }  # fmt: skip


def not_blank(text: str) -> str:
    if not text.strip():
        raise ValueError("it says nothing")
    return text


class TicketRequest(Strict):
    """A body of POST /v1/tickets/match."""

    text: Annotated[str, AfterValidator(not_blank)]
    product: str | None = None
    k: Annotated[int, Field(ge=1, le=MOST_MATCHES)] = 5


class TicketRoute:
    """The route. Tickets are matched one after the other; one whose client has gone before its turn is not."""

    def __init__(self, gateway: "Gateway", tickets: Tickets):
        self.gateway, self.tickets = gateway, tickets
        self._thread = ThreadPoolExecutor(1, "tickets")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        recipe = self.gateway.recipe
        body = await read_body(Request(scope, receive), recipe.max_body_bytes)
        with self.gateway.place():
            asked = parse(TicketRequest, body)
            match = partial(self.tickets.match, asked.text, asked.k, asked.product)
            try:
                async with asyncio.timeout(recipe.answer_timeout), unless_gone(receive):
                    matches = await asyncio.get_running_loop().run_in_executor(self._thread, match)
            except ClientGone:
                scope["outcome"] = GONE
                return
            except TimeoutError:
                raise Problem(503, f"no whole answer in {recipe.answer_timeout} s", code="timeout") from None
        await JSONResponse({"matches": [dataclasses.asdict(m) for m in matches]})(scope, receive, send)
