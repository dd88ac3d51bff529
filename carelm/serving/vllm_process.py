"""A vLLM of our own as a process: started, watched, started again, and never left behind. Imports no torch."""

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path

import httpx

from carelm import ranks
from carelm.errors import UserError

KEY = "VLLM_API_KEY"  # vLLM's own name for it: what it asks of its clients
SUPERVISOR = Path(__file__).with_name("supervisor.py")
MOST_STARTS, WITHIN_S = 4, 900.0  # of the starts: one more in that time would not help
SILENT_S = 60.0  # that one which has been ready may not answer before it is started again
LOOK_S = 1.0  # between two looks at it
SAY_S = 60.0  # between two lines that it is not ready yet
CONNECT_S = 5.0


class VllmProcess:
    """It listens at a free port of this machine; it is watched, started again where it dies or falls silent, and gone when this
    process is, however that ends (see carelm.serving.supervisor).

    Args:
        command: starts it, without host and port.
        log: file for what it prints.

    Attributes:
        key: what it asks of its clients; known to this process and to it.
        url: where it listens, another one after each start.
        given_up: whether it has died too often.
    """

    def __init__(self, command: list[str], log: Path):
        self.command, self.log, self.key = command, log, secrets.token_urlsafe(32)
        self.given_up = False
        self._starts: deque[float] = deque(maxlen=MOST_STARTS)
        self._stopping = threading.Event()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")
        self._start()
        self._watcher = threading.Thread(target=self._watch, name="vllm", daemon=True)

    def _start(self) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._starts.append(time.monotonic())
        self._was_ready, self._seen = False, time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(SUPERVISOR), *self.command, "--host", "127.0.0.1", "--port", str(port)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is for us: what runs is finished
                env=os.environ | {KEY: self.key, "VLLM_NO_USAGE_STATS": "1"},  # else it reports to its makers
            )

    def wait_until_ready(self) -> None:
        """Raises UserError where it ends instead."""
        began = said = time.monotonic()
        while not self._answers():
            if (status := self._process.poll()) is not None:
                raise UserError(f"engine: vLLM ended with exit status {status} while it started ({self._last_line()})")
            if time.monotonic() - said > SAY_S:
                said = time.monotonic()
                ranks.say(f"vLLM is still starting, {said - began:.0f} s so far; {self.log} says what it does")
            time.sleep(0.2)
        self._was_ready, self._seen = True, time.monotonic()
        self._watcher.start()

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=CONNECT_S, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    def _watch(self) -> None:
        while not self._stopping.wait(LOOK_S):
            status = self._process.poll()
            if status is None and self._answers():
                if not self._was_ready:
                    ranks.say("vLLM answers again")
                self._was_ready, self._seen = True, time.monotonic()
                continue
            silent = time.monotonic() - self._seen
            if status is None and (not self._was_ready or silent < SILENT_S):
                continue
            how = f"ended with exit status {status}" if status is not None else f"has not answered for {silent:.0f} s"
            self._end()
            if len(self._starts) == MOST_STARTS and time.monotonic() - self._starts[0] < WITHIN_S:
                self.given_up = True
                ranks.say(f"vLLM {how}, and is not started again: that was {MOST_STARTS} times in {WITHIN_S / 60:.0f} minutes "
                          f"({self._last_line()})")  # fmt: skip
                return
            ranks.say(f"vLLM {how} and is started again ({self._last_line()})")
            self._start()

    def _last_line(self) -> str:
        with self.log.open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 16384))
            lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
        lines = [line for line in lines if "rror" in line] or lines  # others may come after it
        return f"{lines[-1][-200:]}; all of it is in {self.log}" if lines else f"it said nothing in {self.log}"

    def _end(self) -> None:
        self._process.stdin.close()
        self._process.wait()

    def stop(self) -> None:
        """Ends it and all its processes, and waits for that."""
        self._stopping.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._end()
