"""What a user types, a message of several lines included, and what a terminal shows."""

import re
import select
import signal
import sys
import termios
import tty
from collections.abc import Callable

from carelm.errors import UserError

PASTE_S = 0.05  # within which the lines of one paste are there
TICK_S = 0.2
QUOTES = '"""'
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def read_message(prompt: str) -> str:
    """A line, or the lines of one paste, or those between two lines of three quotes.

    A terminal that marks pastes hands them over as one line; of others the lines that are there at once are one message.

    Raises:
        EOFError: at Ctrl-D.
        KeyboardInterrupt: at Ctrl-C.
        UserError: for what is no UTF-8.
    """
    typed_before = _is_waiting(0)  # while an answer came: each line is a message
    text = _read_line(prompt)
    if text.lstrip().startswith(QUOTES):
        text = text.lstrip().removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + _read_line("... ")
        return text.rstrip().removesuffix(QUOTES).strip("\n")
    while not typed_before and not text.startswith("/") and _is_waiting(PASTE_S):
        text += "\n" + _read_line("... ")
    return text


def _read_line(prompt: str) -> str:
    try:
        if sys.stdout.isatty():  # else the line editor is off, and the prompt would stand in the output
            return _with_ctrl_c_heard(input, prompt)
        print(prompt, end="", file=sys.stderr, flush=True)
        return input()
    except UnicodeDecodeError:
        raise UserError("the message is no UTF-8 text; type or paste it again") from None


def _with_ctrl_c_heard(read: Callable[[str], str], prompt: str) -> str:
    """Python's readline looks for signals when one ends its wait for a key. A Ctrl-C between the prompt and that wait would be
    heard with the next key, and take the line of it along; a tick ends the wait too.
    https://github.com/python/cpython/blob/3.11/Modules/readline.c (readline_until_enter_or_signal)"""
    before = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, TICK_S, TICK_S)
    try:
        return read(prompt)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _is_waiting(seconds: float) -> bool:
    """Whether something is typed that has not been read, its line ended or not."""
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    try:
        tty.setcbreak(terminal, termios.TCSANOW)
        return bool(select.select([terminal], [], [], seconds)[0])
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


class Screen:
    """Shows an answer on standard output: at a terminal as it grows, with what would steer it shown as its code; elsewhere once
    it is whole."""

    def __init__(self):
        self.is_terminal, self.shown = sys.stdout.isatty(), ""

    def show(self, text: str) -> None:
        """`text` is the whole answer so far; where it does not begin with what stands there, it begins on a new line."""
        if not self.is_terminal:
            return
        if not text.startswith(self.shown):
            print("\n")
            self.shown = ""
        print(_CONTROL.sub(lambda found: repr(found[0])[1:-1], text[len(self.shown) :]), end="", flush=True)
        self.shown = text

    def end(self, text: str) -> None:
        """The answer is over, and this is what it says."""
        print("\n" if self.is_terminal else text, flush=True)
