"""What goes where a conversation does not fit the window: old turns first, then the end of the longest message."""

from collections.abc import Callable
from typing import Any

Messages = list[dict[str, Any]]


def without_oldest_turns(messages: Messages) -> Messages | None:
    """The messages less everything from the first user turn up to the next one; None where nothing can go."""
    users = [i for i, m in enumerate(messages) if m["role"] == "user"]
    return messages[: users[0]] + messages[users[1] :] if len(users) > 1 else None


def fewest_dropped(messages: Messages, fits: Callable[[Messages], Any]) -> Messages:
    """The messages less as few of the oldest turns as will fit; with the last turn alone where not even that does.

    What fits still does with fewer turns, so that few of them are tried however many there are.
    """
    users = [i for i, m in enumerate(messages) if m["role"] == "user"][1:]
    dropped, enough = 0, len(users)
    while enough - dropped > 1:
        middle = (dropped + enough) // 2
        if fits(_from(messages, users[middle - 1])):
            enough = middle
        else:
            dropped = middle
    return _from(messages, users[enough - 1]) if users else messages


def _from(messages: Messages, turn: int) -> Messages:
    """The messages before the first user turn, and those from this one on."""
    first = next(i for i, m in enumerate(messages) if m["role"] == "user")
    return messages[:first] + messages[turn:]


def cut_longest(messages: Messages, fits_window: Callable[[Messages], Any], limit: int) -> Messages | None:
    """The messages with as much of the longest one as fits the window of `limit` tokens; None where none does."""
    messages = [dict(m) for m in messages]
    longest = max(messages, key=lambda m: len(m["content"] or ""))
    text = longest["content"] or ""
    fits, too_many = -1, len(text) + 1  # characters: the most that fits, the least that does not
    while too_many - fits > 1:
        keep = min((fits + too_many) // 2, 2 * max(fits, limit))  # so that a text far too long is not read many times
        longest["content"] = text[:keep]
        if fits_window(messages):
            fits = keep
        else:
            too_many = keep
    longest["content"] = text[:fits]
    return messages if fits >= 0 else None
