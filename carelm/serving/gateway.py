"""The gateway: OpenAI's API over an engine. What is asked is rendered as in training, and answered as in the evaluation.

An engine has `models`, `answer(model, prompt_ids, decoding)`, `ready()` and `close()` (see carelm.serving.engine). All that is
not the next token is done here: what may be asked, the window, stop texts, usage, the queue, the time.
"""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from carelm import ranks
from carelm.chat.chat import Prompt
from carelm.chat.question import as_trained, asked_columns, form_of, system_message
from carelm.errors import UserError
from carelm.recipe import Recipe
from carelm.serving import feedback
from carelm.serving.answer import Answer
from carelm.serving.engine import EngineError
from carelm.serving.metrics import Metrics
from carelm.serving.requests import ChatRequest, Problem, parse
from carelm.serving.security import ROUTES, Guard, Pages, is_loopback, reply
from carelm.talk.speaker import Speaker

PAGE = Path(__file__).parent / "page"
BODY_SECONDS = 20  # for a body to come
FAREWELL_SECONDS = 5  # for an error to leave where an answer has begun
MOST_DRAINED = 2**26  # bytes of a body too large that are read and let go, so that its sender gets to the reply
GONE = 499  # in the counts: a request whose client has gone
AGAIN_SECONDS = 2  # after which one who was told to come again may


class ClientGone(Exception):
    """Nobody waits for this answer any more."""


