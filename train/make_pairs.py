"""Makes pairs of answers, one that is preferred to the other, of which a model learns with `objective: preferences`.

    python train/make_pairs.py --config recipes/shop.yaml                # the run's result answers its own training questions
    python train/make_pairs.py --config recipes/shop.yaml --by rougeL --num_answers 8 --max_samples 500
    python train/make_pairs.py --config recipes/shop.yaml --model api:NAME --api_url URL
    python train/make_pairs.py --config recipes/shop.yaml --feedback     # of what people marked on the server's page

The model (--model: adapter, base, merged, a folder or api:NAME) gives several answers to each question of train and of
validation, drawn at the recipe's temperature and seed. The best and the worst are a pair: by the recipe's `checks` (--by
checks), by the marks of its `judge` (--by judge), or by a score such as its primary_metric. Where all are worth the same there
is none, which is counted. With --and_expected the data's own answer is one of them: one drawn answer is enough then. Test
questions are never among them. The answers are kept in the run's folder: the same command goes on where it stopped.

--feedback [FILE] asks no model: of outputs/NAME/feedback.jsonl, an answer marked good and one marked bad to the same
conversation are a pair, and so are an answer as somebody edited it and as it was.

--to FOLDER (default: the run's folder with -pairs) gets train.jsonl and validation.jsonl, with the columns prompt (messages),
chosen and rejected; test.jsonl has the expected answers of the recipe's test questions as chosen, and nothing rejected.

exit status: 0 the pairs are written, 2 something is to be mended.
"""

import argparse
import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm import environment, interrupts, ranks  # noqa: F401
from carelm.chat.encoder_decoder import is_encoder_decoder
from carelm.command_line import own_options, own_parser
from carelm.data.report import list_counts
from carelm.data.sources import stay_offline
from carelm.data.split_names import SPLITS
from carelm.data.templates import template_columns
from carelm.errors import UserError
from carelm.files import locate, write_rows, write_whole
from carelm.keys import EVALUATION_KEYS, PREFERENCE_RATES
from carelm.next_steps import say_next, without, words_of
from carelm.recipe import ANSWERS, FEEDBACK, Recipe
from carelm.recipe_file import load_recipe

ABOUT = "pairs.json"  # beside the answers in the run's folder: how its pairs came about
UNLIKE = 1.5  # times as many words on one side
FIRST = ["id", "category", "prompt"]  # columns of every row
# Keys about columns and rows that the pairs do not have, with what takes them back.
NOT_OF_PAIRS = {"row_filter": "{}", "also_train": "{}", "reference_columns": "[]", "overlap_columns": "[]",
                "predicted_columns": "{}", "tag_column": "", "tools_column": ""}  # fmt: skip


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = own_parser(__doc__)
    parser.add_argument("--to", type=Path, help="folder to write (default: the run's folder with -pairs)")
    parser.add_argument("--by", help="checks, judge, or a score: rougeL, chrf ... (default: checks where the recipe has "
                        "some, else its primary_metric)")  # fmt: skip
    parser.add_argument(
        "--model", help="adapter, base, merged, a folder or api:NAME (default: the run's result, else the base)"
    )
    parser.add_argument("--num_answers", type=int, default=4, help="answers to each question (default: 4)")
    parser.add_argument("--and_expected", action="store_true", help="the data's own answer is one of them")
    parser.add_argument(
        "--feedback", nargs="?", const="", help=f"pairs of this file of marks (default: the run's {FEEDBACK})"
    )
    return own_options(parser)


def main() -> None:
    options, keys = parse()
    recipe = load_recipe(keys, usage=__doc__, first=EVALUATION_KEYS)
    folder = options.to or recipe.output_dir.with_name(recipe.output_dir.name + "-pairs")
    if folder.exists() and not is_own(folder):
        raise UserError(f"--to: {folder} holds other data; name another folder for the pairs")
    stay_offline(recipe)
    launch = ranks.check_launch_without_zero3()
    rows, about = of_feedback(recipe, options) if options.feedback is not None else drawn(recipe, options, launch)
    if ranks.rank() == 0:
        write(recipe, folder, rows, about)
        has_encoder = is_encoder_decoder(recipe.base, recipe.revision)
        if recipe.method in PREFERENCE_RATES and not has_encoder:
            say_next(["train/sft.py", *training_words(recipe, folder, words_of(recipe, keys))])


