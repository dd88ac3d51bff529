"""The tokenizer of a base, with the chat template that the recipe names."""

import os

from carelm.chat.encoder_decoder import PLAIN, is_encoder_decoder
from carelm.chat.template import read_template, settle
from carelm.data.sources import why_not_had
from carelm.errors import UserError


def load_tokenizer(name_or_path: str, *, revision: str, trust_remote_code: bool, template_file: str | None):
    """The base's tokenizer, with the recipe's chat template where it names one, and a pad token. An encoder-decoder without a
    template gets the plain one.

    Padding is masked everywhere, so that any token will do where the tokenizer has none; the end of turn stays
    learnable because labels never come from padding.

    Raises:
        UserError: where there is no tokenizer, a chat template that cannot be rendered, or nothing to pad with.
    """
    from transformers import AutoTokenizer

    is_plain = is_encoder_decoder(name_or_path, revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # a damaged file fails in as many ways as it has readers
        if not os.path.exists(name_or_path):
            raise why_not_had("model_name_or_path", name_or_path, error) from None
        reason = " ".join(str(error).split())[:200]
        reason = reason if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {reason}"
        raise UserError(f"model_name_or_path: no tokenizer can be loaded from {name_or_path} ({reason})") from None
    if template_file is not None:
        tokenizer.chat_template = read_template(template_file)
    elif is_plain and not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN
    if tokenizer.chat_template:
        where = f"model_name_or_path: the chat template of {name_or_path}"
        where = where if template_file is None else f"chat_template_path: {template_file}"
        tokenizer.chat_template = settle(tokenizer.chat_template, where)
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        usual = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", tokenizer.unk_token, tokenizer.eos_token)
        tokenizer.pad_token = next((token for token in usual if token in vocabulary), None)
        if tokenizer.pad_token is None:
            raise UserError(f"model_name_or_path: the tokenizer of {name_or_path} names no pad, unk or eos token")
    return tokenizer
