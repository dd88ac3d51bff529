"""What is to be said of how much a run learns: before it, by its few rows and steps, and at its end, by its eval losses.

The limits are those between what was measured to learn and what was not: docs/training.md. Imports no torch.
"""

import math
from typing import Any

from carelm.keys import PREFERENCE_RATES
from carelm.recipe import Recipe
from carelm.training import finished
from carelm.training.prepared import Prepared

FEW_ROWS = 20
LEAST_UPDATE = {"lora": 0.005, "full": 0.0005}  # optimizer steps times learning rate
HIGHEST_RATE = {"lora": 2e-3, "full": 2e-4}  # that was measured to learn; a higher one is not advised
RATE_OF_ANSWERS = 10  # times the default of pairs: there they were seen to go wrong (recipes/results/preferences.md)
LEAST_FALL = 0.03  # of the eval loss before
HIGH_LOSS = 5.0  # nats a token: e^5 is as good as guessing among 150
RISE = 0.05  # nats a token above the best evaluation


def steps(recipe: Recipe, rows: int) -> int:
    """Optimizer steps of a run over so many training examples, as the trainer counts them."""
    most = recipe.training.get("max_steps") or -1
    if most > 0:
        return most
    return math.ceil(recipe.training.get("num_train_epochs", 3) * math.ceil(rows / recipe.global_batch_size))


def expect(recipe: Recipe, prepared: Prepared) -> list[str]:
    """What few training and validation examples, or few steps, let expect; one sentence each."""
    rows, validation_rows, said = len(prepared.train), len(prepared.validation or ()), []
    if rows < FEW_ROWS:
        examples = "example" if rows == 1 else "examples"
        said.append(f"{rows} training {examples} only: what is learnt is little more than their text")
    number, rate = steps(recipe, rows), recipe.training["learning_rate"]
    is_pairs = recipe.objective == "preferences"
    least = 0 if is_pairs else LEAST_UPDATE.get(recipe.method, 0)  # what pairs need was not measured
    if is_pairs and rate > RATE_OF_ANSWERS * PREFERENCE_RATES[recipe.method]:
        said.append(
            f"a learning_rate of {rate:g} is one for answers: a model learns from pairs with a tenth of it or less, and with "
            f"more it forgets how to answer (--learning_rate {PREFERENCE_RATES[recipe.method]:g})"
        )
    if number * rate < least:
        enough, size = math.ceil(round(least / rate, 6)), recipe.global_batch_size
        ways = [f"at least {enough} steps (--max_steps {enough})"]
        if size > 4 and (recipe.training.get("max_steps") or -1) < 1:  # which would leave their number as it is
            ways.append("fewer rows a step (--global_batch_size 4)")
        ways += _higher_rate(recipe)
        said.append(
            f"{number} optimizer {'step' if number == 1 else 'steps'} only ({rows} rows, {size} a step), at a learning_rate of "
            f"{rate:g}: it will hardly learn; take {' or '.join(ways)}"
        )
    if not validation_rows:
        said.append(
            "no validation rows: no eval loss says whether it learns more than its own rows (validation_fraction)"
        )
    elif validation_rows < FEW_ROWS:
        examples = "1 example" if validation_rows == 1 else f"{validation_rows} examples"
        said.append(f"the eval loss is that of {examples} only: it moves by chance")
    return said


def assess(recipe: Recipe, losses: list[tuple[int, float]], kept: float | None = None) -> str | None:
    """What the eval losses of a finished run say against it, in one sentence with the remedy; None where there is nothing.

    Args:
        losses: of all evaluations, each with its step, in order.
        kept: that of the evaluation whose weights are kept, where it is not the last one.
    """
    if not losses:
        return None
    last_step, last = losses[-1]
    best_step, best = min(losses, key=lambda one: one[1])
    loss, rate = last if kept is None else kept, recipe.training["learning_rate"]
    before = losses[0][1] if losses[0][0] == 0 else None
    more = " or ".join([f"take more steps (--max_steps, now {last_step})", *_higher_rate(recipe), "more rows"])
    if kept is None and last > best + RISE and best_step > 0:
        return (
            f"the eval loss was best at step {best_step} of {last_step}, {best:.3f}, and is {last:.3f} at the end: since then "
            f"it has learnt its own rows by heart; train {best_step} steps (--max_steps) or on more rows, or set "
            "--early_stopping_patience 2, which keeps the best"
        )
    if before is not None and recipe.adapter and recipe.mixed:  # it knows these rows, and learns others
        if loss <= before + RISE:
            return None
        return (
            f"the eval loss has risen ({before:.3f} -> {loss:.3f}): it forgets the recipe's own rows; lower --learning_rate "
            f"(now {rate:g}), or take more of these rows (--max_samples)"
        )
    if before is not None and loss >= before:
        return (
            f"the eval loss has not fallen ({before:.3f} -> {loss:.3f}): nothing is learnt that helps with other rows; lower "
            f"--learning_rate (now {rate:g}), or see by --preview 2 whether the rows are as meant"
        )
    if loss >= HIGH_LOSS:
        return f"an eval loss of {loss:.3f} is very high, its answers will make little sense: {more}"
    if before is not None and before - loss < LEAST_FALL * before:
        return f"the eval loss has barely fallen ({before:.3f} -> {loss:.3f}), it will answer much as before: {more}"
    return None


def _higher_rate(recipe: Recipe) -> list[str]:
    rate = recipe.training["learning_rate"]
    is_high = rate >= HIGHEST_RATE.get(recipe.method, math.inf)
    return [] if is_high else [f"a higher --learning_rate (now {rate:g})"]


def in_words(recipe: Recipe, metrics: dict[str, Any]) -> list[str]:
    """A finished run's figures, rounded, and what its losses say against it."""
    folder, minutes = recipe.output_dir, metrics["wall_seconds"] / 60
    losses = [f"{loss:.4f}" for loss in (metrics["eval_loss_before"], metrics["eval_loss"]) if loss is not None]
    steps = metrics["global_step"]
    figures = [f"{steps:,} {'step' if steps == 1 else 'steps'}", f"{minutes:.1f} minutes"]
    if metrics.get("num_trained_tokens"):  # an earlier version did not count them
        figures.append(f"{metrics['num_trained_tokens']:,} trained tokens")
    if metrics.get("tokens_per_second"):
        figures.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    if metrics.get("peak_memory_bytes"):
        figures.append(f"{metrics['peak_memory_bytes'] / 2**30:.1f} GiB of memory")
    of_pairs = ""
    if metrics.get("eval_chosen_loss_before") is not None:  # of preferences
        chosen, tokens = (
            [metrics[f"{key}{at}"] for at in ("_before", "")] for key in ("eval_chosen_loss", "eval_answer_tokens")
        )
        of_pairs = f", chosen loss {chosen[0]:.4f} -> {chosen[1]:.4f}"
        if None not in tokens:  # no prompt of validation may be short enough to be answered
            of_pairs += f", answers of {tokens[0]:.1f} -> {tokens[1]:.1f} tokens"
    said = [
        f"finished: {folder}, eval loss {' -> '.join(losses) or 'not known'}{of_pairs}",
        f"{', '.join(figures)}; all figures: {folder / finished.METRICS}",
    ]
    return said + [metrics["caution"]] * bool(metrics.get("caution"))
