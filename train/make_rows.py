"""Makes rows that teach a model to answer from passages, and show where it cannot: passages in front of questions.

    python train/make_rows.py --config recipes/shop_grounded.yaml
    python train/make_rows.py --config recipes/shop_grounded.yaml --questions recipes/datasets/eshop_productqa.yaml=FOLDER \\
        --documents FOLDER/products.jsonl --gold_passages '{"ProductId": "ProductId"}' --dataset_name outputs/eshop_rows
    python train/make_rows.py --config recipes/shop_grounded.yaml --left_out 0.5 --held_out 0.5

The recipe names the documents, how passages are found in them (python serve/index.py makes the index), and in dataset_name the
folder to write. The questions and their answers are another recipe's rows (--questions), in its splits. For each sentence of an
answer the passage that supports it best is looked up by its words, and the sentence gets that passage's number, as [1];
gold_passages says which passages come into question, where the data knows: {product: ProductId}.

train.jsonl        a row for each question: its passages among others that the retriever takes for right, so many at most as
                   --train_passages says; a share of the
                   questions (--left_out) may stand there again, with the others alone: "I do not know; a colleague will
                   help." A base of 135 million parameters does not learn from that when to say so: it says so always
validation.jsonl   two for each: with what is found, and with what is found where all passages that support the answer were
                   left out, by which a threshold is chosen
test.jsonl         four for each: these two, with its passages alone, and without any. The documents are the shop's own in
                   training and test; --held_out 0.4 keeps the passages of so many test questions out of training

What is done next: accelerate launch train/sft.py --config R, eval/run.py, and eval/grounding.py, which compares the four.

Other rows have a file of their own, which --pairs and --add lead to with all other words: pairs of answers to learn from
(train/make_pairs.py --help), and a column that a model fills in (train/add_column.py --help).

exit status: 0 the rows are written, 2 something is to be mended.
"""

import argparse
import dataclasses
import random
import runpy
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm import environment, ranks  # noqa: F401
from carelm.command_line import own_options, own_parser
from carelm.data.report import list_counts
from carelm.data.sources import is_hub_id, load_splits, stay_offline
from carelm.errors import UserError
from carelm.files import locate, write_rows
from carelm.next_steps import say_next, without, words_of
from carelm.recipe import Recipe
from carelm.recipe_file import load_named, load_recipe

OTHERS = {"--pairs": "make_pairs.py", "--add": "add_column.py"}  # rows of another kind, and the file that makes them
# Of the rows that are made.
OWN_KEYS = {"messages_column": "messages", "id_column": "id", "category_column": "condition"}


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = own_parser(__doc__)
    parser.add_argument("--questions", default="recipes/demo.yaml", help="recipe whose rows are asked, or RECIPE=DATA "
                        "(default: recipes/demo.yaml)")  # fmt: skip
    parser.add_argument("--left_out", type=float, default=0.0, help="share of the training questions that stand there again, "
                        "with their passages left out (default: 0)")  # fmt: skip
    parser.add_argument(
        "--train_passages", type=int, help="the most passages in a training row (default: num_passages)"
    )
    parser.add_argument("--held_out", type=float, default=0.0, help="share of the test questions that are kept, with passages "
                        "that answer no training question; 0: any (default: 0)")  # fmt: skip
    parser.add_argument(
        "--test_questions", type=int, default=120, help="test questions, drawn by split_seed (default: 120)"
    )
    return own_options(parser)


