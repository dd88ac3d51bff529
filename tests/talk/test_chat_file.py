"""train/chat.py as a user starts it: at a terminal, and in a script."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time

import pytest
from launching import PROJECT, environment

CHAT = [sys.executable, str(PROJECT / "train/chat.py")]


class Terminal:
    """A chat at a terminal of its own."""

    def __init__(self, folder, *keys):
        self.seen, self.read = "", 0
        self.child, self.end = pty.fork()
        if self.child == 0:
            signal.signal(
                signal.SIGINT, signal.SIG_DFL
            )  # as a terminal's shell does; what runs in the background ignores it
            os.chdir(folder)
            os.execve(CHAT[0], [*CHAT, *keys], environment(TERM="xterm"))

    def wait_for(self, pattern: str, seconds: float = 120) -> str:
        """What has come since the last one up to this pattern."""
        until = time.time() + seconds
        while not (found := re.compile(pattern).search(self.seen, self.read)):
            assert time.time() < until and select.select([self.end], [], [], seconds)[0], self.seen
            self.seen += os.read(self.end, 65536).decode(errors="replace").replace("\r\n", "\n")
        before, self.read = self.seen[self.read : found.end()], found.end()
        return before

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())


def run(*keys, **options):
    return subprocess.run([*CHAT, *keys], env=environment(), capture_output=True, timeout=240, **options)


def test_at_a_terminal_ctrl_c_ends_an_answer_and_ctrl_d_the_chat(tmp_path):
    keys = ("--max_new_tokens", "900", "--temperature", "8", "--load_in_4bit", "false", "--output_dir", "none")
    chat = Terminal(tmp_path, *keys)
    chat.wait_for("the base answers.*\n")
    chat.wait_for("talking to base.*\n")
    chat.wait_for("> ")
    chat.type("Where is\x03")
    chat.wait_for("Ctrl-D or /quit ends the chat\n")
    chat.wait_for("> ")
    chat.type("\x1b[200~Where is it?\nI wait.\x1b[201~\n")  # a paste, as terminals mark it
    chat.wait_for(r"I wait\.(\x1b\S*)?\n[^\n]{5,}")
    chat.type("\x03")
    chat.wait_for("answer ended by Ctrl-C, what is there is kept\n")
    chat.wait_for("> ")
    chat.type("/nothing\n")
    chat.wait_for("error: /nothing is no command; /help lists them")
    chat.wait_for("> ")
    chat.type("/good\n")
    chat.wait_for("error: /good: the last answer of base was ended by Ctrl-C, and is not whole; ask again\n")
    chat.wait_for("> ")
    chat.type("/bad\n")
    chat.wait_for("is marked bad\n")
    chat.wait_for("> ")
    chat.type("\x04")
    chat.wait_for("saved: 1 answer, 0 marked good: none/chats/chat-.*\n")
    assert os.waitstatus_to_exitcode(os.waitpid(chat.child, 0)[1]) == 0
    assert "Traceback" not in chat.seen
    (file,) = tmp_path.glob("none/chats/chat-*.jsonl")
    row = json.loads(file.read_text())
    assert row["messages"][0]["content"] == "Where is it?\nI wait."
    assert (row["mark"], row["finish_reason"]) == ("bad", "cancelled")


def test_in_a_script_the_answer_alone_is_on_standard_output(tmp_path):
    done = run("--output_dir", "none", "--load_in_4bit", "false", "--max_new_tokens", "16",
               input="Where is my order?\n\nI wait. 🧡\n".encode(), cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    answer = done.stdout.decode()
    assert answer.count("\n") == 1 and len(answer.split()) > 4 and "carelm:" not in answer
    assert b"none holds no result of training yet: the base answers (train first" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("keys", "data", "complaint"),
    [
        ((), b"\x7fELF\x02\0", "standard input is binary (byte 6 is 0); send text"),
        ((), b"", "standard input is empty; send a message, or use --message TEXT"),
        (("--models", "adapter", "--output_dir", "none", "--message", "x"), b"", "models: 'adapter': there is no folder"),
        (("--message", " "), b"", '--message: it is empty; write it in quotes, --message "Where is my order?", or leave'),
        (("--models", "api:gpt", "--message", "x"), b"", "models: api:gpt is for the evaluation alone"),
        (("--prompt_template", "{a} {b}", "--completion_template", "{c}", "--message", "x"), b"", "prompt_template has"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_one_line_before_any_weights(keys, data, complaint, tmp_path):
    done = run(*keys, input=data, cwd=tmp_path)
    last = done.stderr.decode().splitlines()[-1]
    assert done.returncode == 2 and last.startswith(f"error: {complaint}") and not done.stdout
    assert "loading" not in done.stderr.decode()
