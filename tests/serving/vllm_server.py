"""A small server that speaks vLLM 0.32's protocol at /v1/completions, /v1/models and /health: token ids in, token ids out.

    python tests/serving/vllm_server.py serve MODEL --port 8000 ...    # the words of `vllm serve`, as carelm writes them

Started as a program it answers a prompt by its own ids, last one first, so that no weights are needed: what is looked at is the
process. `make_app` takes models that answer.
"""

import argparse
import asyncio
import json
import os
import time
from collections.abc import AsyncIterator, Callable

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

Answers = Callable[[list[int], dict], AsyncIterator[int]]


def make_app(
    models: dict[str, Answers], *, key: str | None, tells_ids: bool = True, asked: list | None = None, reads=list
) -> Starlette:
    """Each model is asked with a prompt's ids and the whole body; every body goes to `asked`, and `reads` makes of
    a prompt what the server says that it has read."""

    def refusal(request: Request) -> Response | None:
        sent = request.headers.get("authorization", "")
        return JSONResponse({"error": "Unauthorized"}, 401) if key and sent != f"Bearer {key}" else None

    async def list_models(request: Request) -> Response:
        data = [{"id": name, "object": "model", "owned_by": "vllm"} for name in models]
        return refusal(request) or JSONResponse({"object": "list", "data": data})

    async def complete(request: Request) -> Response:
        if no := refusal(request):
            return no
        body = await request.json()
        if asked is not None:
            asked.append(body)
        if body["model"] not in models:
            error = {"message": f"The model `{body['model']}` does not exist.", "type": "NotFoundError", "code": 404}
            return JSONResponse({"error": error}, 404)
        chunks = answer(body)
        if not body.get("stream"):
            got = [choice async for choice in chunks]
            whole = {"index": 0, "text": "", "finish_reason": got[-1]["finish_reason"]}
            if tells_ids:
                whole |= {
                    "prompt_token_ids": reads(body["prompt"]),
                    "token_ids": [t for c in got for t in c["token_ids"]],
                }
            return JSONResponse({"object": "text_completion", "model": body["model"], "choices": [whole]})

        async def events() -> AsyncIterator[str]:
            async for choice in chunks:
                if not tells_ids:
                    choice = choice | {"token_ids": None, "prompt_token_ids": None}
                yield f"data: {json.dumps({'object': 'text_completion', 'choices': [choice]})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    async def answer(body: dict) -> AsyncIterator[dict]:
        count, reason = 0, None
        async for token in models[body["model"]](body["prompt"], body):
            count += 1
            if token in body["stop_token_ids"]:
                reason = "stop"
            elif count == body["max_tokens"]:
                reason = "length"
            read = reads(body["prompt"]) if count == 1 else None
            yield {"index": 0, "text": "", "finish_reason": reason, "prompt_token_ids": read, "token_ids": [token]}
            if reason:
                return

    return Starlette(
        routes=[
            Route("/v1/completions", complete, methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/health", lambda request: PlainTextResponse("")),
            Route("/pid", lambda request: PlainTextResponse(str(os.getpid()))),
        ]
    )


async def backwards(prompt: list[int], body: dict) -> AsyncIterator[int]:
    """The prompt's ids from the last one on, round and round."""
    while True:
        for token in reversed(prompt):
            await asyncio.sleep(0.01)
            yield token


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("word", choices=["serve"])
    parser.add_argument("model")
    parser.add_argument("--served-model-name", nargs="+", required=True)
    parser.add_argument("--lora-modules", nargs="+", default=[])
    for option in ("--dtype", "--max-model-len", "--max-lora-rank", "--max-loras", "--generation-config", "--revision",
                   "--tokenizer"):  # fmt: skip
        parser.add_argument(option)
    parser.add_argument("--enable-lora", action="store_true")
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--seconds-to-start", type=float, default=0.0)
    parser.add_argument("--seconds-to-live", type=float)
    parser.add_argument("--forget-ids", action="store_true", help="as before vLLM 0.10.2")
    options = parser.parse_args()
    time.sleep(options.seconds_to_start)
    names = [*options.served_model_name, *(module.partition("=")[0] for module in options.lora_modules)]
    app = make_app(
        dict.fromkeys(names, backwards), key=os.environ.get("VLLM_API_KEY"), tells_ids=not options.forget_ids
    )
    server = uvicorn.Server(uvicorn.Config(app, host=options.host, port=options.port, log_level="warning"))
    print("the server of the tests starts", options.port, flush=True)

    async def serve() -> None:
        if options.seconds_to_live is not None:
            asyncio.get_running_loop().call_later(options.seconds_to_live, os._exit, 3)
        await server.serve()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
