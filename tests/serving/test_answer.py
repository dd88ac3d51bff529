"""What clients read of an answer is what the evaluation reads, whatever stands before it, and grows piece by piece."""

import copy

import pytest

from carelm.chat.chat import Chat
from carelm.serving.answer import Answer

HEAD, END = "<|start_header_id|>assistant<|end_header_id|>", "<|eot_id|>"
# What the template writes as the prompt's end, and before an answer's text.
THINKING = {
    "opened by the model": (HEAD, "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"),
    "opened by the prompt": (f"{HEAD}<think>\n", "{{ m.reasoning_content or '' }}\n</think>\n\n"),
}


def make_chat(tokenizer, ask, lead, answer_ask=None):
    own = copy.copy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}" + (answer_ask or ask) + lead + "{{ m.content }}" + END
        + "{% else %}{{ m.role }}: {{ m.content }}" + END + "{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}" + ask + "{% endif %}"
    )  # fmt: skip
    return Chat(own, max_length=4096)


def read(chat, text, *stops):
    """The pieces, the whole, why it ended, and what the evaluation reads."""
    ids = chat.tokenizer(text + END, add_special_tokens=False)["input_ids"]
    answer, pieces = Answer(chat, {chat.end_of_turn_id}, list(stops)), []
    for token in ids:
        pieces.append(answer.add(token))
        if answer.finish_reason == "stop":
            break
    pieces.append(answer.end())
    return pieces, answer.text, answer.finish_reason, chat.spoken(ids)


@pytest.mark.parametrize("way", THINKING)
def test_thoughts_are_no_part_of_what_clients_read(tokenizer, way):
    thought = "<think>\nThey ask when.\n" if way == "opened by the model" else "They ask when.\n"
    pieces, whole, reason, evaluated = read(
        make_chat(tokenizer, *THINKING[way]), f"{thought}</think>\n\nWe open at nine 🙂."
    )
    assert "".join(pieces) == whole == evaluated == "We open at nine 🙂." and reason == "stop"
    assert sum(map(bool, pieces)) > 3


def test_a_stop_text_in_thoughts_ends_nothing(tokenizer):
    _, whole, *_ = read(
        make_chat(tokenizer, *THINKING["opened by the model"]),
        "<think>\nUser: when?\n</think>\n\nAt nine. User: x",
        "User:",
    )
    assert whole == "At nine. "


def test_an_answer_without_thoughts_comes_piece_by_piece_from_a_model_that_may_think(tokenizer):
    own = make_chat(tokenizer, *THINKING["opened by the model"])
    closed = make_chat(tokenizer, f"{HEAD}<think>\n\n</think>\n\n", THINKING["opened by the model"][1], HEAD)
    for chat in (own, closed):
        pieces, whole, *_ = read(chat, "We open at nine.")
        assert "".join(pieces) == whole == "We open at nine." and sum(map(bool, pieces)) > 3


def test_thoughts_that_nothing_opened_stay_apart_from_the_answer_in_a_stream(tokenizer):
    pieces, whole, _, evaluated = read(
        make_chat(tokenizer, *THINKING["opened by the model"]), "They ask.\n</think>\n\nAt nine."
    )
    assert whole == evaluated == "At nine." and "".join(pieces).endswith("\n\nAt nine.")


def test_an_answer_cut_inside_a_character_ends_before_it(tokenizer):
    chat = make_chat(tokenizer, HEAD, "")
    ids = chat.tokenizer("At nine 🙂", add_special_tokens=False)["input_ids"][:-1]
    assert chat.tokenizer.decode(ids).endswith("\ufffd")
    answer = Answer(chat, {chat.end_of_turn_id}, [])
    pieces = [*(answer.add(token) for token in ids), answer.end()]
    assert "".join(pieces) == answer.text == "At nine" and answer.finish_reason == "length"


@pytest.mark.parametrize("stop", ["🙂", " nine", "en at", "n", "\nUser:", "."])
def test_a_stop_text_over_several_tokens_is_never_shown(tokenizer, stop):
    text = "We open at nine 🙂.\nUser: x"
    pieces, whole, reason, _ = read(make_chat(tokenizer, HEAD, ""), text, stop, "nothing")
    assert "".join(pieces) == whole == text.partition(stop)[0] and reason == "stop"
