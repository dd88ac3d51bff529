"""What is typed at a terminal is heard."""

import os
import pty
import select
import sys
import time

from launching import PROJECT

# Ctrl-C in the very instant after the prompt, before readline waits for a key.
AT_THE_PROMPT = """
import ctypes, functools, os, readline, signal
from carelm.talk.terminal import read_message

readline.set_pre_input_hook(functools.partial(ctypes.CDLL(None).kill, os.getpid(), int(signal.SIGINT)))
try:
    read_message("> ")
except KeyboardInterrupt:
    print("heard")
"""


def test_ctrl_c_in_the_instant_the_prompt_appears_is_heard():
    child, end = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, "-c", AT_THE_PROMPT], {**os.environ, "PYTHONPATH": str(PROJECT)})
    seen, until = "", time.time() + 20
    while "heard" not in seen and time.time() < until and select.select([end], [], [], until - time.time())[0]:
        seen += os.read(end, 4096).decode()
    os.kill(child, 9)
    os.waitpid(child, 0)
    assert "heard" in seen, seen
