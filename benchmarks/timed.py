"""Runs a training script that uses transformers' Trainer, and writes down from the outside when each step ended.

    accelerate launch benchmarks/timed.py --times FILE train/sft.py --config recipes/demo.yaml
    accelerate launch benchmarks/timed.py --times FILE .../trl/scripts/sft.py --model_name_or_path demo/base ...

The script is not changed: a callback is added to those that every Trainer has. Rank 0 writes JSON lines: one per step
(`step`, `time`, `world_size`, `code`: where carelm came from, `peak_memory_bytes`), one per logged loss (`step`, `loss`),
one with where the time of a step went, if one is to be looked at, and a last one with the dtypes that were there at the end of
training.
"""

import argparse
import json
import resource
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers.trainer
from transformers import TrainerCallback


class StepTimes(TrainerCallback):
    """Appends a line to `file` at the end of each step, at each logged loss and at the end of training."""

    file: Path
    stop_after: int | None = None  # asks CareLM's run to stop after this step
    profiled_step: int | None = None
    profiler: torch.profiler.profile | None = None

    def write(self, state, line: dict[str, Any]) -> None:
        if state.is_world_process_zero:
            with open(self.file, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.profiled_step:
            self.profiler = torch.profiler.profile()
            self.profiler.start()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.profiler is not None:
            self.profiler.stop()
            self.write(state, {"profile": where_the_time_goes(self.profiler)})
            self.profiler = None
        line = {"step": state.global_step, "time": time.time(), "world_size": args.world_size}
        line["code"] = getattr(sys.modules.get("carelm"), "__file__", None)
        self.write(state, line | peak_memory())
        if state.global_step == self.stop_after and state.is_world_process_zero:
            Path(args.output_dir, "stop_request").write_text("benchmarks/timed.py --stop_after\n")

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.write(state, {"step": state.global_step, "loss": logs["loss"]})

    def on_train_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.write(state, {"dtypes": dtypes(model, optimizer)})


def where_the_time_goes(profiler: torch.profiler.profile, most: int = 25) -> dict[str, Any]:
    """Milliseconds of one step's kernels and of the operations that the processor starts, the largest first."""
    found: dict[str, list[tuple[float, int, str]]] = {"kernels": [], "operations": []}
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CPU:
            found["operations"].append((event.self_cpu_time_total / 1e3, event.count, event.key))
        elif not event.is_user_annotation:
            found["kernels"].append((event.self_device_time_total / 1e3, event.count, event.key))
    said = {}
    for kind, events in found.items():
        said[kind] = {"number": sum(e[1] for e in events), "milliseconds": round(sum(e[0] for e in events), 2)}
        said[kind]["largest"] = [
            [round(ms, 3), number, name[:100]] for ms, number, name in sorted(events)[: -most - 1 : -1]
        ]
    return said


def peak_memory() -> dict[str, int]:
    """Peak bytes of the device (allocated to tensors, and reserved), or on a CPU of this process."""
    if not torch.cuda.is_available():
        return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def dtypes(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[str]]:
    """Which dtypes there are among weights, buffers, quantised weights once dequantised, and optimizer state."""
    found: dict[str, set[torch.dtype]] = {
        "trainable": {p.dtype for p in model.parameters() if p.requires_grad},
        "frozen": {p.dtype for p in model.parameters() if not p.requires_grad},
        "buffers": {b.dtype for b in model.buffers()},
        "quantized": set(),
        "optimizer": set(),
    }
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            found["quantized"] |= {state.dtype, getattr(module, "compute_dtype", None)}
    while getattr(optimizer, "optimizer", None) is not None:  # accelerate's and DeepSpeed's wrappers
        optimizer = optimizer.optimizer
    for values in optimizer.state.values():
        found["optimizer"] |= {v.dtype for v in values.values() if isinstance(v, torch.Tensor)}
    return {where: sorted(str(d).removeprefix("torch.") for d in kinds if d) for where, kinds in found.items()}


def read_profile(path: Path) -> dict[str, Any] | None:
    """What a file that this script wrote says of the profiled step."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return next((line["profile"] for line in lines if "profile" in line), None)


def read_times(path: Path) -> tuple[dict[int, dict[str, Any]], dict[int, float], dict[str, list[str]]]:
    """(step -> line, step -> loss, dtypes) of a file that this script wrote; empty where there is none."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    steps = {line["step"]: line for line in lines if "time" in line}
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    return steps, losses, next((line["dtypes"] for line in lines if "dtypes" in line), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=Path, required=True, help="file to append the JSON lines to")
    parser.add_argument("--memory_gib", type=float, help="device memory that torch may use at most")
    parser.add_argument(
        "--stop_after", type=int, help="write a stop request into CareLM's output folder after this step"
    )
    parser.add_argument("--profiled_step", type=int, help="look at where the time of this step goes")
    parser.add_argument(
        "--whole_logits", action="store_true", help="CareLM makes the logits of whole rows, as without models/loss.py"
    )
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    if options.memory_gib is not None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.memory_gib * 2**30 / total))
    if options.whole_logits:
        from carelm.models import loss

        loss._differ = lambda *_: True  # as where a model's loss is another than its head's
    StepTimes.file, StepTimes.stop_after = options.times, options.stop_after
    StepTimes.profiled_step = options.profiled_step
    transformers.trainer.DEFAULT_CALLBACKS.append(StepTimes)
    sys.argv = [options.script, *options.arguments]
    runpy.run_path(options.script, run_name="__main__")


if __name__ == "__main__":
    main()