class Gateway:
    """One server's state and routes.

    Args:
        recipe: names templates, window, decoding, limits.
        speakers: the models, of which tokenizer and window count here; their weights are the engine's.
        engine: what answers.
    """

    def __init__(self, recipe: Recipe, speakers: list[Speaker], engine: Any):
        self.recipe, self.engine = recipe, engine
        self.speakers = {speaker.name: speaker for speaker in speakers}
        self.metrics = Metrics()
        self.started = int(time.time())
        self.in_flight = 0
        self.marks: list[str | None] = []  # of the rows of feedback that have come
        self.system, self.tagged_system = system_message(recipe)
        # Long texts take their time, and a tokenizer is used by one thread at a time.
        self.rendering = ThreadPoolExecutor(1, "rendering")

    def app(self, key: str | None) -> ASGIApp:
        """The whole application, guarded by this key."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_route("/v1/chat/completions", Chat(self), methods=["POST"])
        app.get("/v1/models")(self.list_models)
        app.get("/v1/models/{name:path}")(self.show_model)
        app.post("/v1/feedback")(self.keep_feedback)
        app.get("/health")(self.health)
        app.get("/metrics")(self.show_metrics)
        app.get("/")(lambda: FileResponse(PAGE / "page.html"))
        app.get("/page.js")(lambda: FileResponse(PAGE / "page.js"))
        app.get("/page.css")(lambda: FileResponse(PAGE / "page.css"))
        app.exception_handler(Problem)(lambda request, problem: reply(problem, request.scope["path"]))
        app.exception_handler(HTTPException)(lambda request, error: reply(to_problem(error), request.scope["path"]))
        app.exception_handler(ClientDisconnect)(lambda request, error: Response(status_code=GONE))  # in mid-body
        app.exception_handler(Exception)(
            lambda request, error: reply(Problem(500, "the server failed at this request"), request.scope["path"])
        )
        origins = [origin.rstrip("/").lower() for origin in self.recipe.cors_origins]  # as browsers write it
        guarded = Guard(app, key=key, is_local=is_loopback(self.recipe.host), origins=origins, noted=self.note_reply)
        return Pages(guarded, origins) if origins else guarded

    def note_reply(self, path: str, status: int) -> None:
        self.metrics.requests.labels(path if path in ROUTES else "other", status).inc()

    # Small routes

    def list_models(self) -> dict[str, Any]:
        return {"object": "list", "data": [self._model(name) for name in self.engine.models]}

    def show_model(self, name: str) -> dict[str, Any]:
        return self._model(self.speaker(name).name)

    def _model(self, name: str) -> dict[str, Any]:
        columns = {"columns": asked_columns(self.recipe)} if form_of(self.recipe) else {}
        return {"id": name, "object": "model", "created": self.started, "owned_by": "carelm", **columns}

    async def health(self) -> JSONResponse:
        ready = await self.engine.ready()
        return JSONResponse({"status": "ok" if ready else "the engine does not answer"}, 200 if ready else 503)

    def show_metrics(self) -> Response:
        return Response(self.metrics.as_text(), media_type=self.metrics.content_type)

    async def keep_feedback(self, request: Request) -> JSONResponse:
        said = parse(feedback.Feedback, await read_body(request, self.recipe.max_body_bytes))
        self.speaker(said.model)  # it must be one of ours
        row = said.row(self.recipe, self._as_trained(said.messages))
        try:
            path = await asyncio.to_thread(feedback.append, self.recipe.output_dir, row)
        except OSError:
            raise Problem(
                503, "the feedback cannot be written; look at the disk and its permissions", code="disk"
            ) from None
        self.marks.append(row["mark"])
        return JSONResponse({"saved": str(path)}, 201)

    # What the chat route is made of

    def speaker(self, name: str) -> Speaker:
        if name not in self.speakers:
            known = ", ".join(self.speakers)
            raise Problem(404, f"model: there is no such model; {known}", param="model", code="model_not_found")
        return self.speakers[name]

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue.

        Raises:
            Problem: 429, where there is none.
        """
        if self.in_flight >= self.recipe.max_queue:
            raise Problem(
                429, "the queue is full; come again", code="rate_limit_exceeded", retry_after=str(AGAIN_SECONDS)
            )
        self.in_flight += 1
        self.metrics.queue.set(self.in_flight)
        try:
            yield
        finally:
            self.in_flight -= 1
            self.metrics.queue.set(self.in_flight)

    def _as_trained(self, turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
        try:
            return as_trained(self.recipe, turns, self.system, self.tagged_system)
        except UserError as error:  # it names columns and holds no text
            form = form_of(self.recipe)
            content = f'; each message of a user\'s is sent as "content": {json.dumps(form)}' if form else ""
            raise Problem(400, f"messages: {error}{content}", param="messages", code="messages") from None

    def render(self, asked: ChatRequest, speaker: Speaker) -> tuple[Prompt, int]:
        """The prompt, and how many messages have gone so that it fits the window.

        Raises:
            Problem: 400, where the template refuses the conversation, or the window has no room.
        """
        limit = speaker.limit_for(asked.longest_answer)
        fits = (
            f"with {speaker.positions - speaker.limit} or less the whole window of {speaker.limit} tokens is left to it"
        )
        if limit < 1:
            raise Problem(
                400, f"max_tokens: no room is left for a prompt in the {speaker.positions} positions of {speaker.name}; {fits}",
                param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        messages = self._as_trained(asked.messages)
        try:
            prompt = speaker.chat.fit_prompt(messages, limit, tools=asked.tools or None)
        except UserError as error:
            if str(error).startswith("max_length"):
                raise Problem(
                    400, f"messages: no part of them fits the window of {limit} tokens that max_length and max_tokens leave; "
                    f"as max_tokens {fits}",
                    param="messages", code="context_length_exceeded",
                ) from None  # fmt: skip
            if asked.tools and self._takes(messages, speaker, limit):
                raise Problem(
                    400, "tools: the model's chat template has no place for them; leave them out",
                    param="tools", code="chat_template",
                ) from None  # fmt: skip
            raise Problem(
                400, "messages: the model's chat template does not take this conversation: its roles, their order, or a text "
                "that it would change or leave out", param="messages", code="chat_template",
            ) from None  # fmt: skip
        return prompt, len(messages) - len(prompt.messages)

    def _takes(self, messages: list[dict[str, Any]], speaker: Speaker, limit: int) -> bool:
        """Whether the template takes this conversation without tools."""
        try:
            speaker.chat.fit_prompt(messages, limit)
        except UserError:
            return False
        return True


class Chat:
    """POST /v1/chat/completions."""

    def __init__(self, gateway: Gateway):
        self.gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, request = self.gateway, Request(scope, receive)
        began = time.monotonic()
        with gateway.place():
            asked = parse(ChatRequest, await read_body(request, gateway.recipe.max_body_bytes))
            turn = Turn(gateway, asked, gateway.speaker(asked.model), began)
            try:
                async with asyncio.timeout(gateway.recipe.answer_timeout), unless_gone(receive):
                    await turn.render()
                    await (turn.stream(send) if asked.stream else turn.answer_whole(scope, receive, send))
                turn.note("answered", 200)
            except ClientGone:
                turn.note("the client has gone", GONE)
            except TimeoutError:
                turn.note("out of time", 503)
                await turn.fail(
                    send, Problem(503, f"no whole answer in {gateway.recipe.answer_timeout} s", code="timeout")
                )
            except EngineError as error:
                turn.note(str(error), 503)
                await turn.fail(send, Problem(503, str(error), code="engine_error"))


class Turn:
    """One answer on its way to a client."""

    def __init__(self, gateway: Gateway, asked: ChatRequest, speaker: Speaker, began: float):
        self.gateway, self.asked, self.speaker, self.began = gateway, asked, speaker, began
        self.prompt = Prompt([], [], None)
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.answer = Answer(speaker.chat, speaker.stops, asked.stop)
        self.headers = {"x-request-id": self.id}
        self.first_token: float | None = None
        self.has_begun = False

    async def render(self) -> None:
        """Makes the prompt; what did not fit is said in the headers."""
        gateway = self.gateway
        render = partial(gateway.render, self.asked, self.speaker)
        self.prompt, dropped = await asyncio.get_running_loop().run_in_executor(gateway.rendering, render)
        if dropped:
            self.headers["x-dropped-messages"] = str(dropped)
        if self.prompt.change == "prompt cut":
            self.headers["x-message-cut"] = "the longest message, at its end"

    async def texts(self) -> AsyncIterator[str]:
        """The answer's text, piece by piece."""
        decoding = self.asked.decoding(self.gateway.recipe, secrets.randbits(63))
        async with aclosing(self.gateway.engine.answer(self.speaker.name, self.prompt.ids, decoding)) as tokens:
            async for token in tokens:
                self.first_token = self.first_token or time.monotonic() - self.began
                yield self.answer.add(token)
                if self.answer.finish_reason == "stop":
                    break
        yield self.answer.end()

    async def answer_whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        async for _ in self.texts():
            pass
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.answer.text},
            "finish_reason": self.answer.finish_reason,
            "logprobs": None,
        }
        body = {**self._head("chat.completion"), "choices": [choice], "usage": self._usage()}
        if self.asked.return_token_ids:
            choice["token_ids"] = self.answer.tokens
            body["prompt_token_ids"] = self.prompt.ids
        self.has_begun = True
        await JSONResponse(body, headers=self.headers)(scope, receive, send)

    async def stream(self, send: Send) -> None:
        async for piece in self.texts():
            if not self.has_begun:
                await self._begin(send)
                await self._event(send, self._chunk({"role": "assistant", "content": ""}))
            if piece:
                await self._event(send, self._chunk({"content": piece}))
        await self._event(send, self._chunk({}, self.answer.finish_reason))
        if self.asked.includes_usage:
            await self._event(send, {**self._head("chat.completion.chunk"), "choices": [], "usage": self._usage()})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})

    async def fail(self, send: Send, problem: Problem) -> None:
        """Ends with an error: as a status, or as an event where the answer has begun."""
        if not self.has_begun:
            raise problem
        if self.asked.stream:
            with suppress(TimeoutError):  # a client that reads nothing keeps no place
                async with asyncio.timeout(FAREWELL_SECONDS):
                    await self._event(send, problem.body(), is_last=True)

    async def _begin(self, send: Send) -> None:
        self.has_begun = True
        headers = {"content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no", **self.headers}
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": pairs})

    async def _event(self, send: Send, value: dict[str, Any], is_last: bool = False) -> None:
        data = f"data: {json.dumps(value, ensure_ascii=False)}\n\n".encode()
        await send({"type": "http.response.body", "body": data, "more_body": not is_last})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.speaker.name}

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def _usage(self) -> dict[str, int]:
        asked, answered = len(self.prompt.ids), len(self.answer.tokens)
        return {"prompt_tokens": asked, "completion_tokens": answered, "total_tokens": asked + answered}

    def note(self, how: str, status: int) -> None:
        """Counts the answer, and says how it ended: an id, counts and times."""
        if status == GONE or (self.has_begun and status != 200):  # nobody has had it, or it was broken off
            self.gateway.note_reply(ROUTES[0], status)
        metrics, name, total = self.gateway.metrics, self.speaker.name, time.monotonic() - self.began
        metrics.prompt_tokens.labels(name).inc(len(self.prompt.ids))
        metrics.answer_tokens.labels(name).inc(len(self.answer.tokens))
        if self.first_token is not None:
            metrics.first_token.labels(name).observe(self.first_token)
        metrics.total.labels(name).observe(total)
        ranks.say(
            f"{self.id}: {name}, {how}: {len(self.prompt.ids)} + {len(self.answer.tokens)} tokens, "
            f"first after {self.first_token or total:.2f} s, all after {total:.2f} s"
        )


