"""Which ids of a conversation are trained: every answer up to its end of turn, after the ids that ask for it."""

import unicodedata
from dataclasses import dataclass

import numpy as np

from carelm.chat.tokens import Encoded, Encoder, unmark
from carelm.errors import UserError


@dataclass(frozen=True)
class Rendered:
    """One example in tokens: `input_ids` and `trained` are 1-D arrays of one length (int32, bool)."""

    input_ids: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True)
class Layout:
    """One example as text, with the stretches (first character, end) that a model answers in it, and whether the reasoning of
    earlier answers is left out of it."""

    source: str
    text: str
    answers: list[tuple[int, int]]
    forgets: bool = False


def mask(encoder: Encoder, layout: Layout, encoded: Encoded, end_ids: frozenset[int]) -> Rendered:
    """The ids, with every answer up to its end of turn as trained ones, each after the ids that ask for it."""
    starts = [encoder.place(encoded, first) for first, _ in layout.answers]
    cuts = [first for (first, _), start in zip(layout.answers, starts) if start is None]
    if cuts:
        encoded, starts = _cut_apart(encoder, layout, cuts)
    ids = encoded.ids
    trained = np.zeros(len(ids), bool)
    for (first, end), start, following in zip(layout.answers, starts, [*starts[1:], len(ids)]):
        last = _find_end(encoder, encoded, first, end, range(start, following), end_ids)
        if last is None:
            raise UserError(
                f"{layout.source}: an answer has no trained end-of-turn token, every label of it may be masked; look at it "
                "with --preview 1, or set another chat_template_path"
            )
        said = encoder.decode(ids[start : last + 1])
        if not _letters(unmark(layout.text[first:end])).startswith(_letters(said)):
            raise UserError(
                f"{layout.source}: the tokenizer of {encoder.tokenizer.name_or_path} writes an answer as {said[:60]!r}, which "
                "is not its text; take the row out, or take another base"
            )
        trained[start : last + 1] = True
    return Rendered(np.asarray(ids, np.int32), trained)


def _cut_apart(encoder: Encoder, layout: Layout, cuts: list[int]) -> tuple[Encoded, list[int]]:
    """The ids of a text that is tokenised apart at `cuts`, and where its answers begin in them."""
    ids: list[int] = []
    for first, end in zip([0, *cuts], [*cuts, len(layout.text)]):
        ids += encoder.encode(layout.text[first:end])
    encoded = Encoded(layout.text, ids, None)
    starts = [encoder.place(encoded, first) for first, _ in layout.answers]
    if None in starts:
        raise UserError(
            f"{layout.source}: the beginning of an answer shares a token with what stands before it, so that later answers "
            "would not stand after the ids that ask for them; set trained_turns: last, or take the row out"
        )
    return encoded, starts


def _find_end(
    encoder: Encoder, encoded: Encoded, first: int, end: int, among: range, end_ids: frozenset[int]
) -> int | None:
    """Which id ends the answer that stands in these characters and begins with the first of these ids."""
    found = [k for k in among if encoded.ids[k] in end_ids]
    if encoded.special is not None:
        within = {k for k, character in encoded.special if character < end}
        found = [k for k in found if k in within]
    else:
        answer = encoder.encode(encoded.text[first:end])
        found = found[: sum(token in end_ids for token in answer)]
    return found[-1] if found else None


def _letters(text: str) -> str:
    """A text without blanks, which tokenizers put and take as they like, and in one of Unicode's normal forms."""
    return "".join(unicodedata.normalize("NFKC", text).split())
