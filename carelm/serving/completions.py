"""POST /v1/chat/completions: an answer in OpenAI's shapes, whole or as a stream."""

import secrets
import time
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from carelm.serving.requests import ChatRequest, parse
from carelm.serving.turn import Turn
from carelm.serving.wire import read_body

if TYPE_CHECKING:
    from carelm.serving.gateway import Gateway


class Completions:
    """The route."""

    def __init__(self, gateway: "Gateway"):
        self.gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        recipe = self.gateway.recipe
        body = await read_body(Request(scope, receive), recipe.max_body_bytes)
        with self.gateway.place():  # from now on: one who sends slowly takes nobody's
            asked = parse(ChatRequest, body)
            turn = Turn(
                self.gateway, scope, receive, send, speaker=self.gateway.speaker(asked.model), stops=asked.stop,
                decoding=asked.decoding(recipe, secrets.randbits(63)),
            )  # fmt: skip
            completion = Completion(asked, turn)
            await turn.deliver(completion.stream if asked.stream else completion.whole)


class Completion:
    """One answer as OpenAI writes it."""

    def __init__(self, asked: ChatRequest, turn: Turn):
        self.asked, self.turn, self.created = asked, turn, int(time.time())

    async def _render(self) -> None:
        await self.turn.render(self.asked.messages, self.asked.tools or None, self.asked.longest_answer)

    async def whole(self) -> None:
        await self._render()
        async for _ in self.turn.texts():
            pass
        answer = self.turn.answer
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer.text},
            "finish_reason": answer.finish_reason,
            "logprobs": None,
        }
        body = {**self._head("chat.completion"), "choices": [choice], "usage": self.turn.usage()}
        if self.asked.return_token_ids:
            choice["token_ids"] = answer.tokens
            body["prompt_token_ids"] = self.turn.prompt.ids
        await JSONResponse(body, headers=self.turn.headers)(self.turn.scope, self.turn.receive, self.turn.send)

    async def stream(self) -> None:
        await self._render()
        events, has_begun = self.turn.events(), False
        async for piece in self.turn.texts():
            if not has_begun:
                has_begun = True
                await events.put(self._chunk({"role": "assistant", "content": ""}))
            if piece:
                await events.put(self._chunk({"content": piece}))
        await events.put(self._chunk({}, self.turn.answer.finish_reason))
        if self.asked.includes_usage:
            await events.put({**self._head("chat.completion.chunk"), "choices": [], "usage": self.turn.usage()})
        await events.put("[DONE]", is_last=True)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.turn.id, "object": kind, "created": self.created, "model": self.turn.speaker.name}

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}
