"""What goes on beside the optimizer steps: seeds, the last evaluation, the progress bar."""

import os
import sys
import time

import torch
from tqdm import tqdm
from transformers import TrainerCallback

from carelm import ranks
from carelm.training import threads
from carelm.training.speed import Speed
from carelm.training.tensorboard import SampleAnswers, TensorBoard, is_wanted


class StepSeed(TrainerCallback):
    """Seeds torch before every step from (seed, step, rank).

    Dropout is then a function of the step: a resumed run draws what the unbroken one would have drawn, and whatever an
    evaluation or a sample answer drew in between has no effect.
    """

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed((args.seed * 1_000_003 + state.global_step) * 65_536 + args.process_index)


class Evaluations(TrainerCallback):
    """An evaluation at the end also where the recipe has none in between, so that a run always ends with its figures."""

    def __init__(self, has_validation: bool):
        self.has_validation = has_validation

    def on_step_end(self, args, state, control, **kwargs):
        if self.has_validation and args.eval_strategy == "no" and state.global_step >= state.max_steps:
            control.should_evaluate = True


class ThreadWatch(TrainerCallback):
    """Says once that one thread would be faster than several (rank 0, on a CPU).

    It is measured after the first step and after steps that are far slower than others were, so that short steps, or a moment
    in which the machine was busy, are no alarm. The number of threads stays: another one would round sums otherwise.
    """

    SLOW = 3  # times below the run's best speed
    PATIENCE = 30  # seconds between two looks

    def __init__(self, speed: Speed):
        self.speed, self.best, self.next_look, self.is_done = speed, 0.0, 0.0, torch.cuda.is_available()

    def on_step_end(self, args, state, control, **kwargs):
        rate, now = self.speed.of_last_step, time.monotonic()
        is_slow, self.best = rate * self.SLOW < self.best or not self.best, max(self.best, rate)
        if self.is_done or not is_slow or now < self.next_look or (number := torch.get_num_threads()) == 1:
            return
        self.next_look = now + self.PATIENCE
        several, one = threads.measure(number)
        if line := threads.advice(number, several, one):
            ranks.say(line)
            self.is_done = True


class LogLines(tqdm):
    """The bar of a log file: a line now and then, where that of a terminal is drawn over itself."""

    SECONDS = 10  # between two of them

    @staticmethod
    def status_printer(file):
        def write(line: str) -> None:
            if line.strip():
                file.write(f"{line}\n")
                file.flush()

        return write

    def clear(self, *args, **kwargs):  # of what was drawn, before another line is written: here it stays
        pass


class ProgressBar(TrainerCallback):
    """One bar over the run's optimizer steps, with the loss, the speed and the time left; rank 0 alone.

    How long the run will take is also said once, or twice where the first step is slow: no bar knows it before that.
    """

    SLOW, WORTH_SAYING = 10, 60  # seconds of a first step, and of what is left

    def __init__(self, speed: Speed):
        self.speed, self.bar, self._ends = speed, None, list[float]()

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            is_log = not sys.stderr.isatty()
            rare = {"mininterval": float(os.environ.get("TQDM_MININTERVAL", LogLines.SECONDS))} if is_log else {}
            self.bar = (LogLines if is_log else tqdm)(
                total=state.max_steps,
                initial=state.global_step,
                desc="train",
                unit="step",
                file=sys.stderr,
                dynamic_ncols=True,
                **rare,
            )
            self._ends = [time.monotonic()]

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is None:
            return
        self.bar.update(1)
        self._ends.append(time.monotonic())
        done, left = len(self._ends) - 1, state.max_steps - state.global_step
        if done == 1 and (first := self._ends[1] - self._ends[0]) >= self.SLOW and first * left >= self.WORTH_SAYING:
            self._say(
                f"the first step took {first:.0f} s, later ones are often faster: at most {in_words(first * left)} left"
            )
        elif done == 4 and (seconds := (self._ends[4] - self._ends[1]) / 3 * left) >= self.WORTH_SAYING:
            self._say(f"about {in_words(seconds)} left for {left} steps, evaluations not counted")

    def _say(self, sentence: str) -> None:
        self.bar.write(f"carelm: {sentence}", file=sys.stderr)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and "loss" in logs:
            figures = {"loss": f"{logs['loss']:.4f}"}
            if "mfu" in self.speed.shown:
                figures["tokens/s"] = f"{self.speed.shown['tokens_per_second']:,.0f}"
                figures["mfu"] = f"{self.speed.shown['mfu']:.0%}"
            self.bar.set_postfix(figures, refresh=False)  # drawn with the next step
        if self.bar is not None and "eval_loss" in logs:
            more = f", chosen loss {logs['eval_chosen_loss']:.4f}" if "eval_chosen_loss" in logs else ""
            more += f", answers of {logs['eval_answer_tokens']:.1f} tokens" if "eval_answer_tokens" in logs else ""
            self._say(f"step {state.global_step}: eval loss {logs['eval_loss']:.4f}{more}")

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


def in_words(seconds: float) -> str:
    """A time that is not known to the second."""
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def make_callbacks(recipe, prepared, chat, speed: Speed) -> list[TrainerCallback]:
    """The callbacks of a run, in the order in which they act."""
    from transformers import EarlyStoppingCallback

    tensorboard = TensorBoard(recipe.output_dir / "runs", speed) if is_wanted(recipe) else None
    callbacks = [StepSeed(), speed, ProgressBar(speed), Evaluations(prepared.validation is not None)]
    if tensorboard is not None:
        callbacks.append(tensorboard)
    samples = prepared.samples[: recipe.num_sample_answers]
    callbacks.append(SampleAnswers(chat, samples, recipe.sample_max_new_tokens, tensorboard))
    if recipe.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(recipe.early_stopping_patience))
    if ranks.rank() == 0:
        callbacks.append(ThreadWatch(speed))
    else:
        callbacks = [c for c in callbacks if not isinstance(c, ProgressBar)]
    return callbacks
