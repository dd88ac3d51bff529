"""Fills in a column that rows lack, by a model: an explanation of each answer, a paraphrase of each question.

    python train/add_column.py --config recipes/shop.yaml --add paraphrase --ask "Put this in other words: {question}"
    python train/add_column.py --config recipes/shop.yaml --add reason --model api:NAME --api_url URL \\
        --ask "Question: {question} Answer: {reply} Say in one sentence why this answer is right."

The model (--model: base, adapter, merged, a folder or api:NAME; default: base) is asked once for each row of train and
validation that lacks the column; --ask names other columns in braces. --to FOLDER (default: the run's folder with -COLUMN) gets
the rows in their splits with that column, and beside it COLUMN_source, which says who wrote it: data, or the model's name. Look
at some before you train on them. Test rows stay as they are, else a model would be measured by what a model wrote: give them a
file of their own. Where the recipe has max_samples, so many training rows are drawn. What is answered is kept in the run's
folder: the same command goes on.

exit status: 0 the rows are written, 2 something is to be mended.
"""

import argparse
import dataclasses
import random
import sys
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm import environment, interrupts, ranks  # noqa: F401
from carelm.command_line import own_options, own_parser
from carelm.data.report import list_counts
from carelm.data.sources import stay_offline
from carelm.data.templates import template_columns
from carelm.errors import UserError
from carelm.files import write_rows
from carelm.keys import EVALUATION_KEYS
from carelm.recipe import ANSWERS
from carelm.recipe_file import load_recipe


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = own_parser(__doc__)
    parser.add_argument("--add", help="the column to fill in")
    parser.add_argument("--ask", help="what the model is asked, with {columns}")
    parser.add_argument("--model", default="base", help="base, adapter, merged, a folder or api:NAME (default: base)")
    parser.add_argument("--to", type=Path, help="folder to write (default: the run's folder with -COLUMN)")
    return own_options(parser)


def main() -> None:
    options, keys = parse()
    recipe = load_recipe(keys, usage=__doc__, first=EVALUATION_KEYS)
    column = options.add
    for name in ("add", "ask"):
        if not (getattr(options, name) or "").strip():
            raise UserError(
                f'--{name} is missing: python train/add_column.py --config R --add reason --ask "Why? {{question}}"'
            )
    if not template_columns(options.ask, "--ask"):
        raise UserError(
            "--ask: it names no column, so every row would be asked the same; write one in braces, as {question}"
        )
    folder = options.to or recipe.output_dir.with_name(f"{recipe.output_dir.name}-{column}")
    if folder.exists() and any(folder.iterdir()) and not is_own(folder, column):
        raise UserError(f"--to: {folder} holds other data; name another folder for the rows")
    stay_offline(recipe)
    launch = ranks.check_launch_without_zero3()
    from carelm.evaluation.added import ask_for, check, fill_in, load_rows
    from carelm.evaluation.candidates import find_candidates
    from carelm.evaluation.draws import draw

    (model,) = find_candidates(dataclasses.replace(recipe, models=[options.model]))
    rows = load_rows(recipe, options.ask)
    if recipe.max_samples and recipe.max_samples < len(rows["train"]):
        chosen = random.Random(recipe.split_seed).sample(range(len(rows["train"])), recipe.max_samples)
        rows["train"] = [rows["train"][i] for i in sorted(chosen)]
    check(column, [pair for split in ("train", "validation") for pair in rows.get(split, [])])
    ranks.get_ready(launch)
    counts, written = Counter(), {}
    for split, of_split in rows.items():
        questions, without = ask_for(options.ask, column, of_split) if split != "test" else ([], Counter())
        into = recipe.output_dir / ANSWERS / column / split
        (answers,) = draw(recipe, model, questions, 1, into) if questions else ([],)
        written[split], cut = fill_in(column, of_split, answers, model.name)
        counts += without + cut + Counter({f"{split} rows filled in": len(answers) - cut.total()})
    ranks.leave()
    if ranks.rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for split, of_split in written.items():
            write_rows(folder / f"{split}.jsonl", of_split)
        ranks.say(
            f"{', '.join(f'{len(r)} {split}' for split, r in written.items())} rows in {folder}; {list_counts(counts)}"
        )
        rows_of = {split: len(of_split) for split, of_split in written.items()}
        ranks.print_result({"folder": str(folder), "rows": rows_of, "model": model.name, "counts": dict(counts)})


def is_own(folder: Path, column: str) -> bool:
    """Whether this file has written what lies there."""
    train = folder / "train.jsonl"
    return train.is_file() and f'"{column}_source"' in train.read_text(encoding="utf-8").partition("\n")[0]


if __name__ == "__main__":
    ranks.run_main(main, kept="the answers so far stay and are not made again")
