"""Trains and evaluates on public rows: a short QLoRA run on the demo's base, then base against adapter on 200 test rows.

    python benchmarks/real_rows.py [--only bitext_support medquad]

CARELM_DATA names the folder with the datasets. Training is on two CPU ranks under ZeRO-2, the evaluation on one process with
all cores. The base is tiny and has read about one invented shop only: the figures show that the way works, not what a real
base reaches, and nothing is timed. Results, with both commands: benchmarks/results/real_rows.json.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from launches import ONE_PROCESS, PROJECT, RESULTS, accelerate, describe_machine, run, say, threads, write_results

ROWS = 200
OVERLAY = "recipes/overlays/demo_base.yaml"
# Of each recipe: what the training takes, and what the evaluation takes beside it.
RUNS = {
    "bitext_support": ([], []),
    "dialogsum": (
        ["--max_steps", "60"],
        ["--dataset_test_split", "test_multiref", "--reference_columns", "summary1", "summary2", "summary3"],
    ),
    "medquad": (["--max_steps", "60"], []),
    "rqe_question_pairs": (["--max_steps", "120"], []),
}
TRAINED = ("eval_loss_before", "eval_loss", "global_step", "world_size", "zero_stage", "global_batch_size", "num_train_tokens",
           "peak_memory_bytes", "trainable_percent", "git_commit")  # fmt: skip
EVALUATED = (
    "rouge1",
    "rouge2",
    "rougeL",
    "rougeLsum",
    "bleu",
    "chrf",
    "accuracy",
    "macro_f1",
    "confusion",
    "empty_predictions",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="RECIPE")
    parser.add_argument("--output_dir", type=Path, help="keep the runs there (default: a temporary folder)")
    options = parser.parse_args()
    data = Path(os.environ.get("CARELM_DATA", PROJECT.parent / "shared/data"))
    missing = [name for name in options.only if not (data / name).is_dir()]
    if missing:
        sys.exit(f"CARELM_DATA: there is no {data / missing[0]}")
    result = json.loads(file.read_text()) if (file := RESULTS / "real_rows.json").exists() else {}
    result["machine"] = describe_machine()
    with tempfile.TemporaryDirectory(prefix="carelm-rows-") as folder:
        for name in options.only:
            result[name] = train_and_evaluate(name, data / name, (options.output_dir or Path(folder)) / name)
            say(f"{name}: {json.dumps(result[name])}")
            write_results("real_rows", result)


def train_and_evaluate(name: str, rows: Path, folder: Path) -> dict[str, object]:
    training, evaluating = RUNS[name]
    common = [
        "--config",
        f"recipes/datasets/{name}.yaml",
        "--config",
        OVERLAY,
        "--dataset_name",
        rows,
        "--output_dir",
        folder,
    ]
    launch(accelerate(PROJECT / "accelerate_configs/cpu_zero2.yaml", "train/sft.py", *common, *training), ranks=2)
    launch(accelerate(ONE_PROCESS, "eval/run.py", *common, *evaluating, "--max_eval_samples", ROWS,
                      "--num_latency_prompts", 1), ranks=1)  # fmt: skip
    trained = json.loads((folder / "train_metrics.json").read_text())
    found = json.loads((folder / "eval/results.json").read_text())
    return {
        "train": ["accelerate_configs/cpu_zero2.yaml", f"recipes/datasets/{name}.yaml", OVERLAY, *training],
        "trained": {key: trained.get(key) for key in TRAINED},
        "evaluate": [f"recipes/datasets/{name}.yaml", OVERLAY, *evaluating, "--max_eval_samples", str(ROWS)],
        "test": {key: value for key, value in found["test"].items() if key != "dataset"},
        "primary_metric": found["primary_metric"],
        "models": {
            model: {key: values[key] for key in EVALUATED if key in values} for model, values in found["models"].items()
        },
        "verdicts": found["verdicts"],
    }


def launch(command: list[str], ranks: int) -> None:
    done = run(command, {"OMP_NUM_THREADS": threads(ranks)}, 1800)
    if done.status != 0:
        sys.exit(f"{' '.join(command)}\n{done.refusal or done.last_error}")


if __name__ == "__main__":
    main()
