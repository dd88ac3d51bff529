"""For every trained turn the ids before it are those that ask for it, and its ids say the answer and its end of turn."""

import numpy as np
import pytest
from conftest import PROJECT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_tokenizers import KINDS, byte_level
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from carelm.chat.chat import Chat
from carelm.chat.tokens import Encoder
from carelm.data.example import Example
from carelm.errors import UserError

TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}",
    "two line ends": "{% for m in messages %}<|im_start|>{{ m.role }}\n\n{{ m.content }}<|im_end|>{% endfor %}"
    "{{ '<|im_start|>assistant\n\n' if add_generation_prompt }}",
    "inst": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
    "named": "{% for m in messages %}{{ 'ASSISTANT: ' if m.role == 'assistant' else 'USER: ' }}{{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else ' ' }}{% endfor %}{{ 'ASSISTANT:' if add_generation_prompt }}",
    "plain": (PROJECT / "recipes/sweeps/plain.jinja").read_text(encoding="utf-8"),  # of the ready sweep of bases
}
PIECES = [
    "Yes",
    " I am",
    "\n",
    "\n\n",
    "  ",
    "é",
    "😀",
    "38",
    "'s",
    ".",
    "</s>",
    "<|im_end|>",
    "<|im_start|>",
    "<s",
    "[INST]",
]


@pytest.fixture(scope="module")
def tokenizers():
    return {name: make() for name, make in KINDS.items()}


def talk(*texts):
    return [{"role": "assistant" if i % 2 else "user", "content": text} for i, text in enumerate(texts)]


def example(*texts):
    messages = talk(*texts)
    return Example(messages[:1], messages[1:], id="1", category=None, source="rows.jsonl:1")


def letters(text):
    return "".join(text.split())


def stretches(rendered):
    edges = np.flatnonzero(np.diff(np.concatenate([[False], rendered.trained, [False]]).astype(np.int8)))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist()))


def special_ids(tokenizer, ids):
    return [i for i in ids if i in tokenizer.all_special_ids and i != tokenizer.unk_token_id]


def as_served(tokenizer, messages):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(sorted(KINDS)),
    template=st.sampled_from(sorted(TEMPLATES)),
    trained_turns=st.sampled_from(["last", "all"]),
    texts=st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join), min_size=2, max_size=6)
    .filter(lambda texts: len(texts) % 2 == 0 and all(map(str.strip, texts))),
)  # fmt: skip
def test_what_is_trained_is_what_is_asked_and_answered(tokenizers, kind, template, trained_turns, texts):
    tokenizer = tokenizers[kind]
    tokenizer.chat_template = TEMPLATES[template]
    chat = Chat(tokenizer, trained_turns=trained_turns, max_length=10**6)
    messages = talk(*texts)
    try:
        (rendered,), _ = chat.render([example(*texts)])
    except UserError as error:
        assert str(error).startswith("rows.jsonl:1: ")
        assert trained_turns == "all" and len(texts) > 2, error  # of one answer nothing can break
        return
    ids, found = rendered.input_ids.tolist(), stretches(rendered)
    answers = range(1, len(texts), 2) if trained_turns == "all" else [len(texts) - 1]
    assert len(found) == len(answers)
    for i, (start, end) in zip(answers, found):
        assert ids[:start] == chat.prompt_ids(messages[:i])
        ending = tokenizer.decode([chat.end_of_turn_id])
        assert letters(tokenizer.decode(ids[start:end])) == letters(texts[i] + ending)
        assert ids[end - 1] == chat.end_of_turn_id
    # No text of a message becomes a token that only the template may write.
    plain = talk(*["x"] * len(texts))
    assert special_ids(tokenizer, ids) == special_ids(tokenizer, as_served(tokenizer, plain))
    served = as_served(tokenizer, messages)
    holds_special = any(token in text for token in tokenizer.all_special_tokens for text in texts)
    if not holds_special and all(served[:start] == ids[:start] for start, _ in found):
        assert ids == served


def test_a_special_token_that_a_tokenizer_cannot_write_as_text_is_refused_with_the_row():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1, "Yes": 2, "user": 3, "assistant": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}{{ eos_token }}{% endfor %}"
    with pytest.raises(
        UserError, match="^rows.jsonl:1: its text holds '</s>', which this tokenizer cannot write as text"
    ):
        Chat(tokenizer, max_length=64).render([example("Yes </s>", "Yes")])


def without_blanks(*first):
    tokenizer = byte_level().backend_tokenizer
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def of_words():
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1} | {b: 2 + i for i, b in enumerate(ALPHABET)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


ALPHABET = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"a"})


@pytest.mark.parametrize(
    "make",
    [
        byte_level,
        lambda: without_blanks(pre_tokenizers.WhitespaceSplit()),
        lambda: without_blanks(pre_tokenizers.BertPreTokenizer()),
        lambda: without_blanks(pre_tokenizers.CharDelimiterSplit(" ")),
        lambda: without_blanks(pre_tokenizers.Punctuation("removed")),
        of_words,
    ],
)
def test_no_text_that_fits_is_too_long_to_be_encoded(make):
    made = make()
    encoder = Encoder(made if hasattr(made, "backend_tokenizer") else PreTrainedTokenizerFast(tokenizer_object=made))
    for text in ("Yes." + " " * 500 + "No.", "!" * 500, "x" * 500, "Yes, 38.", " \n" * 200, "é" * 200, "a\u0301" * 90):
        assert encoder.may_fit(text, max(1, len(encoder.encode(text))))
    assert make is not byte_level or not encoder.may_fit("x" * 500, 20)
