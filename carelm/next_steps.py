"""The commands that follow one, to paste."""

import os
import shlex
from collections.abc import Iterator

from carelm import ranks
from carelm.command_line import split_command_line
from carelm.files import ORIGIN, ROOT
from carelm.keys import EVALUATION_KEYS, MEANT_ONCE
from carelm.recipe import Recipe


def say_next(*commands: list[str]) -> None:
    """A line for each: a launched file as seen from here, and its words."""
    for file, *words in commands:
        ranks.say(f"next: {shlex.join(['python', os.path.relpath((ORIGIN or ROOT) / file), *words])}")


def words_of(recipe: Recipe, arguments: list[str]) -> list[str]:
    """The words that name this run to the next command: those of this one, or the run's own recipe.yaml where they hold what
    only a training takes."""
    _, given = split_command_line(arguments)
    if "adapter" in given:
        return ["--config", str(recipe.output_dir / "recipe.yaml")]
    return without(arguments, *MEANT_ONCE, "models", "message", "hub_token")


def chat_words(words: list[str]) -> list[str]:
    """Of those that name a run the ones that mean something to a chat: none that say how an evaluation is made."""
    return without(words, *{*EVALUATION_KEYS, "max_eval_samples"} - {"max_new_tokens", "temperature", "top_p"})


def without(words: list[str], *keys: str) -> list[str]:
    """The words of a command line without these keys and their values."""
    return [word for key, word in _with_keys(words) if key not in keys]


def only(words: list[str], *keys: str) -> list[str]:
    """Of the words of a command line these keys and their values."""
    return [word for key, word in _with_keys(words) if key in keys]


def _with_keys(words: list[str]) -> Iterator[tuple[str, str]]:
    """Each word with the key that it is, or is a value of; "" before the first."""
    key = ""
    for word in words:
        if word.startswith("--"):
            key = word[2:].partition("=")[0]
        yield key, word
