"""The text of an answer as its tokens come, cut at a stop text."""

from carelm.chat.chat import Chat


class Answer:
    """One answer.

    Args:
        chat: turns ids into text.
        ends: the ids that end an answer.
        stops: texts that end it too, and are no part of it.

    Attributes:
        tokens: ids so far.
        text: what may be shown of it so far, reasoning aside; after `end` all of it, as the evaluation reads it.
        finish_reason: "stop" once it has ended by itself or by a stop text, "length" until then.
    """

    def __init__(self, chat: Chat, ends: set[int], stops: list[str]):
        self.chat, self.ends, self.stops = chat, ends, stops
        self.tokens: list[int] = []
        self._spoken = chat.listen()
        self.text = ""
        self.finish_reason = "length"

    def add(self, token: int) -> str:
        """The text that has come with this token. What may be the beginning of a stop text is held back."""
        self.tokens.append(token)
        self._spoken.add(token)
        if token in self.ends:
            self.finish_reason = "stop"
            return ""
        if self._spoken.is_thinking:
            return ""
        text = self._cut(self._spoken.so_far)
        if self.finish_reason == "length":
            held = (
                n for stop in self.stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])
            )
            text = text[: len(text) - max(held, default=0)]
        return self._grown_to(text)

    def end(self) -> str:
        """The text that is left when no more tokens come."""
        text = self.chat.spoken(self.tokens)
        if self.finish_reason == "length":  # it may have ended inside a character
            text = text.rstrip("\ufffd").rstrip()
        text = self._cut(text)
        new = self._grown_to(text)
        self.text = text
        return new

    def _cut(self, text: str) -> str:
        if found := [at for stop in self.stops if (at := text.find(stop)) >= 0]:
            self.finish_reason = "stop"
            return text[: min(found)]
        return text

    def _grown_to(self, text: str) -> str:
        """What is new. Thoughts that nothing opened were shown until they ended: the answer follows them."""
        if self.text.startswith(text):
            return ""
        new = text[len(self.text) :] if text.startswith(self.text) else f"\n\n{text}"
        self.text = text
        return new
