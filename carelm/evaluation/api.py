"""A model behind an OpenAI-compatible endpoint as a candidate: `--models base adapter api:NAME` at the recipe's `api_url`.

It is asked the same questions as messages, which it renders itself, whole: no window cuts them. Tokens are those that its
`usage` counts. The first `num_latency_prompts` questions are asked one at a time and timed over the wire, the others several at
a time. The key is read from OPENAI_API_KEY and written nowhere.
"""

import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from carelm import ranks
from carelm.errors import UserError, first_line
from carelm.evaluation.pace import Pace
from carelm.evaluation.predictions import PredictionFile
from carelm.files import fingerprint, read_json, write_whole
from carelm.recipe import Recipe
from carelm.training.stops import HangWatch

if TYPE_CHECKING:
    from carelm.evaluation.questions import Question  # with the scores' libraries, seconds to import

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
PASSES = {429, 500, 502, 503, 504}  # statuses that may pass
OF_MESSAGES = ("role", "content", "name", "tool_calls", "tool_call_id")
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class ApiModel:
    """A model of an endpoint; `name` as in the results and in the names of files."""

    name: str
    model: str
    url: str

    def computing_in(self, name: str) -> "ApiModel":
        return self

    def asked_by(self, recipe: Recipe) -> "ApiModel":
        return self

    def other_data_keys(self, recipe: Recipe) -> list[str]:
        return []

    def changed_data(self, recipe: Recipe) -> list[str]:
        return []


@dataclass(frozen=True)
class AskedApi:
    """A model of an endpoint, what it is asked, and where its answers are kept; `refused` are keys of OTHERWISE."""

    candidate: ApiModel
    questions: list["Question"]
    bodies: dict[str, dict[str, Any]]  # by the question's id
    file: PredictionFile
    refused: list[str] = field(default_factory=list)


class _Unusable(Exception):
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