def to_problem(error: HTTPException) -> Problem:
    """What is said of a path or a method that there is none of."""
    if error.status_code == 405 and (method := (error.headers or {}).get("Allow")):
        return Problem(405, f"this route is asked by {method}", code="method", allow=method)
    return Problem(error.status_code, f"there is no such route ({error.status_code})")


async def read_body(request: Request, most: int) -> bytes:
    """A request's body, counted as it comes.

    Raises:
        Problem: 413 where it is more than `most` bytes, 408 where it takes too long.
    """
    body, length = b"", 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for piece in request.stream():
                length += len(piece)
                body = body + piece if length <= most else b""
                if length > MOST_DRAINED:
                    break
    except TimeoutError:
        raise Problem(408, f"the body has not come in {BODY_SECONDS} s", code="timeout", connection="close") from None
    if length > most:
        raise Problem(413, f"the body is larger than {most} bytes", code="body_too_large", connection="close")
    return body


@asynccontextmanager
async def unless_gone(receive: Receive) -> AsyncIterator[None]:
    """Ends what is within once the client has gone.

    Raises:
        ClientGone: then.
    """
    task, is_gone = asyncio.current_task(), False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if is_gone and task.uncancel() == 0:
            raise ClientGone from None
        raise
    finally:
        watcher.cancel()
