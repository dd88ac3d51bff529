"""The server's log: one line each, with the time of day; ids, counts and times, and no text of a client's."""

import time

from carelm import ranks


def note(line: str) -> None:
    ranks.say(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}")
