"""A model that is talked to: its prompts are fitted as the evaluator fits them, its answers shown as they come."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from carelm import ranks
from carelm.errors import UserError
from carelm.evaluation.candidates import Candidate
from carelm.models.batcher import why_not
from carelm.models.decoding import Decoding
from carelm.models.generation import Answer
from carelm.models.precision import choose_precision
from carelm.models.streaming import stream
from carelm.recipe import Recipe
from carelm.training.checkpoint_folders import find_recipe
from carelm.yaml_file import read_yaml


class Speaker:
    """One model of a chat.

    Args:
        recipe: names window and decoding.
        candidate: the model; all that can be wrong with it is found here, before any weights.

    Raises:
        UserError: for a base that is not there or is another one, no chat template, a precision that the hardware lacks.
    """

    def __init__(self, recipe: Recipe, candidate: Candidate):
        if recipe.precision == "auto" and not torch.cuda.is_available():
            precision = choose_precision(recipe.precision, recipe.output_dir, training=False)
            candidate = candidate.computing_in(precision.name)
        candidate.check_base()
        candidate.check_finite()
        self.name, self.candidate = candidate.name, candidate
        self.chat = candidate.make_chat()
        self.limit = candidate.prompt_limit(recipe, self.chat)
        self.positions = candidate.positions(recipe, self.chat)
        self.stops = candidate.stops(self.chat)
        self.decoding = Decoding(recipe.max_new_tokens, recipe.temperature, recipe.top_p, recipe.seed)

    def load(self, onto: torch.nn.Module | None = None) -> None:
        """Loads its weights, onto another's base where that is shared, and says how it is held."""
        self.model, about = self.candidate.load(self.chat, onto)
        self.device = next(p for p in self.model.parameters() if p.device.type != "meta").device
        held = f"{about['bits']} bits, {about['precision']}" if about["bits"] else about["precision"]
        ranks.say(f"{self.name}: {about['folder']}, {held}, on {self.device}, loaded in {about['load_seconds']:.1f} s")
        if reason := why_not(self.model):
            ranks.say(f"{self.name}: {reason}: its answers come by transformers' generate, which is slower")

    def bound(self, tokens: int) -> None:
        """Lets no prompt and answer be longer than this together; the recipe's own window stays."""
        self.positions = max(min(self.positions, tokens), self.limit + self.decoding.max_new_tokens)

    def limit_for(self, max_new_tokens: int | None) -> int:
        """The most tokens of a prompt with so long an answer; below 1 there is room for none."""
        window = self.candidate.recipe.max_length
        return self.limit if max_new_tokens is None else min(window, self.positions - max_new_tokens)

    def window(self) -> str:
        """How long a conversation it reads, and why."""
        own = self.candidate.recipe
        saved = find_recipe(self.candidate.adapter or own.output_dir)
        trained = read_yaml(saved).get("max_length", own.max_length) if saved else own.max_length
        why = "max_length, as in training" if trained == own.max_length else f"max_length; trained with {trained}"
        if self.limit < own.max_length:
            why = f"{self.positions} positions less max_new_tokens {self.decoding.max_new_tokens}"
        return f"window: {self.limit} tokens of a conversation are read ({why}), {self.positions} with the answer"

    def check_window(self, system: str | None) -> None:
        """Raises UserError where a turn has no room behind this system message."""
        messages = [{"role": "system", "content": system}] if system else []
        tokens = len(self.chat.prompt_ids([*messages, {"role": "user", "content": "x"}]))
        if tokens > self.limit:
            what = "system message" if system else "chat template"
            raise UserError(
                f"max_length: {self.name} reads {self.limit} tokens, and the {what} with a turn of one letter takes {tokens}; "
                f"{'shorten it, or ' if system else ''}set max_length higher or max_new_tokens lower"
            )

    def answer(self, messages: list[dict[str, Any]], show: Callable[[str], None], again: int = 0) -> Answer:
        """Its answer to a conversation that ends in the user's message; see `stream`. Where the window makes the conversation
        shorter, that is said.

        Args:
            again: how many answers were taken back: where answers are drawn, each of them is another draw.

        Raises:
            UserError: where the template or the tokenizer refuses the conversation.
        """
        prompt = self.chat.fit_prompt(messages, self.limit)
        change = prompt.change
        if change == "prompt cut":
            change = "the longest message is cut at its end"
        if change:
            ranks.say(f"{self.name}: {change} to fit {self.limit} tokens (max_length, and room for the answer)")
        decoding = dataclasses.replace(self.decoding, seed=self.decoding.seed + again)
        return stream(self.model, self.chat, prompt.ids, decoding, device=self.device, show=show)
