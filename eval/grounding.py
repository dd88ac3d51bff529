"""Shows whether passages help: scores without, with retrieved and with gold passages, support of marks, refusals.

    python eval/grounding.py --config recipes/shop_grounded.yaml

For rows of train/make_rows.py, whose test questions the models have answered (accelerate launch eval/run.py --config R). Where
no model has, it shows what the threshold on the retriever's confidence refuses, which needs none. Writes results.json,
report.md and refusals.svg into OUTPUT_DIR/eval/grounding/. The last line on standard output is the outcome as one JSON object.

exit status: 0 the report is written, 2 something is to be mended.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm import environment, ranks  # noqa: F401
from carelm.command_line import own_options, own_parser
from carelm.errors import UserError
from carelm.files import locate, write_whole
from carelm.recipe_file import load_recipe


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = own_parser(__doc__)
    parser.add_argument("--false_refusals", type=float, default=0.1, help="share of the answerable validation questions that "
                        "the threshold may refuse (default: 0.1)")  # fmt: skip
    return own_options(parser)


def main() -> None:
    options, keys = parse()
    recipe = load_recipe(keys, usage=__doc__)
    if not 0 < options.false_refusals < 1:
        raise UserError(f"--false_refusals: {options.false_refusals} is no share between 0 and 1")
    if recipe.id_column != "id":
        raise UserError(f"id_column: it is {recipe.id_column}, and the rows of train/make_rows.py have theirs in id; set "
                        "id_column: id, and let eval/run.py answer them so")  # fmt: skip
    rows = {split: read_rows(Path(locate(recipe.dataset_name)), split) for split in ("validation", "test")}
    from carelm.retrieval import grounded_report, grounded_results
    from carelm.retrieval.grounded_rows import GOLD, LEFT_OUT, NONE, RETRIEVED

    folder = recipe.output_dir / "eval"
    test = grounded_results.whole(rows["test"], (NONE, RETRIEVED, GOLD, LEFT_OUT))
    validation = grounded_results.whole(rows["validation"], (RETRIEVED, LEFT_OUT))
    models, answers, cautions = {}, {}, []
    for file in sorted(folder.glob("predictions-*.jsonl")):
        name = file.stem.removeprefix("predictions-")
        said = grounded_results.for_all(rows["test"], {line["id"]: line["prediction"] for line in read_lines(file)})
        missing = [row["id"] for of_condition in test.values() for row in of_condition if row["id"] not in said]
        if missing:
            cautions.append(f"{name} is left out: it has not answered {len(missing)} rows (first: {missing[0]}).")
            continue
        models[name] = grounded_results.of_model(test, said, recipe.num_resamples, recipe.seed)
        answers[name] = said
    if not models and not cautions:
        cautions.append("No model has answered the test rows yet: run eval/run.py for scores and support.")
    found = {
        "questions": len(test[RETRIEVED]),
        "retrieved": grounded_results.share_retrieved(test[RETRIEVED]),
        "cautions": cautions,
        "models": models,
        "refusals": grounded_results.refusals_of(test, validation, answers, options.false_refusals, recipe.seed),
    }
    folder = folder / "grounding"
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "refusals.svg", grounded_report.picture(found["refusals"]))
    write_whole(folder / "report.md", grounded_report.markdown(f"{recipe.name}: do passages help?", found))
    write_whole(folder / "results.json", json.dumps(found, ensure_ascii=False, indent=1))
    for caution in cautions:
        ranks.say(caution)
    ranks.say(f"the report is {folder / 'report.md'}")
    ranks.print_result({"report": str(folder / "report.md"), **grounded_results.summary(found)})


def read_lines(file: Path) -> list[dict]:
    with open(file, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def read_rows(folder: Path, split: str) -> list[dict]:
    """The rows that train/make_rows.py has written."""
    file = folder / f"{split}.jsonl"
    if not file.is_file():
        raise UserError(f"dataset_name: {folder} has no {split}.jsonl; make the rows first: python train/make_rows.py")
    rows = read_lines(file)
    if not rows or "condition" not in rows[0]:
        raise UserError(
            f"dataset_name: {file} holds no rows of train/make_rows.py; name the folder that it has written"
        )
    return rows


if __name__ == "__main__":
    ranks.run_main(main)
