"""Who may ask: the key, the address, the web pages; and the headers that every reply has."""

import hmac
import ipaddress
import os
import re
import traceback
from collections.abc import Callable
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from carelm.errors import UserError
from carelm.files import locate
from carelm.recipe import Recipe
from carelm.serving.log import note
from carelm.serving.requests import Problem

KEY_VARIABLE = "CARELM_API_KEY"
# Without a key: no text of anyone's, and the page that asks for it.
OPEN = {"/health", "/", "/page.js", "/server.js", "/shop.js", "/page.css"}
ROUTES = ("/v1/chat/completions", "/v1/models", "/v1/feedback", "/health", "/metrics")
OF_A_SHOP = {"/v1/shop/chat": "documents", "/v1/tickets/match": "tickets"}  # and the key of the recipe that each needs
# Of OpenAI's, and with an address that lacks /v1 or has it twice: what clients ask that are not set up yet.
ELSEWHERE = ("/chat/completions", "/models", "/v1/v1/chat/completions", "/v1/v1/models", "/v1/completions", "/v1/responses",
             "/v1/embeddings")  # fmt: skip
WATCHED = {"/health", "/metrics"}  # by those who look after the server: answered however many ask
LONGEST_HEAD = 2**14  # bytes of a request's headers
AGAIN_SECONDS = 2  # after which one who was told to come again may
TOLD = ("x-request-id", "x-dropped-messages", "x-message-cut", "retry-after")  # headers that pages elsewhere may read
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def read_key(recipe: Recipe) -> str | None:
    """The key that clients must send, of `api_key_file` or the environment; None where there is none.

    Raises:
        UserError: where the file cannot be read, the key is not one word, or it is missing and others reach the address.
    """
    key = os.environ.get(KEY_VARIABLE)
    where = KEY_VARIABLE
    if recipe.api_key_file:
        where = f"api_key_file: {recipe.api_key_file}"
        try:
            key = Path(locate(recipe.api_key_file)).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is no text"
            raise UserError(f"{where} cannot be read ({reason}); name a file that holds the key") from None
    if key is None:
        if not is_loopback(recipe.host):
            raise UserError(
                f"host: others reach {recipe.host}, so a key is needed; name a file that holds one with api_key_file, or set "
                f"{KEY_VARIABLE}"
            )
        return None
    key = key.strip()
    if not (key.isascii() and key.isprintable() and key and " " not in key):
        raise UserError(f"{where} holds no key; write one word of letters and digits")
    return key


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Guard:
    """Lets in who may ask, and puts the headers on every reply.

    Args:
        app: what is guarded.
        key: what clients must send as `Authorization: Bearer KEY`, or None.
        is_local: whether it listens at a loopback address: then it is asked by its names alone, so that a name elsewhere that
            leads to it (DNS rebinding) does not let a web page in.
        origins: web pages elsewhere that may ask.
        noted: is told of each request's path and status once it is over: the `outcome` in its scope, or the reply's.
    """

    def __init__(
        self, app: ASGIApp, *, key: str | None, is_local: bool, origins: list[str], noted: Callable[[str, int], None]
    ):
        self.app, self.key, self.is_local, self.origins = app, key and f"Bearer {key}".encode(), is_local, origins
        self.noted = noted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        status = None

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                status = message["status"]
            await send(message)

        try:
            await (self._refusal(scope) or self.app)(scope, receive, send_with_headers)
        except Exception as error:  # the app has replied; its traceback may hold a client's text
            at = traceback.extract_tb(error.__traceback__)[-1]
            note(f"{shown(scope['path'])}: {type(error).__name__} at {Path(at.filename).name}:{at.lineno}")
        finally:
            if found := scope.get("outcome", status):
                self.noted(scope["path"], found)

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = Headers(scope=scope)
        path, host, origin = scope["path"], headers.get("host", ""), headers.get("origin")
        if sum(len(name) + len(value) for name, value in scope["headers"]) > LONGEST_HEAD:
            return reply(
                Problem(431, f"the headers are larger than {LONGEST_HEAD} bytes", code="headers_too_large"), path
            )
        if scope.get("is_crowded") and path not in WATCHED:
            return reply(
                Problem(
                    503, "too many connections are open; come again", code="connections",
                    retry_after=str(AGAIN_SECONDS), connection="close",
                ), path,
            )  # fmt: skip
        if self.is_local and not is_loopback(re.sub(r":\d+$", "", host)):
            return reply(
                Problem(
                    403, "this server is asked as localhost alone; let the proxy before it pass on Host: 127.0.0.1",
                    code="host",
                ), path,
            )  # fmt: skip
        if origin is not None and origin not in self.origins and origin.partition("://")[2] != host:
            return reply(
                Problem(
                    403, "only web pages that cors_origins names may ask this server from elsewhere", code="origin"
                ),
                path,
            )
        if self.key is None or path in OPEN:
            return None
        if not hmac.compare_digest(headers.get("authorization", "").encode(), self.key):
            return reply(
                Problem(
                    401, "the key is missing or wrong; send Authorization: Bearer KEY", code="invalid_api_key",
                    www_authenticate="Bearer",
                ), path,
            )  # fmt: skip
        return None


class Pages(CORSMiddleware):
    """Lets web pages elsewhere ask. A preflight that is refused is said: the browser tells its page nothing."""

    def __init__(self, app: ASGIApp, origins: list[str]):
        super().__init__(
            app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"], expose_headers=TOLD
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code >= 400:
            note(f"preflight: {response.status_code}, only web pages that cors_origins names may ask, by GET and POST")
        return response


def reply(problem: Problem, path: str) -> JSONResponse:
    """The reply that says why. So does one line here, without a text of a client's; what breaks in mid-answer is said there."""
    if problem.status < 500 or problem.code in ("disk", "connections"):
        note(f"{shown(path)}: {problem.status}, {problem.message}")
    return JSONResponse(problem.body(), problem.status, problem.headers)


def shown(path: str) -> str:
    """A path as the log has it: one that a client makes up may hold anything."""
    if path.startswith("/v1/models/"):
        return "/v1/models/..."
    return path if path in (*ROUTES, *OF_A_SHOP, *ELSEWHERE) else "another path"
