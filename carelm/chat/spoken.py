"""The text of an answer whose ids come one by one: what decoding all of them gives, without decoding all of them each time."""

import re
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from carelm.chat.habits import Habits

if TYPE_CHECKING:
    from carelm.chat.tokens import Encoder

LONGEST, KEPT = 64, 16  # ids: above so many the first ones are let go, and so many stay
BYTE = re.compile("<0x[0-9A-F]{2}>")  # a token of one byte: a run of them is decoded as a whole


class Decoded:
    """The text of the ids so far, of which only the last ones are decoded again with each new one.

    The first ones are let go where the text of the rest is the end of the whole text, in the middle of no character: what comes
    later stands behind it as it stands behind the whole. A blank that a decoder takes from its first word stays with them.
    """

    def __init__(self, encoder: "Encoder", ids: Sequence[int] = (), *, skip_special_tokens: bool):
        self._encoder, self._skips = encoder, skip_special_tokens
        self._before, self._ids, self._longest = "", list(ids), LONGEST
        self.text = self._decode(self._ids) if ids else ""

    def add(self, token: int) -> None:
        self._ids.append(token)
        self.text = self._before + self._decode(self._ids)
        if len(self._ids) > self._longest:
            self._let_go()

    def _let_go(self) -> None:
        for start in range(len(self._ids) - KEPT, 0, -1):
            rest = self._decode(self._ids[start:])
            if rest and self.text.endswith(rest) and not rest.startswith("\ufffd") and not self._parts_bytes(start):
                self._before, self._ids = self.text[: len(self.text) - len(rest)], self._ids[start:]
                self._longest = LONGEST
                return
        self._longest = 2 * len(self._ids)

    def _parts_bytes(self, start: int) -> bool:
        names = self._encoder.tokenizer.convert_ids_to_tokens(self._ids[start - 1 : start + 1])
        return all(map(BYTE.fullmatch, names))

    def _decode(self, ids: list[int]) -> str:
        return self._encoder.decode(ids, skip_special_tokens=self._skips)


class Spoken:
    """What an answer says: its text without special tokens and without what the template puts around it: a header, a channel,
    thoughts, a tag. A model that does not write those is read just the same.

    Args:
        ids: the first ids of the answer, or all of them.
    """

    def __init__(self, encoder: "Encoder", habits: Habits, ids: Sequence[int] = ()):
        self._encoder, self._habits = encoder, habits
        self._all = Decoded(encoder, ids, skip_special_tokens=False)
        self._shown = Decoded(encoder, ids, skip_special_tokens=True)
        self._behind: dict[
            str, tuple[str, Decoded]
        ] = {}  # each lead that has come: what its last token says more, the rest
        self._find_leads(ids)

    def add(self, token: int) -> None:
        """Takes the next id of the answer."""
        self._shown.add(token)
        for _, rest in self._behind.values():
            rest.add(token)
        if self._habits.closings or self._habits.thought:
            self._all.add(token)
            self._find_leads([token])

    @property
    def whole(self) -> str:
        """The text of an answer that is over."""
        return self._without_lead().strip().removesuffix(self._habits.trailer).strip()

    @property
    def so_far(self) -> str:
        """What `whole` says of the first ids of an answer, less what the ids to come may change: a character whose bytes are
        not all there, the beginning of what the template puts around an answer's text. Thoughts are shown until they end."""
        text = self._without_lead().strip().rstrip("\ufffd")
        if any(lead.startswith(text) for lead in self._leads):
            return ""
        trailer = self._habits.trailer
        held = next((n for n in range(len(trailer), 0, -1) if text.endswith(trailer[:n])), 0)
        return text[: len(text) - held].rstrip()

    @property
    def is_thinking(self) -> bool:
        """Whether the ids so far may be reasoning alone, which `whole` leaves out once it has ended."""
        if not self._habits.thought:
            return False
        (opening, closing), text = self._habits.thought, self._all.text.lstrip()
        return closing not in text and (text.startswith(opening) or opening.startswith(text))

    @cached_property
    def _leads(self) -> list[str]:
        """The leads as they look while they come."""
        encode, decode = self._encoder.encode, self._encoder.decode
        return [decode(encode(closing), skip_special_tokens=True).strip() for closing in self._habits.closings]

    def _find_leads(self, new: Sequence[int]) -> None:
        """Notes the leads that have come with the new ids: one, or all there are."""
        for closing in self._habits.closings:
            text = self._all.text.lstrip() if closing == self._habits.header else self._all.text
            if closing in self._behind or not (
                text.startswith(closing) if closing == self._habits.header else closing in text
            ):
                continue
            within = bisect_left(range(len(new)), True, lo=1, key=lambda n: closing in self._encoder.decode(new[:n]))
            text = self._all.text if within == len(new) else self._encoder.decode(new[:within])
            rest = Decoded(self._encoder, new[within:], skip_special_tokens=True)
            self._behind[closing] = text.partition(closing)[2], rest

    def _without_lead(self) -> str:
        for closing in self._habits.closings:
            if closing in self._behind:
                said, rest = self._behind[closing]
                return said + rest.text
        return self._shown.text
