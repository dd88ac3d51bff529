"""Small tokenizers of the kinds that bases have, made in the test."""

import json

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

SPECIAL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
CORPUS = (
    "The shop opens at nine. I am sorry, your order is late. Yes, size 38 is there.\nHow do I send it back? 😀 é".split(
        " "
    )
)


def _fast(tokenizer):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )  # fmt: skip


def metaspace(scheme):
    """As Llama 2, TinyLlama, Mistral and Phi 3 have it: a blank is a letter, put in front of the text by `scheme`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=True)
    tokenizer.train_from_iterator(CORPUS * 3, trainers.BpeTrainer(vocab_size=300, special_tokens=list(SPECIAL)))
    state = json.loads(tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    vocabulary.setdefault("▁", len(vocabulary))
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _fast(tokenizer)


def byte_level():
    """As GPT-2 has it: two line ends are one token at the end of a text, and two before a word."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(["\n\n\n \n\n", *CORPUS] * 3, trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return _fast(tokenizer)


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python, which tells no offsets: every letter is a token, and so are two blanks in a row."""

    def __init__(self, **kwargs):
        self.letters = {letter: i for i, letter in enumerate(["<unk>", "  ", "\n\n", *map(chr, range(9, 256)), "😀"])}
        super().__init__(
            bos_token="<s>", eos_token="</s>", unk_token="<unk>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]
        )  # fmt: skip

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return self.letters | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        tokens = []
        while text:
            size = 2 if text[:2] in self.letters else 1
            tokens.append(text[:size])
            text = text[size:]
        return tokens

    def _convert_token_to_id(self, token):
        return self.letters.get(token, 0)

    def _convert_id_to_token(self, index):
        return next(letter for letter, i in self.letters.items() if i == index)

    def convert_tokens_to_string(self, tokens):
        return "".join(tokens)


KINDS = {
    "byte-level": byte_level,
    "metaspace first": lambda: metaspace("first"),
    "metaspace always": lambda: metaspace("always"),
    "metaspace never": lambda: metaspace("never"),
    "python": Letters,
}