def drawn(recipe: Recipe, options: argparse.Namespace, launch: Any) -> tuple[dict[str, list], dict[str, Any]]:
    """Rows by split, of answers that a model gives."""
    if options.num_answers < (least := 2 - options.and_expected):
        raise UserError(
            f"--num_answers: of {options.num_answers} none is better than another; give at least {least}, or --and_expected"
        )
    if recipe.temperature == 0:
        ranks.say("temperature: 0 would give one answer again and again; they are drawn at 1.0")
        recipe = dataclasses.replace(recipe, temperature=1.0)
    from carelm.evaluation import scores
    from carelm.evaluation.candidates import find_candidates
    from carelm.evaluation.judge import find_judge

    by = options.by or ("checks" if recipe.checks else recipe.primary_metric)
    if by not in ("checks", "judge", *scores.TEXT_SCORES):
        raise UserError(f"--by: '{by}' is none of checks, judge, {', '.join(scores.TEXT_SCORES)}")
    if by == "checks" and not recipe.checks:
        raise UserError("--by checks: the recipe has no checks; write some, or name a score such as rougeL")
    judge = find_judge(recipe) if by == "judge" else None
    (model,) = find_candidates(dataclasses.replace(recipe, models=[options.model or result_of(recipe)]))
    ranks.say(f"{model.name} answers, {options.num_answers} times each, by {by}")
    from carelm.chat.chat import make_chat
    from carelm.data.splits import make_examples
    from carelm.evaluation.questions import ask_split

    chat, examples = make_chat(recipe), make_examples(recipe)[0]
    asked = {
        split: ask_split(recipe, chat, examples[split]) for split in ("train", "validation") if examples.get(split)
    }

    from carelm.evaluation.draws import draw
    from carelm.evaluation.pairs import choose, expected, score

    ranks.get_ready(launch)
    if judge:
        judge.check_is_there()
    rows: dict[str, list] = {}
    without: Counter[str] = Counter()
    said = {}
    for split, questions in asked.items():
        answers = draw(recipe, model, questions, options.num_answers, recipe.output_dir / ANSWERS / split)
        if ranks.rank() != 0:
            continue
        answers += [expected(chat, questions)] * options.and_expected
        pairs, left_out = choose(
            questions, answers, score(recipe, by, questions, answers, recipe.output_dir / ANSWERS), model.name
        )
        without += left_out
        rows[split] = [pair.row() for pair in pairs]
        said[split] = {"questions": len(questions), "pairs": len(pairs)}
    ranks.leave()
    rows["test"] = test_rows(recipe, chat, examples)
    how = {
        "by": by,
        "model": model.name,
        "num_answers": options.num_answers,
        "and_expected": options.and_expected,
        "temperature": recipe.temperature,
    }
    return rows, how | {"seed": recipe.seed, "splits": said, "without_pair": dict(without)}


def of_feedback(recipe: Recipe, options: argparse.Namespace) -> tuple[dict[str, list], dict[str, Any]]:
    """Rows by split, of what people marked or edited."""
    from carelm.chat.chat import make_chat
    from carelm.data.splits import make_examples
    from carelm.talk.marked_pairs import pairs_of

    file = Path(locate(options.feedback)) if options.feedback else recipe.output_dir / FEEDBACK
    examples = make_examples(dataclasses.replace(recipe, max_eval_samples=None))[0]
    pairs, without = pairs_of(file, [*examples.get("validation", []), *examples.get("test", [])])
    rows = {"train": pairs, "test": test_rows(recipe, make_chat(recipe), examples)}
    return rows, {"by": "marks", "model": None, "feedback": str(file), "without_pair": dict(without)}


def test_rows(recipe: Recipe, chat: Any, examples: dict[str, list]) -> list[dict[str, Any]]:
    """The expected answers of the recipe's test questions, as rows without a rejected one."""
    from carelm.evaluation.pairs import test_row
    from carelm.evaluation.questions import make_questions

    tested = make_questions(dataclasses.replace(recipe, num_shots=0), chat)[0] if examples.get("test") else []
    return [test_row(question) for question in tested]


