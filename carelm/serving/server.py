"""Listening: the address, uvicorn, and an end that lets answers finish."""

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from carelm.errors import UserError
from carelm.recipe import Recipe
from carelm.serving.gateway import Gateway
from carelm.serving.log import Lines
from carelm.serving.security import LONGEST_HEAD
from carelm.serving.turn import FAREWELL_SECONDS
from carelm.serving.wire import BODY_SECONDS

KEEP_ALIVE_SECONDS = 30  # for the head of a connection's next request to come, the first one too
MOST_CONNECTIONS = 512  # open at once: half of the files that Linux lets a process open


def bind(recipe: Recipe) -> socket.socket:
    """The address; raises UserError where it is taken, or none of this machine's."""
    listening = socket.socket(socket.AF_INET6 if ":" in recipe.host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    with having(recipe):
        listening.bind((recipe.host.strip("[]"), recipe.port))
    return listening


def listen(recipe: Recipe, listening: socket.socket) -> None:
    """From here on, who connects is waited for; raises UserError where another server has begun to listen since `bind`."""
    with having(recipe):
        listening.listen()


@contextmanager
def having(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"port: {recipe.host} port {recipe.port} cannot be had ({error.strerror}); stop what listens there, or name "
            "another one, as --port 8001 (0 takes a free one)"
        ) from None


def address_of(listening: socket.socket) -> str:
    """Where it is asked from this machine."""
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Connection(H11Protocol):
    """A client's connection. It is closed where the head of a request takes too long (uvicorn waits for it without end), and
    where too many are open the oldest one whose request is not there yet, or not all of it, makes room. Where there is none,
    the newcomer's requests are told that it is crowded."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._await_head()
        if len(self.connections) <= MOST_CONNECTIONS:
            return
        waiting = [other for other in self.connections if other is not self and (other.is_waiting or other.is_sending)]
        if waiting:
            min(waiting, key=lambda other: other.waits_since).transport.close()
        elif len(self.connections) > MOST_CONNECTIONS + 64:
            transport.abort()
        else:
            self.app = _crowded(self.app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._head.cancel()
        self._await_head()

    @property
    def is_waiting(self) -> bool:
        """Whether no request is under way."""
        return self.cycle is None or self.cycle.response_complete

    @property
    def is_sending(self) -> bool:
        """Whether the body of its request still comes; one who sends slowly would otherwise keep others out."""
        return self.cycle is not None and self.cycle.more_body

    def _await_head(self) -> None:
        self.waits_since = self.loop.time()
        self._head = self.loop.call_later(KEEP_ALIVE_SECONDS, self._give_up)

    def _give_up(self) -> None:
        if self.is_waiting:
            self.transport.close()


def _crowded(app: ASGIApp) -> ASGIApp:
    async def tell(scope: Scope, receive: Receive, send: Send) -> None:
        await app({**scope, "is_crowded": True}, receive, send)

    return tell


def serve(gateway: Gateway, key: str | None, listening: socket.socket, ask: Callable[[], Any] | None = None) -> Any:
    """Serves until SIGTERM or Ctrl-C, or until `ask` has come back, whose value is returned. What has been asked by then is
    answered first."""
    config = uvicorn.Config(
        gateway.app(key), log_config=None, access_log=False, server_header=False, lifespan="off", ws="none",
        proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS, http=Connection, h11_max_incomplete_event_size=LONGEST_HEAD,
        timeout_graceful_shutdown=gateway.recipe.answer_timeout + BODY_SECONDS + FAREWELL_SECONDS,
    )  # fmt: skip
    said = logging.getLogger("uvicorn.error")
    said.handlers, said.propagate, said.level = [Lines(logging.WARNING)], False, logging.WARNING
    if threading.current_thread() is threading.main_thread():
        for stop in (signal.SIGINT, signal.SIGTERM):
            signal.signal(stop, lambda *_: None)  # uvicorn sends itself the signal again once it has stopped

    async def run() -> Any:
        server, value = uvicorn.Server(config), None
        serving = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            if ask:
                while not server.started and not serving.done():
                    await asyncio.sleep(0.01)
                value = await asyncio.to_thread(ask)
                server.should_exit = True
            await serving
        finally:
            server.should_exit = True
            await gateway.engine.close()
            if tasks := server.server_state.tasks:  # a second signal has cut their answers off, which they say now
                await asyncio.wait(tasks, timeout=FAREWELL_SECONDS)
        return value

    return asyncio.run(run())
