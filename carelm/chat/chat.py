"""Conversations -> token ids and the mask of trained tokens: the one place where a prompt is rendered.

A conversation's text comes from the tokenizer's chat template. It is cut where trained turns begin and end, and each
piece is tokenised by itself, so that the ids of a prompt are the same in training and in generation: always the ids
of the text up to and including the assistant's header.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from carelm.chat.tokenizer import load_tokenizer
from carelm.data.example import Example
from carelm.errors import UserError
from carelm.files import locate
from carelm.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARK = "QzMarkzQ"  # stands for an answer where what the template puts around it is looked for


@dataclass(frozen=True)
class Rendered:
    """One example in tokens: `input_ids` and `trained` are 1-D arrays of one length (int32, bool)."""

    input_ids: np.ndarray
    trained: np.ndarray


class Chat:
    """Renders conversations with one tokenizer, one window and one rule for what does not fit.

    Args:
        tokenizer: with a chat template whose text for a conversation begins with the text for its first turns.
        trained_turns: "last" or "all" assistant turns of the completion carry loss.
        max_length: the window in tokens.
        too_long: "drop" or "cut" what does not fit once the old turns are gone.

    Raises:
        UserError: where the tokenizer has no chat template, or one that ends an answer with no special token.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        *,
        trained_turns: str = "last",
        max_length: int,
        too_long: str = "drop",
    ):
        if not tokenizer.chat_template:
            raise UserError(
                f"model_name_or_path: the tokenizer of {tokenizer.name_or_path} has no chat template; set "
                "chat_template_path to a .jinja file"
            )
        self.tokenizer = tokenizer
        self.trained_turns = trained_turns
        self.max_length = max_length
        self.too_long = too_long
        self.end_of_turn_id = self._find_end_of_turn()

    def _find_end_of_turn(self) -> int:
        """The first special token that the template writes after an answer's text, and that generation stops at."""
        question, answer = {"role": "user", "content": "x"}, {"role": "assistant", "content": MARK}
        text = self.text([question, answer])
        if MARK not in text:
            raise UserError(
                f"chat_template_path: the chat template of {self.tokenizer.name_or_path} does not write an answer's text; set "
                "another template"
            )
        tail = text.rpartition(MARK)[2]
        added = self.tokenizer.added_tokens_decoder.items()
        special = {*self.tokenizer.all_special_ids, *(i for i, token in added if token.special)}
        for token in self._tokenize([tail])[0]:
            if token in special:
                return int(token)
        raise UserError(
            f"chat_template_path: the chat template of {self.tokenizer.name_or_path} ends an answer with {tail!r}, which "
            "holds no special token, so that the model could not learn to stop; set another template"
        )

    def text(self, messages: list[dict[str, Any]], *, for_answer: bool = False) -> str:
        """The text of a conversation; with `for_answer` up to and including the assistant's header."""
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=for_answer)

    def prompt_ids(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids that ask for the next assistant turn; the same ids that stand before it in training."""
        return self._tokenize([self.text(messages, for_answer=True)])[0]

    def answer_text(self, messages: list[dict[str, Any]], answer: dict[str, Any]) -> str:
        """What the model is to say after `messages`: the answer's text, or its tool calls as the template writes them."""
        if not answer.get("tool_calls"):
            return answer["content"]
        text = self._pieces(messages, [answer])[-1][0]
        return text.partition(self.tokenizer.decode([self.end_of_turn_id]))[0].strip()

    def fit_prompt(self, messages: list[dict[str, Any]], limit: int) -> tuple[list[int], str | None]:
        """The ids that ask for the next answer, at most `limit` of them, and what was done to fit them (None: nothing).

        As in training, old turns go first; then the longest message is cut.
        """
        ids = self.prompt_ids(messages)
        if len(ids) <= limit:
            return ids, None
        while (rest := _without_oldest_turns(messages)) is not None:
            messages = rest
            if len(ids := self.prompt_ids(messages)) <= limit:
                return ids, "old turns dropped"
        shorter = self._cut_longest(messages, limit)
        if shorter is None:
            raise UserError(f"max_length: {limit} tokens do not even hold the chat template of a prompt; raise it")
        return self.prompt_ids(shorter), "prompt cut"

    def render(self, examples: list[Example]) -> tuple[list[Rendered | None], Counter]:
        """All examples in tokens, None for those dropped as too long, with counts of what was done to fit the window.

        Raises:
            UserError: where the template refuses an example, or a trained turn of it has no end-of-turn token.
        """
        from jinja2 import TemplateError  # costs a tenth of a second, which --help need not wait

        counts: Counter = Counter()
        pieces = []
        for example in examples:
            try:
                pieces.append(self._pieces(example.prompt, example.completion))
            except TemplateError as error:
                raise UserError(
                    f"{example.source}: the chat template of {self.tokenizer.name_or_path} refuses this conversation "
                    f"({error}); mend the row or the system_prompt, or set chat_template_path"
                ) from None
        ids = iter(self._tokenize([text for example in pieces for text, _ in example]))
        rendered = [self._join(example, [next(ids) for _ in example]) for example in pieces]
        for i, example in enumerate(examples):
            if len(rendered[i].input_ids) > self.max_length:
                rendered[i] = self._fit(example, counts)
            if rendered[i] is not None:
                self._check_end_of_turn(example, rendered[i])
        return rendered, counts

    def _pieces(self, prompt: list[dict], completion: list[dict]) -> list[tuple[str, bool]]:
        """The conversation's text in pieces, each with whether it is trained; trained ones begin after the header."""
        messages = prompt + completion
        answers = [i for i in range(len(prompt), len(messages)) if messages[i]["role"] == "assistant"]
        pieces, text = [], ""
        for i in answers if self.trained_turns == "all" else answers[-1:]:
            before, after = self.text(messages[:i], for_answer=True), self.text(messages[: i + 1])
            if not (before.startswith(text) and after.startswith(before)):
                raise UserError(
                    f"trained_turns: the chat template of {self.tokenizer.name_or_path} rewrites earlier turns once a later "
                    "one follows, so that a trained turn would not be what the model sees; set trained_turns: last, or "
                    "chat_template_path"
                )
            pieces += [(before[len(text) :], False), (after[len(before) :], True)]
            text = after
        return pieces

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: no warning that a text is over the model's window, that is what `_fit` is for
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]

    def _join(self, pieces: list[tuple[str, bool]], ids: list[list[int]]) -> Rendered:
        trained = [np.full(len(piece_ids), is_trained) for (_, is_trained), piece_ids in zip(pieces, ids)]
        return Rendered(np.concatenate([np.asarray(i, np.int32) for i in ids]), np.concatenate(trained))

    def _render_one(self, example: Example) -> Rendered:
        pieces = self._pieces(example.prompt, example.completion)
        return self._join(pieces, self._tokenize([text for text, _ in pieces]))

    def _fit(self, example: Example, counts: Counter) -> Rendered | None:
        """Old turns go first; what is still too long is dropped or cut."""
        shorter = example
        while (rest := self._without_oldest_turns(shorter)) is not None:
            shorter = rest
            rendered = self._render_one(shorter)
            if len(rendered.input_ids) <= self.max_length:
                counts["old turns dropped"] += 1
                return rendered
        if self.too_long == "drop":
            counts["too long"] += 1
            return None
        return self._cut(shorter, counts)

    def _without_oldest_turns(self, example: Example) -> Example | None:
        """The example less everything from its first user turn up to the next one; None where nothing can go."""
        kept = _without_oldest_turns(example.prompt + example.completion)
        if kept is None:
            return None
        first_user = next(i for i, m in enumerate(kept) if m["role"] == "user")
        first_answer = next(i for i in range(first_user, len(kept)) if kept[i]["role"] == "assistant")
        split = first_answer if self.trained_turns == "all" else len(kept) - 1
        return replace(example, prompt=kept[:split], completion=kept[split:])

    def _cut_longest(self, messages: list[dict], limit: int) -> list[dict] | None:
        """The messages with as much of the longest one as makes `limit` tokens of the prompt; None where none does."""
        messages = [dict(m) for m in messages]
        longest = max(messages, key=lambda m: len(m["content"] or ""))
        text = longest["content"] or ""
        fits, too_many = -1, len(text) + 1  # characters: the most that fits, the least that does not
        while too_many - fits > 1:
            keep = (fits + too_many) // 2
            longest["content"] = text[:keep]
            if len(self.prompt_ids(messages)) <= limit:
                fits = keep
            else:
                too_many = keep
        longest["content"] = text[:fits]
        return messages if fits >= 0 else None

    def _cut(self, example: Example, counts: Counter) -> Rendered | None:
        """Cuts the longest message of the prompt down to what the answer leaves (half the window at least), then the
        answer, whose last token becomes the end of turn."""
        rendered = self._render_one(example)
        answer_length = int(rendered.trained.sum())
        room = max(self.max_length - answer_length, self.max_length // 2)
        prompt = self._cut_longest(example.prompt, room)
        if prompt is None:
            counts["too long"] += 1
            return None
        if prompt != example.prompt:
            counts["prompt cut"] += 1
        rendered = self._render_one(replace(example, prompt=prompt, completion=example.completion))
        if len(rendered.input_ids) > self.max_length:
            counts["answer cut"] += 1
            end = int(np.flatnonzero(rendered.trained[: self.max_length])[-1]) + 1
            rendered = Rendered(rendered.input_ids[:end].copy(), rendered.trained[:end].copy())
            if end == self.max_length:  # else the window ends in a tool's turn, and the answer before it is whole
                rendered.input_ids[-1] = self.end_of_turn_id
        return rendered

    def _check_end_of_turn(self, example: Example, rendered: Rendered) -> None:
        """Every trained stretch must hold the end-of-turn token."""
        edges = np.flatnonzero(np.diff(np.concatenate([[False], rendered.trained, [False]]).astype(np.int8)))
        stretches = list(zip(edges[::2], edges[1::2]))
        if not stretches or any(self.end_of_turn_id not in rendered.input_ids[a:b] for a, b in stretches):
            raise UserError(
                f"{example.source}: an answer has no trained end-of-turn token, every label of it may be masked; look at it "
                "with --preview 1, or set another chat_template_path"
            )

    def highlight(self, rendered: Rendered) -> str:
        """The example's text with the trained tokens in reverse green, for a terminal."""
        edges = [0, *(np.flatnonzero(np.diff(rendered.trained.astype(np.int8))) + 1), len(rendered.trained)]
        parts = []
        for a, b in zip(edges, edges[1:]):
            text = self.tokenizer.decode(rendered.input_ids[a:b].tolist(), clean_up_tokenization_spaces=False)
            parts.append(f"\033[7;32m{text}\033[0m" if rendered.trained[a] else text)
        return "".join(parts)


def _without_oldest_turns(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The messages less everything from the first user turn up to the next one; None where nothing can go."""
    users = [i for i, m in enumerate(messages) if m["role"] == "user"]
    return messages[: users[0]] + messages[users[1] :] if len(users) > 1 else None


def make_chat(recipe: Recipe) -> Chat:
    """The recipe's tokenizer and rules for rendering."""
    template = recipe.training.get("chat_template_path")
    tokenizer = load_tokenizer(
        recipe.base,
        revision=recipe.model.get("model_revision", "main"),
        trust_remote_code=recipe.training.get("trust_remote_code", False),
        template_file=locate(template) if template else None,
    )
    virtual = recipe.num_virtual_tokens if recipe.method == "prompt_tuning" else 0
    return Chat(
        tokenizer,
        trained_turns=recipe.trained_turns,
        max_length=recipe.max_length - virtual,
        too_long=recipe.too_long,
    )
