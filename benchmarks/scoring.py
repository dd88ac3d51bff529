"""Times the scores: ROUGE of this project beside rouge_score in a loop, on 2,000 pairs of long medical answers.

    python benchmarks/scoring.py

The answers of medquad of at least 150 words, each scored against another row's. Both compute the same figures; the largest
difference is in the result, benchmarks/results/scoring.json. CARELM_DATA names the folder with medquad/train.jsonl.
"""

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path

from launches import PROJECT, describe_machine, say, write_results
from rouge_score.rouge_scorer import RougeScorer

from carelm.evaluation.rouge import rouge

GROUPS = (("rouge1", "rouge2", "rougeL"), ("rougeLsum",))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--min_words", type=int, default=150)
    parser.add_argument("--no_write", action="store_true", help="leave benchmarks/results as it is")
    options = parser.parse_args()
    file = Path(os.environ.get("CARELM_DATA", PROJECT.parent / "shared/data")) / "medquad/train.jsonl"
    if not file.is_file():
        sys.exit(f"CARELM_DATA: there is no {file}")
    answers = [json.loads(line)["Answer"] for line in open(file, encoding="utf-8")]
    answers = [text for text in answers if len(text.split()) >= options.min_words]
    draw = random.Random(0)
    pairs = [tuple(draw.sample(answers, 2)) for _ in range(options.pairs)]
    predictions, references = [p for p, _ in pairs], [[r] for _, r in pairs]
    machine = describe_machine()
    result = {"machine": machine, "pairs": len(pairs), "rows": len(answers),
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
    if not options.no_write:
        say(f"written to {write_results('scoring', result)}")


if __name__ == "__main__":
    main()
