"""What the models of a comparison are asked: the recipe's own test split, and those of the recipes in `also_test`."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from carelm import ranks
from carelm.chat.chat import Chat, make_chat
from carelm.data.label_form import Form, find_form
from carelm.data.leaks import find_leaks
from carelm.errors import UserError
from carelm.evaluation.check_scores import AskedCheck, ask
from carelm.evaluation.questions import Question, make_questions_of_both
from carelm.files import locate
from carelm.recipe import Recipe
from carelm.recipe_file import load_recipe
from carelm.training.checkpoint_folders import find_recipe


@dataclass(frozen=True, eq=False)
class QuestionSet:
    """Questions with the recipe that they are asked and scored by.

    Attributes:
        name: of the file in `also_test`; empty for the recipe's own.
        about: how the questions came about, for results.json.
        form: how answers hold their labels, where these are scored by their probability.
        validation: the validation split's questions, where the recipe has labels.
    """

    name: str
    recipe: Recipe
    questions: list[Question]
    about: dict[str, Any]
    checks: list[AskedCheck]
    form: Form | None
    validation: list[Question]


def make_question_sets(recipe: Recipe, others: dict[str, Recipe]) -> list[QuestionSet]:
    """The recipe's own questions first, then those of `others` by name (`load_also_tests`). Training rows that are nearly
    questions of another set are counted, and said.

    Raises:
        UserError: for data that cannot be asked.
    """
    sets = [_make("", recipe, make_chat(recipe), is_trained_on=True)]
    trained_on = {Path(file).stem for file in recipe.mixed}
    for name, other in others.items():
        try:
            found = _make(name, other, make_chat(other), is_trained_on=name in trained_on)
            leaks = find_leaks(recipe, other)
        except UserError as error:
            raise UserError(f"also_test: {name}: {error}") from None
        if leaks["near_duplicates"]:
            ranks.say(f"also_test: {name}: {leaks['sentence']}")
        sets.append(replace(found, about=found.about | {"leaks": leaks}))
    return [replace(s, about=s.about | {"earlier_leaks": list(_earlier_leaks(recipe, s.recipe))}) for s in sets]


def _earlier_leaks(recipe: Recipe, tested: Recipe) -> Iterator[str]:
    """Sentences on the runs that a run has gone on from (`adapter`): which of their training rows are nearly test questions, or
    that this is not known."""
    seen: set[str] = set()
    while (name := recipe.adapter) and name not in seen:
        seen.add(name)
        unknown = "its adapter may have seen test questions"
        if (file := find_recipe(Path(locate(name)))) is None:
            yield f"The run has gone on from {name}, and what that was trained on cannot be told here: {unknown}."
            return
        try:
            recipe = load_recipe(["--config", str(file)], usage="")
            leaks = find_leaks(recipe, tested)
        except UserError as error:
            yield f"The run has gone on from {name}, and what that was trained on cannot be read here ({error}): {unknown}."
            return
        if leaks["near_duplicates"]:
            yield f"The run has gone on from {name}, of which {leaks['sentence']}"


def _make(name: str, recipe: Recipe, chat: Chat, is_trained_on: bool) -> QuestionSet:
    questions, validation, about = make_questions_of_both(recipe, chat, is_trained_on)
    where = f"{name}: " if name else ""
    counted = recipe.max_eval_samples and about["questions"] > about["conversations"]
    ranks.say(f"{where}{about['questions']} questions of {about['conversations']} conversations"
              f"{', which max_eval_samples counts' if counted else ''}")  # fmt: skip
    form = find_form(recipe, map(Question.expected, questions))
    return QuestionSet(name, recipe, questions, about, ask(recipe, questions), form, validation)