def main() -> None:
    for word, file in OTHERS.items():
        if word in (given.partition("=")[0] for given in sys.argv[1:]):
            sys.argv = [str(Path(__file__).with_name(file)), *(w for w in sys.argv[1:] if w != "--pairs")]
            return runpy.run_path(sys.argv[0])["main"]()
    options, keys = parse()
    recipe = load_recipe(keys, usage=__doc__)
    for name in ("left_out", "held_out"):
        if not 0 <= getattr(options, name) <= 1:
            raise UserError(f"--{name}: {getattr(options, name)} is no share; give a number from 0 to 1")
    if options.train_passages is not None and options.train_passages < 1:
        raise UserError(f"--train_passages: {options.train_passages} is not above 0")
    if not recipe.documents:
        raise UserError("documents: the recipe names none; set documents: [folder or files]")
    folder = folder_of(recipe)
    asked_by = load_named("--questions", options.questions)
    needed = dataclasses.replace(recipe, dataset_name=asked_by.dataset_name)  # the recipe's own is still to be made
    stay_offline(needed, and_embedder=True)
    from carelm import quiet
    from carelm.retrieval.retriever import Retriever

    quiet.silence(has_gpu=False, is_first_rank=True)
    from carelm.chat.chat import make_chat
    from carelm.data.splits import make_examples
    from carelm.retrieval.gold import gold_by_row
    from carelm.retrieval.grounded_rows import GOLD, LEFT_OUT, NONE, RETRIEVED, Rows, hold_out

    examples, reports = make_examples(asked_by)
    retriever, chat = Retriever(recipe), make_chat(recipe)

    def fits(messages: list[dict], answer: str) -> bool:
        ids = chat.answer_ids(messages, {"role": "assistant", "content": answer})
        return len(chat.prompt_ids(messages)) + len(ids) <= recipe.max_length

    def search(questions: list[str], number: int) -> list[list[tuple]]:
        return [[(f.passage, f.confidence) for f in found] for found in retriever.search_many(questions, number)]

    passages, numbers = retriever.index.passages(), dict.fromkeys(("train", "validation", "test"), recipe.num_passages)
    numbers["train"] = options.train_passages or recipe.num_passages
    rows = {
        split: Rows(passages, fits, number=number, left_out=options.left_out, seed=recipe.split_seed)
        for split, number in numbers.items()
    }
    allowed = None
    if recipe.gold_passages:
        gold_of, by_split = gold_by_row(recipe, passages), load_splits(asked_by)[0]
        allowed = {source: gold_of(source, row)[1] for of_split in by_split.values() for source, row in of_split}
    asked, answerable = {}, {}
    for split, own in rows.items():
        asked[split] = own.ask(examples.get(split, []), allowed)
        answerable[split] = f"{len(asked[split])} of {len(asked[split]) + own.counts.total()}"
        ranks.say(f"{split}: {answerable[split]} answers stand in the documents")
    asked, on_other_side = hold_out(asked, options.held_out, recipe.split_seed)
    if options.test_questions < len(asked["test"]):
        asked["test"] = random.Random(recipe.split_seed).sample(asked["test"], options.test_questions)

    def counts() -> dict[str, int]:
        return dict(sum((own.counts for own in rows.values()), on_other_side))

    for split, of_split in asked.items():
        if not of_split:
            by_key = ", another gold_passages, which allows some passages alone" if recipe.gold_passages else ""
            raise UserError(
                f"--questions: no question of {split} is left ({list_counts(counts())}); "
                f"give documents that answer them{by_key}, or another --held_out"
            )
    asked = {split: rows[split].retrieve(of_split, search) for split, of_split in asked.items()}
    made = {
        "train": rows["train"].train(asked["train"]),
        "validation": rows["validation"].test(asked["validation"], (RETRIEVED, LEFT_OUT)),
        "test": rows["test"].test(asked["test"], (RETRIEVED, GOLD, NONE, LEFT_OUT)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for split, of_split in made.items():
        write_rows(folder / f"{split}.jsonl", of_split)
    ranks.say(
        f"{', '.join(f'{len(r)} {split}' for split, r in made.items())} rows in {folder}; {list_counts(counts())}"
    )
    lacking = {key: value for key, value in OWN_KEYS.items() if getattr(recipe, key) != value}
    words = [*without(words_of(recipe, keys), *lacking), *(w for key in lacking for w in (f"--{key}", lacking[key]))]
    say_next(["train/sft.py", *words], ["eval/run.py", *words], ["eval/grounding.py", *words])
    found = {"folder": str(folder), "rows": {split: len(r) for split, r in made.items()}, "answerable": answerable}
    ranks.print_result(found | {"left_out": counts()})


def folder_of(recipe: Recipe) -> Path:
    """Where the rows go: the recipe's data, unless something else lies there."""
    folder = Path(locate(recipe.dataset_name))
    if folder.exists() and not is_own(folder):
        raise UserError(f"dataset_name: {folder} holds other data; name another folder for the rows")
    if is_hub_id(recipe.dataset_name) and "/" not in recipe.dataset_name:
        raise UserError(f"dataset_name: {recipe.dataset_name} is no folder; name one for the rows, as outputs/rows")
    return folder


def is_own(folder: Path) -> bool:
    """Whether this file has written what lies there."""
    train = folder / "train.jsonl"
    if not train.is_file():
        return folder.is_dir() and not any(folder.iterdir())
    with open(train, encoding="utf-8") as lines:
        return '"question_id"' in lines.readline()


if __name__ == "__main__":
    ranks.run_main(main)
