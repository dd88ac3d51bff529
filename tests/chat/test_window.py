"""What does not fit the window leaves it as in training: as few old turns as will do, then as little of the longest text."""

import pytest

from carelm.chat.chat import Chat
from carelm.chat.window import cut_longest, fewest_dropped, without_oldest_turns

TURNS = [{"role": "system", "content": "s" * 5}]
for k, size in enumerate((30, 4, 50, 7, 1, 20)):
    TURNS += [{"role": "user", "content": "u" * size}, {"role": "assistant", "content": "a" * (k + 1)}]
TURNS.append({"role": "user", "content": "last"})


def length(messages) -> int:
    return sum(3 + len(message["content"]) for message in messages)


@pytest.mark.parametrize("limit", range(0, length(TURNS), 3))
def test_as_few_of_the_oldest_turns_are_dropped_as_one_after_the_other_would_be(limit):
    wanted = TURNS
    while (rest := without_oldest_turns(wanted)) is not None:
        wanted = rest
        if length(wanted) <= limit:
            break
    assert fewest_dropped(TURNS, lambda messages: length(messages) <= limit) == wanted


@pytest.mark.parametrize("limit, kept", [(20, 3), (34, 17), (500, 483), (5000, 4983), (17, 0), (16, None)])
def test_of_the_longest_text_as_much_stays_as_fits(limit, kept):
    messages = [{"role": "system", "content": "x" * 11}, {"role": "user", "content": "y" * 20_000}]
    tried = []

    def measured(some) -> bool:
        tried.append(len(some[1]["content"]))
        return length(some) <= limit

    found = cut_longest(messages, measured, limit)
    assert found is None if kept is None else [len(m["content"]) for m in found] == [11, kept]
    assert max(tried) <= 2 * 5000 and len(messages[1]["content"]) == 20_000  # a text far too long is never read whole


def test_a_text_far_too_long_is_cut_as_one_that_is_encoded_whole(tokenizer, monkeypatch):
    chat = Chat(tokenizer, max_length=4096)
    long, lost = "Where is my order 4711? 🙂 " * 3000, "\x04" * 50_000
    turn, answer = {"role": "user", "content": "And then?"}, {"role": "assistant", "content": "Soon. " * 40}
    conversations = [
        [{"role": "user", "content": long}],
        [{"role": "user", "content": f"When{lost}?"}],
        [turn, answer] * 300 + [turn],
        [{"role": "user", "content": long}, answer, turn],
        [{"role": "user", "content": long}, answer, {"role": "user", "content": long}],
    ]
    encoded, encode = [], type(chat._encoder).encode
    monkeypatch.setattr(
        type(chat._encoder),
        "encode",
        lambda self, text: encoded.append(len(text.replace("\x04", ""))) or encode(self, text),
    )
    found = [chat.fit_prompt(messages, 64) for messages in conversations]
    assert 1000 < max(encoded) < 10_000
    monkeypatch.setattr(type(chat._encoder), "may_fit", lambda *_: True)
    assert found == [chat.fit_prompt(messages, 64) for messages in conversations]
    assert [prompt.change for prompt in found[2:]] == ["old turns dropped", "old turns dropped", "prompt cut"]