def result_of(recipe: Recipe) -> str:
    """The name of what the run has trained; of the base where it has not."""
    if recipe.method == "full":
        return str(recipe.output_dir) if (recipe.output_dir / "config.json").exists() else "base"
    return "adapter" if (recipe.output_dir / "adapter_config.json").exists() else "base"


def training_words(recipe: Recipe, folder: Path, words: list[str]) -> list[str]:
    """`words`, which name the recipe on a command line, with what goes on from its result by these pairs."""
    result = result_of(recipe)
    keys = {"objective": "preferences", "dataset_name": str(folder), "prompt_column": "prompt", "messages_column": "chosen",
            "rejected_column": "rejected", "category_column": "category", "id_column": "id", "too_long": "drop",
            "trained_turns": "last", "num_train_epochs": "1", "max_steps": "-1"}  # fmt: skip
    keys |= {key: value for key, value in NOT_OF_PAIRS.items() if getattr(recipe, key)}
    if template_columns(recipe.system_prompt or "", "system_prompt"):
        keys["system_prompt"] = ""  # it stands in the prompts, filled in
    keys |= {key: split for split in SPLITS if getattr(recipe, key := f"dataset_{split}_split") != split}
    keys |= {"adapter": str(recipe.output_dir)} if result == "adapter" else {}
    keys |= {"model_name_or_path": result} if result not in ("adapter", "base") else {}
    keys |= {"learning_rate": f"{PREFERENCE_RATES[recipe.method]:g}", "output_dir": f"{recipe.output_dir}-preferred"}
    kept = without(words, *keys, *EVALUATION_KEYS, "max_samples")
    return [*kept, *(word for key, value in keys.items() for word in (f"--{key}", value))]


def is_own(folder: Path) -> bool:
    """Whether this file has written what lies there."""
    train = folder / "train.jsonl"
    if not train.is_file():
        return folder.is_dir() and not any(folder.iterdir())
    try:
        with open(train, encoding="utf-8") as lines:
            first = [*json.loads(lines.readline())]
    except ValueError:  # no JSON, no text
        return False
    return first[: len(FIRST)] == FIRST and "rejected" in first


def write(recipe: Recipe, folder: Path, rows: dict[str, list[dict[str, Any]]], about: dict[str, Any]) -> None:
    """The files and what is said of them; raises UserError where there is no pair to train on."""
    without = list_counts(about["without_pair"]) or "none without"
    if not rows["train"]:
        raise UserError(
            f"--by: no training question gives a pair ({without}); ask more of them, draw more answers, or longer ones "
            "(max_new_tokens: one that was cut off is not whole), or go by another rule"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation", "test"):
        (folder / f"{split}.jsonl").unlink(missing_ok=True)  # of an earlier time
        if rows.get(split):
            write_rows(folder / f"{split}.jsonl", rows[split])
    words = {
        side: round(sum(len(row[side].split()) for row in rows["train"]) / len(rows["train"]), 1)
        for side in ("chosen", "rejected")
    }
    about = about | {"rows": {split: len(of_split) for split, of_split in rows.items()}, "mean_words": words}
    beside = recipe.output_dir / ANSWERS
    beside.mkdir(parents=True, exist_ok=True)
    write_whole(beside / ABOUT, json.dumps(about, indent=1, ensure_ascii=False))
    ranks.say(f"{', '.join(f'{len(r)} {split}' for split, r in rows.items())} rows in {folder}; no pair: {without}")
    ranks.say(f"mean length of an answer, words: chosen {words['chosen']}, rejected {words['rejected']}")
    if max(words.values()) > UNLIKE * min(words.values()):
        longer = "longer" if words["chosen"] > words["rejected"] else "shorter"
        ranks.say(
            f"the preferred answers are far {longer}: a model learns that first; take another rule, or more drawn answers"
        )
    ranks.print_result({"folder": str(folder), **about})


if __name__ == "__main__":
    ranks.run_main(main, kept="the answers so far stay and are not made again")
