"""Loads the server as many clients at once do, then beside it `transformers serve`: first token, whole answer, tokens, memory.

    python train/sft.py && python train/merge.py --adapter outputs/demo --output_dir outputs/demo/merged
    python benchmarks/serving.py                                    # 32 clients for two minutes, then 30 s of the other server
    python benchmarks/serving.py --self_test                        # four clients for some seconds; writes nothing

Each client streams one answer after another to test questions of the demo, greedily, by the merged model, which both servers
take. What is counted is what a client sees: tokens (as the server counts them, else pieces of text), statuses other than 200,
the time to the first piece and to the last. One client alone comes first. Memory is that of the server's processes, and what
the GPU has in use, every second. The other server is transformers' own, with continuous batching in bounded blocks, where its
extra (`serving`) is installed. Clients and server share the machine's cores. benchmarks/results/serving.json has all of it.
"""

import argparse
import asyncio
import importlib.util
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from launches import PROJECT, describe_machine, end, say, write_results

MODEL = PROJECT / "outputs/demo/merged"
OTHERS_OPTIONS = [
    "--continuous-batching",
    "--cb-block-size",
    "256",
    "--cb-num-blocks",
    "64",
    "--cb-max-batch-tokens",
    "1024",
]
NEW_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=int, default=120, help="of all clients at once")
    parser.add_argument("--seconds_alone", type=int, default=15, help="of one client, before")
    parser.add_argument("--seconds_other", type=int, default=30, help="of all clients at once, of the other server")
    parser.add_argument("--self_test", action="store_true")
    options = parser.parse_args()
    if options.self_test:
        options.clients, options.seconds, options.seconds_alone, options.seconds_other = 4, 5, 3, 5
    if not (MODEL / "merge.json").exists():
        sys.exit(f"error: there is no {MODEL}; train and merge the demo first: the commands are above, in --help")
    machine = describe_machine()
    port, other_port = free_port(), free_port()
    ours = [sys.executable, "serve/run.py", "--models", "merged", "--port", str(port)]
    loads = [(1, options.seconds_alone), (options.clients, options.seconds)]
    found = {"carelm": measure(ours, port, "merged", loads)}
    if not Path(sys.executable).with_name("transformers").exists() or not importlib.util.find_spec("fastapi"):
        say("transformers serve is not there: pip install 'transformers[serving]'")
    else:
        other = [str(Path(sys.executable).with_name("transformers")), "serve", str(MODEL), "--port", str(other_port)]
        loads[1] = (options.clients, options.seconds_other)
        found["transformers serve"] = measure([*other, *OTHERS_OPTIONS], other_port, str(MODEL), loads)
    for name, of_server in found.items():
        say(f"{name}: {json.dumps(of_server)}")
    result = {"machine": machine, "options": vars(options), "new_tokens": NEW_TOKENS, "servers": found}
    if not options.self_test:
        say(f"results: {write_results('serving', result)}")
    print(json.dumps(found))


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def measure(command: list[str], port: int, model: str, loads: list[tuple[int, int]]) -> dict[str, Any]:
    """Starts a server, loads it by so many clients for so many seconds, one load after the other, and stops it.

    Raises:
        RuntimeError: where it does not serve.
    """
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=log, stderr=log)
        try:
            started = time.perf_counter()
            while not asyncio.run(is_up(port)):
                if process.poll() is not None or time.perf_counter() - started > 120:
                    log.seek(0)
                    raise RuntimeError(f"{command[1]} does not serve: {log.read()[-1000:]}")
                time.sleep(0.2)
            asyncio.run(load(port, model, 1, 2, process.pid))  # the first answers are slower
            found = [asyncio.run(load(port, model, clients, seconds, process.pid)) for clients, seconds in loads]
        finally:
            end(process)
    named = {"one client" if clients == 1 else f"{clients} clients": each for (clients, _), each in zip(loads, found)}
    times = found[-1]["tokens_per_second"] / found[0]["tokens_per_second"]
    return named | {"times_one_client": round(times, 2)}


async def is_up(port: int) -> bool:
    try:
        status, *_ = await ask(port, "/health", None)
    except OSError:
        return False
    return status == 200


async def load(port: int, model: str, clients: int, seconds: int, pid: int) -> dict[str, Any]:
    """Clients that ask one question after another for so long; answers that have begun then are waited for."""
    rows = (PROJECT / "demo/data/test.jsonl").read_text(encoding="utf-8").splitlines()
    questions = itertools.cycle([[m for m in json.loads(row)["messages"] if m["role"] == "user"][:1] for row in rows])
    started, statuses, first, whole, tokens, memory, on_gpu = time.perf_counter(), {}, [], [], [], [], []

    async def client() -> None:
        while time.perf_counter() - started < seconds:
            body = {
                "model": model,
                "messages": next(questions),
                "stream": True,
                "stream_options": {"include_usage": True},
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
            }
            began = time.perf_counter()
            status, times, counted = await ask(port, "/v1/chat/completions", body)
            statuses[status] = statuses.get(status, 0) + 1
            if times:
                first.append(times[0] - began)
                whole.append(times[-1] - began)
                tokens.append(counted or len(times))

    async def watch() -> None:
        while True:
            processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
            memory.append(sum(process.memory_info().rss for process in processes))
            on_gpu.append(gpu_bytes())
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(client() for _ in range(clients)))
    spent = time.perf_counter() - started
    watching.cancel()
    found = {
        "seconds": round(spent, 1),
        "statuses": statuses,
        "answers": len(whole),
        "tokens_per_second": round(sum(tokens) / spent, 1),
        "first_token_seconds": percentiles(first),
        "whole_answer_seconds": percentiles(whole),
        "memory_mib": in_mib(memory),
    }
    return found | ({"gpu_memory_mib": in_mib(on_gpu)} if on_gpu[-1] else {})


def in_mib(bytes_each_second: list[int]) -> dict[str, int]:
    quarter, end, peak = bytes_each_second[len(bytes_each_second) // 4], bytes_each_second[-1], max(bytes_each_second)
    return {"after_a_quarter": quarter >> 20, "at_the_end": end >> 20, "peak": peak >> 20}


def gpu_bytes() -> int:
    """In use on the first GPU, by whomever; 0 where there is none."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used
    except pynvml.NVMLError:
        return 0


def percentiles(values: list[float]) -> dict[str, float]:
    return {f"p{p}": round(float(np.percentile(values, p)), 3) for p in (50, 95)} if values else {}


async def ask(port: int, path: str, body: dict[str, Any] | None) -> tuple[int, list[float], int | None]:
    """A reply's status, when each piece of its text came, and its tokens, where the server says so."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode() if body else b""
    head = f"{'POST' if body else 'GET'} {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    status, times, tokens = int((await reader.readline()).split()[1]), [], None
    async for line in reader:
        if not line.startswith(b"data: {"):
            continue
        piece = json.loads(line[6:])
        tokens = (piece.get("usage") or {}).get("completion_tokens", tokens)
        if (choices := piece.get("choices")) and choices[0].get("delta", {}).get("content"):
            times.append(time.perf_counter())
    writer.close()
    return status, times, tokens


if __name__ == "__main__":
    main()
