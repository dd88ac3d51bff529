"""Where the cells of benchmarks/gpu.py train: launches with a deadline, the example, and random weights of real shapes."""

import gc
import json
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from launches import EVERY_ROW_TRAINS, ONE_PROCESS, PROJECT, accelerate, keys, run, say, threads, write_recipe
from random_base import write_random_base
from timed import read_profile, read_times

from carelm.models.flops import matmul_ceiling

TIMED = PROJECT / "benchmarks/timed.py"
OURS = PROJECT / "train/sft.py"
TRL_SFT = Path(trl.__file__).parent / "scripts/sft.py"
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
WARM_UP_STEPS = 4  # and fp16's loss scale finds its size in them
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
    profile: dict[str, Any] | None

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
        profiled_step: int | None = None,
        whole_logits: bool = False,
    ) -> Run:
        """Trains through benchmarks/timed.py on one GPU, or in small on what a CPU has, and reads what that wrote down.

        Raises:
            RunFailed: where it does not end well; with `stop_after`, where it is not saved after that step.
            OutOfTime: where it does not end in time.
        """
        aside = self.folder / name
        aside.mkdir(exist_ok=True)
        ranks = 1 if self.has_gpu or rung == "plain" else 2
        on = PROJECT / f"accelerate_configs/{'' if self.has_gpu else 'cpu_'}{rung}.yaml"
        driver = ["--times", aside / f"times-{time.monotonic_ns()}.jsonl"]
        driver += ["--memory_gib", memory_gib] if memory_gib and self.has_gpu else []
        driver += ["--stop_after", stop_after] if stop_after else []
        driver += ["--profiled_step", profiled_step] if profiled_step else []
        driver += ["--whole_logits"] if whole_logits else []
        command = accelerate(
            ONE_PROCESS if rung == "plain" else on, TIMED, *driver, script, *words, num_processes=ranks
        )
        environment = {"CARELM_CACHE": str(aside / "cache"), "HF_DATASETS_CACHE": str(aside / "datasets")}
        environment |= {"OMP_NUM_THREADS": threads(4)} | ({"CUDA_VISIBLE_DEVICES": "0"} if self.has_gpu else {})
        if self.left_s < 3:
            raise OutOfTime
        outcome = run(command, environment, self.left_s - 2)
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
        return Run(
            outcome.seconds, steps[first]["time"] - outcome.started, steps, losses, dtypes, read_profile(driver[1])
        )

    def demo(self, name: str, precision: str, *, steps: int, **options: Any) -> Run:
        """QLoRA on the embedded example and its base."""
        words = keys(
            output_dir=self.folder / name / "output", max_steps=steps, learning_rate=2e-3,
            precision=self.precision(precision), eval_strategy="no", eval_on_start=False, save_strategy="no",
            num_sample_answers=0, max_eval_samples=16, report_to="none",
        )  # fmt: skip
        return self.launch(name, OURS, words, **options)

    def ceiling(self, precision: str) -> float:
        """FLOP/s of matrix products that this device was measured to make."""
        device = torch.device("cuda" if self.has_gpu else "cpu")
        return matmul_ceiling(device, getattr(torch, DTYPES[precision]))

    def bandwidth(self) -> float:
        """Bytes per second that a copy within this device's memory reads and writes."""
        source = torch.ones(2**24 if self.small else 2**30, dtype=torch.uint8, device="cuda" if self.has_gpu else "cpu")
        target, seconds = torch.empty_like(source), []
        for _ in range(10):
            began = time.perf_counter()
            target.copy_(source)
            if self.has_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        return 2 * len(source) / min(seconds)

    def shape(self, name: str, who: str, shape: str, precision: str, *, batch: int, micro: int, bits: int = 4,
              checkpointing: bool = True, timed: int = 12, **options: Any) -> dict[str, Any]:  # fmt: skip
        """LoRA of a shape on 4 or 16 bits by `who` (carelm or trl): settings, speed, memory, model FLOPs utilisation; after
        the `timed` steps comes one whose time is looked into."""
        base, max_length = self.base(shape), 128 if self.small else 1024
        steps = WARM_UP_STEPS + (4 if self.small else timed)
        precision, rows = self.precision(precision), self.folder / name / "rows"
        write_rows(rows, batch * (steps + 1), max_length)
        words = shape_words(who, base, rows, steps + 1, max_length, precision, batch, micro, bits, checkpointing)
        ceiling = self.ceiling(precision)
        self.free()
        script = OURS if who == "carelm" else TRL_SFT
        trained = self.launch(name, script, words, profiled_step=steps + 1, **options)
        last = trained.steps[steps]
        seconds = last["time"] - trained.steps[WARM_UP_STEPS]["time"]
        tokens_per_second = batch * max_length * (steps - WARM_UP_STEPS) / seconds
        parameters = matrix_parameters(base)
        flops = 4 * parameters * tokens_per_second
        peak = DENSE_PEAK.get(torch.cuda.get_device_name()) if self.has_gpu and precision != "fp32" else None
        return {
            "who": who,
            "shape": base.name,
            "precision": precision,
            "bits": bits,
            "whole_logits": options.get("whole_logits", False) if who == "carelm" else None,
            "gradient_checkpointing": checkpointing,
            "max_length": max_length,
            "global_batch_size": batch,
            "per_device_train_batch_size": micro,
            "steps": steps,
            "tokens_per_second": round(tokens_per_second, 1),
            "flops_per_token": 4 * parameters,
            "model_tflops": round(1e-12 * flops, 2),
            "matmul_ceiling_tflops": round(1e-12 * ceiling, 2),
            "model_flops_utilisation": round(flops / ceiling, 4),
            "dense_peak_tflops": peak,
            "share_of_peak": round(1e-12 * flops / peak, 4) if peak else None,
            "peak_memory_gib": round(last["peak_memory_bytes"] / 2**30, 2),
            "peak_reserved_gib": round(last["peak_reserved_bytes"] / 2**30, 2) if self.has_gpu else None,
            "seconds": round(trained.seconds, 1),
            "seconds_to_first_step": round(trained.seconds_to_first_step, 1),
            "losses": [trained.losses[step] for step in sorted(trained.losses)],
            "dtypes": trained.dtypes,
            "profile": trained.profile,
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
    who: str, base: Path, rows: Path, steps: int, max_length: int, precision: str, batch: int, micro: int, bits: int,
    checkpointing: bool,
) -> list[Any]:  # fmt: skip
    """The arguments of one run: for both scripts the same settings, each in its own words."""
    same = {
        "model_name_or_path": base,
        "output_dir": rows.with_name("output"),
        "max_steps": steps,
        "max_length": max_length,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "load_in_4bit": bits == 4,
        "use_bnb_nested_quant": True,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "lora_target_modules": "all-linear",
        "attn_implementation": "sdpa",
        "gradient_checkpointing": checkpointing,
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
        **EVERY_ROW_TRAINS,
        "precision": precision,
        "global_batch_size": batch,
    }
    return ["--config", write_recipe(rows.with_name("recipe.yaml"), same | about)]
