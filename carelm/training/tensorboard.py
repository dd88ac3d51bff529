"""What TensorBoard shows of a run: its curves, the memory, sample answers, and its keys beside its final scores.

runs/                 curves and answers while it trains; the first charts under Custom Scalars
runs/final/           what it came to, for HParams: made anew by the run's end and by each evaluation
"""

import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from carelm.keys import COMPARED, COMPARED_OF, in_effect
from carelm.models.generation import Answer, Decoding, generate
from carelm.recipe import Recipe
from carelm.training.speed import Speed

if TYPE_CHECKING:
    from trl import SFTConfig


LAYOUT = {
    "Training": {
        "loss and eval loss": ["Multiline", ["^train/loss$", "^eval/loss$"]],
        "learning rate": ["Multiline", ["^train/learning_rate$"]],
        "tokens per second": ["Multiline", ["^usage/tokens_per_second$"]],
    }
}


def is_wanted(recipe: Recipe) -> bool:
    return bool({"tensorboard", "all"} & set(recipe.training["report_to"]))


class TensorBoard(TrainerCallback):
    """Scalars of every log, under train/, eval/ and usage/; a resumed run takes out what is to be done again, and writes
    nothing that stands there already."""

    NAMES = {
        "loss": "train/loss",
        "grad_norm": "train/grad_norm",
        "skipped_steps": "train/skipped_steps",
        "learning_rate": "train/learning_rate",
        "epoch": "train/epoch",
        "eval_loss": "eval/loss",
        "eval_chosen_loss": "eval/chosen_loss",
        "eval_answer_tokens": "eval/answer_tokens",
    }

    def __init__(self, folder: Path, speed: Speed):
        self.folder, self.speed, self.writer = folder, speed, None
        self.last_steps = dict[str, int]()  # of each tag, by an earlier part of the run too

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        from torch.utils.tensorboard import SummaryWriter

        if state.global_step:
            self.last_steps = _cut(self.folder, state.global_step)
        else:
            remove_events(self.folder)  # of a run that was killed before its first checkpoint
        # A TensorBoard that is open meanwhile has read them: it purges.
        self.writer = SummaryWriter(str(self.folder), purge_step=state.global_step + 1 if state.global_step else 0)
        if "custom_scalars__config__" not in self.last_steps:
            self.writer.add_custom_scalars(LAYOUT)
        self.writer.flush()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.writer is None:
            return
        figures = {name: logs[key] for key, name in self.NAMES.items() if key in logs}
        if "loss" in logs:
            figures |= {f"usage/{key}": value for key, value in self.speed.shown.items()}
        for name, value in figures.items():
            if state.global_step > self.last_steps.get(name, -1):
                self.writer.add_scalar(name, value, state.global_step)
                self.last_steps[name] = state.global_step
        self.writer.flush()

    def add_text(self, tag: str, text: str, step: int) -> None:
        if self.writer is not None and step > self.last_steps.get(f"{tag}/text_summary", -1):
            self.writer.add_text(tag, text, step)
            self.writer.flush()

    def on_train_end(self, args, state, control, **kwargs):
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def remove_events(folder: Path) -> None:
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()


def _cut(folder: Path, step: int) -> dict[str, int]:
    """Takes out of a folder's events what was written after this step (readers would purge curves of it, and keep texts);
    returns the last step of each tag that stays."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    last_steps = dict[str, int]()
    for file in sorted(folder.glob("events.out.tfevents.*")):
        aside = file.with_name("events.partial")
        with open(aside, "wb") as whole:
            records = RecordWriter(whole)
            for record in RawEventFileLoader(str(file)).Load():
                event = Event.FromString(record)
                if event.step <= step:
                    records.write(record)
                    last_steps |= {value.tag: event.step for value in event.summary.value}
        aside.replace(file)
    return last_steps


def write_final(folder: Path, keys: dict[str, Any], metrics: dict[str, Any], **scores: float) -> None:
    """What a run came to, with its keys: its eval loss and, once it is evaluated, the scores. It is written anew, so that each
    stands there once.

    Args:
        folder: the run's output folder.
        keys: its recipe's.
        metrics: what train_metrics.json has.
        scores: by name.
    """
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    final = folder / "runs/final"
    remove_events(final)
    chosen = in_effect(keys, [*COMPARED, *sum(COMPARED_OF.values(), ())]) | {"precision": metrics.get("precision")}
    told = {
        key: str(value).lower() if isinstance(value, bool) else value for key, value in chosen.items()
    }  # else 1.000
    _, start, end = hparams({key: value for key, value in told.items() if value is not None}, {})
    with SummaryWriter(str(final)) as writer:
        for part in (start, end):
            writer.file_writer.add_summary(part)
        for name, value in {"eval_loss": metrics["eval_loss"], **scores}.items():
            if value is not None:
                writer.add_scalar(f"verdict/{name}", value, metrics["global_step"])


def answer_in_training(
    model, chat, prompts: list[list[int]], max_new_tokens: int, args: "SFTConfig", synced_gpus: bool
) -> list[Answer]:
    """Greedy answers of the model as it is, in the precision of its training; every rank calls it (`synced_gpus`: ZeRO-3)."""
    dtype = torch.float16 if args.fp16 else torch.bfloat16
    with torch.autocast(args.device.type, dtype, enabled=args.fp16 or args.bf16):
        return generate(
            model, chat, prompts, Decoding(max_new_tokens), device=args.device, synced_gpus=synced_gpus
        )  # fmt: skip


class SampleAnswers(TrainerCallback):
    """Answers the same few validation prompts at every evaluation, as TensorBoard text."""

    def __init__(self, chat, samples: list[dict[str, Any]], max_new_tokens: int, tensorboard: TensorBoard | None):
        self.chat, self.samples, self.max_new_tokens, self.tensorboard = chat, samples, max_new_tokens, tensorboard
        self.synced_gpus = False  # True under ZeRO-3

    def on_evaluate(self, args, state, control, model=None, **kwargs):
        if not self.samples or self.tensorboard is None:
            return
        prompts = [self.chat.prompt_ids(sample["prompt"], tools=sample["tools"]) for sample in self.samples]
        answers = answer_in_training(model, self.chat, prompts, self.max_new_tokens, args, self.synced_gpus)
        for i, (sample, answer) in enumerate(zip(self.samples, answers)):
            reference = self.chat.answer_text(sample["prompt"], sample["completion"][0], tools=sample["tools"])
            parts = [(m["role"], m.get("content") or str(m.get("tool_calls", ""))) for m in sample["prompt"]]
            text = "".join(map(_quoted, *zip(*parts, ("answer", answer.text), ("expected", reference))))
            self.tensorboard.add_text(f"answers/{i}", text, state.global_step)


def _quoted(title: str, text: str) -> str:
    """A text below its title as HTML in one line, which TensorBoard's Markdown leaves as it is: every sign stands there as it
    was written, lines break where it breaks them, and long words wherever there is no more room."""
    words = re.sub(r"(?<= ) |^ ", "\N{NO-BREAK SPACE}", text.expandtabs(4), flags=re.MULTILINE)
    return (
        f"<p><strong>{title}</strong></p><blockquote><p>{'<br>'.join(html.escape(words).splitlines())}</p></blockquote>"
    )
