"""Times CareLM beside TRL's own script and the usual notebook loop: the same rows, settings and machine, in turn.

    CARELM_DATA=../shared/data python benchmarks/speed.py
    python benchmarks/speed.py --steps 4 --rounds 1 --no_write

Rows of bitext_support (in the folder that CARELM_DATA names), QLoRA r=8 in fp32 on the CPU, 8 examples a step, cut at
512 tokens. The base is a Llama shape of 27 M random weights; its tokenizer of 16,384 entries is trained on all training
rows under that folder.

    carelm         train/sft.py
    trl            trl/scripts/sft.py, what `trl sft` launches
    notebook_loop  benchmarks/notebook_loop.py, every row padded to 512

on one process, and carelm and trl on two ranks under ZeRO-2 as well. A run is two epochs over the same rows, and the
second is timed, step ends written down by the same callback for all (benchmarks/timed.py): everything is warm, and each
has trained on every row exactly once. The start is timed from the launcher's to the end of the first step, with nothing
prepared or cached. Prints medians and ratios; writes benchmarks/results/speed.json.
"""

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import trl
from launches import (
    ONE_PROCESS,
    PROJECT,
    Outcome,
    accelerate,
    describe_machine,
    keys,
    run,
    say,
    threads,
    write_recipe,
    write_results,
)
from random_base import DEMO_BASE, SHAPES, write_random_base
from timed import read_times

BATCH_SIZE = 8
MAX_LENGTH = 512
TIMED = PROJECT / "benchmarks/timed.py"
TRL_SFT = Path(trl.__file__).parent / "scripts/sft.py"
RUNS = (
    ("carelm", "one_process"),
    ("trl", "one_process"),
    ("notebook_loop", "one_process"),
    ("carelm", "zero2_two_ranks"),
    ("trl", "zero2_two_ranks"),
)
SAME = dict(  # one value for both scripts
    max_length=MAX_LENGTH,
    learning_rate=2e-4,
    lr_scheduler_type="constant",
    num_train_epochs=2,
    load_in_4bit=True,
    use_bnb_nested_quant=True,
    lora_r=8,
    lora_alpha=16,
    lora_dropout=0.0,
    lora_target_modules="all-linear",
    gradient_checkpointing=False,
    logging_steps=1,
    report_to="none",
    seed=42,
)


