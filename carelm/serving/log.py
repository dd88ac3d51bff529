"""The server's log: one line each, with the time of day; ids, counts and times, and no text of a client's."""

import logging
import time

from carelm import ranks


def note(line: str) -> None:
    ranks.say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")


class Lines(logging.Handler):
    """What uvicorn says, as lines of this log, without tracebacks: those may hold a client's text."""

    def emit(self, record: logging.LogRecord) -> None:
        note(record.getMessage().strip())
