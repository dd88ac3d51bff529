"""Times QLoRA on one GPU beside TRL's own script: tokens per second and peak memory, with the same settings.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only llama3_8b_fp16
    python benchmarks/gpu.py --self_test

Random weights of real shapes (benchmarks/random_base.py), rows of exactly `max_length` tokens, gradient checkpointing,
LoRA r=16 on all linear layers of a 4-bit base. TinyLlama's shape in bf16 plain and under ZeRO-2 and ZeRO-3, and in
fp16; Llama-3-8B's shape at length 1,024 with at most 14.5 GiB of device memory for torch, as much as a T4 has. What
fails is written down with its last line: that TRL's script cannot train a quantised base in fp16 is a result
(https://github.com/huggingface/trl/issues/4901).

Needs about 20 GB of disk in --folder and writes benchmarks/results/gpu.json. --self_test runs the same code with a tiny
shape, on a CPU in fp32 and on two ranks under ZeRO, and writes nothing: its figures mean nothing.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import trl
from launches import ONE_PROCESS, PROJECT, accelerate, describe_machine, keys, run, say, write_recipe, write_results
from random_base import write_random_base
from timed import read_times

TIMED = PROJECT / "benchmarks/timed.py"
TRL_SFT = Path(trl.__file__).parent / "scripts/sft.py"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
TIMEOUT_S = 1500
T4_GIB = 14.5
WARM_UP_STEPS = 4  # and fp16's loss scale finds its size in them


@dataclass(frozen=True)
class Cell:
    name: str
    shape: str
    precision: str
    accelerate_file: str | None = None  # None: one process without DeepSpeed
    micro_batch_size: int = 8
    global_batch_size: int = 8
    memory_gib: float | None = None
    max_length: int = 1024


T4_8B = Cell("llama3_8b_fp16", "llama3_8b", "fp16", micro_batch_size=1, global_batch_size=4, memory_gib=T4_GIB)
CELLS = [
    Cell("tinyllama_1b_bf16", "tinyllama_1b", "bf16"),
    Cell("tinyllama_1b_bf16_zero2", "tinyllama_1b", "bf16", "zero2"),
    Cell("tinyllama_1b_bf16_zero3", "tinyllama_1b", "bf16", "zero3"),
    Cell("tinyllama_1b_fp16", "tinyllama_1b", "fp16"),
    replace(T4_8B, name="llama3_8b_bf16", precision="bf16"),
    T4_8B,
]


def for_self_test(cell: Cell) -> Cell:
    """The same cell in small: a tiny shape, and on a CPU the precision and the ranks that a CPU has."""
    small = replace(cell, shape="tiny", max_length=128)
    if torch.cuda.is_available():
        return small
    zero = f"cpu_{cell.accelerate_file}" if cell.accelerate_file else None
    return replace(small, precision="fp32", memory_gib=None, accelerate_file=zero)


def write_rows(folder: Path, number: int, max_length: int) -> None:
    """Writes rows that are longer than `max_length` with demo/base's tokenizer, in the shape that each script reads."""
    corpus = (PROJECT / "demo/data/corpus.txt").read_text(encoding="utf-8")
    size = 8 * max_length  # characters; a token of this text has under six
    for who in ("carelm", "trl"):
        (folder / who).mkdir(parents=True)
    with open(folder / "carelm/train.jsonl", "w") as ours, open(folder / "trl/train.jsonl", "w") as theirs:
        for i in range(number):
            start = i * 997 % (len(corpus) - size)
            question, answer = f"What is written at {start}?", corpus[start : start + size]
            ours.write(json.dumps({"question": question, "answer": answer}) + "\n")
            prompt, completion = [{"role": "user", "content": question}], [{"role": "assistant", "content": answer}]
            theirs.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")


def command(who: str, cell: Cell, base: Path, rows: Path, output_dir: Path, times: Path, steps: int) -> list[str]:
    """The launch of one run, on one GPU (or in the self-test on what the accelerate file says)."""
    same = {
        "model_name_or_path": base,
        "output_dir": output_dir,
        "max_steps": steps,
        "max_length": cell.max_length,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "load_in_4bit": True,
        "use_bnb_nested_quant": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "report_to": "none",
        "seed": 42,
    }
    if who == "carelm":
        about = {
            "dataset_name": rows / "carelm/train.jsonl",
            "prompt_template": "{question}",
            "completion_template": "{answer}",
            "validation_fraction": 0.0,
            "test_fraction": 0.0,
            "too_long": "cut",
            "num_sample_answers": 0,
            "precision": cell.precision,
            "global_batch_size": cell.global_batch_size,
            "per_device_train_batch_size": cell.micro_batch_size,
            "eval_strategy": "no",
            "eval_on_start": False,
            "save_strategy": "no",
        }
        script = PROJECT / "train/sft.py"
        words = ["--config", write_recipe(output_dir.with_name("recipe.yaml"), same | about)]
    else:
        script = TRL_SFT
        words = keys(
            **same,
            dataset_name=rows / "trl",
            use_peft=True,
            dtype=DTYPES[cell.precision],
            bf16=cell.precision == "bf16",
            fp16=cell.precision == "fp16",
            per_device_train_batch_size=cell.micro_batch_size // ranks_of(cell),
            gradient_accumulation_steps=cell.global_batch_size // cell.micro_batch_size,
            eval_strategy="no",
            save_strategy="no",
        )
        words += keys(ddp_backend="gloo") if ranks_of(cell) == 2 else []
    config_file = PROJECT / f"accelerate_configs/{cell.accelerate_file}.yaml" if cell.accelerate_file else ONE_PROCESS
    driver = ["--times", times, *(["--memory_gib", cell.memory_gib] if cell.memory_gib else []), script]
    return accelerate(config_file, TIMED, *driver, *words, num_processes=ranks_of(cell))


