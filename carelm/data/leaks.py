"""Training rows that are nearly test questions of another dataset: the models may have learnt them by heart."""

from typing import Any

from carelm.data.comparison import asked, without_template
from carelm.data.mixture import draw_mixed
from carelm.data.near_duplicates import NearQuestions
from carelm.data.splits import make_examples
from carelm.recipe import Recipe

MOST_NAMED = 3


def find_leaks(trained: Recipe, tested: Recipe) -> dict[str, Any]:
    """How many training rows of one recipe are near-duplicates of another one's test questions, the first of them, and a
    sentence. What the users say is compared, without what the templates put around it, further columns included."""
    index = NearQuestions(without_template(make_examples(tested)[0].get("test", [])), asked)
    examples, _ = make_examples(trained)
    train = without_template(examples["train"])
    for rows, _ in draw_mixed(trained, examples).values():
        train += rows
    found = [(e, match[0]) for e in train if (match := index.find(e))]
    first = [f"{e.source} and {other.source}" for e, other in found[:MOST_NAMED]]
    sentence = f"{len(found)} of {len(train)} training rows are near-duplicates of its test questions"
    sentence += (
        f" ({', '.join(first)}{' ...' if len(found) > MOST_NAMED else ''}): the models may have seen them" * bool(found)
    )
    return {"training_rows": len(train), "near_duplicates": len(found), "first": first, "sentence": sentence + "."}
