"""The command that trains on answers that people marked good, in a chat or on the server's page. Imports no torch."""

import itertools
import json
import math
import re
from pathlib import Path

from carelm import ranks
from carelm.files import read_json
from carelm.keys import SERVING_KEYS
from carelm.next_steps import say_next, without
from carelm.recipe import Recipe

MARKED = "recipes/datasets/marked.yaml"  # reads the rows that chat and server write
# Of the recipe's own rows so many for each good answer, and in all; the good ones are repeated. At the whole learning rate, or
# without its own rows, the demo's model forgot what it knew; with fewer repetitions or steps it did not learn every answer.
OF_OTHERS, FEWEST_OF_OTHERS, REPEATED = 10, 200, 20
PASSES, FEWEST_STEPS, SHARE_OF_RATE = 3, 80, 1 / 4


def training_words(recipe: Recipe, file: Path, good: int, words: list[str], ending: str) -> list[str]:
    """`words`, which name the recipe on a command line, with what goes on from its result, by the good answers of this file
    among some of the recipe's own rows: on a few answers alone a model forgets all else. The run's folder gets this ending,
    and a number from the second time on.

    Args:
        good: how many answers are good.
    """
    folder = recipe.output_dir
    # A run of this command has its rate already.
    goes_on = any(str(name).startswith(f"{MARKED}=") for name in recipe.also_train or {})
    mixed = {**(recipe.also_train or {}), f"{MARKED}={file}": f"{REPEATED} times"}
    keys = {"also_train": json.dumps(mixed, ensure_ascii=False)}
    if result := _result(recipe):
        keys |= result
        others = max(FEWEST_OF_OTHERS, OF_OTHERS * good)
        there = read_json(folder / "data_report.json").get("train", {}).get("used", others)
        passes = math.ceil(FEWEST_STEPS * recipe.global_batch_size / (min(others, there) + REPEATED * good))
        keys |= {"max_samples": str(others), "num_train_epochs": str(max(PASSES, passes)), "max_steps": "-1"}
        keys["learning_rate"] = f"{recipe.training['learning_rate'] * (1 if goes_on else SHARE_OF_RATE):g}"
        if recipe.training.get("push_to_hub"):  # it is compared first
            keys["push_to_hub"] = "false"
    keys["output_dir"] = _free(f"{re.sub(rf'-{ending}(-[0-9]+)?$', '', str(folder))}-{ending}")
    kept = without(words, *keys, *SERVING_KEYS, "max_new_tokens", "temperature", "top_p")  # what training does not read
    return [*kept, *(word for key, value in keys.items() for word in (f"--{key}", value))]


def say_training(recipe: Recipe, file: Path, good: int, words: list[str], ending: str) -> None:
    """Prints that command, and says so where there is no result to go on from; of a shop's answers, which follow passages, it
    names rows that have passages instead, and of a recipe of pairs the one of answers."""
    if recipe.objective == "preferences":
        return ranks.say(
            f"{recipe.name} learns from pairs, and these are answers: talk by the recipe of the answers, --models "
            f"{recipe.output_dir}; its next command, or train/make_pairs.py --feedback, learns from them"
        )
    if recipe.documents and not _result(recipe):
        return ranks.say(
            f"{recipe.output_dir} holds no result to go on from: answers from passages are learnt among rows that have some: "
            "train recipes/shop_grounded.yaml, and serve it"
        )
    found = training_words(recipe, file, good, words, ending)
    if not _result(recipe):
        ranks.say(f"{recipe.output_dir} holds no result to go on from: the recipe is trained anew, with these answers")
    say_next(["train/sft.py", *found])


def _result(recipe: Recipe) -> dict[str, str]:
    """The key that goes on from what the run has trained; none where it has not."""
    folder = recipe.output_dir
    if (folder / "adapter_config.json").exists():
        return {"adapter": str(folder)}
    has_model = recipe.method == "full" and (folder / "config.json").exists()
    return {"model_name_or_path": str(folder)} if has_model else {}


def _free(folder: str) -> str:
    """The folder's name, or the first of NAME-2, NAME-3 ... where nothing lies."""
    names = itertools.chain([folder], (f"{folder}-{number}" for number in itertools.count(2)))
    return next(name for name in names if not Path(name).exists())
