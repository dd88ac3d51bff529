"""Times preferences (DPO) with CareLM and with TRL's own script, in turn, on the same pairs.

    CARELM_DATA=../shared/data python benchmarks/preferences.py

LoRA r=16 of a Llama shape of 27 M random weights on the CPU, 8 pairs a step, at most 512 tokens a row; the tokenizer of 16,384
entries is that of benchmarks/speed.py. The pairs are questions of bitext_support with their own answer and that of another
question. Each side trains three epochs over the same pairs as it comes
(trl: trl/scripts/dpo.py), step ends written down by the same callback (benchmarks/timed.py); the steps of the last two epochs
are timed. TRL asks its reference at every step; CareLM once before the first, which is timed apart and counted with one epoch
and with three. Writes benchmarks/results/preferences.json and prints it.
"""

import argparse
import importlib.util
import json
import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from launches import ONE_PROCESS, PROJECT, accelerate, describe_machine, keys, run, say, write_recipe, write_results
from speed import read_rows, write_base
from timed import read_times

PAIRS_A_STEP, EPOCHS = 8, 3
TIMED = PROJECT / "benchmarks/timed.py"
SAME = {
    "lora_r": 16, "lora_alpha": 32, "lora_target_modules": "all-linear", "lora_dropout": 0.0, "learning_rate": 5e-6,
    "lr_scheduler_type": "constant", "num_train_epochs": EPOCHS, "per_device_train_batch_size": PAIRS_A_STEP,
    "gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no", "eval_strategy": "no", "report_to": "none",
    "max_length": 512, "beta": 0.1, "seed": 42,
}  # fmt: skip


def write_pairs(file: Path, folder: Path, number: int) -> None:
    """So many pairs, for CareLM as texts and for TRL as messages; the worse answer is that of another question."""
    rows = random.Random(42).sample(read_rows(file, "instruction", "response"), number)
    pairs = [(question, answer, rows[i - 1][1]) for i, (question, answer) in enumerate(rows)]
    texts = [dict(zip(("prompt", "chosen", "rejected"), pair)) for pair in pairs]
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    said = [{key: [{"role": roles[key], "content": text}] for key, text in row.items()} for row in texts]
    for who, lines in (("carelm", texts), ("trl", said)):
        (folder / who).mkdir()
        (folder / who / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def command(who: str, base: Path, precision: str, folder: Path) -> list[str]:
    same = SAME | {"model_name_or_path": base, "output_dir": folder / f"{who}-output"}
    words = [TIMED, "--times", folder / f"{who}.times"]
    if who == "trl":
        script = Path(importlib.util.find_spec("trl").origin).parent / "scripts/dpo.py"
        same |= {"dataset_name": folder / who, "use_peft": True, "bf16": precision == "bf16", "use_cpu": True}
        same |= {"dtype": {"fp32": "float32", "bf16": "bfloat16"}[precision]}
        return accelerate(ONE_PROCESS, *words, script, *keys(**same))
    same |= {
        "objective": "preferences", "dataset_name": folder / who / "train.jsonl", "prompt_template": "{prompt}",
        "completion_template": "{chosen}", "rejected_template": "{rejected}", "precision": precision,
        "global_batch_size": PAIRS_A_STEP, "validation_fraction": 0.0, "test_fraction": 0.0,
    }  # fmt: skip
    recipe = write_recipe(folder / "recipe.yaml", same)
    return accelerate(ONE_PROCESS, *words, PROJECT / "train/sft.py", "--config", recipe)


def measure(who: str, base: Path, precision: str, folder: Path) -> dict[str, Any]:
    """One run: seconds for a pair of a step (and of the reference where it is asked once), memory, losses."""
    environment = {"CARELM_CACHE": str(folder / "carelm"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    outcome = run(command(who, base, precision, folder), environment, 900)
    steps, losses, _ = read_times(folder / f"{who}.times")
    if outcome.status != 0:
        sys.exit(f"{who}: {outcome.last_error}")
    last = max(steps)
    warm = last // EPOCHS
    seconds = (steps[last]["time"] - steps[warm]["time"]) / (last - warm) / PAIRS_A_STEP
    before = 0.0
    if who == "carelm":
        before = json.loads(outcome.stdout.splitlines()[-1])["reference_seconds"] / (warm * PAIRS_A_STEP)
    return {
        "who": who,
        "step_seconds_per_pair": round(seconds, 4),
        "reference_seconds_per_pair": round(before, 4),
        "pairs_per_second_one_epoch": round(1 / (seconds + before), 3),
        "pairs_per_second_three_epochs": round(1 / (seconds + before / EPOCHS), 3),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in steps.values()),
        "losses": [round(losses[step], 5) for step in sorted(losses)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--steps", type=int, default=2, help="steps of an epoch")
    parser.add_argument("--folder", type=Path, help="where the base is kept for later runs")
    options = parser.parse_args()
    about = describe_machine()
    data = Path(os.environ.get("CARELM_DATA", PROJECT.parent / "shared/data"))
    with tempfile.TemporaryDirectory() as aside:
        folder = options.folder or Path(aside)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "base").exists():
            write_base("llama_27m", data, folder / "base")
        work = Path(aside) / "work"
        work.mkdir()
        write_pairs(data / "bitext_support/train.jsonl", work, options.steps * PAIRS_A_STEP)
        runs = []
        for who in ("trl", "carelm"):
            runs.append(measure(who, folder / "base", options.precision, work))
            say(json.dumps(runs[-1]))
    theirs, ours = runs
    ratios = {key: round(ours[key] / theirs[key], 3) for key in theirs if key.startswith(("pairs_", "peak_"))}
    settings = SAME | {"precision": options.precision, "pairs": options.steps * PAIRS_A_STEP}
    results = {"machine": about, "settings": settings, "runs": runs, "carelm_to_trl": ratios}
    write_results("preferences", results)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
