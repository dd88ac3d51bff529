"""What one GPU can show in eight minutes: does every way to train on it work, how fast is it, how repeatable are answers?

    python benchmarks/gpu.py --budget 480
    python benchmarks/gpu.py --only c d
    python benchmarks/gpu.py --self_test

a   the T4 rule: QLoRA in fp16 has fp32 trained weights, no bf16 tensor anywhere, and a loss that falls
b   QLoRA in bf16 in one process, under ZeRO-2 and under ZeRO-3, each unbroken, and stopped at half and gone on
c   QLoRA of Llama-3-8B's shape in fp16, length 1,024, with at most 14.5 GiB of device memory, as much as a T4 has
d   QLoRA of TinyLlama's shape beside TRL's own script: the same rows, settings and precision
e   the evaluator's generation on TinyLlama's shape: prompts per second by batch, and one prompt at a time
f   the same greedy answers in other batches: how far scores differ where nothing does
g   as c, in bf16

Shapes have random weights, made on the GPU (benchmarks/random_base.py): 20 GB in memory (/dev/shm) or on disk. The JSON is
written after every finding. What no longer fits into --budget is "not reached", what is under way at its end is "cut off",
and the script ends in time. Llama shapes train at rows of exactly --max_length tokens with gradient checkpointing and sdpa
attention. --self_test runs every cell whole in small, on a CPU too (fp32, two ranks under ZeRO): its figures mean nothing.
"""

import argparse
import faulthandler
import gc
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

import psutil
import torch
import trl
from launches import ONE_PROCESS, PROJECT, RESULTS, accelerate, describe_machine, keys, run, say, threads, write_recipe
from random_base import write_random_base
from timed import read_times

from carelm.files import write_whole

TIMED = PROJECT / "benchmarks/timed.py"
OURS = PROJECT / "train/sft.py"
TRL_SFT = Path(trl.__file__).parent / "scripts/sft.py"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
T4_GIB = 14.5
DISK_GB = 20
WARM_UP_STEPS = 4  # and fp16's loss scale finds its size in them
MARGIN_S = 8  # before the budget's end what is under way is ended, so that the script can still write what there is
TOLERANCE = 1e-2  # of a resumed run's losses, relative: a GPU's sums come in no fixed order
# TFLOP/s of dense 16-bit matrix products with 32-bit sums, without sparsity, from NVIDIA's data sheets.
DENSE_PEAK = {
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "Tesla T4": 65,
}


class RunFailed(Exception):
    """A run that did not do what it should; the message is its last error."""


class OutOfTime(Exception):
    """The budget's end."""


