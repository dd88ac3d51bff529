"""Times the scores: ROUGE beside rouge_score in a loop, then a whole comparison of two models over 100,000 predictions.

    python benchmarks/scoring.py                                                  # both
    python benchmarks/scoring.py --only rouge [--pairs 2000] [--min_words 150]
    python benchmarks/scoring.py --only comparison [--predictions 100000] [--resamples 1000]

rouge: the answers of medquad of at least 150 words, each scored against another row's. Both compute the same figures; the
largest difference is in the result. CARELM_DATA names the folder with medquad/train.jsonl.
comparison: what eval/run.py does once all answers are there, in a process of its own: it reads the two files of predictions,
scores both models with 1,000 resamples, in all and by category, compares them and writes the report. The texts are 100 words
long in the mean, drawn from 50,000 words as often as Zipf's law has it; each model says every word of the reference with
probability 0.5 or 0.55, else another, and ends with one of three labels. Seconds of each part and the peak memory of that
process are in the result.
"""

import argparse
import json
import multiprocessing
import os
import random
import resource
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
from launches import PROJECT, RESULTS, describe_machine, say, write_results

GROUPS = (("rouge1", "rouge2", "rougeL"), ("rougeLsum",))
VOCABULARY = 50_000
KEPT = {"first": 0.5, "second": 0.55}  # of the reference's words, by model
LABELS = ("billing", "delivery", "account")
CATEGORIES = 27


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("rouge", "comparison"))
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--min_words", type=int, default=150)
    parser.add_argument("--predictions", type=int, default=100_000, help="of each of the two models")
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--no_write", action="store_true", help="leave benchmarks/results as it is")
    options = parser.parse_args()
    file = RESULTS / "scoring.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    for name, measure in (("rouge", time_rouge), ("comparison", time_comparison)):
        if options.only in (None, name):
            result[name] = {"machine": describe_machine(), **measure(options)}
    if not options.no_write:
        say(f"written to {write_results('scoring', result)}")


def time_rouge(options: argparse.Namespace) -> dict[str, object]:
    """Seconds of this project's ROUGE and of rouge_score's, in turn on the same pairs."""
    from rouge_score.rouge_scorer import RougeScorer

    from carelm.evaluation.rouge_measures import rouge

    file = Path(os.environ.get("CARELM_DATA", PROJECT.parent / "shared/data")) / "medquad/train.jsonl"
    if not file.is_file():
        sys.exit(f"CARELM_DATA: there is no {file}")
    answers = [json.loads(line)["Answer"] for line in open(file, encoding="utf-8")]
    answers = [text for text in answers if len(text.split()) >= options.min_words]
    draw = random.Random(0)
    pairs = [tuple(draw.sample(answers, 2)) for _ in range(options.pairs)]
    predictions, references = [p for p, _ in pairs], [[r] for _, r in pairs]
    result = {"pairs": len(pairs), "rows": len(answers),
              "mean_words": round(sum(len(p.split()) for p in predictions) / len(pairs), 1), "groups": {}}  # fmt: skip
    for types in GROUPS:
        started = time.perf_counter()
        ours = rouge(predictions, references, types)
        seconds = time.perf_counter() - started
        scorer = RougeScorer(types)
        started = time.perf_counter()
        theirs = [scorer.score(r, p) for p, r in pairs]
        loop = time.perf_counter() - started
        difference = max(abs(s[name].fmeasure - ours[name][i]) for i, s in enumerate(theirs) for name in types)
        result["groups"][" ".join(types)] = {
            "seconds": round(seconds, 3), "rouge_score_seconds": round(loop, 3), "times_as_fast": round(loop / seconds, 1),
            "largest_difference": difference,
        }  # fmt: skip
        say(f"{types}: {result['groups'][' '.join(types)]}")
    return result


def time_comparison(options: argparse.Namespace) -> dict[str, object]:
    """Seconds by part and the peak memory of a process that compares two models on texts made here."""
    with tempfile.TemporaryDirectory(prefix="carelm-scoring-") as name:
        words = write_predictions(Path(name), options.predictions)
        context = multiprocessing.get_context("spawn")
        there, here = context.Pipe()
        process = context.Process(target=compare, args=(Path(name), options.resamples, here))
        process.start()
        here.close()
        try:
            found = there.recv()
        except EOFError:
            sys.exit("the process that compares has died; its message stands above")
        process.join()
    result = {
        "predictions": options.predictions,
        "models": len(KEPT),
        "mean_words": round(words, 1),
        "resamples": options.resamples,
        **found,
    }
    say(json.dumps(result, indent=1))
    return result


