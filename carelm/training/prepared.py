"""Examples -> prepared splits on disk: memory-mapped arrays, named by a fingerprint of all that went into them.

`prepare` is run by one rank per machine before any process group exists; the others wait for its files, however long
that takes. Imports no torch.
"""

import itertools
import json
import os
import shutil
import socket
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from carelm import ranks
from carelm.chat.chat import FORGOTTEN, Chat, Rendered
from carelm.chat.encoder_decoder import one_answer_each
from carelm.data.comparison import first_words
from carelm.data.example import Example
from carelm.data.label_count import count_labels, label_sentences
from carelm.data.label_form import why_none
from carelm.data.labels import parse_label
from carelm.data.masking import personal_versions
from carelm.data.mixture import draw_mixed
from carelm.data.report import SplitReport, list_counts, number_of
from carelm.data.sources import hash_files, recipe_keys_about_data
from carelm.data.split_files import find_files
from carelm.data.split_names import SPLITS
from carelm.data.splits import make_examples
from carelm.errors import UserError
from carelm.files import cache, code_fingerprint, fingerprint
from carelm.keys import NOT_ABOUT_DATA
from carelm.recipe import Recipe


class PreparedSplit:
    """The tokens of one split, memory-mapped: item i is (input_ids int32 [length], trained bool [length]).

    Of preferences it is a pair of answers, one behind the other, each with the prompt before it: `pair(i)` has them apart.
    """

    def __init__(self, folder: Path, name: str):
        self.tokens = np.load(folder / f"{name}.tokens.npy", mmap_mode="r")
        self.trained = np.load(folder / f"{name}.trained.npy", mmap_mode="r")
        self.offsets = np.load(folder / f"{name}.offsets.npy")
        borders = folder / f"{name}.borders.npy"  # where the second of a pair begins
        self.borders = np.load(borders) if borders.exists() else None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[part], self.trained[part]

    def pair(self, i: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """The better answer and the worse one, each as an item of its own."""
        (ids, trained), border = self[i], self.borders[i]
        return (ids[:border], trained[:border]), (ids[border:], trained[border:])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [number of examples]."""
        return np.diff(self.offsets)

    @property
    def trained_counts(self) -> np.ndarray:
        """Trained tokens of each example, those that carry loss, int64 [number of examples]."""
        return np.add.reduceat(self.trained, self.offsets[:-1], dtype=np.int64)


@dataclass(frozen=True)
class Prepared:
    """Train and validation in tokens, a few validation examples as messages, the report, the fingerprint of all that, and a
    hash of each of the data's files (None for a Hub dataset)."""

    train: PreparedSplit
    validation: PreparedSplit | None
    samples: list[dict[str, Any]]
    report: dict[str, dict[str, Any]]
    fingerprint: str
    files: dict[str, str] | None


def prepare(recipe: Recipe, chat: Chat) -> Prepared:
    """The data of a run in tokens. One rank per machine prepares, the others wait for its files.

    Raises:
        UserError: for whatever is wrong with the data, on the rank that prepares (the others end with it).
    """
    if recipe.objective == "preferences" and chat.is_encoder_decoder:
        base = recipe.model["model_name_or_path"]
        raise UserError(
            f"objective: preferences is not for a base with an encoder, as {base} is; set objective: answers"
        )
    home = cache()
    files = hash_files(recipe)
    key = _fingerprint(recipe, chat, files)
    folder = home / key
    if ranks.local_rank() == 0 and not (folder / "report.json").exists():
        aside = home / f"{key}.{socket.gethostname()}-{os.getpid()}.partial"
        try:
            aside.mkdir(parents=True)
            _write(recipe, chat, aside)
            try:
                aside.rename(folder)
            except OSError:  # another run prepared the same data in the meantime
                if not (folder / "report.json").exists():
                    raise
        except OSError as error:
            raise UserError(
                f"CARELM_CACHE: {home} cannot be written ({error.strerror or error}); set it to another folder"
            ) from None
        finally:
            shutil.rmtree(aside, ignore_errors=True)
    launcher = os.getppid()
    while not (folder / "report.json").exists():
        if os.getppid() != launcher:
            raise UserError("the launcher has ended while the data was being prepared")
        time.sleep(0.05)
    about = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    return Prepared(
        train=PreparedSplit(folder, "train"),
        validation=PreparedSplit(folder, "validation") if "validation" in about["prepared"] else None,
        samples=about["samples"],
        report=about["report"],
        fingerprint=about["fingerprint"],
        files=files,
    )


def check_nodes_agree(prepared: Prepared) -> None:
    """Raises UserError where a node has prepared other examples than the first one; every rank calls it."""
    everyone = ranks.gather((socket.gethostname(), prepared.fingerprint))
    first = everyone[0]
    for host, found in everyone:
        if found != first[1]:
            raise UserError(
                f"dataset_name: {host} has other rows than {first[0]}, or another tokenizer or chat template; put the files "
                "on a disk that all nodes share, or remove what an earlier day has left in CARELM_CACHE there"
            )


def _fingerprint(recipe: Recipe, chat: Chat, files: dict[str, str] | None) -> str:
    """Of the rows' files (their hashes by name; None for a Hub dataset), the keys that shape them, the tokenizer with its
    template, and this code."""
    keys = {k: v for k, v in recipe.keys().items() if k in Recipe.__dataclass_fields__ and k not in NOT_ABOUT_DATA}
    # Labels shape no row but those that look empty; the report says how they fit.
    parts: list[Any] = [keys, recipe.labels, recipe.primary_metric.startswith("constrained")]
    parts += [chat.max_length, chat.tokenizer.chat_template]
    parts.append(
        chat.tokenizer.backend_tokenizer.to_str().encode() if chat.tokenizer.is_fast else chat.tokenizer.get_vocab()
    )
    parts.append(code_fingerprint("carelm/data", "carelm/chat", "carelm/training/prepared.py"))
    parts.append(personal_versions())
    for name, other in recipe.mixed.items():
        files_of_it = hash_files(other)
        parts += [name, recipe_keys_about_data(other), files_of_it]
        parts.append(sorted(find_files(other).by_split) if files_of_it is not None else _day())
    if files is None:
        # A Hub dataset is looked at again every day; the launcher's day, so that all ranks have one.
        parts.append([recipe.dataset_name, _day()])
    else:
        found = find_files(recipe)
        # where each of them counts, and those that the report names
        parts += [files, {split: list(of_split) for split, of_split in found.by_split.items()}, found.unused]
    return fingerprint(*parts)


def _day() -> float:
    return psutil.Process(os.getppid()).create_time() // 86400


def _write(recipe: Recipe, chat: Chat, folder: Path) -> None:
    examples, reports = make_examples(recipe)
    if recipe.labels:
        _look_for_labels(recipe, chat, examples, reports)
    mixed = draw_mixed(recipe, examples)
    prepared, content, samples = [], [], []
    for split in ("train", "validation"):
        if not examples.get(split):
            continue
        conversations, examples[split] = len(examples[split]), one_answer_each(chat, examples[split])
        if len(examples[split]) > conversations:
            unit = number_of(conversations, reports[split].unit)
            reports[split].notes.append(f"an answer is an example of its own: {len(examples[split])} of {unit}")
        lines = [e.source for e in examples[split] if any("\n" in (m["content"] or "").strip() for m in e.completion)]
        if lines and not chat.keeps_lines:
            reports[split].notes.append(
                f"answers of several lines: {len(lines)} (first: {lines[0]}); this tokenizer writes a new line as a blank, and "
                "so will the model"
            )
        is_pair = recipe.objective == "preferences"
        rendered, counts = (chat.render_pairs if is_pair else chat.render)(examples[split])
        kept = [r for r in rendered if r is not None]
        borders = {"borders": [len(better.input_ids) for better, _ in kept]} if is_pair else {}
        kept = [_joined(*pair) for pair in kept] if is_pair else kept
        if too_long := next((e.source for e, r in zip(examples[split], rendered) if r is None), None):
            reports[split].first_dropped["too long"] = too_long
            reports[split].notes.append(f"too long: {_way_to_keep(recipe, chat)}")
        _describe(reports[split], kept, counts)
        if split == "train" and chat.own_system:
            reports[split].notes += _own_system(chat, examples[split], reports[split].unit)
        if split == "train" and mixed:
            kept += _render_mixed(recipe, chat, mixed, reports)
        if split == "validation":
            fitting = (e for e, r in zip(examples[split], rendered) if r is not None)
            fitting = (e for e in fitting if len(chat.prompt_ids(e.prompt, tools=e.tools)) <= chat.max_length)
            samples = [
                {"prompt": e.prompt, "completion": e.completion, "tools": e.tools}
                for e in itertools.islice(fitting, 32)
            ]
        if not kept:
            dropped = list_counts(reports[split].dropped, reports[split].first_dropped)
            raise UserError(
                f"max_length: nothing is left of the {split} split ({dropped}); {_way_to_keep(recipe, chat)}"
            )
        arrays = {
            "tokens": np.concatenate([r.input_ids for r in kept]),
            "trained": np.concatenate([r.trained for r in kept]),
            "offsets": np.cumsum([0] + [len(r.input_ids) for r in kept]),
            **borders,
        }
        for name, array in arrays.items():
            np.save(folder / f"{split}.{name}.npy", array)
        content += [arrays["tokens"].tobytes(), arrays["trained"].tobytes()]
        content += [np.asarray(borders["borders"]).tobytes()] if is_pair else []
        prepared.append(split)
    if "test" in reports:
        reports["test"].used = len(examples["test"])
    about = {
        "prepared": prepared,
        "samples": samples,
        "report": {part: asdict(reports[part]) for part in (*SPLITS, *map(_part, mixed)) if part in reports},
        "fingerprint": fingerprint(*content),
    }
    (folder / "report.json").write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")


def _joined(better: Rendered, worse: Rendered) -> Rendered:
    """A pair as one example, so that both are dealt to one micro-batch and count as one."""
    return Rendered(*(np.concatenate([getattr(r, name) for r in (better, worse)]) for name in ("input_ids", "trained")))


def _look_for_labels(
    recipe: Recipe, chat: Chat, examples: dict[str, list[Example]], reports: dict[str, SplitReport]
) -> None:
    """Reports how `labels` fit the answers that the evaluation will expect, and how it can score them."""
    expected: dict[str, list[tuple[str, str]]] = {}
    for split, of_split in examples.items():
        try:
            expected[split] = [(e.source, text) for e in of_split for text in chat.expected_answers(e)]
        except UserError as error:
            raise UserError(f"labels: an answer of the {split} split cannot be read: {error}") from None
        reports[split].labels = count_labels(recipe, expected[split])
    reports["train"].label_notes = label_sentences(recipe, reports)
    labelled = [(row, text) for row, text in expected.get("test", ()) if parse_label(text, recipe.labels) is not None]
    if why := why_none(recipe, labelled):
        reports["train"].label_notes.append(why)


def _own_system(chat: Chat, examples: list[Example], unit: str) -> list[str]:
    """That the template speaks to the model in the base's name where a conversation has no system message."""
    if not (number := sum(e.prompt[0]["role"] != "system" for e in examples)):
        return []
    have = f"{number_of(number, unit)} {'has' if number == 1 else 'have'}"
    return [
        f"{have} no system message, and the chat template writes its own there: {first_words(chat.own_system)!r}; "
        "system_prompt sets yours"
    ]


def _way_to_keep(recipe: Recipe, chat: Chat) -> str:
    """What keeps rows that are too long."""
    cut = ", or set too_long: cut" if recipe.too_long == "drop" else ""
    return f"over {chat.max_length} tokens; set max_length higher{cut}"


def _part(name: str) -> str:
    return f"train of {name}"


def _render_mixed(
    recipe: Recipe, chat: Chat, mixed: dict[str, tuple[list[Example], SplitReport]], reports: dict[str, SplitReport]
) -> list[Rendered]:
    """The rows of `also_train` in tokens, each recipe's by its own rules in this run's window; reports them and the shares."""
    kept = []
    for name, (examples, report) in mixed.items():
        other = recipe.mixed[name]
        own = Chat(
            chat.tokenizer, trained_turns=other.trained_turns, max_length=chat.max_length, too_long=other.too_long,
            is_encoder_decoder=chat.is_encoder_decoder,
        )  # fmt: skip
        examples = one_answer_each(own, examples)
        try:
            rendered, counts = own.render(examples)
        except UserError as error:
            raise UserError(f"also_train: {name}: {error}") from None
        fitting = [r for r in rendered if r is not None]
        if examples and not fitting:  # none at all is said in the report: they are there already, or tested on
            raise UserError(
                f"also_train: {name}: max_length: nothing is left of its rows ({list_counts(counts)}); "
                f"{_way_to_keep(other, chat)}"
            )
        if counts["too long"]:
            report.notes.append(f"too long: {_way_to_keep(other, chat)}")
        _describe(report, fitting, counts)
        reports[_part(name)] = report
        kept += fitting
    parts = [reports["train"], *(reports[_part(name)] for name in mixed)]
    for report in parts:
        report.share = round(report.used / sum(r.used for r in parts), 4)
        report.share_of_trained_tokens = round(report.trained_tokens / sum(r.trained_tokens for r in parts), 4)
    return kept


def _describe(report: SplitReport, kept: list[Rendered], counts: Counter) -> None:
    if counts["too long"]:
        report.dropped["too long"] = counts.pop("too long")
    report.fitted |= dict(counts)
    report.used = len(kept)
    if kept:
        lengths = np.array([len(r.input_ids) for r in kept])
        report.length_p50, report.length_p95 = (int(np.percentile(lengths, p, method="lower")) for p in (50, 95))
        report.length_max, report.tokens = int(lengths.max()), int(lengths.sum())
        report.trained_tokens = int(sum(r.trained.sum() for r in kept))
        report.truncated_share = (sum(counts.values()) - counts[FORGOTTEN]) / len(kept)
