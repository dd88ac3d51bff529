"""Text -> token ids, and where in them a part of the text begins and ends."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from carelm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Around a special token that stands in a row's own text, from there to the ids: two that Unicode keeps out of all text.
OPEN, CLOSE = "\ufdd0", "\ufdd1"
# A normalizer that writes blanks in another way, and nothing else: one sign for one, and one more in front.
BLANK = r'Prepend\(prepend="▁"\)|Replace\(pattern=String\(" "\), content="▁"\)'
# What parts a text into words and leaves nothing of it out, where it does not remove what it parts at.
KEEP_ALL = {"Sequence", "ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts"}
BLANKS_ALONE = re.compile(rf"None|{BLANK}|Sequence\(normalizers=\[({BLANK})(, ({BLANK}))*\]\)")


def _keeps_all(pre_tokenizer: Any) -> bool:
    state = b"" if pre_tokenizer is None else pre_tokenizer.__getstate__()
    kinds = {kind.decode() for kind in re.findall(rb'"type":"(\w+)"', state)}
    return kinds <= KEEP_ALL and b'"behavior":"Removed"' not in state


@dataclass(frozen=True)
class Encoded:
    """The ids of a text.

    Attributes:
        text: the text, in which special tokens of the row's own stand between OPEN and CLOSE.
        ids: its token ids.
        special: index in `ids` and first character of every special token, or None where the tokenizer does not tell.
    """

    text: str
    ids: list[int]
    special: list[tuple[int, int]] | None


class Encoder:
    """One tokenizer's way from text to ids. A special token that a row's own text holds becomes ids of plain text.

    Attributes:
        special_ids: of the tokens that the config names, and of added tokens that are flagged special; not of the one that
            stands for unknown text.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.tokenizer = tokenizer
        added = {i: token for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset({*tokenizer.all_special_ids, *added} - {tokenizer.unk_token_id})
        names = {*tokenizer.all_special_tokens, *(token.content for token in added.values())} - {tokenizer.unk_token}
        self._special = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")
        self._eats_blanks_behind = {token.content for token in added.values() if token.rstrip}
        self._encode_short = lru_cache(maxsize=4096)(lambda text: self._call([text])["input_ids"][0])

    def mark(self, messages: Any) -> Any:
        """The messages or tools with marks around special tokens in their text; as they are where there are none."""
        return self._marked(messages) if any(map(self._special.search, strings(messages, keys=True))) else messages

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._special.sub(f"{OPEN}\\g<0>{CLOSE}", unmark(value))
        if isinstance(value, dict):
            return {self._marked(key): self._marked(item) for key, item in value.items()}
        return [self._marked(item) for item in value] if isinstance(value, (list, tuple)) else value

    def encode(self, text: str) -> list[int]:
        """The ids of a text.

        Raises:
            UserError: where a special token in the row's own text cannot be written as text.
        """
        return self._encode_marked(text) if OPEN in text else self._call([text])["input_ids"][0]

    def may_fit(self, text: str, limit: int) -> bool:
        """Whether a text may come to at most so many ids, told by its length; where that does not tell it, it may."""
        longest, lost = self._longest
        return len(text) <= limit * longest or len(unmark(text)) - sum(map(text.count, lost)) <= limit * longest

    @cached_property
    def _longest(self) -> tuple[float, list[str]]:
        """Characters that one id stands for at most, and those that no id stands for. Infinity where it is not known what a
        tokenizer leaves out: this tells those whose vocabulary writes all bytes and whose normalizer shortens nothing."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        strips = any(token.lstrip or token.rstrip for token in self.tokenizer.added_tokens_decoder.values())
        if backend is None or strips or type(backend.model).__name__ != "BPE" or not _keeps_all(backend.pre_tokenizer):
            return math.inf, []
        vocabulary, normalizer = self.tokenizer.get_vocab(), repr(backend.normalizer)
        if getattr(backend.model, "byte_fallback", False):
            names, most = (
                {byte: f"<0x{byte:02X}>" for byte in range(256)},
                1 if BLANKS_ALONE.fullmatch(normalizer) else math.inf,
            )
        elif "ByteLevel" in repr(backend.pre_tokenizer):
            from transformers.convert_slow_tokenizer import bytes_to_unicode  # torch, which others need anyway

            names, most = (
                bytes_to_unicode(),
                {"None": 1, "NFC()": 4}.get(normalizer, math.inf),
            )  # NFC makes one of four at most
        else:
            return math.inf, []
        missing = {byte for byte, name in names.items() if name not in vocabulary}
        if missing.intersection(range(0x80, 0xC0)):  # bytes that every character beyond ASCII has
            most = math.inf
        return most * max(map(len, vocabulary)), [chr(byte) for byte in missing if byte < 0x80]

    def encode_all(self, texts: list[str]) -> list[Encoded]:
        """The ids of whole texts, with the places of special tokens in those where the tokenizer tells them."""
        plain = [text for text in texts if OPEN not in text]
        fast = self.tokenizer.is_fast
        found = iter(())
        if plain:
            output = self._call(plain, return_offsets_mapping=True) if fast else self._call(plain)
            places = output["offset_mapping"] if fast else [None] * len(plain)
            found = zip(output["input_ids"], places)
        encoded = []
        for text in texts:
            ids, places = (self._encode_marked(text), None) if OPEN in text else next(found)
            special = places and [(k, places[k][0]) for k, token in enumerate(ids) if token in self.special_ids]
            encoded.append(Encoded(text, ids, special))
        return encoded

    def place(self, encoded: Encoded, character: int) -> int | None:
        """How many of the ids are those of the text before `character` by itself; None where its ids are others.

        A special token parts what stands on its two sides, so that only the text from the last one on is looked at.
        """
        index = start = 0
        for k, first in reversed(encoded.special or []):
            if first < character:
                index, start = k, first
                break
        before = encoded.text[start:character]
        ids = self._encode_short(before) if encoded.special is not None else self.encode(before)
        return index + len(ids) if encoded.ids[index : index + len(ids)] == ids else None

    def end_of_last(self, text: str, ids: frozenset[int], start: int) -> int:
        """Where the last of these special tokens that the template wrote behind `start` ends; the text's end without any."""
        names = {self.tokenizer.convert_ids_to_tokens(i) for i in ids}
        found = [m.end() for m in self._special.finditer(text, start) if m[0] in names and text[m.start() - 1] != OPEN]
        return found[-1] if found else len(text)

    def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)

    def _call(self, texts: list[str], **options: Any) -> Any:
        # verbose=False: no warning that a text is over the model's window, that is looked at later
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)

    def _encode_marked(self, text: str) -> list[int]:
        """Stretches between the template's own special tokens: those that hold one as text are encoded apart, as text."""
        stretches = [""]  # every second one is a special token of the template
        for part in re.split(f"({OPEN}.*?{CLOSE}|{self._special.pattern})", text, flags=re.DOTALL):
            if part.startswith(OPEN) or not self._special.fullmatch(part):
                stretches[-1] += part
            else:
                stretches += [part, ""]
        ids, waiting = [], ""
        for i, stretch in enumerate(stretches):
            if OPEN not in stretch:
                waiting += stretch
                continue
            if waiting:
                ids += self._call([waiting])["input_ids"][0]
            waiting = ""
            if i and stretches[i - 1] in self._eats_blanks_behind:
                stretch = stretch.lstrip()
            ids += self._encode_as_text(unmark(stretch), is_first=not ids)
        return ids + (self._call([waiting])["input_ids"][0] if waiting else [])

    def _encode_as_text(self, text: str, *, is_first: bool) -> list[int]:
        ids = self._call([text], split_special_tokens=True)["input_ids"][0]
        if not is_first and not self._starts_anew:
            # This tokenizer puts a blank before a text's first word and not after a special token: a line's end keeps it off.
            line, longer = ([*self._call([t], split_special_tokens=True)["input_ids"][0]] for t in ("\n", "\n" + text))
            ids = longer[len(line) :] if longer[: len(line)] == line else ids
        if real := self.special_ids.intersection(ids):
            token = self.tokenizer.convert_ids_to_tokens(min(real))
            raise UserError(
                f"its text holds {token!r}, which this tokenizer cannot write as text; take it out of the row"
            )
        return ids

    @property
    def _starts_anew(self) -> bool:
        """Whether text after a special token has the ids that it has by itself."""
        token = self.tokenizer.convert_ids_to_tokens(min(self.special_ids))
        return self._encode_short(token + "x")[1:] == self._encode_short("x")


def unmark(text: str) -> str:
    """The text without the marks around special tokens."""
    return text.replace(OPEN, "").replace(CLOSE, "")


def strings(value: Any, *, keys: bool) -> Iterator[str]:
    """The texts in a value of objects and lists, those of its objects' keys only where `keys` says so."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            if keys:
                yield from strings(key, keys=keys)
            yield from strings(item, keys=keys)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item, keys=keys)
