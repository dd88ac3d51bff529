"""How well new tickets find past ones, and how many can be decided without a person, before and after the matching model.

    python benchmarks/tickets.py --data FOLDER --matcher RUN      # the rqe official test: consumer questions and FAQs
    python benchmarks/tickets.py                                  # the demo's rows: the same intent is the same ticket
    python benchmarks/tickets.py --tuned EMBEDDER                 # with one that is tuned on past tickets

recall@k: a right past ticket is among the first k. Decided: the share of tickets whose first match is taken without a person,
for its score is above a threshold: the lowest that is right for 95 of 100 of other tickets (each tenth by the other nine).
Precision: how often it is right on these. After: the same by the matcher's probability, of the match that it finds likeliest of
the first five. Milliseconds are of one match, with the matcher and without. FOLDER holds rqe_question_pairs. RUN is a finished
run of recipes/datasets/rqe_question_pairs.yaml. Results: benchmarks/results/tickets.json.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from launches import PROJECT, RESULTS, describe_machine, say, write_results

sys.path.append(str(PROJECT))

from carelm.evaluation.calibration import threshold_for  # noqa: E402
from carelm.evaluation.scores import wilson_interval  # noqa: E402
from carelm.recipe import Recipe  # noqa: E402
from carelm.recipe_file import load_recipe  # noqa: E402
from carelm.retrieval.refusals import FOLDS  # noqa: E402
from carelm.retrieval.tickets import Match, Tickets, update_tickets  # noqa: E402

MATCHES = 5
PRECISION = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with the public rows; the demo's without it")
    parser.add_argument("--matcher", help="folder of a finished run with two columns and labels")
    parser.add_argument(
        "--tuned", help="folder of an embedder that benchmarks/tuned_embedder.py has kept, as rqe/learnt/embedder"
    )
    options = parser.parse_args()
    name = "rqe" if options.data else "demo"
    with tempfile.TemporaryDirectory(prefix="carelm-tickets-") as folder:
        past, asked = rqe(options.data / "rqe_question_pairs") if options.data else demo(PROJECT / "demo/data")
        recipe = prepare(Path(folder), past, options.tuned or "auto")
        recipe = dataclasses.replace(recipe, matcher=options.matcher)
        measured = measure(recipe, past, asked)
    result = json.loads(file.read_text()) if (file := RESULTS / "tickets.json").exists() else {}
    result[f"{name}_tuned" if options.tuned else name] = {"machine": describe_machine(), **measured}
    write_results("tickets", result)
    say(json.dumps(measured))


def rqe(folder: Path) -> tuple[dict[str, str], dict[str, set[str]]]:
    """The FAQs by their names, and for each question the names of those that answer it."""
    pairs = read(folder / "official_test.jsonl")
    names = {text: f"F{n}" for n, text in enumerate(dict.fromkeys(pair["faq"] for pair in pairs))}
    asked: dict[str, set[str]] = {}
    for pair in pairs:
        if str(pair["value"]).lower() == "true":
            asked.setdefault(pair["chq"], set()).add(names[pair["faq"]])
    return {name: text for text, name in names.items()}, asked


def demo(folder: Path) -> tuple[dict[str, str], dict[str, set[str]]]:
    """The first messages of the training rows by their names, and for each one of the test rows those of its intent."""
    past = {row["id"]: row for row in read(folder / "train.jsonl")}
    of_intent: dict[str, set[str]] = {}
    for name, row in past.items():
        of_intent.setdefault(row["intent"], set()).add(name)
    asked = {row["messages"][0]["content"]: of_intent.get(row["intent"], set()) for row in read(folder / "test.jsonl")}
    first = {name: row["messages"][0]["content"] for name, row in past.items()}
    return first, {text: right for text, right in asked.items() if right}


def prepare(folder: Path, past: dict[str, str], embedder: str) -> Recipe:
    """A recipe with the index of these past tickets."""
    rows = [json.dumps({"id": name, "asked": text, "answered": name}) + "\n" for name, text in past.items()]
    (folder / "past.jsonl").write_text("".join(rows), encoding="utf-8")
    keys = {
        "dataset_name": str(folder / "past.jsonl"), "prompt_template": "{asked}", "completion_template": "{answered}",
        "id_column": "id", "validation_fraction": 0, "test_fraction": 0, "model_name_or_path": "demo/base",
    }  # fmt: skip
    (folder / "past.yaml").write_text(json.dumps(keys))
    words = ["--tickets", str(folder / "past.yaml"), "--index", str(folder / "index"), "--embedder", embedder]
    recipe = load_recipe(words, usage="")
    update_tickets(recipe)
    return recipe


def measure(recipe: Recipe, past: dict[str, str], asked: dict[str, set[str]]) -> dict:
    questions, right_of = list(asked), list(asked.values())
    found, taken = ask(Tickets(dataclasses.replace(recipe, matcher=None)), questions)
    right = [[match.ticket_id in golds for match in of_one] for of_one, golds in zip(found, right_of)]
    recall = {
        f"recall_at_{k}": wilson_interval(float(np.mean([any(r[:k]) for r in right])), len(right)) for k in (1, 5)
    }
    before = decide(np.array([m[0].confidence for m in found]), np.array([r[0] for r in right]), recipe.seed)
    measured = {
        "past": len(past), "questions": len(questions), **recall, "decided_by_score": before, "milliseconds": taken,
    }  # fmt: skip
    tickets = Tickets(recipe)
    if tickets.matcher:
        tickets.matcher.load()
        judged, taken = ask(tickets, questions)
        measured |= {**after(judged, right_of, recipe.seed), "milliseconds_with_matcher": taken}
    return measured


def ask(tickets: Tickets, questions: list[str]) -> tuple[list[list[Match]], dict[str, float]]:
    """The matches of each question, and the milliseconds that one takes."""
    tickets.match(questions[0], MATCHES)
    found, taken = [], []
    for text in questions:
        began = time.perf_counter()
        found.append(tickets.match(text, MATCHES))
        taken.append(1000 * (time.perf_counter() - began))
    return found, {"p50": round(float(np.percentile(taken, 50)), 1), "p95": round(float(np.percentile(taken, 95)), 1)}


def after(judged: list[list[Match]], right_of: list[set[str]], seed: int) -> dict:
    """What the matcher makes of the same matches."""
    likeliest = [max(of_one, key=lambda match: match.probability) for of_one in judged]
    chosen = np.array([match.ticket_id in golds for match, golds in zip(likeliest, right_of)])
    first = np.array([of_one[0].ticket_id in golds for of_one, golds in zip(judged, right_of)])
    pairs = [
        (match.probability, match.ticket_id in golds) for of_one, golds in zip(judged, right_of) for match in of_one
    ]
    return {
        "likeliest_is_right": wilson_interval(float(chosen.mean()), len(chosen)),
        "decided_by_probability": decide(np.array([match.probability for match in likeliest]), chosen, seed),
        "decided_by_probability_of_the_first": decide(np.array([m[0].probability for m in judged]), first, seed),
        "pairs_said_right": float(np.mean([(probability > 0.5) == is_right for probability, is_right in pairs])),
        "pairs_right": float(np.mean([is_right for _, is_right in pairs])),
    }


def decide(score: np.ndarray, right: np.ndarray, seed: int) -> dict:
    """The share that is decided, each tenth by the threshold that the other nine have chosen, and how often that is right."""
    fold = np.random.default_rng(seed).permutation(len(score)) % FOLDS
    chosen = [threshold_for(PRECISION, score[fold != k], right[fold != k]) for k in range(FOLDS)]
    decided = score >= np.array([np.inf if threshold is None else threshold for threshold in chosen])[fold]
    share = wilson_interval(float(decided.mean()), len(decided))
    precision = wilson_interval(float(right[decided].mean()), int(decided.sum())) if decided.any() else None
    return {"share": share, "precision": precision, "thresholds": chosen}


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
