"""What an embedder that is tuned on past questions finds more, and what a threshold on its confidence refuses.

    python benchmarks/tuned_embedder.py --keep FOLDER                    # the demo's questions and tickets
    python benchmarks/tuned_embedder.py --keep FOLDER --data FOLDER      # the public rows too

Each is one `python train/embedder.py` on training rows, which keeps the tuned embedder in --keep where it is better on
validation rows; one that lies there is taken as it is. That one is compared with the one before on test rows, by
`carelm.retrieval.tuning.compare`.

demo: its questions and its documents, the same ones in training and test, as in a shop. demo_tickets: first messages among 980
past ones, of which those of the same intent are right. rqe: consumer questions -> FAQs; the test has others.
medquad: questions -> answers, others in test. bitext: questions -> 2,000 past ones of the same intents.
Of rqe 600 training rows, of medquad 300. --data holds rqe_question_pairs, medquad and bitext_support.
Results: benchmarks/results/tuned_embedder.json.
"""

import argparse
import json
import sys
from pathlib import Path

import yaml
from launches import PROJECT, RESULTS, describe_machine, run, say, threads, write_results
from retrieval import WHOLE, bitext, medquad, read, rqe, write

sys.path.append(str(PROJECT))

from carelm.recipe_file import load_recipe  # noqa: E402
from carelm.retrieval.embedder import Embedder  # noqa: E402
from carelm.retrieval.past_questions import past_questions  # noqa: E402
from carelm.retrieval.retriever import Retriever  # noqa: E402
from carelm.retrieval.tuning import compare  # noqa: E402
from carelm.retrieval.update import update  # noqa: E402

ROWS = {"rqe": 600, "medquad": 300}  # that an embedder is tuned on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, required=True, help="folder for the tuned embedders and their indexes")
    parser.add_argument("--data", type=Path, help="folder with the public rows")
    parser.add_argument("--only", nargs="+", choices=SETS, help="these sets alone")
    options = parser.parse_args()
    names = options.only or [name for name in SETS if options.data or name.startswith("demo")]
    if not options.data and any(not name.startswith("demo") for name in names):
        sys.exit("--data: name the folder with the public rows")
    for name in names:
        folder = (options.keep / name).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        learnt, tested, words = SETS[name](options.data, folder)
        measured = {"machine": describe_machine(), **measure(learnt, tested, words, folder)}
        result = json.loads(file.read_text()) if (file := RESULTS / "tuned_embedder.json").exists() else {}
        result[name] = measured
        say(f"{name}: written to {write_results('tuned_embedder', result)}")


def measure(learnt: dict, tested: dict, words: list[str], folder: Path) -> dict:
    """What the tuning says of validation rows, and `test`: what it changes there; None where it was not kept.

    Args:
        learnt, tested: recipes of the rows that are learnt from, and tested on.
        words: more of train/embedder.py.
    """
    recipes = {}
    for name, keys in (("learnt", learnt), ("tested", tested)):
        keys = {"model_name_or_path": "demo/base", "num_resamples": 2000, "output_dir": str(folder / name)} | keys
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(keys))
        recipes[name] = load_recipe(["--config", str(folder / f"{name}.yaml")], usage="")
        update(recipes[name])
    kept = folder / "learnt/embedder"
    if not kept.exists():
        command = [sys.executable, "train/embedder.py", "--config", str(folder / "learnt.yaml"), *words]
        outcome = run(command, {"OMP_NUM_THREADS": threads(1)}, 3600)
        if outcome.status != 0:
            sys.exit(outcome.stderr)
        tuned = json.loads(outcome.stdout.splitlines()[-1])
    if kept.exists():
        tuned = json.loads((kept / "source.json").read_text())
    told = {key: tuned[key] for key in ("train_questions", "steps", "epochs", "learning_rate", "seed", "validation")}
    found = None
    if kept.exists():
        before = Retriever(recipes["tested"])
        asked_by = load_recipe(["--config", words[words.index("--questions") + 1]], usage="") if words else None
        asked = past_questions(recipes["tested"], asked_by, before.index.passages(), ["test"])["test"]
        found = compare(before, Embedder(kept, before.embedder.precision), asked)
    return {**told, "kept": kept.exists(), "test": found}


