"""Conversations -> token ids and the mask of trained tokens: the one place where a prompt is rendered.

A conversation's text comes from the tokenizer's chat template and is tokenised as a whole, as every server does it. What
stands before a trained answer must be the ids that ask for it: where a token would cross that border, the two sides are
tokenised apart.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from carelm.chat.encoder_decoder import is_encoder_decoder
from carelm.chat.habits import find_habits
from carelm.chat.mask import Layout, Rendered, mask
from carelm.chat.presence import Presence
from carelm.chat.spoken import Spoken
from carelm.chat.template import write
from carelm.chat.tokenizer import load_tokenizer
from carelm.chat.tokens import CLOSE, OPEN, Encoder, unmark
from carelm.chat.window import cut_longest, fewest_dropped, without_oldest_turns
from carelm.data.example import Example
from carelm.data.report import shortened
from carelm.errors import UserError
from carelm.files import locate
from carelm.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORGOTTEN = "without the thoughts of earlier answers, as the template asks"  # nothing is cut


@dataclass(frozen=True)
class Prompt:
    """What asks for an answer.

    Attributes:
        ids: token ids up to and including the assistant's header.
        messages: those that the ids hold.
        change: what was done to fit them ("old turns dropped", "prompt cut"), or None.
    """

    ids: list[int]
    messages: list[dict[str, Any]]
    change: str | None


class Chat:
    """Renders conversations with one tokenizer, one window and one rule for what does not fit.

    Args:
        tokenizer: with a chat template whose text for a conversation begins with the text for its first turns.
        trained_turns: "last" or "all" assistant turns of the completion carry loss, those with "train": False aside.
        max_length: the window in tokens; of an encoder-decoder each of the two windows.
        too_long: "drop" or "cut" what does not fit once the old turns are gone.
        is_encoder_decoder: the prompt goes to an encoder, the answer to a decoder.

    Attributes:
        end_of_turn_id: the special token that ends an answer.
        end_of_turn_ids: it and the one that ends a tool call, where that is another; generation stops at each of them.
        own_system: the system message that the template writes itself where a conversation has none; "" for none.
        keeps_lines: whether a new line has a token; a T5 writes it as a blank.

    Raises:
        UserError: where the tokenizer has no chat template, or one that ends an answer with no special token, or for an
            encoder-decoder a prompt.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        trained_turns: str = "last",
        max_length: int,
        too_long: str = "drop",
        is_encoder_decoder: bool = False,
    ):
        if not tokenizer.chat_template:
            raise UserError(
                f"model_name_or_path: the tokenizer of {tokenizer.name_or_path} has no chat template; set "
                "chat_template_path to a .jinja file, such as recipes/sweeps/plain.jinja"
            )
        self.tokenizer = tokenizer
        self.trained_turns = trained_turns
        self.max_length = max_length
        self.too_long = too_long
        self.is_encoder_decoder = is_encoder_decoder
        self._encoder = Encoder(tokenizer)
        self._habits = find_habits(self._encoder)
        self._presence = Presence(lambda *args: unmark(self._write(*args)))
        self.end_of_turn_id = self._habits.end_of_turn_id
        self.end_of_turn_ids = self._habits.end_of_turn_ids
        self.own_system = self._habits.own_system
        self.keeps_lines = "\n" in self._encoder.decode(self._encoder.encode("x\nx"))
        if is_encoder_decoder and self.prompt_ids([{"role": "user", "content": "x"}])[-1] != tokenizer.eos_token_id:
            raise UserError(
                f"chat_template_path: an encoder's text ends with {tokenizer.eos_token}, and this chat template ends a prompt "
                "otherwise; leave it out, texts are written plainly then"
            )

    # Prompts and answers

    def text(self, messages: list[dict[str, Any]], *, tools: list[dict] | None = None, for_answer: bool = False) -> str:
        """The text of a conversation; with `for_answer` up to and including the assistant's header.

        Raises:
            UserError: where the template refuses it.
        """
        return unmark(self._write(messages, tools, for_answer))

    def prompt_ids(self, messages: list[dict[str, Any]], *, tools: list[dict] | None = None) -> list[int]:
        """The ids that ask for the next assistant turn; the same ids that stand before it in training."""
        return self._encoder.encode(self._write(messages, tools, True))

    def fit_prompt(self, messages: list[dict[str, Any]], limit: int, *, tools: list[dict] | None = None) -> Prompt:
        """The prompt that asks for the next answer, of at most `limit` ids.

        As in training, old turns go first; then the longest message is cut.

        Raises:
            UserError: where the template refuses the conversation or leaves a message out, or nothing of it fits.
        """
        text = self._write(messages, tools, True)
        self._presence.check(unmark(text), messages, tools, for_answer=True, thoughts=set())
        if ids := self._ids_within(text, limit):
            return Prompt(ids, messages, None)

        def ids_of(some: list[dict[str, Any]]) -> list[int] | None:
            return self._ids_within(self._write(some, tools, True), limit)

        rest = fewest_dropped(messages, ids_of)
        if len(rest) < len(messages) and (ids := ids_of(rest)):
            return Prompt(ids, rest, "old turns dropped")
        messages = rest
        shorter = cut_longest(messages, ids_of, limit)
        if shorter is None:
            raise UserError(f"max_length: {limit} tokens do not even hold the chat template of a prompt; raise it")
        return Prompt(self.prompt_ids(shorter, tools=tools), shorter, "prompt cut")

    def holds(self, messages: list[dict[str, Any]], limit: int) -> bool:
        """Whether the prompt that asks for the next answer has at most `limit` ids.

        Raises:
            UserError: where the template refuses the conversation.
        """
        return self._ids_within(self._write(messages, None, True), limit) is not None

    def _ids_within(self, text: str, limit: int) -> list[int] | None:
        """The ids of a text; None where they are more than the limit. A text far too long is not even encoded."""
        ids = self._encoder.encode(text) if self._encoder.may_fit(text, limit) else None
        return ids if ids and len(ids) <= limit else None

    def answer_text(
        self, messages: list[dict[str, Any]], answer: dict[str, Any], *, tools: list[dict] | None = None
    ) -> str:
        """What the model is to say after `messages`, as `spoken` reads it: the answer's text, or its tool calls as the
        template writes them."""
        if not answer.get("tool_calls") and not any(closing in answer["content"] for closing in self._habits.closings):
            return answer["content"]
        return self.spoken(self.answer_ids(messages, answer, tools=tools))

    def answer_ids(
        self, messages: list[dict[str, Any]], answer: dict[str, Any], *, tools: list[dict] | None = None
    ) -> list[int]:
        """The ids of an answer to `messages` up to its end of turn, as they are trained behind `prompt_ids`."""
        example = Example(messages, [answer], id="", category=None, source="the answer")
        rendered = self._render_one(replace(example, tools=tools) if tools else example)
        return rendered.input_ids[rendered.trained].tolist()

    def spoken(self, ids: list[int]) -> str:
        """What an answer of these ids says."""
        return Spoken(self._encoder, self._habits, ids).whole

    def listen(self) -> Spoken:
        """What an answer says whose ids come one by one."""
        return Spoken(self._encoder, self._habits)

    # Examples

    def render(self, examples: list[Example]) -> tuple[list[Rendered | None], Counter]:
        """All examples in tokens, None for those dropped as too long, with counts of what was done to fit the window.

        Raises:
            UserError: where the template refuses an example or leaves out a message of it, or where what is trained would
                not be what is asked and answered.
        """
        counts: Counter = Counter()
        rendered: list[Rendered | None] = self._render_whole(examples, counts)
        for i, example in enumerate(examples):
            if self._is_too_long(rendered[i]):
                rendered[i] = self._fit(example, counts)
        return rendered, counts

    def render_pairs(self, examples: list[Example]) -> tuple[list[tuple[Rendered, Rendered] | None], Counter]:
        """Both answers of each pair in tokens, the better one first, behind the same prompt: old turns go until the longer one
        fits, and a pair that never does is dropped. The rest is as in `render`."""
        counts: Counter = Counter()
        rendered = self._render_whole([answered for pair in examples for answered in _both(pair)], counts)
        if FORGOTTEN in counts:
            counts[FORGOTTEN] //= 2
        pairs: list[tuple[Rendered, Rendered] | None] = [*zip(rendered[::2], rendered[1::2])]
        for i, shorter in enumerate(examples):
            is_cut = False
            while pairs[i] is not None and max(len(r.input_ids) for r in pairs[i]) > self.max_length:
                shorter, is_cut = self._without_oldest_turns(shorter), True
                pairs[i] = shorter and tuple(map(self._render_one, _both(shorter)))
            if is_cut:
                counts["too long" if pairs[i] is None else "old turns dropped"] += 1
        return pairs, counts

    def _render_whole(self, examples: list[Example], counts: Counter) -> list[Rendered]:
        """All examples in tokens, however long."""
        layouts, refused = [], {}
        for example in examples:
            try:
                layouts.append(self._lay_out(example))
            except UserError as error:
                refused.setdefault(example.source, str(error))
        if refused:
            rows = f": {shortened([*refused], 5)}" if len(refused) > 1 else ""
            total = len({example.source for example in examples})
            number = f"; {len(refused)} of {total} rows cannot be written{rows}" if total > 1 else ""
            raise UserError(next(iter(refused.values())) + number)
        if forgotten := sum(layout.forgets for layout in layouts):
            counts[FORGOTTEN] = forgotten
        return self._render(layouts)

    def _write(self, messages: list[dict], tools: list[dict] | None, for_answer: bool = False) -> str:
        """The text with marks around special tokens that the messages and tools hold themselves."""
        messages = [self._to_template(m) for m in messages]
        text = write(self.tokenizer, self._encoder.mark(messages), self._encoder.mark(tools), for_answer=for_answer)
        for mark in (OPEN, CLOSE):
            text = text.replace(json.dumps(mark)[1:-1], mark)
        return text

    def _to_template(self, message: dict[str, Any]) -> dict[str, Any]:
        message = {k: v for k, v in message.items() if k != "train"}
        if self._habits.arguments_as_text and message.get("tool_calls"):
            message["tool_calls"] = [_with_text_arguments(call) for call in message["tool_calls"]]
        return message

    def trained_answers(self, example: Example) -> list[int]:
        """The places in prompt + completion of the answers that carry loss, and that the evaluator asks for."""
        messages = example.prompt + example.completion
        answers = [i for i in range(len(example.prompt), len(messages)) if messages[i]["role"] == "assistant"]
        answers = answers if self.trained_turns == "all" else answers[-1:]
        return [i for i in answers if messages[i].get("train") is not False]

    def expected_answers(self, example: Example) -> list[str]:
        """What each of them is to say; the last one of a row with several references, the first of these."""
        return [self.references(example, turn)[0] for turn in self.trained_answers(example)]

    def references(self, example: Example, turn: int) -> list[str]:
        """What the answer at this place of the example may say: the row's references for its last one, else its own text."""
        messages = example.prompt + example.completion
        is_last = turn == max(k for k, message in enumerate(messages) if message["role"] == "assistant")
        own = list(example.references) if is_last else []
        return own or [self.answer_text(messages[:turn], messages[turn], tools=example.tools)]

    def _lay_out(self, example: Example, *, is_whole: bool = True) -> Layout:
        """The example's text up to its last trained answer, with the stretches of the trained ones; `is_whole` says that all
        its messages must stand there."""
        messages, tools, answers = example.prompt + example.completion, example.tools, self.trained_answers(example)
        try:
            if not answers:
                raise UserError("it has no answer to train; take the row out")
            stretches, text, closed = [], "", ""  # closed: the text up to the last end of turn
            for i in answers:
                before, after = self._write(messages[:i], tools, True), self._write(messages[: i + 1], tools)
                if not before.startswith(closed):
                    raise UserError(
                        "trained_turns: the chat template rewrites earlier turns once a later one follows, so that a trained "
                        "turn would not be what the model sees; set trained_turns: last, or another chat_template_path"
                    )
                if not after.startswith(before):
                    turns = self._write(messages[:i], tools)
                    asked = unmark(before.removeprefix(turns))[-60:]
                    what = (
                        f"asks for an answer with {asked!r}, which it does not write before one"
                        if before.startswith(turns) and after.startswith(turns)
                        else "rewrites earlier turns once an answer follows"
                    )
                    raise UserError(
                        f"the chat template {what}, so that what is trained would not be what is asked; set another "
                        "chat_template_path"
                    )
                end = self._encoder.end_of_last(after, self.end_of_turn_ids, len(before))
                stretches.append((len(before), end))
                text, closed = after, after[:end]
            if OPEN in text:
                self._encoder.encode(text)  # raises where a special token of the row's own cannot be text
            forgets = False
            if is_whole:
                shown = messages[: answers[-1] + 1]
                forgets = self._presence.check(unmark(text), shown, tools, for_answer=False, thoughts={*answers})
        except UserError as error:
            raise UserError(f"{example.source}: {error}") from None
        return Layout(example.source, text, stretches, forgets)

    def _render_one(self, example: Example) -> Rendered:
        return self._render([self._lay_out(example, is_whole=False)])[0]

    def _render(self, layouts: list[Layout]) -> list[Rendered]:
        encoded = self._encoder.encode_all([layout.text for layout in layouts])
        return [mask(self._encoder, *pair, self.end_of_turn_ids) for pair in zip(layouts, encoded)]

    # What does not fit

    def _is_too_long(self, rendered: Rendered) -> bool:
        if not self.is_encoder_decoder:
            return len(rendered.input_ids) > self.max_length
        of_answer = int(rendered.trained.sum())
        return max(of_answer, len(rendered.input_ids) - of_answer) > self.max_length

    def _fit(self, example: Example, counts: Counter) -> Rendered | None:
        """Old turns go first; what is still too long is dropped or cut."""
        shorter = example
        while (rest := self._without_oldest_turns(shorter)) is not None:
            shorter = rest
            rendered = self._render_one(shorter)
            if not self._is_too_long(rendered):
                counts["old turns dropped"] += 1
                return rendered
        if self.too_long == "drop":
            counts["too long"] += 1
            return None
        return self._cut(shorter, counts)

    def _without_oldest_turns(self, example: Example) -> Example | None:
        """The example less everything from its first user turn up to the next one; None where nothing can go."""
        kept = without_oldest_turns(example.prompt + example.completion)
        if kept is None:
            return None
        first_user = next(i for i, m in enumerate(kept) if m["role"] == "user")
        first_answer = next(i for i in range(first_user, len(kept)) if kept[i]["role"] == "assistant")
        split = max(first_answer, len(kept) - len(example.completion))  # what was prompt stays prompt
        return replace(example, prompt=kept[:split], completion=kept[split:])

    def _cut(self, example: Example, counts: Counter) -> Rendered | None:
        """Cuts the longest message of the prompt down to what the answer leaves (half the window at least; of an
        encoder-decoder the whole), then the answer, whose last token becomes the end of turn."""
        rendered = self._render_one(example)
        answer_length = 0 if self.is_encoder_decoder else int(rendered.trained.sum())
        room = max(self.max_length - answer_length, self.max_length // 2)
        prompt = cut_longest(example.prompt, lambda m: len(self.prompt_ids(m, tools=example.tools)) <= room, room)
        if prompt is None:
            counts["too long"] += 1
            return None
        if prompt != example.prompt:
            counts["prompt cut"] += 1
        rendered = self._render_one(replace(example, prompt=prompt, completion=example.completion))
        if self._is_too_long(rendered):
            counts["answer cut"] += 1
            limit = self.max_length + (int((~rendered.trained).sum()) if self.is_encoder_decoder else 0)
            end = int(np.flatnonzero(rendered.trained[:limit])[-1]) + 1
            rendered = Rendered(rendered.input_ids[:end].copy(), rendered.trained[:end].copy())
            if end == limit:  # else the window ends in a tool's turn, and the answer before it is whole
                rendered.input_ids[-1] = self.end_of_turn_id
        return rendered

    def highlight(self, rendered: Rendered) -> str:
        """The example's text with the trained tokens in reverse green, for a terminal."""
        edges = [0, *(np.flatnonzero(np.diff(rendered.trained.astype(np.int8))) + 1), len(rendered.trained)]
        parts = []
        for a, b in zip(edges, edges[1:]):
            text = self._encoder.decode(rendered.input_ids[a:b].tolist())
            parts.append(f"\033[7;32m{text}\033[0m" if rendered.trained[a] else text)
        return "".join(parts)


def _both(pair: Example) -> tuple[Example, Example]:
    """A pair as two examples: with the better answer, and with the worse one."""
    return pair, replace(pair, completion=pair.rejected)


def _with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}}


def make_chat(recipe: Recipe) -> Chat:
    """The recipe's tokenizer and rules for rendering."""
    template = recipe.training.get("chat_template_path")
    tokenizer = load_tokenizer(
        recipe.base,
        revision=recipe.revision,
        trust_remote_code=recipe.training.get("trust_remote_code", False),
        template_file=locate(template) if template else None,
    )
    return Chat(
        tokenizer,
        trained_turns=recipe.trained_turns,
        max_length=recipe.max_length - recipe.virtual_tokens,
        too_long=recipe.too_long,
        is_encoder_decoder=is_encoder_decoder(recipe.base, recipe.revision),
    )
