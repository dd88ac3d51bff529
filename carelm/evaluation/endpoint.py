"""An OpenAI-compatible endpoint: a request is sent whole, tried again where that may help, and answered in time or not at all.

Keys are read from the environment and written nowhere.
"""

import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from email.message import Message
from http.client import HTTPException
from typing import Any

from carelm import ranks
from carelm.errors import UserError, first_line

KEY = "OPENAI_API_KEY"
TIMEOUT_S = 120.0  # of one request, whole
PROBE_S = 30.0  # of the question whether it is there
WAITS_S = (1.0, 4.0)  # before the second and the third try
LONGEST_WAIT_S = 30.0  # that an endpoint may ask for
LARGEST_BYTES = 2**24  # of one reply
AT_A_TIME = 8
# What some models refuse, by the name to send it under instead; None: it is left out.
OTHERWISE = {"max_tokens": "max_completion_tokens", "temperature": None, "top_p": None, "seed": None}
REFUSED = re.compile(r"[Uu]nsupported (?:parameter|value): '(\w+)'")  # OpenAI's words for it
SHORTENED = ("x-message-cut", "x-dropped-messages")  # headers by which this project's server tells it
PASSES = {429, 500, 502, 503, 504}  # statuses that may pass


class Unusable(Exception):
    """What an endpoint did instead of answering, in words; trying again may help where `passes`."""

    def __init__(self, what: str, passes: bool = False, wait_s: float = 0.0, status: int | None = None):
        super().__init__(what)
        self.passes, self.wait_s, self.status = passes, wait_s, status
        found = REFUSED.search(what) if status == 400 else None
        self.refused = found[1] if found else None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the key to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class Reply:
    """A chat completion; `wire_ms` is the time of the try that brought it, `is_shortened` where it answers a part of what was
    asked, and says so."""

    text: str
    new_tokens: int
    prompt_tokens: int
    finish_reason: str
    wire_ms: float
    is_shortened: bool = False