def find_api(recipe: Recipe, name: str) -> ApiModel:
    """The model that `api:NAME` stands for; nothing is sent yet.

    Raises:
        UserError: where NAME or `api_url` is missing, or the latter is no address or holds a password.
    """
    model = name.removeprefix("api:").strip()
    if not model:
        raise UserError("models: 'api:' names no model; write api:NAME, as the endpoint calls it")
    if not recipe.api_url:
        raise UserError(f"models: '{name}' needs api_url, the endpoint's address, such as https://api.openai.com/v1")
    try:
        parts = urllib.parse.urlsplit(recipe.api_url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # of brackets and ports
        is_address = False
    if "@" in recipe.api_url or "?" in recipe.api_url:
        raise UserError(
            f"api_url: it may hold no password and no query, because it is written down; the key is read from {KEY}"
        )
    if not (is_address and recipe.api_url.isascii() and recipe.api_url.isprintable() and " " not in recipe.api_url):
        raise UserError(f"api_url: {recipe.api_url!r} is no address; write it as https://api.openai.com/v1")
    key = os.environ.get(KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"{KEY}: the environment holds a key with signs that no key has; set it again")
    return ApiModel(
        f"api:{model.replace('/', '-')}", model, recipe.api_url.rstrip("/").removesuffix("/chat/completions")
    )


def prepare(recipe: Recipe, model: ApiModel, questions: list["Question"], folder: Path) -> AskedApi:
    """The requests of all questions; an endpoint that is down is found here, before any weights.

    Raises:
        UserError: where nothing answers at `api_url`, or what is to decide is not known of its answers.
    """
    if recipe.primary_metric.startswith("constrained"):
        raise UserError(
            f"primary_metric: {recipe.primary_metric} is not known of {model.name}, which tells no probabilities of labels; "
            f"set {recipe.primary_metric.removeprefix('constrained_')}"
        )
    problem = None
    if ranks.rank() == 0:
        try:
            _send(urllib.request.Request(model.url + "/models", headers=_headers()), PROBE_S)
        except _Unusable as error:  # an endpoint that lists no models may still answer
            problem = str(error) if error.status in (None, 401, 403) else None
    if problem := ranks.share(problem):
        raise UserError(f"models: {model.name}: {model.url} {problem}; start it, or set api_url")
    bodies = {q.id: _body(recipe, model, q) for q in questions}
    made_by = {q.id: fingerprint(model.url, bodies[q.id], q.references) for q in questions}
    return AskedApi(model, questions, bodies, PredictionFile(folder / f"predictions-{model.name}.jsonl", made_by))


def answer(
    recipe: Recipe, asked: AskedApi, folder: Path, watch: HangWatch, pace: Pace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The predictions in the order of the questions, and what was measured, by rank 0; elsewhere both are empty.

    Answers are kept as they come: where the endpoint fails, the same command goes on with the others.

    Raises:
        UserError: for an endpoint that is down, too slow, refuses, or answers what is no answer, after three tries.
    """
    problem = None
    if ranks.rank() == 0:
        watch.look()
        try:
            _ask_all(recipe, asked, folder, watch, pace)
        except _Unusable as error:
            kept = len(asked.file.read())
            problem = (
                f"models: {asked.candidate.name}: {asked.candidate.url} {error}; {kept} of {len(asked.questions)} answers are "
                "kept, and the same command goes on with the others"
            )
    watch.pause()
    if problem := ranks.share(problem):
        raise UserError(problem)
    if ranks.rank() != 0:
        return [], {}
    lines = asked.file.close()
    measured = read_json(folder / f"measured-{asked.candidate.name}.json")
    refused = measured.pop("refused", [])
    lengths = [line["prompt_tokens"] for line in lines]
    timed = [line["wire_ms"] for line in lines if line["wire_ms"] is not None][: recipe.num_latency_prompts]
    whole = {f"p{p}": round(float(np.percentile(timed, p)), 3) for p in PERCENTILES} if timed else {}
    p50, p95 = (int(np.percentile(lengths, p, method="lower")) for p in (50, 95))
    return lines, {
        "kind": "api",
        "folder": asked.candidate.url,
        "precision": "unknown",
        "bits": None,
        "unused_generation_config": {},
        "total_parameters": None,
        "trained_parameters": None,
        "load_seconds": None,
        "peak_memory_bytes": None,
        "prompt_tokens": {"p50": p50, "p95": p95, "max": max(lengths)},
        "usage": {"prompt_tokens": sum(lengths), "new_tokens": sum(line["new_tokens"] for line in lines)},
        "throughput": measured,
        "latency": {"prompts": len(timed), "over_the_wire": True, "ttft_ms": {}, "tpot_ms": {}, "e2e_ms": whole},
        "conditions": {
            "device": "over the wire",
            "endpoint": asked.candidate.url,
            "model": asked.candidate.model,
            **({"refused": refused} if refused else {}),
        },
    }


def _ask_all(recipe: Recipe, asked: AskedApi, folder: Path, watch: HangWatch, pace: Pace) -> None:
    done = asked.file.open()
    timed = sum(line["wire_ms"] is not None for line in asked.file.read().values())
    left = [q for q in asked.questions if q.id not in done]
    if not left and not timed and recipe.num_latency_prompts:
        left = asked.questions[:1]  # all of them came several at a time, in a larger test: one is timed
    if not left:
        return ranks.say(f"{asked.candidate.name}: all {len(done)} answers are there; nothing to do")
    number = max(0, recipe.num_latency_prompts - timed)
    alone = left[:: max(1, len(left) // max(1, number))][:number]  # spread over all, as for a model here
    ids = {question.id for question in alone}
    several = [question for question in left if question.id not in ids] or alone  # by which the throughput is told
    with tqdm(total=len(left), desc=asked.candidate.name, unit="example", dynamic_ncols=True) as bar:

        def ask(question: "Question", is_alone: bool) -> int:
            line = _ask(asked, question, is_alone)
            asked.file.append(line)
            watch.look()
            pace.answered()
            bar.update()
            return line["new_tokens"]

        pace.begin(len(left))
        started = time.perf_counter()
        tokens = sum([ask(question, True) for question in alone])
        if several is not alone:
            started = time.perf_counter()
            with ThreadPoolExecutor(AT_A_TIME) as pool:
                futures = [pool.submit(ask, question, False) for question in several]
                wait(futures, return_when=FIRST_EXCEPTION)
                pool.shutdown(wait=True, cancel_futures=True)  # what is on its way is still kept
                tokens = sum(future.result() for future in futures if not future.cancelled())
    seconds = time.perf_counter() - started
    write_whole(folder / f"measured-{asked.candidate.name}.json", json.dumps({
        "examples": len(several),
        "of_examples": len(asked.questions),
        "seconds": round(seconds, 3),
        "examples_per_second": round(len(several) / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "batch_size": 1 if several is alone else AT_A_TIME,
        "refused": asked.refused,
    }))  # fmt: skip


def _ask(asked: AskedApi, question: "Question", is_alone: bool) -> dict[str, Any]:
    """The line of one question; `_Unusable` after the last try."""
    waits = [*WAITS_S]
    while True:
        own = asked.bodies[question.id]
        body = {OTHERWISE[key] if key in asked.refused else key: value for key, value in own.items()}
        body.pop(None, None)
        url, started = asked.candidate.url + "/chat/completions", time.perf_counter()
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), _headers())
            text, tokens, prompt_tokens, reason = _read(_send(request, TIMEOUT_S))
            break
        except _Unusable as error:
            if error.refused in OTHERWISE.keys() & body.keys():
                _ask_otherwise(asked, error.refused)
            elif waits and error.passes:
                time.sleep(min(LONGEST_WAIT_S, max(waits.pop(0), error.wait_s)))
            else:
                raise
    return {
        "id": question.id,
        "conversation": question.conversation,
        "category": question.category,
        "question": question.last_words(),
        "prediction": text,
        "references": question.references,
        "new_tokens": tokens,
        "prompt_tokens": prompt_tokens,
        "finish_reason": reason,
        "wire_ms": round(1e3 * (time.perf_counter() - started), 3) if is_alone else None,
        "made_by": asked.file.made_by[question.id],
    }


def _ask_otherwise(asked: AskedApi, key: str) -> None:
    """All further questions are asked without a key that the endpoint refuses, or under its other name; said once."""
    if key not in asked.refused:
        asked.refused.append(key)
        ranks.say(f"{asked.candidate.name}: {what_was_refused(key)}")


def what_was_refused(key: str) -> str:
    """A sentence on a key of OTHERWISE."""
    if other := OTHERWISE[key]:
        hint = "of which hidden reasoning takes its part: set max_new_tokens higher where answers are empty"
        return f"it refuses {key} and is sent {other}, {hint}."
    return f"it refuses {key} and is asked without: its own default decides, and its answers may be others each time."


def _body(recipe: Recipe, model: ApiModel, question: "Question") -> dict[str, Any]:
    messages = [{key: _calls(m[key]) if key == "tool_calls" else m[key] for key in OF_MESSAGES if key in m} for m in
                question.messages]  # fmt: skip
    body = {"model": model.model, "messages": messages, "max_tokens": recipe.max_new_tokens}
    body |= {"temperature": recipe.temperature}
    if recipe.temperature > 0:
        body |= {"top_p": recipe.top_p, "seed": recipe.seed}
    return body | ({"tools": question.tools} if question.tools else {})


def _calls(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool calls with their arguments as text, as the protocol has them."""
    functions = [call.get("function", {}) for call in calls]
    texts = [
        f.get("arguments") if isinstance(f.get("arguments"), str) else json.dumps(f.get("arguments")) for f in functions
    ]
    return [call | {"function": f | {"arguments": text}} for call, f, text in zip(calls, functions, texts)]


def _headers() -> dict[str, str]:
    key = os.environ.get(KEY, "").strip()
    return {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}


def _send(request: urllib.request.Request, timeout_s: float) -> bytes:
    """The reply's body; `_Unusable` where there is none in time, or one with an error."""
    end, parts, size = time.monotonic() + timeout_s, [], 0
    try:
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout_s) as reply:
            while part := reply.read1(2**16):
                parts.append(part)
                size += len(part)
                if time.monotonic() > end:
                    raise TimeoutError
                if size > LARGEST_BYTES:
                    raise _Unusable(f"answers with more than {LARGEST_BYTES >> 20} MiB")
        return b"".join(parts)
    except urllib.error.HTTPError as error:
        hint = f" (the key is read from {KEY})" if error.code in (401, 403) else ""
        asked_for = error.headers.get("Retry-After", "") if error.headers else ""
        wait_s = float(asked_for) if asked_for.isdecimal() else 0.0
        raise _Unusable(
            f"answers {error.code}{hint}{_reason(error)}", error.code in PASSES, wait_s, error.code
        ) from None
    except TimeoutError:
        raise _Unusable(f"has not answered within {timeout_s:g} s", passes=True) from None
    except (OSError, HTTPException, ValueError) as error:  # URLError is an OSError
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise _Unusable(f"has not answered within {timeout_s:g} s", passes=True) from None
        said = first_line(reason) if isinstance(reason, Exception) else str(reason)
        raise _Unusable(f"cannot be reached ({_hide(said)})", passes=True) from None


def _reason(error: urllib.error.HTTPError) -> str:
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
    return f": {_hide(text)}" if text else ""


def _hide(text: str) -> str:
    key = os.environ.get(KEY, "").strip()
    return text.replace(key, "***") if key else text


def _read(reply: bytes) -> tuple[str, int, int, str]:
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
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        begins = " ".join(reply[:80].decode(errors="replace").split())
        raise _Unusable(f"answers what is no chat completion ({_hide(begins)!r})", passes=True) from None
    if not (isinstance(tokens, int) and isinstance(prompt_tokens, int) and tokens >= 0 and prompt_tokens >= 0):
        raise _Unusable("answers without `usage`, by which tokens are counted")
    return text, tokens, prompt_tokens, str(choice.get("finish_reason") or "stop")
