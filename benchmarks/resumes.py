"""Stops a run on one rung and goes on with it on another: is the loss curve that of the run that was never stopped?

    python benchmarks/resumes.py

LoRA and prompt tuning, from each of one process and two CPU ranks under ZeRO-1, 2 and 3 (every parameter sharded) to each
other one: `train/sft.py` on demo/data, eight optimizer steps, stopped after the fourth. A cell is the largest relative
difference of its losses from those of one process that trained all eight. Writes benchmarks/results/resumes.json and prints
the table; exit status 1 where a difference is above 1e-3.
"""

import argparse
import itertools
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from launches import PROJECT, accelerate, describe_machine, keys, run, say, threads, write_results
from methods import STAGES, TIMEOUT_S, accelerate_file

RUNGS = STAGES[:4]
TOLERANCE = 1e-3
LEARNING_RATES = {"lora": 2e-3, "prompt_tuning": 1e-1}


def train(method: str, rung: str, output_dir: Path, folder: Path, came_from: str | None = None) -> dict[int, float]:
    """Trains, or goes on with what `output_dir` holds; the loss of every step."""
    arguments = keys(
        output_dir=output_dir, method=method, learning_rate=LEARNING_RATES[method], precision="fp32", max_samples=64,
        max_steps=8, save_steps=4, eval_strategy="no", eval_on_start=False, num_sample_answers=0, max_eval_samples=8,
        report_to="none",
    )  # fmt: skip
    command = accelerate(accelerate_file(rung, folder), PROJECT / "train/sft.py", *arguments)
    environment = {"CARELM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": threads(1 if rung == "none" else 2)}
    outcome = run(command, environment, TIMEOUT_S)
    if outcome.status != 0:
        sys.exit(f"{method} on {rung}: {outcome.refusal or outcome.last_error}")
    state = json.loads((output_dir / "checkpoint-8/trainer_state.json").read_text())
    if came_from is not None and f"going on from {output_dir / came_from}" not in outcome.stderr:
        sys.exit(f"{method} on {rung}: it did not go on from {came_from}")
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def go_on(method: str, before: str, after: str, folder: Path, unbroken: dict[int, float]) -> dict[str, Any]:
    run_folder = shutil.copytree(folder / f"{method}-{before}", folder / f"{method}-{before}-{after}")
    shutil.rmtree(run_folder / "checkpoint-8")
    (run_folder / "train_metrics.json").unlink()
    losses = train(method, after, run_folder, folder, "checkpoint-4")
    difference = max(abs(losses[step] - loss) / loss for step, loss in unbroken.items())
    return {"method": method, "from": before, "to": after, "largest_relative_difference": difference}


def table(cells: list[dict[str, Any]]) -> str:
    lines = [
        "| method | from | " + " | ".join(f"to {rung}" for rung in RUNGS) + " |",
        "|---|---|" + "---|" * len(RUNGS),
    ]
    found = {(c["method"], c["from"], c["to"]): f"{c['largest_relative_difference']:.0e}" for c in cells}
    for method, before in itertools.product(LEARNING_RATES, RUNGS):
        row = [found.get((method, before, after), "") for after in RUNGS]
        lines.append(f"| {method} | {before} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    machine, cells = describe_machine(), []
    with tempfile.TemporaryDirectory(prefix="carelm-resumes-") as name:
        folder = Path(name)
        for method in LEARNING_RATES:
            curves = {rung: train(method, rung, folder / f"{method}-{rung}", folder) for rung in RUNGS}
            for before, after in itertools.permutations(RUNGS, 2):
                cells.append(go_on(method, before, after, folder, curves["none"]))
                say(str(cells[-1]))
    settings = {
        "recipe": "recipes/demo.yaml",
        "steps": 8,
        "stopped_after": 4,
        "ranks": "2, none: 1",
        "tolerance": TOLERANCE,
    }
    say(f"written to {write_results('resumes', {'machine': machine, 'settings': settings, 'cells': cells})}")
    print(table(cells))
    if any(cell["largest_relative_difference"] > TOLERANCE for cell in cells):
        sys.exit(1)


if __name__ == "__main__":
    main()
