"""What goes over a client's connection: a body counted as it comes, events of a stream, and the client that goes."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.requests import Request
from starlette.types import Receive, Send

from carelm.serving.requests import Problem

BODY_SECONDS = 20  # for a body to come
MOST_DRAINED = 2**26  # bytes of a body too large that are read and let go, so that its sender gets to the reply


class ClientGone(Exception):
    """Nobody waits for this answer any more."""


async def read_body(request: Request, most: int) -> bytes:
    """A request's body, counted as it comes.

    Raises:
        Problem: 413 where it is more than `most` bytes, 408 where it takes too long.
    """
    too_large = Problem(413, f"the body is larger than {most} bytes", code="body_too_large", connection="close")
    announced = request.headers.get("content-length", "")
    waits = "expect" in request.headers  # it sends nothing until it is told to go on
    if announced.isdecimal() and int(announced) > (most if waits else MOST_DRAINED):
        raise too_large
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
        raise too_large
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


class Events:
    """A reply of server-sent events; it begins with the first one.

    Args:
        send: of the request.
        headers: of the reply, beside those of a stream.
    """

    def __init__(self, send: Send, headers: dict[str, str]):
        self._send, self._headers, self._has_begun = send, headers, False

    async def put(self, value: Any, name: str | None = None, *, is_last: bool = False) -> None:
        """One event: a value as JSON, or a text as it is; under a name, or without."""
        if not self._has_begun:
            self._has_begun = True
            headers = {"content-type": "text/event-stream; charset=utf-8", "x-accel-buffering": "no", **self._headers}
            pairs = [(key.encode(), text.encode()) for key, text in headers.items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": pairs})
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        event = f"event: {name}\n" if name else ""
        data = f"{event}data: {text}\n\n".encode()
        await self._send({"type": "http.response.body", "body": data, "more_body": not is_last})
