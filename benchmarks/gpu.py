"""What one GPU can show in eight minutes: does every way to train on it work, how fast is it, how repeatable are answers?

    python benchmarks/gpu.py --budget 480
    python benchmarks/gpu.py --only c d
    python benchmarks/gpu.py --self_test

a   the T4 rule: QLoRA in fp16 has fp32 trained weights, no bf16 tensor anywhere, and a loss that falls
b   QLoRA in bf16 in one process, under ZeRO-2 and under ZeRO-3, each unbroken, and stopped at half and gone on
c   QLoRA of Llama-3-8B's shape in fp16, length 1,024, with at most 14.5 GiB of device memory, as much as a T4 has
d   QLoRA of TinyLlama's shape beside TRL's own script: the same rows, settings and precision
e   generation on TinyLlama's shape, by the evaluator's batcher and by transformers' generate: prompts per second by batch,
    and one prompt at a time, with the share of memory bandwidth; there by generate with a static cache as well, which
    transformers compiles into CUDA graphs
f   the same greedy answers in other batches: how far scores differ where nothing does
g   as c, in bf16
h   LoRA of Llama-3-8B's shape on 16 bits, in bf16 without gradient checkpointing, beside TRL's own script
s   serving: TinyLlama's shape for 1, 32 and 128 clients, and what is served beside what is evaluated, token for token

c and g train with the logits of trained tokens in chunks (carelm/models/loss.py), and with those of whole rows. c, d, g
and h look into one step: its kernels, and the operations that the processor starts.
Shapes have random weights, made on the GPU (benchmarks/random_base.py): 20 GB in memory (/dev/shm) or on disk. The JSON is
written after every finding. What no longer fits into --budget is "not reached", what is under way at its end is "cut off",
and the script ends in time. Llama shapes train at rows of exactly --max_length tokens with gradient checkpointing and sdpa
attention. --self_test runs every cell whole in small, on a CPU too (fp32, two ranks under ZeRO): its figures mean nothing.
"""

import argparse
import faulthandler
import json
import math
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import psutil
import torch
from lab import WARM_UP_STEPS, Lab, OutOfTime, Run, RunFailed
from launches import PROJECT, RESULTS, describe_machine, keys, say, threads
from served_shape import served

from carelm.files import write_whole
from carelm.models.memory import available_memory_bytes

T4_GIB = 14.5
DISK_GB = 20
MARGIN_S = 10  # before the budget's end what is under way is ended, so that the script can still write what there is
TOLERANCE = 1e-2  # of a resumed run's losses, relative: a GPU's sums come in no fixed order

Findings = Iterator[dict[str, Any]]


def t4_rule(lab: Lab) -> Findings:
    trained = lab.demo("t4_rule", "fp16", steps=8 if lab.small else 24)
    kinds = trained.dtypes
    yield {
        "checks": {
            "trained weights and optimizer are fp32": kinds["trainable"] == kinds["optimizer"] == ["float32"],
            "the base is quantised on a GPU, in fp16": kinds["quantized"] == ["float16"] * lab.has_gpu,
            "no bf16 tensor": not any("bfloat16" in found for found in kinds.values()),
            "the loss falls": trained.falls,
        },
        "dtypes": kinds,
        "losses": [trained.losses[step] for step in sorted(trained.losses)],
    }


