"""The gateway: OpenAI's API over an engine. What is asked is rendered as in training, and answered as in the evaluation.

An engine has `models`, `answer(model, prompt_ids, decoding)`, `ready()` and `close()` (see carelm.serving.engine). All that is
not the next token is done in this room: what may be asked (requests), the window (prompts), the queue (here), stop texts
(answer), the time an answer takes and its end (turn).
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from carelm.chat.question import asked_columns, form_of
from carelm.recipe import Recipe
from carelm.retrieval.assistant import Assistant
from carelm.retrieval.tickets import Tickets
from carelm.serving import feedback
from carelm.serving.completions import Completions
from carelm.serving.metrics import Metrics
from carelm.serving.prompts import Prompts
from carelm.serving.requests import Problem, parse
from carelm.serving.security import AGAIN_SECONDS, OF_A_SHOP, ROUTES, Guard, Pages, is_loopback, reply
from carelm.serving.shop import Shop, TicketRoute
from carelm.serving.turn import GONE
from carelm.serving.wire import read_body
from carelm.talk.speaker import Speaker

PAGE = Path(__file__).parent / "page"


class Gateway:
    """One server's state and routes. A route that answers is a file of its own (see carelm.serving.completions): it takes a
    `place`, reads the body, and lets a `Turn` deliver.

    Args:
        recipe: names templates, window, decoding, limits.
        speakers: the models, of which tokenizer and window count here; their weights are the engine's.
        engine: what answers.
        assistant: looks up the shop's documents, where the recipe has any.
        tickets: looks up past tickets, where it has any.
    """

    def __init__(
        self, recipe: Recipe, speakers: list[Speaker], engine: Any, assistant: Assistant | None = None,
        tickets: Tickets | None = None,
    ):  # fmt: skip
        self.recipe, self.engine, self.assistant, self.tickets = recipe, engine, assistant, tickets
        self.speakers = {speaker.name: speaker for speaker in speakers}
        self.prompts = Prompts(recipe)
        self.metrics = Metrics()
        self.started = int(time.time())
        self.in_flight = 0
        self.marks: list[str | None] = []  # of the rows of feedback that have come

    def app(self, key: str | None) -> ASGIApp:
        """The whole application, guarded by this key."""
        app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
        app.add_route("/v1/chat/completions", Completions(self), methods=["POST"])
        if self.assistant:
            app.add_route("/v1/shop/chat", Shop(self, self.assistant), methods=["POST"])
        if self.tickets:
            app.add_route("/v1/tickets/match", TicketRoute(self, self.tickets), methods=["POST"])
        app.get("/v1/models")(self.list_models)
        app.get("/v1/models/{name:path}")(self.show_model)
        app.post("/v1/feedback")(self.keep_feedback)
        app.api_route("/health", methods=["GET", "HEAD"])(self.health)
        app.get("/metrics")(self.show_metrics)
        app.get("/")(lambda: FileResponse(PAGE / "page.html"))
        for name in ("page.js", "server.js", "shop.js", "page.css"):
            app.add_route(f"/{name}", lambda request, name=name: FileResponse(PAGE / name))
        app.exception_handler(Problem)(lambda request, problem: reply(problem, request.scope["path"]))
        app.exception_handler(HTTPException)(
            lambda request, error: reply(_to_problem(error, request.scope["path"]), request.scope["path"])
        )
        app.exception_handler(ClientDisconnect)(lambda request, error: Response(status_code=GONE))  # in mid-body
        app.exception_handler(Exception)(
            lambda request, error: reply(Problem(500, "the server failed at this request"), request.scope["path"])
        )
        origins = [origin.rstrip("/").lower() for origin in self.recipe.cors_origins]  # as browsers write it
        guarded = Guard(app, key=key, is_local=is_loopback(self.recipe.host), origins=origins, noted=self.note_reply)
        return Pages(guarded, origins) if origins else guarded

    def note_reply(self, path: str, status: int) -> None:
        self.metrics.requests.labels(path if path in (*ROUTES, *OF_A_SHOP) else "other", status).inc()

    # Small routes

    def list_models(self) -> dict[str, Any]:
        """OpenAI's list; beside it what else this server has: `shop`, with the values that its filters take, and
        `tickets`, with their products and whether a model says which are the same."""
        more: dict[str, Any] = {}
        if self.assistant:
            more["shop"] = {"filters": self.assistant.filters()}
        if self.tickets:
            more["tickets"] = {"products": self.tickets.products(), "has_matcher": bool(self.tickets.matcher)}
        return {"object": "list", "data": [self._model(name) for name in self.engine.models], **more}

    def show_model(self, name: str) -> dict[str, Any]:
        return self._model(self.speaker(name).name)

    def _model(self, name: str) -> dict[str, Any]:
        """OpenAI's fields, vLLM's `max_model_len` (tokens of a prompt with its answer), and `max_prompt_len` and `columns`."""
        more = {"columns": asked_columns(self.recipe)} if form_of(self.recipe) else {}
        return {
            "id": name, "object": "model", "created": self.started, "owned_by": "carelm",
            "max_model_len": self.speakers[name].positions, "max_prompt_len": self.speakers[name].limit, **more,
        }  # fmt: skip

    async def health(self) -> JSONResponse:
        ready = await self.engine.ready()
        return JSONResponse({"status": "ok" if ready else "the engine does not answer"}, 200 if ready else 503)

    def show_metrics(self) -> Response:
        return Response(self.metrics.as_text(), media_type=self.metrics.content_type)

    async def keep_feedback(self, request: Request) -> JSONResponse:
        said = parse(feedback.Feedback, await read_body(request, self.recipe.max_body_bytes))
        self.speaker(said.model)  # it must be one of ours
        row = said.row(self.recipe, self.prompts.as_trained(said.messages))
        try:
            path = await asyncio.to_thread(feedback.append, self.recipe.output_dir, row)
        except OSError:
            raise Problem(
                503, "the feedback cannot be written; look at the disk and its permissions", code="disk"
            ) from None
        self.marks.append(row["mark"])
        return JSONResponse({"saved": str(path)}, 201)

    # What routes are made of

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


def _to_problem(error: HTTPException, path: str) -> Problem:
    """What is said of a path or a method that there is none of."""
    if error.status_code == 405 and (method := (error.headers or {}).get("Allow")):
        return Problem(405, f"this route is asked by {method}", code="method", allow=method)
    if error.status_code == 404 and path in OF_A_SHOP:
        return Problem(404, f"{OF_A_SHOP[path]}: the recipe of this server names none, so that it has no such route")
    if error.status_code == 404:
        return Problem(404, f"there is no such route; there are {', '.join(ROUTES)}, and the API's address ends in /v1")
    return Problem(error.status_code, f"this cannot be asked ({error.status_code})")