def demo(data: Path, folder: Path) -> tuple[dict, dict, list[str]]:
    shop = yaml.safe_load((PROJECT / "recipes/shop_grounded.yaml").read_text())
    names = ("model_name_or_path", "documents", "dataset_name", "messages_column")
    keys = {name: shop[name] for name in names} | {"chunk_tokens": 160}
    return keys, keys, ["--questions", "recipes/demo.yaml"]


def demo_tickets(data: Path, folder: Path) -> tuple[dict, dict, list[str]]:
    rows = {
        split: [{"asked": row["messages"][0]["content"], "intent": row["intent"], "answered": row["intent"]} for row in
                read(PROJECT / f"demo/data/{split}.jsonl")]
        for split in ("train", "validation", "test")
    }  # fmt: skip
    past, rows["train"] = rows["train"][:980], rows["train"][980:]
    return of_intents(past, rows, "asked", "answered", folder)


def public_rqe(data: Path, folder: Path) -> tuple[dict, dict, list[str]]:
    tested = rqe(data, folder / "test") | {"chunk_tokens": WHOLE}
    of_test = {row["faq"] for row in read(data / "rqe_question_pairs/official_test.jsonl")}
    pairs = [
        row for row in read(data / "rqe_question_pairs/train.jsonl")
        if row["value"] == "true" and row["faq"] not in of_test and row["chq"].strip() != row["faq"].strip()
    ][: ROWS["rqe"]]  # fmt: skip
    write(folder / "learnt_faqs.jsonl", [{"faq": faq} for faq in dict.fromkeys(row["faq"] for row in pairs)])
    write(folder / "learnt_rows/train.jsonl", pairs)
    learnt = tested | {
        "documents": [str(folder / "learnt_faqs.jsonl")], "dataset_name": str(folder / "learnt_rows"),
        "validation_fraction": 0.15, "test_fraction": 0,
    }  # fmt: skip
    return learnt, tested, []


def public_medquad(data: Path, folder: Path) -> tuple[dict, dict, list[str]]:
    tested = medquad(data, folder) | {"chunk_tokens": WHOLE}
    write(folder / "learnt_rows/train.jsonl", read(data / "medquad/train.jsonl")[: ROWS["medquad"]])
    learnt = tested | {
        "documents": [str(folder / "learnt_rows/train.jsonl")], "dataset_name": str(folder / "learnt_rows"),
        "validation_fraction": 0.15, "test_fraction": 0,
    }  # fmt: skip
    return learnt, tested, []


def public_bitext(data: Path, folder: Path) -> tuple[dict, dict, list[str]]:
    rows = {split: read(data / f"bitext_support/{split}.jsonl") for split in ("train", "test")}
    past, rows["train"] = rows["train"][:2000], rows["train"][2000:]
    rows["train"], rows["validation"] = rows["train"][:550], rows["train"][550:]
    return of_intents(past, rows, "instruction", "response", folder)


def of_intents(
    past: list[dict], rows: dict[str, list[dict]], asked: str, answered: str, folder: Path
) -> tuple[dict, dict, list[str]]:
    """Questions among past ones, of which those of the same intent are right."""
    write(folder / "past.jsonl", past)
    for split, of_split in rows.items():
        write(folder / f"rows/{split}.jsonl", of_split)
    keys = bitext(folder, folder) | {
        "documents": [str(folder / "past.jsonl")], "dataset_name": str(folder / "rows"), "passage_template": f"{{{asked}}}",
        "prompt_template": f"{{{asked}}}", "completion_template": f"{{{answered}}}", "chunk_tokens": WHOLE,
    }  # fmt: skip
    return keys, keys, []


SETS = {
    "demo": demo,
    "demo_tickets": demo_tickets,
    "rqe": public_rqe,
    "medquad": public_medquad,
    "bitext": public_bitext,
}


if __name__ == "__main__":
    main()
