"""One answer on its way to a client: its prompt, its text as it comes, its end. Every route that answers is made of it."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from starlette.types import Message, Receive, Scope, Send

from carelm.models.decoding import Decoding
from carelm.serving.answer import Answer
from carelm.serving.engine import EngineError
from carelm.serving.log import note
from carelm.serving.prompts import Asked
from carelm.serving.requests import Problem
from carelm.serving.wire import ClientGone, Events, unless_gone
from carelm.talk.speaker import Speaker

if TYPE_CHECKING:
    from carelm.serving.gateway import Gateway

FAREWELL_SECONDS = 5  # for an error to leave where an answer has begun
GONE = 499  # in the counts: a request whose client has gone


class Turn:
    """One answer.

    Args:
        gateway: names the engine, the time an answer may take, and the counts.
        scope, receive, send: of the request, whose body has been read.
        speaker: the model that is asked.
        decoding: how its tokens are chosen.
        stops: texts that end the answer.

    Attributes:
        id: the answer's, which the log and the header x-request-id have.
        headers: of the reply, once the prompt is made.
        send: what the route sends by.
    """

    def __init__(
        self, gateway: "Gateway", scope: Scope, receive: Receive, send: Send, *, speaker: Speaker, decoding: Decoding,
        stops: list[str],
    ):  # fmt: skip
        self.gateway, self.scope, self.receive, self.speaker, self.decoding = gateway, scope, receive, speaker, decoding
        self.began = time.monotonic()
        self.prompt = Asked([])
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.answer = Answer(speaker.chat, speaker.stops, stops)
        self.headers = {"x-request-id": self.id}
        self._first_token: float | None = None
        self._events: Events | None = None
        self._has_begun = False

        async def noting(message: Message) -> None:
            self._has_begun = True
            await send(message)

        self.send = noting

    async def deliver(self, write: Callable[[], Awaitable[None]]) -> None:
        """Has `write` render, answer and send, in the time that an answer may take and while the client is there; says and
        counts how it ended.

        Raises:
            Problem: where nothing has been sent yet; else the error is the stream's last event.
        """
        try:
            async with asyncio.timeout(self.gateway.recipe.answer_timeout), unless_gone(self.receive):
                await write()
            self._note("answered", 200)
        except ClientGone:
            self._note("the client has gone", GONE)
        except TimeoutError:
            self._note("out of time", 503)
            seconds = self.gateway.recipe.answer_timeout
            await self._fail(Problem(503, f"no whole answer in {seconds} s", code="timeout"))
        except EngineError as error:
            self._note(str(error), 503)
            await self._fail(Problem(503, str(error), code="engine_error"))

    async def render(self, messages: list[dict[str, Any]], tools: list[dict] | None, longest: int | None) -> None:
        """Makes the prompt; what did not fit is said in the headers."""
        prompts = self.gateway.prompts
        self.prompt = await prompts.make(messages, self.speaker, tools=tools, longest_answer=longest)
        self.headers |= self.prompt.headers

    async def texts(self) -> AsyncIterator[str]:
        """The answer's text, piece by piece."""
        async with aclosing(self.gateway.engine.answer(self.speaker.name, self.prompt.ids, self.decoding)) as tokens:
            async for token in tokens:
                self._first_token = self._first_token or time.monotonic() - self.began
                yield self.answer.add(token)
                if self.answer.finish_reason == "stop":
                    break
        yield self.answer.end()

    def events(self, error_name: str | None = None) -> Events:
        """The reply as a stream, in which an error has this name."""
        self._events, self._error_name = Events(self.send, self.headers), error_name
        return self._events

    def usage(self) -> dict[str, int]:
        asked, answered = len(self.prompt.ids), len(self.answer.tokens)
        return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}

    async def _fail(self, problem: Problem) -> None:
        """Ends with an error: as a status, or as an event where the answer has begun."""
        if not self._has_begun:
            raise problem
        if self._events:
            with suppress(TimeoutError):  # a client that reads nothing keeps no place
                async with asyncio.timeout(FAREWELL_SECONDS):
                    await self._events.put(problem.body(), self._error_name, is_last=True)

    def _note(self, how: str, status: int) -> None:
        """Counts the answer, and says how it ended: an id, counts and times."""
        self.scope["outcome"] = status
        metrics, name, total = self.gateway.metrics, self.speaker.name, time.monotonic() - self.began
        metrics.prompt_tokens.labels(name).inc(len(self.prompt.ids))
        metrics.answer_tokens.labels(name).inc(len(self.answer.tokens))
        if self._first_token is not None:
            metrics.first_token.labels(name).observe(self._first_token)
        metrics.total.labels(name).observe(total)
        note(
            f"{self.id}: {name}, {how}: {len(self.prompt.ids)} + {len(self.answer.tokens)} tokens{self.prompt.in_short}, "
            f"first after {self._first_token or total:.2f} s, all after {total:.2f} s"
        )