def read_rows(folder: Path) -> list[dict[str, str]]:
    """The training rows of bitext_support, each question once (CareLM would leave doubled rows out)."""
    with open(folder / "bitext_support/train.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return list({row["instruction"]: row for row in rows}.values())


def read_texts(data: Path) -> Iterator[str]:
    """Every text column of every training row under the folder, for the tokenizer."""
    for file in sorted(data.glob("*/train.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield from (value for value in json.loads(line).values() if isinstance(value, str))


def write_inputs(data: Path, chosen: list[dict[str, str]], folder: Path) -> dict[str, Any]:
    """Writes the base, and the chosen rows in the shape that each of the three reads; returns what describes them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
    tokenizer = tokenizer.train_new_from_iterator(
        read_texts(data), SHAPES["llama_27m"]["vocab_size"], show_progress=False
    )
    tokenizer.model_max_length = MAX_LENGTH
    tokenizer.save_pretrained(folder / "tokenizer")
    parameters = write_random_base("llama_27m", folder / "base", folder / "tokenizer")
    conversations = [
        [
            {"role": "user", "content": row["instruction"]},
            {"role": "assistant", "content": row["response"]},
        ]
        for row in chosen
    ]
    shapes = {
        "carelm": chosen,
        "trl": [{"prompt": messages[:-1], "completion": messages[-1:]} for messages in conversations],
        "notebook_loop": [{"messages": messages} for messages in conversations],
    }
    for who, lines in shapes.items():
        (folder / who).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / who / "train.jsonl").write_text(text, encoding="utf-8")
    lengths = [len(tokenizer.apply_chat_template(messages)["input_ids"]) for messages in conversations]
    return {
        "rows": len(chosen),
        "mean_tokens": round(statistics.mean(lengths), 1),
        "longest_tokens": max(lengths),
        "vocabulary": len(tokenizer),
        "parameters": parameters,
    }


def command(who: str, where: str, folder: Path, output_dir: Path, times: Path) -> list[str]:
    """The launch of one run."""
    ranks = 1 if where == "one_process" else 2
    config_file = ONE_PROCESS if ranks == 1 else PROJECT / "accelerate_configs/cpu_zero2.yaml"
    if who == "notebook_loop":
        words = keys(model=folder / "base", rows=folder / who / "train.jsonl", times=times, epochs=2)
        return [sys.executable, str(PROJECT / "benchmarks/notebook_loop.py"), *words]
    same = SAME | {"model_name_or_path": folder / "base", "output_dir": output_dir}
    if who == "carelm":
        about = {
            "dataset_name": folder / who / "train.jsonl",
            "prompt_template": "{instruction}",
            "completion_template": "{response}",
            "validation_fraction": 0.0,
            "test_fraction": 0.0,
            "too_long": "cut",
            "num_sample_answers": 0,
            "precision": "fp32",
            "global_batch_size": BATCH_SIZE,
            "per_device_train_batch_size": BATCH_SIZE,
            "eval_strategy": "no",
            "eval_on_start": False,
            "save_strategy": "no",
        }
        recipe = write_recipe(output_dir.with_name("recipe.yaml"), same | about)
        return accelerate(config_file, TIMED, "--times", times, PROJECT / "train/sft.py", "--config", recipe)
    words = keys(
        dataset_name=folder / who,
        use_peft=True,
        dtype="float32",
        bf16=False,
        fp16=False,
        per_device_train_batch_size=BATCH_SIZE // ranks,
        gradient_accumulation_steps=1,
        eval_strategy="no",
        save_strategy="no",
    )
    words += keys(ddp_backend="gloo") if ranks == 2 else []  # without it each rank takes itself for the only one
    return accelerate(config_file, TIMED, "--times", times, TRL_SFT, *keys(**same), *words)


def measure(who: str, where: str, folder: Path, aside: Path, steps: int, timeout_s: float) -> dict[str, Any]:
    """One run; examples per second over its second epoch, and seconds until its first step had ended.

    Raises:
        SystemExit: where the run fails, or is not on the ranks that it should be on.
    """
    aside.mkdir()
    times = aside / "times.jsonl"
    ranks = 1 if where == "one_process" else 2
    environment = {
        "OMP_NUM_THREADS": threads(ranks),
        "CARELM_CACHE": str(aside / "carelm"),
        "HF_DATASETS_CACHE": str(aside / "datasets"),
    }
    outcome = run(command(who, where, folder, aside / "output", times), environment, timeout_s)
    lines, losses, _ = read_times(times)
    if outcome.status != 0 or max(lines, default=0) != steps:
        sys.exit(f"{who} on {where}: {outcome.refusal or outcome.last_error}\n{outcome.stderr[-3000:]}")
    if lines[1]["world_size"] != ranks:
        sys.exit(f"{who} on {where}: {lines[1]['world_size']} rank(s), not {ranks}")
    seconds = lines[steps]["time"] - lines[steps // 2]["time"]
    return {
        "who": who,
        "where": where,
        "examples_per_second": round(steps // 2 * BATCH_SIZE / seconds, 3),
        "seconds_to_first_step": round(lines[1]["time"] - outcome.started, 2),
        "first_loss": losses[1],
        "last_loss": losses[steps],
        "peak_memory_bytes": lines[steps].get("peak_memory_bytes"),
    }


def time_short_commands(folder: Path) -> dict[str, Any]:
    """Medians over five calls of `--help` and of a recipe with an unknown key, without a launcher."""
    results = {}
    script = str(PROJECT / "train/sft.py")
    for name, words, status in (("help", ["--help"], 0), ("recipe_error", ["--learning_rat", "1e-4"], 2)):
        outcomes: list[Outcome] = []
        for _ in range(5):
            outcomes.append(run([sys.executable, script, *words], {"CARELM_CACHE": str(folder)}, 60))
        assert all(outcome.status == status for outcome in outcomes), outcomes[-1].stderr
        seconds = [outcome.seconds for outcome in outcomes]
        results[name] = {"median": round(statistics.median(seconds), 2), "highest": round(max(seconds), 2)}
    return results


def summarize(runs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Medians with lowest and highest of every kind of run, and CareLM's ratios to the others."""
    summary = []
    for who, where in RUNS:
        these = [r for r in runs if (r["who"], r["where"]) == (who, where)]
        line: dict[str, Any] = {"who": who, "where": where, "runs": len(these)}
        for figure in ("examples_per_second", "seconds_to_first_step"):
            values = [r[figure] for r in these]
            line[figure] = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
        summary.append(line)
    by_run = {(line["who"], line["where"]): line for line in summary}
    ratios = {}
    for figure in ("examples_per_second", "seconds_to_first_step"):
        for (who, where), line in by_run.items():
            if who != "carelm":
                carelm = by_run["carelm", where][figure]["median"]
                ratios[f"{figure}: carelm / {who}, {where}"] = round(carelm / line[figure]["median"], 3)
    return summary, ratios


def report(summary: list[dict[str, Any]], ratios: dict[str, float], short: dict[str, Any]) -> Iterator[str]:
    """The results as markdown, line by line."""
    yield "| what | where | examples/s (lowest to highest) | s to first step (lowest to highest) |"
    yield "|---|---|---|---|"
    for line in summary:
        figures = (line[figure] for figure in ("examples_per_second", "seconds_to_first_step"))
        cells = (f"{f['median']:.2f} ({f['lowest']:.2f} to {f['highest']:.2f})" for f in figures)
        yield f"| {line['who']} | {line['where']} | " + " | ".join(cells) + " |"
    yield ""
    yield from (f"{name}: {ratio:.2f}" for name, ratio in ratios.items())
    yield from (f"python train/sft.py, {name}: {figures['median']:.2f} s" for name, figures in short.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run, even (default: 40)")
    parser.add_argument("--rounds", type=int, default=3, help="how often the five runs take turns (default: 3)")
    parser.add_argument("--timeout_s", type=float, default=1200, help="of one run (default: 1200)")
    parser.add_argument("--no_write", action="store_true", help="leave benchmarks/results as it is")
    options = parser.parse_args()
    if options.steps < 2 or options.steps % 2 or options.rounds < 1:
        parser.error("--steps must be even and at least 2, --rounds at least 1")
    data = Path(os.environ.get("CARELM_DATA", PROJECT.parent / "shared/data"))
    if not (data / "bitext_support/train.jsonl").is_file():
        sys.exit(f"CARELM_DATA: {data} has no bitext_support/train.jsonl; set it to a folder that has")
    chosen = random.Random(42).sample(read_rows(data), options.steps // 2 * BATCH_SIZE)
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="carelm-speed-") as name:
        folder = Path(name)
        inputs = write_inputs(data, chosen, folder)
        say(f"{inputs}")
        short = time_short_commands(folder)
        runs = []
        for round_number in range(1, options.rounds + 1):
            for who, where in RUNS:
                aside = folder / f"{who}-{where}-{round_number}"
                result = measure(who, where, folder, aside, options.steps, options.timeout_s)
                runs.append({"round": round_number, **result})
                say(f"{runs[-1]}")
    summary, ratios = summarize(runs)
    settings = {**SAME, "global_batch_size": BATCH_SIZE, "steps": options.steps, "rounds": options.rounds}
    results = {
        "machine": machine,
        "settings": settings,
        "inputs": inputs,
        "summary": summary,
        "ratios": ratios,
        "without_launcher_seconds": short,
        "runs": runs,
    }
    if not options.no_write:
        say(f"written to {write_results('speed', results)}")
    print("\n".join(report(summary, ratios, short)))


if __name__ == "__main__":
    main()
