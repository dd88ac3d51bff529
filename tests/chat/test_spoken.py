"""An answer's text, put together while its ids come, is what decoding all of them gives."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from carelm.chat import spoken
from carelm.chat.chat import Chat
from carelm.chat.spoken import Spoken

END, OPENS = "<|eot_id|>", "<|start_header_id|>"
WORDS = ["We open at nine. 🙂 Köln, 東京!\n- one\n- two  three", "<think>\nThey ask when.\n</think>\n\nAt nine."] * 9
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n"
    "{% endif %}{{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def of_bytes():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.train_from_iterator(
        WORDS, trainers.BpeTrainer(vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    )
    return made


def of_pieces():
    """As sentencepiece writes it: a blank before the first word, unknown characters as bytes."""
    alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    plain = ["We open at nine. Tokens, one by one"] * 9
    made.train_from_iterator(plain, trainers.BpeTrainer(vocab_size=330, special_tokens=["<unk>", *alphabet]))
    return made


def of_words():
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made.train_from_iterator(WORDS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=["[UNK]"]))
    return made


@pytest.fixture(scope="module", params=[of_bytes, of_pieces, of_words], ids=lambda make: make.__name__)
def chat(request):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=request.param(), eos_token=END, pad_token=END)
    tokenizer.add_special_tokens({"additional_special_tokens": [OPENS]})
    tokenizer.chat_template = TEMPLATE
    return Chat(tokenizer, max_length=4096)


def ids_of(chat, seed):
    """Ids of texts, between ids of anything."""
    draw, ids = random.Random(seed), []
    while len(ids) < 300:
        ids += draw.choices(range(len(chat.tokenizer)), k=draw.choice([0, 0, 2, 90]))
        text = draw.choice([*WORDS, "</think>\n\n", "🙂" * draw.randrange(40), "\n\n", OPENS, "assistant: ", " "])
        ids += chat.tokenizer(text, add_special_tokens=False)["input_ids"][draw.choice([0, 0, 1, 3]) :]
    return ids


@pytest.mark.parametrize("seed", range(12))
def test_ids_one_by_one_say_what_they_say_together(chat, seed):
    ids, heard = ids_of(chat, seed), chat.listen()
    for n, token in enumerate(ids, 1):
        heard.add(token)
        at_once = Spoken(chat._encoder, chat._habits, ids[:n])
        for what in ("whole", "so_far", "is_thinking"):
            assert getattr(heard, what) == getattr(at_once, what), (n, what)


def test_few_ids_are_decoded_for_each_new_one(chat, monkeypatch):
    ids = chat.tokenizer("We open at nine. " * 200, add_special_tokens=False)["input_ids"]
    decoded, decode = [], type(chat._encoder).decode
    monkeypatch.setattr(
        type(chat._encoder), "decode", lambda self, ids, **how: decoded.append(len(ids)) or decode(self, ids, **how)
    )
    heard = chat.listen()
    for token in ids:
        heard.add(token)
    assert heard.so_far == chat.spoken(ids) and len(ids) > 500
    assert sum(decoded[:-4]) / len(ids) < 3 * spoken.LONGEST
