"""Past questions by split, with the passages that answer them: told by columns (`gold_passages`), or by an answer's words."""

from collections.abc import Sequence

from carelm.data.sources import load_splits
from carelm.data.splits import make_examples
from carelm.errors import UserError
from carelm.ranks import say
from carelm.recipe import Recipe
from carelm.retrieval.gold import Asked, gold_by_row
from carelm.retrieval.grounded_rows import Rows
from carelm.retrieval.passages import Passage


def past_questions(
    recipe: Recipe, asked_by: Recipe | None, passages: Sequence[Passage], splits: Sequence[str]
) -> dict[str, list[Asked]]:
    """Of these splits the questions that have a gold passage, which is said.

    Args:
        recipe: its `gold_passages` say which passages come into question for a row.
        asked_by: whose rows are asked, of which the answers' words say which passages are gold; None: those of `recipe`.

    Raises:
        UserError: where neither says what is gold, or a split has no question.
    """
    if not (recipe.gold_passages or asked_by):
        raise UserError(
            "gold_passages: it is empty; write {passage column: row's column}, or name past questions with their answers: "
            "--questions RECIPE"
        )
    examples, _ = make_examples(asked_by or recipe)
    allowed = None
    if recipe.gold_passages:
        gold_of = gold_by_row(recipe, passages)
        by_split = load_splits(asked_by or recipe)[0]
        allowed = {source: gold_of(source, row)[1] for rows in by_split.values() for source, row in rows}
    rows = Rows(passages, lambda *_: True, number=recipe.num_passages, left_out=0, seed=recipe.split_seed)
    found = {}
    for split in splits:
        of_split = examples.get(split, [])
        if asked_by:
            asked = [
                Asked(one.id, one.question, {*one.golds}, also={*one.supporting}) for one in rows.ask(of_split, allowed)
            ]
        else:
            asked = [
                Asked(e.id, next(m["content"] for m in reversed(e.prompt) if m["role"] == "user"), allowed[e.source])
                for e in of_split
            ]
        found[split] = [one for one in _merged(asked) if one.gold]
        say(f"{split}: {len(found[split])} questions have a passage, of {len(of_split)}")
        if not found[split]:
            key = "--questions" if asked_by else "gold_passages"
            both = " and gold_passages allows; leave gold_passages out" if asked_by and recipe.gold_passages else ""
            raise UserError(
                f"{key}: no question of {split} has a passage that answers it{both}; give documents that do, or mend the key"
            )
    return found


def _merged(asked: Sequence[Asked]) -> list[Asked]:
    """Rows that ask the same are one question, whose passages are those of all of them."""
    by_text: dict[str, Asked] = {}
    for one in asked:
        first = by_text.setdefault(one.text, one)
        first.gold |= one.gold
        first.also |= one.also
    return [*by_text.values()]