def rungs_and_resumes(lab: Lab) -> Findings:
    """Stopped by a stop request after half of the steps, and started again by the same command; several at a time.

    With LoRA the optimizer's group without weight decay is empty, of which DeepSpeed was reported to die under torch 2.13.
    """
    steps = 8 if lab.small else 60
    found, checks = {}, {}

    def unbroken(rung: str) -> Run:
        return lab.demo(f"{rung}-whole", "bf16", steps=steps, rung=rung)

    def resumed(rung: str) -> Run:
        lab.demo(f"{rung}-half", "bf16", steps=steps, rung=rung, stop_after=steps // 2)
        return lab.demo(f"{rung}-half", "bf16", steps=steps, rung=rung)

    with ThreadPoolExecutor(int(threads(2))) as pool:  # nothing is timed here
        runs = {rung: [pool.submit(way, rung) for way in (unbroken, resumed)] for rung in ("plain", "zero2", "zero3")}
        for rung, futures in runs.items():
            try:
                whole, rest = (future.result() for future in futures)
            except RunFailed as error:
                found[rung], checks[rung] = {"error": str(error)}, False
            else:
                difference = max(abs(loss / whole.losses[step] - 1) for step, loss in rest.losses.items())
                found[rung] = {
                    "resumed_after_step": min(rest.losses) - 1,
                    "largest_relative_difference": difference,
                    "losses": [whole.losses[step] for step in sorted(whole.losses)],
                    "resumed_losses": [rest.losses[step] for step in sorted(rest.losses)],
                }
                checks[rung] = whole.falls and min(rest.losses) == steps // 2 + 1 and difference <= TOLERANCE
            yield {"steps": steps, "tolerance": TOLERANCE, "rungs": found, "checks": checks}


def in_14_gib(precision: str) -> Callable[[Lab], Findings]:
    def cell(lab: Lab) -> Findings:
        runs, checks = [], {}
        for logits in ("chunks", "whole rows"):
            options = {"batch": 4, "micro": 1, "memory_gib": T4_GIB, "whole_logits": logits == "whole rows"}
            try:
                run = lab.shape(f"llama3_8b_{precision}_{logits[0]}", "carelm", "llama3_8b", precision, **options)
            except RunFailed as error:
                if logits == "chunks":
                    raise
                runs.append({"who": "carelm", "precision": precision, "whole_logits": True, "error": str(error)})
            else:
                runs.append(run)
                reserved = run["peak_reserved_gib"]
                checks |= {
                    f"{logits}: losses are finite": all(map(math.isfinite, run["losses"])),
                    f"{logits}: trained weights are fp32": run["dtypes"]["trainable"] == ["float32"],
                    f"{logits}: within the limit": reserved is None or reserved <= T4_GIB,
                }
            yield {"memory_limit_gib": T4_GIB if lab.has_gpu else None, "runs": runs, "checks": checks}

    return cell


def beside_trl(shape: str, precision: str | None = None, **options: Any) -> Callable[[Lab], Findings]:
    """CareLM, then TRL; without `precision` in the card's faster one."""

    def cell(lab: Lab) -> Findings:
        runs, chosen = [], precision or lab.fast_precision
        for who in ("carelm", "trl"):
            try:
                runs.append(lab.shape(f"{shape}-{options.get('bits', 4)}-{who}", who, shape, chosen, **options))
            except RunFailed as error:
                runs.append({"who": who, "precision": chosen, "error": str(error)})
            yield {"runs": runs, "checks": {"carelm": "error" not in runs[0]}}

    return cell


def evaluator(lab: Lab) -> Findings:
    """Prompts of 128 tokens of corpus text and 64 new ones: no token ends an answer."""
    from carelm.evaluation import candidates
    from carelm.models import generation
    from carelm.models.decoding import Decoding
    from carelm.recipe_file import load_recipe

    base = lab.base("tinyllama_1b")
    prompt_tokens, new_tokens = (16, 8) if lab.small else (128, 64)
    words = keys(model_name_or_path=base, load_in_4bit=False, precision=lab.fast_precision)
    candidate = candidates.find(load_recipe(words, usage=""), "base")
    chat = candidate.make_chat()
    model, about = candidate.load(chat)
    device = next(model.parameters()).device
    model.generation_config.eos_token_id = [model.config.vocab_size]  # which is never drawn
    text = (PROJECT / "demo/data/corpus.txt").read_text(encoding="utf-8")[:200_000]
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    decoding = Decoding(new_tokens)

    def prompts(number: int) -> list[list[int]]:
        starts = [k * 37 % (len(ids) - prompt_tokens) for k in range(number)]
        return [ids[start : start + prompt_tokens] for start in starts]

    def answer(number: int, batch: int) -> dict[str, float]:
        return generation.generate_all(
            model, chat, prompts(number), decoding, device=device, done=lambda *_: None,
            max_batch_tokens=batch * (prompt_tokens + new_tokens),
        )  # fmt: skip

    def with_static_cache(tokens: int) -> float:
        began = time.perf_counter()
        model.generate(torch.tensor(prompts(1), device=device), max_new_tokens=tokens, do_sample=False,
                       cache_implementation="static")  # fmt: skip
        return time.perf_counter() - began

    if reason := generation.why_not(model):
        raise RunFailed(f"the batcher cannot serve it: {reason}")
    read_per_token = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
    bandwidth, at_1, by_batch = lab.bandwidth(), {}, []

    def one_at_a_time(way: str, seconds_per_token: float, first_token_ms: float | None = None) -> None:
        at_1[way] = {
            "first_token_ms": first_token_ms,
            "tokens_per_second": round(1 / seconds_per_token, 1),
            "share_of_bandwidth": round(read_per_token / seconds_per_token / bandwidth, 4),
        }

    yield {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "precision": about["precision"],
           "bytes_read_per_token": read_per_token, "copy_bandwidth_gb_per_second": round(bandwidth / 1e9, 1)}  # fmt: skip
    for way in ("batcher", "generate"):
        with patch.object(generation, "why_not", lambda model, way=way: way == "generate" and "for comparison"):
            answer(1, 1)  # warms up
            timed = generation.latency(model, chat, prompts(4), decoding, device=device, done=lambda: None)
            one_at_a_time(way, timed["tpot_ms"]["p50"] / 1e3, timed["ttft_ms"]["p50"])
            yield {"one_at_a_time": at_1}
            for batch in (1, 4) if lab.small else (1, 8, 64, 256):
                number = max(4, 2 * batch)
                spent = answer(number, batch)
                if (spent["new_tokens"], spent["batch_size"]) != (number * new_tokens, min(batch, number)):
                    raise RunFailed(f"batches of {batch}: {spent}, not {number * new_tokens} tokens")
                by_batch.append({
                    "way": way,
                    "batch_size": batch,
                    "max_batch_tokens": batch * (prompt_tokens + new_tokens),
                    "prompts_per_second": round(number / spent["seconds"], 2),
                    "tokens_per_second": round(spent["new_tokens"] / spent["seconds"], 1),
                })  # fmt: skip
                yield {"by_batch": by_batch}
    with_static_cache(new_tokens)  # compiles
    with_static_cache(new_tokens)
    first = with_static_cache(1)
    one_at_a_time("generate, static cache", (with_static_cache(new_tokens) - first) / (new_tokens - 1), 1e3 * first)
    yield {"one_at_a_time": at_1}


def noise_floor(lab: Lab) -> Findings:
    """The adapter of b answers the example's test questions three times: twice in the same batches, once in others."""
    from carelm.chat.chat import make_chat
    from carelm.evaluation import candidates
    from carelm.evaluation.questions import make_questions
    from carelm.evaluation.rouge_measures import rouge
    from carelm.models import generation
    from carelm.recipe_file import load_recipe

    adapter, precision = lab.folder / "plain-whole/output", lab.fast_precision
    if not (adapter / "train_metrics.json").exists():
        lab.demo("plain-whole", precision, steps=8 if lab.small else 60)
    words = keys(output_dir=adapter, precision=precision, max_eval_samples=16 if lab.small else 200, max_new_tokens=64)
    recipe, found = load_recipe(words, usage=""), {}
    questions, _ = make_questions(recipe, make_chat(recipe))
    for name in ("adapter", f"adapter@{precision}"):
        candidate = candidates.find(recipe, name)
        chat = candidate.make_chat()
        model, _ = candidate.load(chat)
        prompts = [chat.prompt_ids(question.messages) for question in questions]
        texts = {label: [""] * len(prompts) for label in ("first", "again", "other batches")}
        for label, several in texts.items():
            generation.generate_all(
                model, chat, prompts, generation.Decoding(64), device=next(model.parameters()).device,
                max_batch_tokens=40_000 if label == "other batches" else 4_000,
                done=lambda i, answer, several=several: several.__setitem__(i, answer.text),
            )  # fmt: skip
        references = [question.references for question in questions]
        scores = {label: rouge(several, references, ("rougeL",))["rougeL"] for label, several in texts.items()}
        held = {"base": "4 bit" if candidate.bits else precision, "questions": len(prompts)}
        for label in ("again", "other batches"):
            held[label] = {
                "equal_texts": sum(a == b for a, b in zip(texts["first"], texts[label])) / len(prompts),
                "rougeL": [float(scores["first"].mean()), float(scores[label].mean())],
                "rougeL_difference": abs(float(scores["first"].mean() - scores[label].mean())),
                "mean_difference_of_an_answer": float(abs(scores["first"] - scores[label]).mean()),
            }
        found[name] = held
        del model
        lab.free()
        other = held["other batches"]
        yield {
            "models": found,
            "caution": f"{other['equal_texts']:.1%} of {len(prompts)} greedy answers in {precision} stayed the same in other "
            f"batches, and ROUGE-L moved by {other['rougeL_difference']:.4f}: smaller differences say nothing here.",
        }


@dataclass(frozen=True)
class Cell:
    what: str
    seconds: int  # that it is expected to need on a GPU: with less left it is not begun
    measure: Callable[[Lab], Findings]


CELLS = {
    "a": Cell("the T4 rule", 25, t4_rule),
    "b": Cell("bf16 on three rungs, resumed", 50, rungs_and_resumes),
    "c": Cell("Llama-3-8B's shape in fp16, in 14.5 GiB", 150, in_14_gib("fp16")),
    "d": Cell("TinyLlama's shape beside TRL", 90, beside_trl("tinyllama_1b", batch=8, micro=8, timed=24)),
    "e": Cell("the evaluator", 60, evaluator),
    "f": Cell("the noise floor of greedy answers", 35, noise_floor),
    "g": Cell("Llama-3-8B's shape in bf16, in 14.5 GiB", 120, in_14_gib("bf16")),
    "h": Cell(
        "Llama-3-8B's shape on 16 bits in bf16, beside TRL",
        150,
        beside_trl("llama3_8b", "bf16", batch=8, micro=4, bits=16, checkpointing=False),
    ),
    "s": Cell("serving", 90, served),
}


def fill(found: dict[str, Any], cell: Cell, lab: Lab, write: Callable[[], None]) -> None:
    """Runs one cell and writes each of its findings as it comes."""
    needed = 0 if lab.small else cell.seconds
    if lab.left_s < needed:
        found["reason"] = f"{max(0, lab.left_s):.0f} s were left, it needs about {needed}"
        return write()
    started = time.monotonic()

    def end(*_: Any) -> NoReturn:
        raise OutOfTime

    signal.signal(signal.SIGALRM, end)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(0.01, lab.left_s))
        try:
            for findings in cell.measure(lab):
                found |= findings | {"result": "cut off", "seconds": round(time.monotonic() - started, 1)}
                write()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        found["result"] = "works" if all(found.get("checks", {}).values()) else "fails"
    except OutOfTime:
        found |= {"result": "cut off", "reason": "the budget's end"}
    except Exception as error:  # whatever it is, it is this cell's result, and the others are still to be tried
        say(traceback.format_exc())
        found |= {"result": "fails", "reason": f"{type(error).__name__}: {error}"[:400]}
    found["seconds"] = round(time.monotonic() - started, 1)
    lab.free()
    write()