def ranks_of(cell: Cell) -> int:
    return 2 if cell.accelerate_file and cell.accelerate_file.startswith("cpu_") else 1


def measure(who: str, cell: Cell, base: Path, folder: Path, steps: int) -> dict[str, Any]:
    """One run: its figures, or why it failed."""
    aside = folder / f"{cell.name}-{who}"
    aside.mkdir()
    write_rows(aside / "rows", max(64, 2 * steps), cell.max_length)
    times = aside / "times.jsonl"
    environment = {"CARELM_CACHE": str(aside / "carelm"), "HF_DATASETS_CACHE": str(aside / "datasets")}
    if torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = "0"
    outcome = run(command(who, cell, base, aside / "rows", aside / "output", times, steps), environment, TIMEOUT_S)
    lines, losses, dtypes = read_times(times)
    about = {"who": who, "cell": cell.name, "status": outcome.status, "seconds": round(outcome.seconds, 1)}
    if outcome.status != 0 or max(lines, default=0) != steps:
        return about | {
            "result": "fails",
            "message": outcome.refusal or outcome.last_error,
            "stopped_after": len(lines),
        }
    seconds = lines[steps]["time"] - lines[WARM_UP_STEPS]["time"]
    tokens = (steps - WARM_UP_STEPS) * cell.global_batch_size * cell.max_length
    memory = {key: lines[steps].get(key) for key in ("peak_memory_bytes", "peak_reserved_bytes")}
    return about | {
        "result": "works",
        "tokens_per_second": round(tokens / seconds, 1),
        **memory,
        "seconds_to_first_step": round(lines[1]["time"] - outcome.started, 1),
        "losses": [losses[step] for step in sorted(losses)],
        "dtypes": dtypes,
    }


def table(runs: list[dict[str, Any]]) -> str:
    lines = ["| cell | who | tokens/s | peak GiB | loss, first to last |", "|---|---|---|---|---|"]
    for r in runs:
        if r["result"] == "works":
            memory = f"{r['peak_memory_bytes'] / 2**30:.2f}"
            figures = f"{r['tokens_per_second']:.0f} | {memory} | {r['losses'][0]:.3f} to {r['losses'][-1]:.3f}"
        else:
            figures = f"fails | | {r['message']}"
        lines.append(f"| {r['cell']} | {r['who']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=16, help=f"of a run, more than {WARM_UP_STEPS} (default: 16)")
    parser.add_argument("--only", nargs="+", help="cells whose name starts with one of these")
    parser.add_argument("--who", nargs="+", choices=("carelm", "trl"), default=["carelm", "trl"])
    parser.add_argument("--folder", help="where the bases are made, 20 GB (default: the system's temporary folder)")
    parser.add_argument("--output", type=Path, help="another file than benchmarks/results/gpu.json")
    parser.add_argument("--self_test", action="store_true", help="a tiny shape on whatever there is; no figures")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.self_test:
        sys.exit("no GPU: torch sees no CUDA device here, so there is nothing to measure; --self_test runs on a CPU")
    if options.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be more than {WARM_UP_STEPS}")
    cells = [cell for cell in CELLS if not options.only or cell.name.startswith(tuple(options.only))]
    if not cells:
        parser.error(f"--only {' '.join(options.only)}: there are {', '.join(cell.name for cell in CELLS)}")
    if options.self_test:
        cells = [for_self_test(cell) for cell in cells]
    machine, runs = describe_machine(), []
    with tempfile.TemporaryDirectory(prefix="carelm-gpu-", dir=options.folder) as name:
        folder = Path(name)
        for cell in cells:
            base = folder / cell.shape
            if not base.exists():
                say(f"{cell.shape}: {write_random_base(cell.shape, base):,} parameters")
            for who in options.who:
                runs.append(measure(who, cell, base, folder, options.steps))
                say(json.dumps(runs[-1]))
    print(table(runs))
    results = {
        "machine": machine,
        "settings": {"steps": options.steps, "warm_up_steps": WARM_UP_STEPS, "self_test": options.self_test},
        "cells": [vars(cell) for cell in cells],
        "runs": runs,
    }
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    elif not options.self_test:
        say(f"written to {write_results('gpu', results)}")


if __name__ == "__main__":
    main()
