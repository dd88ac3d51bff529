"""How long an evaluation will take, said once, when enough is answered to know."""

import time

from carelm import ranks
from carelm.recipe import Recipe

ENOUGH_SECONDS, ENOUGH = 20, 1 / 4  # of a model's questions: those that answer shortest come first out of a batch
WORTH_SAYING, LONG = 60, 600  # seconds


class Pace:
    """Is told of this rank's answers. Args: how many questions all models have left to answer, on all ranks."""

    def __init__(self, recipe: Recipe, left: int):
        self.recipe, self.left, self.is_done = recipe, left, ranks.rank() != 0
        self._began, self._share, self._answered = 0.0, 0, 0

    def begin(self, share: int) -> None:
        """A model begins with so many questions of this rank."""
        self._began, self._share, self._answered = time.monotonic(), share, 0

    def answered(self) -> None:
        self._answered += 1
        self.left -= ranks.world_size()
        seconds = time.monotonic() - self._began
        if self.is_done or seconds < ENOUGH_SECONDS or self._answered < ENOUGH * self._share:
            return
        self.is_done = True
        expected = seconds / (self._answered * ranks.world_size()) * self.left
        if expected >= WORTH_SAYING:
            ranks.say(self.sentence(expected))

    def sentence(self, seconds: float) -> str:
        said = f"about {seconds / 60:.0f} minutes are left for the answers of all models"
        if timed := self.recipe.num_latency_prompts:
            said += f"; besides, up to {timed} of each are timed one at a time (--num_latency_prompts 0: none)"
        if seconds > LONG:
            said += "; for a first look: --max_eval_samples 10, which counts conversations"
        return said
