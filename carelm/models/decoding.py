"""How the next token is chosen from the logits: the likeliest one, or drawn by the seed of its own request."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn: `temperature` 0 takes the likeliest token, above it tokens are drawn by `seed`."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 42

    def arguments(self) -> dict:
        """What decides an answer, by name."""
        draws = {"temperature": self.temperature, "top_p": self.top_p} if self.temperature > 0 else {}
        return {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0, **draws}

    def draws_for(self, prompt: list[int], used: int = 0) -> random.Random:
        """The random numbers of one answer, less those `used`: they follow from the seed and the prompt, and so not from the
        prompts beside it, the ranks, or what an earlier run has answered."""
        draws = random.Random(f"{self.seed} {prompt}")
        for _ in range(used):
            draws.random()
        return draws


def choose(logits: torch.Tensor, decodings: Sequence[Decoding], draws: Sequence[random.Random]) -> torch.Tensor:
    """The next token of each row, [rows], on the logits' device.

    A drawn one is where a number between 0 and 1 falls in the cumulated probabilities of the likeliest tokens that make up
    `top_p` (nucleus sampling, arXiv:1904.09751).

    Args:
        logits: [rows, vocabulary].
        decodings: of each row.
        draws: of each row; a number is taken from it where a token is drawn.
    """
    tokens = logits.max(-1).indices  # in bf16 on a CPU argmax takes seven times as long
    drawn = [row for row, decoding in enumerate(decodings) if decoding.temperature > 0]
    if not drawn:
        return tokens
    asked = [(decodings[row].temperature, decodings[row].top_p, draws[row].random()) for row in drawn]
    temperature, top_p, number = torch.tensor(asked, device=logits.device).split(1, dim=1)
    number = number.clamp(max=1 - 2**-24)  # as float32 it may have been rounded to 1, where nothing lies
    rows = torch.tensor(drawn, device=logits.device)
    probabilities, order = (logits[rows].float() / temperature).softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities  # what the likelier ones make up
    probabilities = probabilities.masked_fill((before >= top_p) & (before > 0), 0)
    upto = probabilities.cumsum(-1)
    place = torch.searchsorted(upto, number * upto[:, -1:], right=True).clamp(max=upto.shape[1] - 1)
    tokens[rows] = order.gather(1, place)[:, 0]
    return tokens


class Draws(LogitsProcessor):
    """Lets transformers' `generate` choose as `choose` does: all but the chosen token become impossible."""

    def __init__(self, decoding: Decoding, prompts: list[list[int]]):
        self.decodings = [decoding] * len(prompts)
        self.draws = [decoding.draws_for(prompt) for prompt in prompts]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        chosen = choose(scores, self.decodings, self.draws)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)
