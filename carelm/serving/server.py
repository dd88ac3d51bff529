"""Listening: the address, uvicorn, and an end that lets answers finish."""

import asyncio
import signal
import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn

from carelm.errors import UserError
from carelm.recipe import Recipe
from carelm.serving.gateway import Gateway

KEEP_ALIVE_SECONDS = 30  # for the next request of a connection


def bind(recipe: Recipe) -> socket.socket:
    """The address; raises UserError where it is taken, or none of this machine's."""
    listening = socket.socket(socket.AF_INET6 if ":" in recipe.host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((recipe.host.strip("[]"), recipe.port))
    except OSError as error:
        raise UserError(
            f"port: {recipe.host} port {recipe.port} cannot be had ({error.strerror}); stop what listens there, or name "
            "another one, as --port 8001 (0 takes a free one)"
        ) from None
    return listening


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(gateway: Gateway, key: str | None, listening: socket.socket, ask: Callable[[], Any] | None = None) -> Any:
    """Serves until SIGTERM or Ctrl-C, or until `ask` has come back, whose value is returned. What has been asked by then is
    answered first."""
    config = uvicorn.Config(
        gateway.app(key), log_config=None, access_log=False, server_header=False, lifespan="off", ws="none",
        proxy_headers=False, timeout_keep_alive=KEEP_ALIVE_SECONDS,
    )  # fmt: skip
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
        return value

    return asyncio.run(run())