@dataclass(frozen=True)
class Endpoint:
    """Where requests go.

    Attributes:
        url: without `/chat/completions`.
        name: who is asked, in what is said.
        key_name: the environment's variable with the key; empty for none.
        refused: keys of OTHERWISE that it has refused so far.
        limit_key: the recipe's key with the longest reply.
    """

    url: str
    name: str
    key_name: str = KEY
    refused: list[str] = field(default_factory=list)
    limit_key: str = "max_new_tokens"

    def problem(self) -> str | None:
        """Why nothing can be asked of it, in words that follow its address; None where it is there. One that lists no models
        may still answer."""
        try:
            self._send(urllib.request.Request(self.url + "/models", headers=self._headers()), PROBE_S)
        except Unusable as error:
            return str(error) if error.status in (None, 401, 403) else None
        return None

    def complete(self, body: dict[str, Any]) -> Reply:
        """The answer to a chat completion's body, in at most three tries; what the model refuses is sent otherwise.

        Raises:
            Unusable: after the last try.
        """
        waits = [*WAITS_S]
        while True:
            sent = {OTHERWISE[key] if key in self.refused else key: value for key, value in body.items()}
            sent.pop(None, None)
            started = time.perf_counter()
            try:
                address = self.url + "/chat/completions"
                request = urllib.request.Request(address, json.dumps(sent).encode(), self._headers())
                reply, headers = self._send(request, TIMEOUT_S)
                wire_ms = round(1e3 * (time.perf_counter() - started), 3)
                return Reply(*self._read(reply), wire_ms, any(name in headers for name in SHORTENED))
            except Unusable as error:
                if error.refused in OTHERWISE.keys() & sent.keys():
                    self._ask_otherwise(error.refused)
                elif waits and error.passes:
                    time.sleep(min(LONGEST_WAIT_S, max(waits.pop(0), error.wait_s)))
                else:
                    raise

    def _ask_otherwise(self, key: str) -> None:
        """All further requests go without a key that the endpoint refuses, or under its other name; said once."""
        if key not in self.refused:
            self.refused.append(key)
            ranks.say(f"{self.name}: {what_was_refused(key, self.limit_key)}")

    def _key(self) -> str:
        return os.environ.get(self.key_name, "").strip() if self.key_name else ""

    def _headers(self) -> dict[str, str]:
        key = self._key()
        return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}

    def _send(self, request: urllib.request.Request, timeout_s: float) -> tuple[bytes, Message]:
        """The reply's body and headers; `Unusable` where there is none in time, or one with an error."""
        end, parts, size = time.monotonic() + timeout_s, [], 0
        try:
            with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout_s) as reply:
                while part := reply.read1(2**16):
                    parts.append(part)
                    size += len(part)
                    if time.monotonic() > end:
                        raise TimeoutError
                    if size > LARGEST_BYTES:
                        raise Unusable(f"answers with more than {LARGEST_BYTES >> 20} MiB")
                return b"".join(parts), reply.headers
        except urllib.error.HTTPError as error:
            hint = f" (the key is read from {self.key_name})" if error.code in (401, 403) else ""
            asked_for = error.headers.get("Retry-After", "") if error.headers else ""
            wait_s = float(asked_for) if asked_for.isdecimal() else 0.0
            raise Unusable(
                f"answers {error.code}{hint}{self._reason(error)}", error.code in PASSES, wait_s, error.code
            ) from None
        except TimeoutError:
            raise Unusable(f"has not answered within {timeout_s:g} s", passes=True) from None
        except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise Unusable(f"has not answered within {timeout_s:g} s", passes=True) from None
            said = first_line(reason) if isinstance(reason, Exception) else str(reason)
            raise Unusable(f"cannot be reached ({self._hide(said)})", passes=True) from None

    def _reason(self, error: urllib.error.HTTPError) -> str:
        """What the endpoint says of its error, shortened and without the key."""
        try:
            said = error.read(2**14)
        except (OSError, HTTPException):
            return ""
        try:
            found = json.loads(said)
            found = found.get("error", found) if isinstance(found, dict) else found
            found = found.get("message", found) if isinstance(found, dict) else found
        except ValueError:
            found = said.decode(errors="replace")
        text = " ".join(str(found).split())[:200]
        return f": {self._hide(text)}" if text else ""

    def _hide(self, text: str) -> str:
        key = self._key()
        return text.replace(key, "***") if key else text

    def _read(self, reply: bytes) -> tuple[str, int, int, str]:
        """Text, new tokens, prompt tokens and why it ended."""
        try:
            found = json.loads(reply)
            choice, usage = found["choices"][0], found.get("usage") or {}
            message = choice["message"]
            tokens, prompt_tokens = (usage.get(key) for key in ("completion_tokens", "prompt_tokens"))
            text = message.get("content") or ""
            if not text and message.get("tool_calls"):
                text = json.dumps(message["tool_calls"], ensure_ascii=False)
            if not isinstance(text, str):
                raise TypeError
            text = text.encode(errors="replace").decode()  # half of a surrogate pair cannot be written down
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            begins = " ".join(reply[:80].decode(errors="replace").split())
            raise Unusable(f"answers what is no chat completion ({self._hide(begins)!r})", passes=True) from None
        if not (isinstance(tokens, int) and isinstance(prompt_tokens, int) and tokens >= 0 and prompt_tokens >= 0):
            raise Unusable("answers without `usage`, by which tokens are counted")
        return text, tokens, prompt_tokens, str(choice.get("finish_reason") or "stop")


def complete_all(ask: Callable[[Any], Any], several: Sequence[Any]) -> list[Any]:
    """What `ask` returns of each, AT_A_TIME at once. Where one fails, those on their way still end, and it is raised."""
    pool = ThreadPoolExecutor(AT_A_TIME)
    try:
        futures = [pool.submit(ask, one) for one in several]
        wait(futures, return_when=FIRST_EXCEPTION)
    finally:  # also where Ctrl-C ends the waiting
        pool.shutdown(wait=True, cancel_futures=True)
    return [future.result() for future in futures if not future.cancelled()]


def check_address(key: str, url: str, key_name: str = KEY) -> str:
    """The address that stands in a key of the recipe, without its end; nothing is sent yet.

    Raises:
        UserError: where it is no address or holds a password, or the environment's key cannot be sent.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of brackets and ports
        is_address = False
    if "@" in url or "?" in url:
        raise UserError(
            f"{key}: it may hold no password and no query, because it is written down; the key is read from {key_name}"
        )
    if not (is_address and url.isascii() and url.isprintable() and " " not in url):
        raise UserError(f"{key}: {url!r} is no address; write it as https://api.openai.com/v1")
    secret = os.environ.get(key_name, "").strip()
    if not (secret.isascii() and secret.isprintable()):
        raise UserError(f"{key_name}: the environment holds a key with signs that no key has; set it again")
    return url.rstrip("/").removesuffix("/chat/completions")


def what_was_refused(key: str, limit_key: str = "max_new_tokens") -> str:
    """A sentence on a key of OTHERWISE."""
    if other := OTHERWISE[key]:
        hint = f"of which hidden reasoning takes its part: set {limit_key} higher where answers are empty"
        return f"it refuses {key} and is sent {other}, {hint}."
    return f"it refuses {key} and is asked without: its own default decides, and its answers may be others each time."