def table(cells: list[dict[str, Any]]) -> str:
    """The results as markdown."""
    lines = ["| cell | what | result | s |", "|---|---|---|---|"]
    lines += [f"| {c['cell']} | {c['what']} | {c['result']} | {c.get('seconds', '')} |" for c in cells]
    lines += ["", "| run | tokens/s | model TFLOP/s | MFU: of the ceiling measured here | share of the data sheet's peak | "
              "peak GiB, reserved |", "|---|---|---|---|---|---|"]  # fmt: skip
    for r in (r for c in cells for r in c.get("runs", ()) if "error" not in r):
        share = "unknown" if r["share_of_peak"] is None else f"{r['share_of_peak']:.1%}"
        who = r["who"] + (", logits of whole rows" if r["whole_logits"] else "")
        lines.append(f"| {r['shape']} on {r['bits']} bits, {r['precision']}, {who} | {r['tokens_per_second']:.0f} | "
                     f"{r['model_tflops']} | {r['model_flops_utilisation']:.1%} | {share} | {r['peak_memory_gib']}, "
                     f"{r['peak_reserved_gib']} |")  # fmt: skip
    return "\n".join(lines + ["", *(c["caution"] for c in cells if "caution" in c)])


def roomy_folder() -> str | None:
    """/dev/shm where it and the memory have room for the bases; else the system's temporary folder."""
    memory = Path("/dev/shm")
    room = memory.is_dir() and shutil.disk_usage(memory).free > DISK_GB * 1e9
    return str(memory) if room and available_memory_bytes() > 2 * DISK_GB * 1e9 else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=480, help="seconds that all of it may take (default: 480)")
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS), help="these cells (default: all)")
    parser.add_argument("--folder", help="where the bases are made (default: /dev/shm where there is room)")
    parser.add_argument("--output", type=Path, help="another file than benchmarks/results/gpu.json")
    parser.add_argument("--self_test", action="store_true", help="all cells in small on whatever there is; no figures")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.self_test:
        sys.exit("no GPU: torch sees no CUDA device here, so there is nothing to measure; --self_test runs on a CPU")
    began = time.monotonic() - (time.time() - psutil.Process().create_time())  # importing torch counts
    left_s = began + options.budget - time.monotonic()
    faulthandler.dump_traceback_later(max(1.0, left_s), exit=True)  # even where a call into the GPU does not come back
    output = options.output or (None if options.self_test else RESULTS / "gpu.json")
    cells = [{"cell": k, "what": CELLS[k].what, "result": "not reached"} for k in CELLS if k in options.only]
    results = {
        "machine": describe_machine(),
        "settings": {"budget_s": options.budget, "warm_up_steps": WARM_UP_STEPS, "self_test": options.self_test},
        "flops": "4N a token with a frozen base (6N where all is trained), N: parameters without the embedding; "
        "recomputation is not counted; utilisation of the ceiling measured here, share of the data sheet's dense 16-bit peak",
        "cells": cells,
    }

    def write() -> None:
        results["seconds"] = round(time.monotonic() - began, 1)
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            write_whole(output, json.dumps(results, indent=1) + "\n")

    with tempfile.TemporaryDirectory(prefix="carelm-gpu-", dir=options.folder or roomy_folder()) as name:
        lab = Lab(Path(name), began + options.budget - MARGIN_S, options.self_test)
        for found in cells:
            fill(found, CELLS[found["cell"]], lab, write)
            say(json.dumps({k: v for k, v in found.items() if k not in ("runs", "dtypes", "losses", "rungs")}))
    write()
    print(table(cells))
    if options.self_test and any(found["result"] != "works" for found in cells):
        sys.exit(1)


if __name__ == "__main__":
    main()