def write_predictions(folder: Path, number: int) -> float:
    """Writes predictions-MODEL.jsonl as eval/run.py does; returns the mean number of words of a reference."""
    random = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    often = 1 / np.arange(1, 27)
    lengths = np.clip(
        random.poisson(1.5 + 0.6 * np.log(np.arange(1, VOCABULARY + 1))), 1, 14
    )  # the frequent ones are short
    vocabulary = np.array(["".join(random.choice(letters, n, p=often / often.sum())) for n in lengths], object)
    zipf = 1 / (np.arange(VOCABULARY) + 2.7)  # Zipf and Mandelbrot's law
    cumulated = np.cumsum(zipf / zipf.sum())

    def draw(count: int) -> np.ndarray:
        return np.searchsorted(cumulated, random.random(count))

    def text(words: np.ndarray, ends: np.ndarray, label: str) -> str:
        spoken = vocabulary[words]
        spoken[ends < 1 / 12] += "."  # a sentence has twelve words in the mean, and one in twenty ends a line
        spoken[ends < 1 / 240] += "\n"
        return " ".join(spoken).replace("\n ", "\n") + f" {label}."

    total = 0
    files = {name: open(folder / f"predictions-{name}.jsonl", "w", encoding="utf-8") for name in KEPT}
    for i in range(number):
        count = int(random.integers(60, 141))
        total += count
        reference, ends, label = draw(count), random.random(count), LABELS[random.integers(3)]
        line = {"id": str(i), "conversation": str(i), "category": f"intent {i % CATEGORIES}", "question": "?",
                "references": [text(reference, ends, label)], "new_tokens": count, "prompt_tokens": 40,
                "finish_reason": "stop", "made_by": ""}  # fmt: skip
        for name, kept in KEPT.items():
            said = np.where(random.random(count) < kept, reference, draw(count))
            spoken = label if random.random() < kept else LABELS[random.integers(3)]
            files[name].write(json.dumps({**line, "prediction": text(said, ends, spoken)}) + "\n")
    for file in files.values():
        file.close()
    return total / number


def compare(folder: Path, resamples: int, result: Connection) -> None:
    """What eval/run.py does with the predictions; sends seconds by part, the peak in bytes and the two models' ROUGE-L."""
    from carelm.evaluation import report, results
    from carelm.evaluation.predictions import PredictionFile
    from carelm.evaluation.questions import Question
    from carelm.recipe_file import load_recipe

    keys = ["--dataset_name", str(folder), "--prompt_template", "{q}", "--completion_template", "{a}"]
    keys += ["--output_dir", str(folder), "--num_resamples", str(resamples), "--labels", *LABELS]
    recipe = load_recipe(keys, usage="")
    unmeasured = {"kind": "base", "precision": "fp32", "bits": None, "unused_generation_config": {}, "throughput": {},
                  "latency": {"prompts": 0, "ttft_ms": {}, "tpot_ms": {}, "e2e_ms": {"p50": 1.0, "p95": 1.0, "p99": 1.0}},
                  "conditions": {"device": "CPU"}, "peak_memory_bytes": None, "load_seconds": 0.0, "total_parameters": 1,
                  "trained_parameters": None, "prompt_tokens": {"p50": 1, "p95": 1, "max": 1}}  # fmt: skip
    seconds = {}

    def clock(part: str) -> None:
        nonlocal started
        seconds[part] = round(time.perf_counter() - started, 2)
        say(f"{part}: {seconds[part]} s")
        started = time.perf_counter()

    started = time.perf_counter()
    count = sum(1 for _ in open(folder / "predictions-first.jsonl"))
    made_by = {str(i): "" for i in range(count)}
    lines = {name: PredictionFile(folder / f"predictions-{name}.jsonl", made_by).close() for name in KEPT}
    clock("read the predictions")
    questions = [Question(p["id"], p["conversation"], p["category"], [{"role": "user", "content": p["question"]}],
                          p["references"]) for p in lines["first"]]  # fmt: skip
    clock("questions")
    found = results.make_results(recipe, questions, lines, {name: unmeasured for name in KEPT})
    clock("scores, resamples and comparison")
    found |= {"conditions": {"num_resamples": resamples},
              "test": {"questions": count, "conversations": count, "split": "test", "dataset": "made"}}  # fmt: skip
    report.write(folder, recipe, found, questions, lines)
    clock("report")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    primary = {name: found["models"][name]["rougeL"] for name in KEPT}
    result.send({"seconds": seconds, "total_seconds": round(sum(seconds.values()), 2), "peak_memory_bytes": peak,
                 "rougeL": primary, "difference": found["pairs"][0]["scores"]["rougeL"]})  # fmt: skip


if __name__ == "__main__":
    main()
