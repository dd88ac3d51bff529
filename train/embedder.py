"""Tunes a recipe's embedder on past questions, and keeps the tuned one only if it finds more passages.

    python serve/index.py --config recipes/shop.yaml
    python train/embedder.py --config recipes/shop.yaml                       # gold_passages says which passages are right
    python train/embedder.py --config recipes/shop_grounded.yaml --embedder auto --output_dir outputs/shop_embedder \\
        --questions recipes/demo.yaml                                         # the words of past answers say it

The recipe names the documents, and its index is there. The questions are its training rows, whose right passages gold_passages
names as for eval/retrieval.py; or the rows of another recipe (--questions), where the words of a past answer say which
passages hold it, as for train/make_rows.py. Test rows are not read. Each question is drawn to a passage that answers it, away
from the others of its batch and from those that are found for it by mistake.

What decides are the questions of validation: where the tuned embedder's MRR@10 on them is significantly higher, it is
OUTPUT_DIR/embedder, for the key embedder. Else nothing is written. An index is made anew for another embedder, and a
threshold on the confidence is chosen anew. The last line on standard output is the outcome as one JSON object.

exit status: 0 the tuned embedder is there, or it is no better, 2 something is to be mended.
"""

import argparse
import dataclasses
import math
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm import environment, ranks  # noqa: F401
from carelm.command_line import own_options, own_parser
from carelm.data.sources import stay_offline
from carelm.errors import UserError
from carelm.files import here, made_whole, write_whole
from carelm.keys import RETRIEVAL_KEYS
from carelm.next_steps import say_next, without, words_of
from carelm.recipe_file import load_named, load_recipe


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = own_parser(__doc__)
    parser.add_argument("--questions", help="recipe whose rows are asked, or RECIPE=DATA, in place of the recipe's own")
    parser.add_argument("--epochs", type=float, default=2, help="how often each question is seen (default: 2)")
    parser.add_argument("--learning_rate", type=float, default=1e-4, help="of the embedder, at its highest; the "
                        "recipe's is its model's (default: 1e-4)")  # fmt: skip
    return own_options(parser)


def main() -> None:
    options, keys = parse()
    recipe = load_recipe(keys, usage=__doc__, first=RETRIEVAL_KEYS)
    for name in ("epochs", "learning_rate"):
        if not 0 < getattr(options, name) < math.inf:
            raise UserError(f"--{name}: {getattr(options, name)} is not above 0 and finite")
    folder = recipe.output_dir / "embedder"
    if folder.exists():
        raise UserError(f"output_dir: {folder} is there already; name another output_dir, or move it away")
    asked_by = load_named("--questions", options.questions) if options.questions else None
    # With --questions the recipe's own rows are not read, and may still be to be made.
    needed = dataclasses.replace(recipe, dataset_name=asked_by.dataset_name) if asked_by else recipe
    stay_offline(needed, and_embedder=True)
    from carelm import quiet
    from carelm.retrieval.retriever import Retriever

    quiet.silence(has_gpu=False, is_first_rank=True)
    from carelm.evaluation.verdicts import FEWEST_CONVERSATIONS
    from carelm.retrieval import tuning
    from carelm.retrieval.embedder import Embedder
    from carelm.retrieval.past_questions import past_questions

    retriever = Retriever(recipe)
    if retriever.embedder is None:
        raise UserError("retriever: passages are found by their words alone; set retriever: hybrid and an embedder")
    passages = retriever.index.passages()
    asked = past_questions(recipe, asked_by, passages, ("train", "validation"))
    texts = {passage.id: passage.indexed for passage in passages}
    learning = Embedder(retriever.embedder.folder, "fp32")
    hard = tuning.hard_negatives(retriever, asked["train"])
    given = {"epochs": options.epochs, "learning_rate": options.learning_rate, "seed": recipe.seed}
    steps = tuning.tune(learning.model, asked["train"], texts, hard, **given)
    with tempfile.TemporaryDirectory(prefix="carelm-embedder-") as made:
        tuned = Embedder(Path(made) / "tuned", retriever.embedder.precision)
        learning.model.save(str(tuned.folder), create_model_card=False)
        found = tuning.compare(retriever, tuned, asked["validation"])
        about = {"train_questions": len(asked["train"]), "steps": steps, **given}
        if found["is_better"]:
            write_whole(tuned.folder / "source.json", tuning.source(retriever.embedder, found, about))
            folder.parent.mkdir(parents=True, exist_ok=True)
            with made_whole(folder) as aside:
                shutil.copytree(tuned.folder, aside)
    for line in tuning.verdicts(found):
        ranks.say(line)
    if found["is_better"]:
        ranks.say(f"the tuned embedder is better and kept: {folder}; an index is made anew for it")
        words = [*without(words_of(recipe, keys), "embedder"), "--embedder", str(here(folder))]
        say_next(["serve/index.py", *words])
    else:
        few = f"{found['questions']} validation questions are too few to tell whether"
        said = (
            f"{few} it is" if found["questions"] < FEWEST_CONVERSATIONS else "the tuned embedder is not significantly"
        )
        ranks.say(f"{said} better, and it is not kept; go on with the one before")
    ranks.print_result({"kept": str(folder) if found["is_better"] else None, **about, "validation": found})


if __name__ == "__main__":
    ranks.run_main(main, kept="nothing is written before it is whole")
