"""What a template puts around an answer stands on neither side of a comparison, whatever the model writes."""

import copy

import pytest

from carelm.chat.chat import Chat
from carelm.data.example import Example

END = "<|eot_id|>"
CHANNEL, MESSAGE = (
    "<|start_header_id|>",
    "<|end_header_id|>",
)  # of the demo's special tokens, for those of other families
TEMPLATES = {
    "plain": ("", ""),
    "tags around the answer": ("Assistant:\n", "<answer>", "</answer>\n"),
    "end in words": ("Assistant:", " ", "\n### End"),
    "header in the answer": ("", "Assistant:\n"),
    "channel": (f"{CHANNEL}assistant", f"{CHANNEL}final{MESSAGE}"),
    "empty thought": (f"{CHANNEL}assistant{MESSAGE}", "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n"),
    "opened thought": (f"{CHANNEL}assistant{MESSAGE}<think>\n", "{{ m.reasoning_content or '' }}\n</think>\n\n"),
    "thought in a message of its own": (
        f"{CHANNEL}assistant",
        "{% if m.reasoning_content %}" + f"{CHANNEL}analysis{MESSAGE}" + "{{ m.reasoning_content }}<|end_of_text|>"
        f"{CHANNEL}assistant" + "{% endif %}" + f"{CHANNEL}final{MESSAGE}",
    ),
}  # generation prompt, what stands between it and an answer's text, and behind that
ANSWERS = ["We open at nine.", "é 😀\n- one\n- two", "Write </think> or Assistant: there.", "Write <|eot_id|> there."]


@pytest.fixture
def chat(tokenizer):
    def chat(name):
        ask, lead, *tail = TEMPLATES[name]
        own = copy.copy(tokenizer)
        own.chat_template = (
            "{% for m in messages %}{% if m.role == 'assistant' %}" + ask + lead + "{{ m.content }}" + "".join(tail) + END
            + "{% else %}{{ m.role }}: {{ m.content }}" + END + "{% endif %}{% endfor %}"
            + "{% if add_generation_prompt %}" + ask + "{% endif %}"
        )  # fmt: skip
        return Chat(own, max_length=4096)

    return chat


def trained_ids(chat, answer):
    question = [{"role": "user", "content": "When?"}]
    (r,), _ = chat.render([Example(question, [answer], id="1", category=None, source="r:1")])
    return r.input_ids[r.trained].tolist(), chat.answer_text(question, answer)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", ANSWERS)
def test_a_model_that_says_what_it_was_trained_on_says_the_reference(chat, name, content):
    own = chat(name)
    ids, reference = trained_ids(own, {"role": "assistant", "content": content})
    assert own.spoken(ids) == own.spoken(ids[:-1]) == reference == content


def shown_of(own, ids):
    """What is shown of an answer after each id of it."""
    spoken = own.listen()
    shown = [spoken.so_far]
    for token in ids:
        spoken.add(token)
        shown.append(spoken.so_far)
    return shown


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("content", ANSWERS)
def test_what_is_shown_of_an_answer_while_it_comes_stays_as_it_is(chat, name, content):
    own = chat(name)
    ids, reference = trained_ids(own, {"role": "assistant", "content": content})
    shown = shown_of(own, ids)
    assert all(after.startswith(before) for before, after in zip(shown, shown[1:]))
    assert not any("\ufffd" in text for text in shown)
    assert reference.startswith(shown[-1]) and len(set(shown)) > 4


def test_thoughts_are_shown_until_the_answer_takes_their_place(chat):
    own = chat("opened thought")
    ids, _ = trained_ids(own, {"role": "assistant", "content": "At nine.", "reasoning_content": "They ask when."})
    shown = shown_of(own, ids)
    assert "They ask when." in shown and shown[-1] == "At nine."


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_model_that_leaves_the_templates_part_out_is_read_all_the_same(chat, name):
    own = chat(name)
    ids = own.tokenizer("We open at nine.<|eot_id|>", add_special_tokens=False)["input_ids"]
    assert own.spoken(ids) == "We open at nine."
    assert own.spoken([]) == "" and own.spoken(ids[-1:]) == ""


@pytest.mark.parametrize("name", ["empty thought", "opened thought", "thought in a message of its own"])
def test_thoughts_are_no_part_of_the_answer(chat, name):
    own = chat(name)
    answer = {"role": "assistant", "content": "At nine.", "reasoning_content": "They ask for the hours."}
    ids, reference = trained_ids(own, answer)
    assert "They ask for the hours." in own.tokenizer.decode(ids)
    assert own.spoken(ids) == reference == "At nine."


def test_a_prompt_that_opens_a_thought_is_read_to_its_end_though_no_answer_is_written_that_way(tokenizer):
    own = copy.copy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}{{ '<think>\n' if add_generation_prompt }}"
    )
    ids = own("They ask.\n</think>\n\nAt nine.<|eot_id|>", add_special_tokens=False)["input_ids"]
    assert Chat(own, max_length=64).spoken(ids) == "At nine."


def test_a_tool_call_that_opens_and_ends_with_special_tokens_is_compared_without_them(tokenizer):
    own = copy.copy(tokenizer)
    own.chat_template = (
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}<|start_header_id|>"
        "{{ c.function | tojson }}<|end_of_text|>{% else %}<|eot_id|>{% endfor %}{% endfor %}"
    )
    chat = Chat(own, max_length=4096)
    assert own.convert_ids_to_tokens(sorted(chat.end_of_turn_ids)) == ["<|end_of_text|>", "<|eot_id|>"]
    call = {"type": "function", "function": {"name": "find_order", "arguments": {"number": "K-38"}}}
    ids, reference = trained_ids(chat, {"role": "assistant", "content": "", "tool_calls": [call]})
    assert own.decode(ids[-1:]) == "<|end_of_text|>"
    assert chat.spoken(ids) == reference == '{"name": "find_order", "arguments": {"number": "K-38"}}'
