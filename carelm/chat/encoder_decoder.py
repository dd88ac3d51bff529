"""Encoder-decoders: which ones can be trained, and how a conversation is written for them. Imports no torch.

The encoder reads what is asked, the decoder writes the answer, and the two texts never meet in one sequence. Prepared rows hold
both all the same, one behind the other: what is not trained is the encoder's, what is trained the decoder's, and each ends with
the end of sequence.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carelm.data.example import Example
from carelm.errors import UserError
from carelm.files import read_json

if TYPE_CHECKING:
    from carelm.chat.chat import Chat

T5_FAMILY = ("t5", "mt5", "umt5")  # FLAN-T5 and T5 v1.1 are t5; their sums overflow in fp16
KNOWN = (*T5_FAMILY, "bart")
CODES = "wants language codes before both texts, for which a recipe has no keys"
WHY_NOT = {
    "mbart": CODES,
    "m2m_100": CODES,
    "nllb-moe": CODES,
    "t5gemma": "has a chat template and attention of another kind on its two sides",
    "t5gemma2": "has a chat template and attention of another kind on its two sides",
}
# Texts with an empty line between turns, and a new line before an answer that was given; so are a system message and examples
# in front written. The answer that is asked for stands behind an end of sequence: it is the decoder's, which begins anew.
PLAIN = """\
{{- bos_token or '' }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' and loop.last %}
        {{- eos_token + (bos_token or '') + (message['content'] or '') + eos_token }}
    {%- elif message['role'] == 'assistant' %}
        {{- '\\n' + (message['content'] or '') }}
    {%- else %}
        {{- ('' if loop.first else '\\n\\n') + (message['content'] or '') }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- eos_token }}
{%- endif %}
"""


@lru_cache
def is_encoder_decoder(name_or_path: str, revision: str = "main") -> bool:
    """Whether a base is an encoder-decoder, as its config.json says.

    Raises:
        UserError: for one that cannot be trained here.
    """
    return check_kind(name_or_path, read_config(name_or_path, revision))


def overflows_in_fp16(name_or_path: str, revision: str = "main") -> bool:
    return read_config(name_or_path, revision).get("model_type") in T5_FAMILY


@lru_cache
def read_config(name_or_path: str, revision: str) -> dict[str, Any]:
    """A base's config.json; empty where there is none, which is said where the base is loaded."""
    if Path(name_or_path).is_dir():
        return read_json(Path(name_or_path) / "config.json")
    from transformers import PreTrainedConfig

    try:
        return PreTrainedConfig.get_config_dict(name_or_path, revision=revision)[0]
    except (OSError, ValueError):
        return {}


def check_kind(name: str, config: dict[str, Any]) -> bool:
    """The same of a configuration that is there."""
    kind = config.get("model_type")
    if kind in KNOWN:
        return True
    if kind in WHY_NOT or config.get("is_encoder_decoder"):
        reason = WHY_NOT.get(kind, "was never tried here")
        raise UserError(
            f"model_name_or_path: {name} is an encoder-decoder ({kind}) that {reason}; take a T5, FLAN-T5, mT5, UMT5 or BART, "
            "or a decoder-only base"
        )
    return False


def one_answer_each(chat: "Chat", examples: list[Example]) -> list[Example]:
    """The same examples, those of an encoder-decoder with several trained answers as one for each of them: what comes before
    an answer is read by the encoder, other answers too."""
    if not chat.is_encoder_decoder:
        return examples
    parts = []
    for example in examples:
        messages, answers = example.prompt + example.completion, chat.trained_answers(example)
        parts += [replace(example, prompt=messages[:i], completion=[messages[i]]) for i in answers] or [example]
    return parts
