"""vLLM as the engine: token ids go to its /v1/completions and come back, so that what is asked and answered is read as in
training. It is a process of ours, or one that runs elsewhere (`engine_url`).

Its own chat templates, sampling defaults and stop tokens are passed by: each request says all of them.
"""

import asyncio
import json
import os
import shlex
import shutil
import urllib.parse
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx

from carelm import ranks
from carelm.errors import UserError
from carelm.models.decoding import Decoding
from carelm.recipe import ENGINE_LOG, Recipe
from carelm.serving.engine import EngineError
from carelm.serving.vllm_command import options
from carelm.serving.vllm_process import CONNECT_S, KEY, VllmProcess
from carelm.talk.speaker import Speaker

BETWEEN_TOKENS_S = 300.0
# Said in each request: an engine that we did not start may have other defaults.
PLAIN = {
    "n": 1,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class VllmEngine:
    """Answers by vLLM.

    Args:
        recipe: names `engine_command`, or `engine_url` of one that runs; its key is read from VLLM_API_KEY.
        speakers: models that `servable` has let through; vLLM holds their weights, not this process.

    Raises:
        UserError: where vLLM is not there, does not start, refuses the key, serves other models or tells no token ids.
    """

    def __init__(self, recipe: Recipe, speakers: list[Speaker]):
        self._stops = {speaker.name: sorted(speaker.stops) for speaker in speakers}
        self._server = (
            None if recipe.engine_url else VllmProcess(_command(recipe, speakers), recipe.output_dir / ENGINE_LOG)
        )
        self._url = _address(recipe.engine_url) if recipe.engine_url else ""
        self._client: httpx.AsyncClient | None = None
        try:
            if self._server:
                ranks.say(f"vLLM starts; {self._server.log} says what it does")
                self._server.wait_until_ready()
            for speaker in speakers:
                self._check(speaker)
        except BaseException:
            if self._server:
                self._server.stop()
            raise

    @property
    def models(self) -> list[str]:
        return list(self._stops)

    async def answer(self, model: str, prompt_ids: list[int], decoding: Decoding) -> AsyncIterator[int]:
        """The ids of an answer as they come, the end of turn too; closing the iterator ends the answer. Where they are drawn,
        vLLM draws others by a seed than the evaluation does.

        Raises:
            EngineError: where vLLM refuses, breaks or goes.
        """
        if self._server and self._server.given_up:
            raise EngineError("vLLM has died too often and is not started again; see its log")
        body, is_over = self._body(model, prompt_ids, decoding) | {"stream": True}, False
        try:
            async with self._connection().stream("POST", f"{self._at()}/v1/completions", json=body) as response:
                if response.status_code != 200:
                    raise EngineError(f"vLLM refused this request (status {response.status_code})")
                async for line in response.aiter_lines():
                    if line == "data: [DONE]" and is_over:
                        return
                    if not line.startswith("data: {"):
                        continue
                    (choice,) = _read(line.removeprefix("data: "))["choices"]
                    if choice.get("prompt_token_ids") not in (None, prompt_ids):  # they come with the first tokens
                        raise EngineError("vLLM has read another prompt than it was sent")
                    for token in choice["token_ids"]:
                        yield token
                    is_over = choice["finish_reason"] in ("stop", "length")
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise EngineError("vLLM does not answer; ask again") from None
        except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
            raise EngineError(f"vLLM broke in the middle of this answer ({type(error).__name__}); ask again") from None
        raise EngineError("vLLM ended this answer before its end; ask again")

    async def ready(self) -> bool:
        try:
            reply = await self._connection().get(f"{self._at()}/health", timeout=CONNECT_S)
        except httpx.HTTPError:
            return False
        return reply.status_code == 200

    async def close(self) -> None:
        if self._client:
            await self._client.aclose()
        if self._server:
            await asyncio.to_thread(self._server.stop)

    def _at(self) -> str:
        return self._server.url if self._server else self._url

    def _headers(self) -> dict[str, str]:
        key = self._server.key if self._server else os.environ.get(KEY, "").strip()
        return {"Authorization": f"Bearer {key}"} if key else {}

    def _connection(self) -> httpx.AsyncClient:
        if self._client is None:  # it belongs to the loop that serves
            self._client = httpx.AsyncClient(
                headers=self._headers(),
                timeout=httpx.Timeout(CONNECT_S, read=BETWEEN_TOKENS_S),
                limits=httpx.Limits(max_connections=None),
                trust_env=self._server is None,  # no proxy stands before this machine's own address
            )
        return self._client

    def _body(self, model: str, prompt_ids: list[int], decoding: Decoding) -> dict[str, Any]:
        return PLAIN | {
            "model": model,
            "prompt": prompt_ids,
            "max_tokens": decoding.max_new_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p if decoding.temperature > 0 else 1.0,
            "seed": decoding.seed,
            "ignore_eos": True,  # the ids that end an answer are those of the evaluation, and no others
            "stop_token_ids": self._stops[model],
            "return_token_ids": True,
        }

    def _check(self, speaker: Speaker) -> None:
        """One token of each model, before anybody asks."""
        at = self._at()
        prompt = speaker.chat.prompt_ids([{"role": "user", "content": "x"}])
        body = self._body(speaker.name, prompt, Decoding(1))
        trusted = self._server is None
        try:
            with httpx.Client(headers=self._headers(), trust_env=trusted, timeout=BETWEEN_TOKENS_S) as client:
                reply = client.post(f"{at}/v1/completions", json=body)
                listed = client.get(f"{at}/v1/models") if reply.status_code == 404 else None
        except httpx.HTTPError as error:
            raise UserError(
                f"engine: vLLM at {at} does not answer ({type(error).__name__}); start it, or set engine_url"
            ) from None
        if reply.status_code in (401, 403):
            raise UserError(
                f"engine: vLLM at {at} refuses the key of {KEY} (status {reply.status_code}); set the one that it has"
            )
        if listed is not None:
            raise UserError(
                f"engine: vLLM at {at} serves no model called {speaker.name}{_others(listed)}; python train/export.py writes "
                "the command that serves it"
            )
        if reply.status_code != 200:
            raise UserError(
                f"engine: vLLM at {at} refuses a prompt of token ids (status {reply.status_code}); is it a vLLM?"
            )
        try:
            (choice,) = _read(reply.text)["choices"]
            told, answered = choice.get("prompt_token_ids"), choice.get("token_ids")
        except (EngineError, ValueError, KeyError, TypeError):
            raise UserError(f"engine: vLLM at {at} answers what no vLLM does; look at the address") from None
        if not answered:
            raise UserError(
                f"engine: vLLM at {at} tells no token ids (return_token_ids came with 0.10.2): with counts only nothing can "
                "be read or certified; update it"
            )
        if told != prompt:
            raise UserError(
                f"engine: vLLM at {at} reads other token ids than it was sent; nothing can be served from it"
            )


def _command(recipe: Recipe, speakers: list[Speaker]) -> list[str]:
    """The command that starts vLLM with these models: ours, then what the recipe adds to it."""
    program, *own = shlex.split(recipe.engine_command)
    if ours := {"--host", "--port", "--api-key", "--served-model-name"}.intersection(w.partition("=")[0] for w in own):
        raise UserError(f"engine_command: {min(ours)} is set here; take it out")
    if (found := shutil.which(os.path.expanduser(program))) is None:
        raise UserError(
            f"engine: vllm needs vLLM, and there is no program {program}; install it in an environment of its own and set "
            "engine_command: FOLDER/bin/vllm, or engine_url of one that runs"
        )
    candidates = [speaker.candidate for speaker in speakers]
    adapters = {c.name: c.adapter.resolve() for c in candidates if c.adapter}
    longest = min(speaker.positions for speaker in speakers)
    model = candidates[0].recipe.base
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    words = options(candidates, model=model, max_model_len=longest, adapters=adapters)
    return [found, "serve", *words, "--generation-config", "vllm", *own]


def _address(url: str) -> str:
    """The address without the API's path.

    Raises:
        UserError: where it is none.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
        raise UserError(f"engine_url: it is no address, or holds a password or a query; write it as http://gpu-box:8000, and "
                        f"the key into {KEY}")  # fmt: skip
    return url.rstrip("/").removesuffix("/v1")


def _read(text: str) -> dict[str, Any]:
    told = json.loads(text)
    if "error" in told:  # it holds what was asked
        raise EngineError("vLLM ended this answer with an error; ask again")
    return told


def _others(reply: httpx.Response) -> str:
    try:
        return f" but {', '.join(str(model['id']) for model in reply.json()['data'])}"
    except (ValueError, KeyError, TypeError):
        return ""
