"""How fast the optimizer steps are, and the memory that they take."""

import time

import psutil
import torch
from transformers import TrainerCallback

from carelm import ranks


class Speed(TrainerCallback):
    """Times the optimizer steps of this process (fetching batches, evaluations and saves are not in it) and watches memory.

    Args:
        flops_per_token: of the model's matrix products.
        ceiling: FLOP/s of matrix products that all ranks together were measured to reach.

    Attributes:
        step_seconds: sum over this process's steps.
        tokens: tokens read in them, over all ranks, without padding.
        first_step_at: time.time() at the end of the first step.
        of_last_step: tokens per second of it.
        shown: the figures of the newest log.
    """

    def __init__(self, flops_per_token: int, ceiling: float):
        self.flops_per_token, self.ceiling = flops_per_token, ceiling
        self.step_seconds, self.tokens, self.first_step_at = 0.0, 0, None
        self.of_last_step, self.shown = 0.0, dict[str, float]()
        self.reads_utilisation = False
        self.batches = None  # the trainer's GlobalBatches, set once there is a trainer
        self._began = self._tokens_before = 0
        self._window = (0.0, 0)

    def on_train_begin(self, args, state, control, **kwargs):
        self._plan_epoch, self._plan = None, []
        if torch.cuda.is_available():
            try:
                torch.cuda.utilization()
                self.reads_utilisation = True
            except Exception as error:  # NVML's own errors: a slice of a GPU, or a container, may not have it
                ranks.say(f"GPU utilisation cannot be read here ({error})")

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if args.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._began
        self.step_seconds += seconds
        epoch, position = divmod(state.global_step - 1, self.batches.steps_per_epoch)
        if epoch != self._plan_epoch:
            self._plan_epoch, self._plan = epoch, self.batches.plan(epoch)
        tokens = int(self.batches.lengths[self._plan[position]].sum())
        self.tokens += tokens
        self.of_last_step = tokens / seconds
        self._window = (self._window[0] + seconds, self._window[1] + tokens)
        if self.first_step_at is None:
            self.first_step_at = time.time()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.shown = self._read()

    def metrics(self) -> dict[str, float | None]:
        """Of all steps of this process."""
        figures = self._rate(self.step_seconds, self.tokens) if self.step_seconds else {}
        return {
            "tokens_per_second": round(figures["tokens_per_second"], 1) if figures else None,
            "mfu": round(figures["mfu"], 4) if "mfu" in figures else None,
            "flops_per_token": self.flops_per_token,
            "matmul_ceiling_flops": round(self.ceiling),
        }

    def _rate(self, seconds: float, tokens: int) -> dict[str, float]:
        """With the model FLOPs utilisation (MFU: Chowdhery et al. 2022, PaLM, appendix B), here of the ceiling that was
        measured and not of a data sheet's. Where the run passes it, other work held the machine up when it was measured, and
        there is none."""
        rate = tokens / seconds
        mfu = rate * self.flops_per_token / self.ceiling
        return {"tokens_per_second": rate} | ({"mfu": mfu} if mfu <= 1 else {})

    def _read(self) -> dict[str, float]:
        """Speed since the last call, and memory now."""
        (seconds, tokens), self._window = self._window, (0.0, 0)
        figures = self._rate(seconds, tokens) if seconds else {}
        figures["host_memory_gib"] = psutil.Process().memory_info().rss / 2**30
        if torch.cuda.is_available():
            figures["peak_device_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if self.reads_utilisation:
                figures["gpu_utilisation_percent"] = torch.cuda.utilization()
        return figures
