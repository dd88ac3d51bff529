"""One real run: LoRA of the real base on bitext_support, then base against adapter on 100 test questions.

    python benchmarks/real_base.py            # up to an hour on two cores; the same command again goes on

CARELM_DATA names the folder with the datasets. The base is the folder that demo/real_base.py makes; what its weights are is
said with the figures. It trains and answers in what `precision: auto` takes. Results: benchmarks/results/real_base.json; the
last lines on standard output are the table of README.md.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from launches import ONE_PROCESS, PROJECT, accelerate, describe_machine, say, threads, write_results
from real_rows import EVALUATED, TRAINED

RECIPE = "bitext_support"
FILES = [f"recipes/datasets/{RECIPE}.yaml", "recipes/overlays/real_base.yaml"]
SETTINGS = ["--learning_rate", "5e-4", "--max_length", "384", "--max_samples", "1200", "--global_batch_size", "8"]
FEWER_ROWS = ["--max_eval_samples", "100"]
ANSWERS = ["--max_new_tokens", "128", "--num_latency_prompts", "5"]
SCORES = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "bleu": "BLEU", "chrf": "chrF"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, default=PROJECT / f"outputs/{RECIPE}+real_base", help="the run's folder"
    )
    options = parser.parse_args()
    data = Path(os.environ.get("CARELM_DATA", PROJECT.parent / "shared/data")) / RECIPE
    if not data.is_dir():
        sys.exit(f"CARELM_DATA: there is no {data}")
    base = Path(launch([sys.executable, "demo/real_base.py"]))
    source = json.loads((base / "source.json").read_text())
    result = {"machine": describe_machine(), "base": {key: source.get(key) for key in ("weights", "source", "sha256")}}
    keys = [word for file in FILES for word in ("--config", file)]
    keys += [*SETTINGS, *FEWER_ROWS, "--dataset_name", data, "--output_dir", options.output_dir]
    launch(accelerate(ONE_PROCESS, "train/sft.py", *keys))
    launch(accelerate(ONE_PROCESS, "eval/run.py", *keys, *ANSWERS, "--models", "base", "adapter"))

    trained = json.loads((options.output_dir / "train_metrics.json").read_text())
    found = json.loads((options.output_dir / "eval/results.json").read_text())
    measured = ("latency", "throughput", "cut_predictions", "answer_tokens", "precision")
    result |= {
        "train": [*FILES, *SETTINGS, *FEWER_ROWS],
        "trained": {key: trained.get(key) for key in (*TRAINED, "wall_seconds", "tokens_per_second", "precision")},
        "evaluate": [*FILES, *SETTINGS, *FEWER_ROWS, *ANSWERS],
        "test": {key: value for key, value in found["test"].items() if key != "dataset"},
        "models": {
            model: {key: values[key] for key in (*EVALUATED, *measured) if key in values}
            for model, values in found["models"].items()
        },
        "pairs": found["pairs"],
        "verdicts": found["verdicts"],
        "cautions": found["cautions"],
    }
    say(f"written: {write_results('real_base', result)}")
    print(table(result))


def launch(command: list[str]) -> str:
    """Runs a command with its messages shown; the last line of its standard output."""
    done = subprocess.run(command, cwd=PROJECT, stdout=subprocess.PIPE, text=True,
                          env={"OMP_NUM_THREADS": threads(1), **os.environ})  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"status {done.returncode}: {' '.join(command)}")
    return done.stdout.splitlines()[-1]


def table(result: dict) -> str:
    """The figures as Markdown: scores with 95 % intervals, the paired difference, eval loss, latency."""
    base, adapter = result["models"]["base"], result["models"]["adapter"]
    (pair,) = result["pairs"]
    lines = [f"| {result['base']['weights']} | base | adapter | difference |", "|---|---|---|---|"]
    for key, name in SCORES.items():
        digits = 3 if key.startswith("rouge") else 1
        values = [f"{m[key]['value']:.{digits}f} ({m[key]['low']:.{digits}f} to {m[key]['high']:.{digits}f})"
                  for m in (base, adapter)]  # fmt: skip
        change = [f"{pair['scores'][key][part]:+.{digits}f}" for part in ("difference", "low", "high")]
        lines.append(f"| {name} | {' | '.join(values)} | {change[0]} ({change[1]} to {change[2]}) |")
    trained = result["trained"]
    lines.append(f"| eval loss | {trained['eval_loss_before']:.3f} | {trained['eval_loss']:.3f} | |")
    for key, name in (("ttft_ms", "milliseconds to the first token, p50"), ("tpot_ms", "per further token, p50")):
        lines.append(f"| {name} | {' | '.join(format(m['latency'][key]['p50'], '.0f') for m in (base, adapter))} | |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