@dataclass(frozen=True)
class Run:
    """A training run that came to its end, as benchmarks/timed.py saw it."""

    seconds: float
    seconds_to_first_step: float
    steps: dict[int, dict[str, Any]]
    losses: dict[int, float]
    dtypes: dict[str, list[str]]

    @property
    def falls(self) -> bool:
        """Whether the last quarter's losses are below those of the first."""
        values = [self.losses[step] for step in sorted(self.losses)]
        quarter = max(1, len(values) // 4)
        return all(map(math.isfinite, values)) and sum(values[-quarter:]) < sum(values[:quarter])


@dataclass
class Lab:
    """Where the cells work, until when (time.monotonic()), and whether in small."""

    folder: Path
    deadline: float
    small: bool

    @property
    def has_gpu(self) -> bool:
        return torch.cuda.is_available()

    @property
    def fast_precision(self) -> str:
        """The faster precision that the hardware really has."""
        if not self.has_gpu:
            return "fp32"
        return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"

    def precision(self, wanted: str) -> str:
        return wanted if self.has_gpu else "fp32"

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def base(self, shape: str) -> Path:
        """A folder with random weights of this shape, made where it is not there."""
        folder = self.folder / (shape := "tiny" if self.small else shape)
        if not folder.exists():
            started = time.perf_counter()
            partial = self.folder / "partial"
            shutil.rmtree(partial, ignore_errors=True)
            parameters = write_random_base(shape, partial)
            partial.rename(folder)
            say(f"{shape}: {parameters:,} random parameters in {time.perf_counter() - started:.1f} s")
            self.free()
        return folder

    def free(self) -> None:
        """Gives back the device memory that this process no longer uses."""
        gc.collect()
        if self.has_gpu:
            torch.cuda.empty_cache()

    def launch(
        self,
        name: str,
        script: Path,
        words: list[Any],
        *,
        rung: str = "plain",
        memory_gib: float | None = None,
        stop_after: int | None = None,
    ) -> Run:
        """Trains through benchmarks/timed.py on one GPU, or in small on what a CPU has, and reads what that wrote down.

        Raises:
            RunFailed: where it does not end well; with `stop_after`, where it is not saved after that step.
        """
        aside = self.folder / name
        aside.mkdir(exist_ok=True)
        ranks = 1 if self.has_gpu or rung == "plain" else 2
        on = PROJECT / f"accelerate_configs/{'' if self.has_gpu else 'cpu_'}{rung}.yaml"
        driver = ["--times", aside / f"times-{time.monotonic_ns()}.jsonl"]
        driver += ["--memory_gib", memory_gib] if memory_gib and self.has_gpu else []
        driver += ["--stop_after", stop_after] if stop_after else []
        command = accelerate(
            ONE_PROCESS if rung == "plain" else on, TIMED, *driver, script, *words, num_processes=ranks
        )
        environment = {"CARELM_CACHE": str(aside / "cache"), "HF_DATASETS_CACHE": str(aside / "datasets")}
        environment |= {"OMP_NUM_THREADS": threads(4)} | ({"CUDA_VISIBLE_DEVICES": "0"} if self.has_gpu else {})
        outcome = run(command, environment, max(1.0, self.left_s - 2))
        if outcome.status is None:
            raise OutOfTime
        stopped = f"stopped: after step {stop_after}, "
        if (stopped not in outcome.stderr) if stop_after else outcome.status != 0:
            say(f"--- {name}: {' '.join(command)}\n{outcome.stderr[-6000:]}\n---")
            raise RunFailed(outcome.refusal or outcome.last_error)
        steps, losses, dtypes = read_times(driver[1])
        first = min(steps)
        curve = f"loss {losses[first]:.3f} to {losses[max(losses)]:.3f}"
        say(f"{name}: {outcome.seconds:.0f} s, {len(steps)} steps, {curve}")
        return Run(outcome.seconds, steps[first]["time"] - outcome.started, steps, losses, dtypes)

    def demo(self, name: str, precision: str, *, steps: int, **options: Any) -> Run:
        """QLoRA on the embedded example and its base."""
        words = keys(
            output_dir=self.folder / name / "output", max_steps=steps, learning_rate=2e-3,
            precision=self.precision(precision), eval_strategy="no", eval_on_start=False, save_strategy="no",
            num_sample_answers=0, max_eval_samples=16, report_to="none",
        )  # fmt: skip
        return self.launch(name, OURS, words, **options)

    def shape(self, name: str, who: str, shape: str, precision: str, *, batch: int, micro: int, **options: Any) -> dict:
        """QLoRA of a shape by `who` (carelm or trl): settings, speed, memory, and what share of the card's peak that is."""
        base, max_length = self.base(shape), 128 if self.small else 1024
        steps = WARM_UP_STEPS + (4 if self.small else 12)
        precision, rows = self.precision(precision), self.folder / name / "rows"
        write_rows(rows, batch * steps, max_length)
        words = shape_words(who, base, rows, steps, max_length, precision, batch, micro)
        trained = self.launch(name, OURS if who == "carelm" else TRL_SFT, words, **options)
        last = trained.steps[steps]
        seconds = last["time"] - trained.steps[WARM_UP_STEPS]["time"]
        tokens_per_second = batch * max_length * (steps - WARM_UP_STEPS) / seconds
        parameters = matrix_parameters(base)
        peak = DENSE_PEAK.get(torch.cuda.get_device_name()) if self.has_gpu and precision != "fp32" else None
        return {
            "who": who,
            "shape": shape,
            "precision": precision,
            "max_length": max_length,
            "global_batch_size": batch,
            "per_device_train_batch_size": micro,
            "steps": steps,
            "tokens_per_second": round(tokens_per_second, 1),
            "flops_per_token": 4 * parameters,
            "model_tflops": round(4e-12 * parameters * tokens_per_second, 2),
            "dense_peak_tflops": peak,
            "share_of_peak": round(4e-12 * parameters * tokens_per_second / peak, 4) if peak else None,
            "peak_memory_gib": round(last["peak_memory_bytes"] / 2**30, 2),
            "peak_reserved_gib": round(last["peak_reserved_bytes"] / 2**30, 2) if self.has_gpu else None,
            "seconds": round(trained.seconds, 1),
            "seconds_to_first_step": round(trained.seconds_to_first_step, 1),
            "losses": [trained.losses[step] for step in sorted(trained.losses)],
            "dtypes": trained.dtypes,
        }


def matrix_parameters(base: Path) -> int:
    """Parameters of a base without its embedding, which is looked up and not multiplied.

    A token costs 2 FLOPs for each of them forward and 2 for the gradient that goes through: 4 with a frozen base, where
    the other 2, for the weights' own gradient, are not taken. Recomputation and attention's own products do not count.
    """
    total_size = json.loads((base / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
    config = json.loads((base / "config.json").read_text())
    return total_size // 2 - config["vocab_size"] * config["hidden_size"]


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


def shape_words(
    who: str, base: Path, rows: Path, steps: int, max_length: int, precision: str, batch: int, micro: int
) -> list[Any]:
    """The arguments of one run: for both scripts the same settings, each in its own words."""
    same = {
        "model_name_or_path": base,
        "output_dir": rows.with_name("output"),
        "max_steps": steps,
        "max_length": max_length,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "load_in_4bit": True,
        "use_bnb_nested_quant": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "attn_implementation": "sdpa",
        "gradient_checkpointing": True,
        "logging_steps": 1,
        "report_to": "none",
        "eval_strategy": "no",
        "save_strategy": "no",
        "per_device_train_batch_size": micro,
        "seed": 42,
    }
    if who == "trl":
        return keys(
            **same,
            dataset_name=rows / "trl",
            use_peft=True,
            dtype=DTYPES[precision],
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            gradient_accumulation_steps=batch // micro,
        )
    about = {
        "dataset_name": rows / "carelm/train.jsonl",
        "prompt_template": "{question}",
        "completion_template": "{answer}",
        "validation_fraction": 0.0,
        "test_fraction": 0.0,
        "too_long": "cut",
        "num_sample_answers": 0,
        "precision": precision,
        "global_batch_size": batch,
        "eval_on_start": False,
    }
    return ["--config", write_recipe(rows.with_name("recipe.yaml"), same | about)]


Findings = Iterator[dict[str, Any]]


def t4_rule(lab: Lab) -> Findings:
    trained = lab.demo("t4_rule", "fp16", steps=8 if lab.small else 24)
    kinds = trained.dtypes
    yield {
        "checks": {
            "trained weights and optimizer are fp32": kinds["trainable"] == kinds["optimizer"] == ["float32"],
            "the base is quantised, and computes in fp16": kinds["quantized"] == [DTYPES[lab.precision("fp16")]],
            "no bf16 tensor": not any("bfloat16" in found for found in kinds.values()),
            "the loss falls": trained.falls,
        },
        "dtypes": kinds,
        "losses": [trained.losses[step] for step in sorted(trained.losses)],
    }


def rungs_and_resumes(lab: Lab) -> Findings:
    """Stopped by a stop request after half of the steps, and started again by the same command; several at a time."""
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


def llama3_8b(precision: str) -> Callable[[Lab], Findings]:
    def cell(lab: Lab) -> Findings:
        options = {"batch": 4, "micro": 1, "memory_gib": T4_GIB}
        figures = lab.shape(f"llama3_8b_{precision}", "carelm", "llama3_8b", precision, **options)
        reserved = figures["peak_reserved_gib"]
        yield {
            "memory_limit_gib": T4_GIB if lab.has_gpu else None,
            "runs": [figures],
            "checks": {
                "losses are finite": all(map(math.isfinite, figures["losses"])),
                "within the limit": reserved is None or reserved <= T4_GIB,
            },
        }

    return cell


def beside_trl(lab: Lab) -> Findings:
    runs = []
    for who in ("carelm", "trl"):
        try:
            options = {"batch": 8, "micro": 8}
            runs.append(lab.shape(f"tinyllama-{who}", who, "tinyllama_1b", lab.fast_precision, **options))
        except RunFailed as error:
            runs.append({"who": who, "precision": lab.fast_precision, "error": str(error)})
        yield {"runs": runs, "checks": {run["who"]: "error" not in run for run in runs}}


def evaluator(lab: Lab) -> Findings:
    """Prompts of 128 tokens of corpus text and 64 new ones: what would end an answer is suppressed."""
    from carelm.evaluation import candidates
    from carelm.models import generation
    from carelm.recipe_file import load_recipe

    base = lab.base("tinyllama_1b")
    prompt_tokens, new_tokens = (16, 8) if lab.small else (128, 64)
    words = keys(model_name_or_path=base, load_in_4bit=False, precision=lab.fast_precision)
    candidate = candidates.find(load_recipe(words, usage=""), "base")
    chat = candidate.make_chat()
    model, about = candidate.load(chat)
    device = next(model.parameters()).device
    model.generation_config.suppress_tokens = chat.tokenizer.all_special_ids
    text = (PROJECT / "demo/data/corpus.txt").read_text(encoding="utf-8")[:200_000]
    ids = chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    decoding, by_batch = generation.Decoding(new_tokens), []

    def prompts(number: int) -> list[list[int]]:
        starts = [k * 37 % (len(ids) - prompt_tokens) for k in range(number)]
        return [ids[start : start + prompt_tokens] for start in starts]

    def answer(number: int, batch: int) -> dict[str, float]:
        return generation.generate_all(
            model, chat, prompts(number), decoding, device=device, done=lambda *_: None,
            max_batch_tokens=batch * (prompt_tokens + new_tokens),
        )  # fmt: skip

    yield {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "precision": about["precision"]}
    answer(1, 1)  # warms up
    timed = generation.latency(model, chat, prompts(4), decoding, device=device, done=lambda: None)
    yield {
        "first_token_ms": timed["ttft_ms"]["p50"],
        "tokens_per_second_at_batch_1": round(1e3 / timed["tpot_ms"]["p50"], 1),
    }
    for batch in (1, 4) if lab.small else (1, 8, 64, 256):
        number = max(4, 2 * batch)
        spent = answer(number, batch)
        if (spent["new_tokens"], spent["batch_size"]) != (number * new_tokens, min(batch, number)):
            raise RunFailed(f"batches of {batch}: {spent}, not {number * new_tokens} tokens")
        by_batch.append({
            "batch_size": batch,
            "max_batch_tokens": batch * (prompt_tokens + new_tokens),
            "prompts_per_second": round(number / spent["seconds"], 2),
            "tokens_per_second": round(spent["new_tokens"] / spent["seconds"], 1),
        })  # fmt: skip
        yield {"by_batch": by_batch}


def noise_floor(lab: Lab) -> Findings:
    """The adapter of b answers the example's test questions three times: twice in the same batches, once in others."""
    from carelm.chat.chat import make_chat
    from carelm.evaluation import candidates
    from carelm.evaluation.questions import make_questions
    from carelm.evaluation.rouge import rouge
    from carelm.models import generation
    from carelm.recipe_file import load_recipe

    adapter, precision = lab.folder / "plain-whole/output", lab.precision("bf16")
    if not (adapter / "train_metrics.json").exists():
        lab.demo("plain-whole", "bf16", steps=8 if lab.small else 60)
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
                max_batch_tokens=20_000 if label == "other batches" else 2_000,
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
    "c": Cell("Llama-3-8B's shape in fp16, in 14.5 GiB", 90, llama3_8b("fp16")),
    "d": Cell("TinyLlama's shape beside TRL", 60, beside_trl),
    "e": Cell("the evaluator", 30, evaluator),
    "f": Cell("the noise floor of greedy answers", 30, noise_floor),
    "g": Cell("Llama-3-8B's shape in bf16, in 14.5 GiB", 60, llama3_8b("bf16")),
}


def fill(found: dict[str, Any], cell: Cell, lab: Lab, write: Callable[[], None]) -> None:
    """Runs one cell and writes each of its findings as it comes."""
    if not lab.small and lab.left_s < cell.seconds:
        found["reason"] = f"{lab.left_s:.0f} s were left, it needs about {cell.seconds}"
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
    lines += ["", "| run | tokens/s | model TFLOP/s | share of peak | peak GiB, reserved |", "|---|---|---|---|---|"]
    for r in (r for c in cells for r in c.get("runs", ()) if "error" not in r):
        share = "unknown" if r["share_of_peak"] is None else f"{r['share_of_peak']:.1%}"
        lines.append(f"| {r['shape']}, {r['precision']}, {r['who']} | {r['tokens_per_second']:.0f} | {r['model_tflops']} | "
                     f"{share} | {r['peak_memory_gib']}, {r['peak_reserved_gib']} |")  # fmt: skip
    return "\n".join(lines + ["", *(c["caution"] for c in cells if "caution" in c)])


def roomy_folder() -> str | None:
    """/dev/shm where it and the memory have room for the bases; else the system's temporary folder."""
    memory = Path("/dev/shm")
    room = memory.is_dir() and shutil.disk_usage(memory).free > DISK_GB * 1e9
    return str(memory) if room and psutil.virtual_memory().available > 2 * DISK_GB * 1e9 else None


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
    began = time.monotonic()
    faulthandler.dump_traceback_later(options.budget, exit=True)  # even where a call into the GPU does not come back
    output = options.output or (None if options.self_test else RESULTS / "gpu.json")
    cells = [{"cell": k, "what": CELLS[k].what, "result": "not reached"} for k in CELLS if k in options.only]
    results = {
        "machine": describe_machine(),
        "settings": {"budget_s": options.budget, "warm_up_steps": WARM_UP_STEPS, "self_test": options.self_test},
        "flops": "4N a token with a frozen base (6N where all is trained), N: parameters without the embedding; "
        "recomputation is not counted; share of the data sheet's dense 16-bit peak",
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
