"""Several answers of one model to each question, drawn by seeds; or one, the likeliest."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from carelm.evaluation import answers, api
from carelm.evaluation.candidates import Candidate
from carelm.evaluation.pace import Pace
from carelm.evaluation.questions import Question
from carelm.recipe import Recipe
from carelm.training.stops import HangWatch

Lines = list[dict[str, Any]]  # of carelm.evaluation.predictions, in the order of the questions


def draw(
    recipe: Recipe, model: Candidate | api.ApiModel, questions: Sequence[Question], number: int, folder: Path
) -> list[Lines]:
    """`number` answers to each question, [number][questions], the first by the recipe's seed, the next by that + 1; on ranks
    other than 0 the lists are empty. They are kept in `folder` as they come: the same call again goes on.

    Raises:
        UserError: for a model that is not there or cannot be asked, and an endpoint that fails.
    """
    watch = HangWatch(recipe.stall_timeout)
    way = api if isinstance(model, api.ApiModel) else answers
    asked = []
    for k in range(number):
        training = recipe.training | {"seed": recipe.seed + k}
        drawn, into = dataclasses.replace(recipe, training=training, num_latency_prompts=0), folder / f"draw-{k + 1}"
        into.mkdir(parents=True, exist_ok=True)
        asked.append((drawn, way.prepare(drawn, model, list(questions), into), into))
    pace = Pace(recipe, sum(len(m.file.made_by) - len(m.file.read()) for _, m, _ in asked))
    return [way.answer(drawn, prepared, into, watch, pace)[0] for drawn, prepared, into in asked]
