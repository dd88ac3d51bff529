"""Rows of a file, a folder or a Hub dataset -> examples -> prepared splits on disk. Imports no torch.

`prepare` is run by one rank per machine before any process group exists; the others wait for its files, however long
that takes. The prepared splits are memory-mapped arrays, named by a fingerprint of all that went into them.
"""

import csv
import glob
import hashlib
import itertools
import json
import os
import random
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from carelm import __version__, ranks
from carelm.chat import Chat, Example, Rendered
from carelm.recipe import (
    DATA_SUFFIXES,
    EVALUATION_KEYS,
    Recipe,
    UserError,
    fingerprint,
    is_hub_id,
    locate,
    template_columns,
    template_pieces,
)

SPLITS = ("train", "validation", "test")
ROLE_KEYS = ("role", "from", "speaker")
NOT_ABOUT_DATA = {
    "method", "precision", "global_batch_size", "group_by_length", "num_virtual_tokens", "prompt_tuning_init_text",
    "early_stopping_patience", "num_sample_answers", "sample_max_new_tokens", *EVALUATION_KEYS,
}  # fmt: skip
CONTENT_KEYS = ("content", "value", "utterance", "text")
ROLES = {
    **dict.fromkeys(("user", "human", "customer", "client", "patient"), "user"),
    **dict.fromkeys(("assistant", "gpt", "bot", "agent", "model", "chatbot"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation"), "tool"),
    "system": "system",
}


@dataclass
class SplitReport:
    """What became of a split's rows; lengths in tokens."""

    rows: int = 0
    used: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    fitted: dict[str, int] = field(default_factory=dict)
    first_without_answer: list[str] = field(default_factory=list)
    first_in_other_split: list[str] = field(default_factory=list)
    length_p50: int = 0
    length_p95: int = 0
    length_max: int = 0
    truncated_share: float = 0.0
    tokens: int = 0
    trained_tokens: int = 0


class PreparedSplit:
    """The tokens of one split, memory-mapped: item i is the pair (input_ids int32 [length], trained bool [length])."""

    def __init__(self, folder: Path, name: str):
        self.tokens = np.load(folder / f"{name}.tokens.npy", mmap_mode="r")
        self.trained = np.load(folder / f"{name}.trained.npy", mmap_mode="r")
        self.offsets = np.load(folder / f"{name}.offsets.npy")

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[part], self.trained[part]

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [number of examples]."""
        return np.diff(self.offsets)


@dataclass(frozen=True)
class Prepared:
    """Train and validation in tokens, a few validation examples as messages, the report and the fingerprint."""

    train: PreparedSplit
    validation: PreparedSplit | None
    samples: list[dict[str, Any]]
    report: dict[str, dict[str, Any]]
    fingerprint: str


# Reading


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (file:row, row) of one .jsonl, .json, .csv or .parquet file; rows count from 1, text stays as it is.

    Raises:
        UserError: for a file that cannot be read or parsed, with the row.
    """
    readers = {".jsonl": _read_jsonl, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}
    try:
        for number, row in readers[path.suffix](path):
            yield f"{path.name}:{number}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"dataset_name: {path} cannot be read ({error.strerror or error})") from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{path}:{number}: not JSON ({error.msg} at character {error.pos + 1})") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: a line of a .jsonl file must be an object, such as {{...}}")
            yield number, row


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig") as file:
        try:
            rows = json.load(file)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}: not JSON ({error.msg} on line {error.lineno}); one object a line is .jsonl"
            ) from None
    if isinstance(rows, dict):
        rows = next((value for value in rows.values() if isinstance(value, list)), None)
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: a .json file must hold a list of objects, or an object with one such list")
    yield from enumerate(rows, 1)


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        try:
            reader = csv.DictReader(file, strict=True)
            for separator, called in ((";", "semicolons"), ("\t", "tabs")):
                if reader.fieldnames and len(reader.fieldnames) == 1 and separator in reader.fieldnames[0]:
                    raise UserError(f"{path}: the columns seem to be separated by {called}; save the file with commas")
            for number, row in enumerate(reader, 1):
                if None in row:
                    raise UserError(f"{path}:{number}: more fields than the header has; quote fields that hold commas")
                yield number, row
        except csv.Error as error:
            raise UserError(f"{path}: not CSV ({error})") from None


def _read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path}: not Parquet ({error})") from None


def find_files(recipe: Recipe) -> dict[str, list[Path]]:
    """The files of each split: by name in a folder (train.csv, test-00000.parquet), all of `train` for a file or glob."""
    name = locate(recipe.dataset_name)
    path = Path(name)
    if path.is_dir():
        wanted = {
            "train": recipe.dataset_train_split,
            "validation": recipe.dataset_validation_split,
            "test": recipe.dataset_test_split,
        }
        files = sorted(p for p in path.iterdir() if p.suffix in DATA_SUFFIXES)
        by_split = {s: [f for f in files if _split_of(f) == wanted[s]] for s in SPLITS}
        if not by_split["train"]:
            there = ", ".join(f.name for f in files) or "no data files"
            raise UserError(f"dataset_train_split: {path} has no file of a split '{wanted['train']}' (there: {there})")
        return {s: f for s, f in by_split.items() if f}
    matches = [Path(p) for p in sorted(glob.glob(name))] if not path.exists() else [path]
    if not matches:
        raise UserError(f"dataset_name: there is no file, folder or glob {recipe.dataset_name}")
    for match in matches:
        if match.suffix not in DATA_SUFFIXES:
            raise UserError(f"dataset_name: {match} is none of {', '.join(DATA_SUFFIXES)}")
    return {"train": matches}


def _split_of(file: Path) -> str:
    """`train.jsonl`, `train-00000-of-00002.parquet` -> "train"."""
    return file.stem.split("-0")[0]


def _load_hub(recipe: Recipe) -> dict[str, list[tuple[str, dict]]]:
    import datasets

    try:
        loaded = datasets.load_dataset(recipe.dataset_name, recipe.dataset_config)
    except Exception as error:  # the Hub's client raises its own, OSError, ValueError: all mean that it is not there
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"dataset_name: {recipe.dataset_name} is no file here and cannot be had from the Hub ({reason}); "
            "--dataset_name FILE puts a file in its place"
        ) from None
    names = (recipe.dataset_train_split, recipe.dataset_validation_split, recipe.dataset_test_split)
    if names[0] not in loaded:
        raise UserError(
            f"dataset_train_split: {recipe.dataset_name} has no split '{names[0]}' (there: {', '.join(loaded)})"
        )
    return {
        split: [(f"{name}:{i}", row) for i, row in enumerate(loaded[name], 1)]
        for split, name in zip(SPLITS, names)
        if name in loaded
    }


def load_splits(recipe: Recipe) -> dict[str, list[tuple[str, dict]]]:
    """The (source, row) pairs of each split that the data has by name, after `row_filter`; columns are checked."""
    if is_hub_id(recipe.dataset_name):
        splits = _load_hub(recipe)
    else:
        splits = {s: [pair for f in files for pair in read_rows(f)] for s, files in find_files(recipe).items()}
    for split, rows in splits.items():
        if not rows:
            raise UserError(f"dataset_name: the {split} split of {recipe.dataset_name} has no rows")
        _check_columns(recipe, rows, split, _reference_columns(recipe, split, splits))
        for column, wanted in (recipe.row_filter or {}).items():
            wanted = [str(w) for w in (wanted if isinstance(wanted, list) else [wanted])]
            rows = [pair for pair in rows if str(pair[1].get(column)) in wanted]
        splits[split] = rows
    if not splits["train"]:
        raise UserError(f"row_filter: {recipe.row_filter} leaves no training row of {recipe.dataset_name}")
    return splits


def _reference_columns(recipe: Recipe, split: str, splits: dict[str, Any]) -> list[str]:
    """`reference_columns` where test rows are among a split's: without a test split they are cut from train."""
    return recipe.reference_columns if split == ("test" if "test" in splits else "train") else []


def _check_columns(recipe: Recipe, rows: list[tuple[str, dict]], split: str, references: list[str]) -> None:
    there = {column for _, row in rows for column in row}
    needed = {"messages_column": [recipe.messages_column] if recipe.messages_column else []}
    for key in ("prompt_template", "completion_template", "system_prompt"):
        needed[key] = template_columns(getattr(recipe, key) or "", key)
    for key in ("category_column", "id_column"):
        needed[key] = [getattr(recipe, key)] if getattr(recipe, key) else []
    needed["row_filter"] = list(recipe.row_filter or {})
    needed["reference_columns"] = references
    if split == "test" and references:  # such rows may have no other answer
        needed["completion_template"] = []
    for key, columns in needed.items():
        for column in columns:
            if column not in there:
                file = rows[0][0].rsplit(":", 1)[0]
                raise UserError(f"{key}: {file} has no column '{column}' (there: {', '.join(sorted(there))})")


# Rows to examples


class NoAnswer(Exception):
    """A row that holds nothing to learn; the text says why."""


def to_example(
    recipe: Recipe, source: str, row: dict[str, Any], split: str = "train", reference_columns: Sequence[str] = ()
) -> Example:
    """One row as an example; rows of the test split may have several references instead of a completion.

    Raises:
        NoAnswer: for a row whose answer is empty, not text or not there.
        UserError: for a message of an unknown shape or role.
    """
    references = [text for c in reference_columns if isinstance(text := row.get(c), str) and text.strip()]
    instead = reference_columns and split == "test"
    if instead and not references:
        raise NoAnswer("no reference")
    if recipe.messages_column:
        prompt, completion = _from_messages(recipe, source, row[recipe.messages_column])
    else:
        answer = references[0] if instead else _fill(recipe.completion_template, row, source, answer=True)
        if not answer.strip():
            raise NoAnswer("empty answer")
        prompt = [{"role": "user", "content": _fill(recipe.prompt_template, row, source)}]
        completion = [{"role": "assistant", "content": answer}]
    if recipe.system_prompt and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": _fill(recipe.system_prompt, row, source)}, *prompt]
    category = row.get(recipe.category_column) if recipe.category_column else None
    return Example(
        prompt=prompt,
        completion=completion,
        id=str(row[recipe.id_column]) if recipe.id_column and row.get(recipe.id_column) is not None else source,
        category=None if category is None else str(category),
        source=source,
        references=tuple(references),
    )


def _fill(template: str, row: dict[str, Any], source: str, answer: bool = False) -> str:
    pieces, values = template_pieces(template, "template"), {}
    for _, column in pieces:
        if column is None:
            continue
        value = row.get(column)
        if answer and isinstance(value, (list, dict)):
            raise NoAnswer("answer is not text")
        if answer and value is None:
            raise NoAnswer("empty answer")
        values[column] = (
            "" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        )
    if answer and values and not any(value.strip() for value in values.values()):
        raise NoAnswer("empty answer")
    return "".join(text + values.get(column, "") for text, column in pieces)


def _from_messages(recipe: Recipe, source: str, messages: Any) -> tuple[list[dict], list[dict]]:
    if isinstance(messages, str):  # a CSV file holds the list as JSON
        try:
            messages = json.loads(messages)
        except json.JSONDecodeError:
            raise UserError(
                f"{source}: column '{recipe.messages_column}' is text and no JSON list of messages"
            ) from None
    if messages is not None and not isinstance(messages, (list, tuple)):
        raise UserError(
            f"{source}: column '{recipe.messages_column}' holds a {type(messages).__name__}, no list of messages"
        )
    turns = [_to_turn(recipe, source, message) for message in messages or []]
    while turns and turns[-1]["role"] != "assistant":  # a question that nobody answered
        turns.pop()
    if not turns:
        raise NoAnswer("no assistant turn")
    # A greeting that opens the conversation answers nothing: it is prompt.
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i > 0]
    if not answers:
        raise NoAnswer("no turn before the answer")
    split = answers[0] if recipe.trained_turns == "all" else answers[-1]
    for turn in turns[split:]:
        if turn["role"] == "assistant" and not turn["content"].strip() and not turn.get("tool_calls"):
            raise NoAnswer("empty answer")
    return turns[:split], turns[split:]


def _to_turn(recipe: Recipe, source: str, message: Any) -> dict[str, Any]:
    """A message of any of the usual shapes as {"role", "content", ...}; null content becomes empty text."""
    if not isinstance(message, dict):
        raise UserError(f"{source}: a message is {message!r}, not an object with a role and a text")
    role_key = recipe.role_key or next((k for k in ROLE_KEYS if k in message), None)
    content_key = recipe.content_key or next((k for k in CONTENT_KEYS if k in message), None)
    if role_key not in message or (content_key not in message and not message.get("tool_calls")):
        key = "content_key" if role_key in message else "role_key"
        raise UserError(f"{source}: a message has the keys {', '.join(map(str, message))}; set {key} to one of them")
    given = message[role_key]
    name = str(given).lower() if isinstance(given, bool) else str(given)
    role = (
        "user" if name in recipe.user_roles
        else "assistant" if name in recipe.assistant_roles
        else ROLES.get(name.lower())
    )  # fmt: skip
    if role is None:
        raise UserError(f"{source}: a message has the role {name!r}; put it in user_roles or assistant_roles")
    content = message.get(content_key)
    if content is not None and not isinstance(content, str):
        raise UserError(f"{source}: a message's '{content_key}' is {type(content).__name__}, not text")
    turn = {"role": role, "content": content or ""}
    if message.get("tool_calls"):
        turn["tool_calls"] = [_to_tool_call(call) for call in message["tool_calls"]]
    for extra in ("name", "tool_call_id"):
        if role == "tool" and message.get(extra):
            turn[extra] = message[extra]
    return turn


def _to_tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """Chat templates expect the arguments as an object; the OpenAI shape holds them as JSON text."""
    function = dict(call.get("function", call))
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except json.JSONDecodeError:
            pass  # a template that can render objects can render text
    return {"type": "function", "function": function}


# Cleaning and splitting


def make_examples(recipe: Recipe) -> tuple[dict[str, list[Example]], dict[str, SplitReport]]:
    """All splits as examples: answers that are empty, duplicates and questions of two splits are out, and counted.

    Raises:
        UserError: where too many rows have no answer, or a split has none left.
    """
    examples: dict[str, list[Example]] = {}
    reports: dict[str, SplitReport] = {}
    splits = load_splits(recipe)
    for split, rows in splits.items():
        examples[split], reports[split] = _clean(recipe, split, rows, _reference_columns(recipe, split, splits))
    _cut_splits(recipe, examples, reports)
    _keep_apart(recipe, examples, reports)
    for split, limit in (
        ("train", recipe.max_samples),
        ("validation", recipe.max_eval_samples),
        ("test", recipe.max_eval_samples),
    ):
        if split in examples and limit is not None and limit < len(examples[split]):
            reports[split].dropped["beyond max_samples"] = len(examples[split]) - limit
            chosen = sorted(random.Random(recipe.split_seed).sample(range(len(examples[split])), limit))
            examples[split] = [examples[split][i] for i in chosen]
    if not examples["train"]:
        raise UserError(f"dataset_name: nothing is left to train on ({_counts(reports['train'].dropped)})")
    return examples, reports


def _clean(
    recipe: Recipe, split: str, rows: list[tuple[str, dict]], reference_columns: list[str]
) -> tuple[list[Example], SplitReport]:
    report, kept, seen = SplitReport(rows=len(rows)), [], set()
    dropped: Counter = Counter()
    without_answer = 0
    for source, row in rows:
        try:
            example = to_example(recipe, source, row, split, reference_columns)
        except NoAnswer as reason:
            dropped[str(reason)] += 1
            without_answer += 1
            report.first_without_answer = (report.first_without_answer + [source])[:3]
            continue
        content = json.dumps([example.prompt, example.completion], sort_keys=True, ensure_ascii=False)
        try:
            content.encode()
        except UnicodeEncodeError as error:
            half = content[error.start].encode("unicode_escape").decode()
            raise UserError(f"{source}: the text holds {half}, half of a character; mend the row") from None
        if content in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(content)
            kept.append(example)
    report.dropped = dict(dropped)
    if without_answer > recipe.max_empty_share * len(rows):
        raise UserError(
            f"max_empty_share: {without_answer} of {len(rows)} rows of the {split} split have no answer "
            f"({_counts(dropped)}; {', '.join(report.first_without_answer)}); mend the rows or raise max_empty_share"
        )
    return kept, report


def _cut_splits(recipe: Recipe, examples: dict[str, list[Example]], reports: dict[str, SplitReport]) -> None:
    """Holds out the splits that the data does not have by name, by a hash of the question: no question on two sides."""
    shares = [("test", recipe.test_fraction), ("validation", recipe.validation_fraction)]
    shares = [(split, share) for split, share in shares if split not in examples and share > 0]
    parts: dict[str, list[Example]] = {"train": [], **{split: [] for split, _ in shares}}
    for example in examples["train"]:
        digest = hashlib.sha256(f"{recipe.split_seed} {example.question}".encode()).digest()
        draw, target = int.from_bytes(digest[:8], "big") / 2**64, "train"
        for split, share in shares:
            if draw < share:
                target = split
                break
            draw -= share
        parts[target].append(example)
    for split, _ in shares:
        examples[split] = parts[split]
        reports[split] = SplitReport(rows=len(parts[split]))
    examples["train"] = parts["train"]
    reports["train"].rows -= sum(len(parts[split]) for split, _ in shares)


def _keep_apart(recipe: Recipe, examples: dict[str, list[Example]], reports: dict[str, SplitReport]) -> None:
    held_out = {e.question for split in ("validation", "test") for e in examples.get(split, [])}
    shared = [e for e in examples["train"] if e.question in held_out]
    reports["train"].first_in_other_split = [f"{e.source} {e.question[:80]}" for e in shared[:3]]
    if shared and not recipe.keep_test_questions:
        reports["train"].dropped["question also in validation or test"] = len(shared)
        examples["train"] = [e for e in examples["train"] if e.question not in held_out]
    elif shared:
        reports["train"].fitted["question also in validation or test, kept"] = len(shared)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{number} {what}" for what, number in counts.items()) or "none dropped"


# Preparing


def make_chat(recipe: Recipe) -> Chat:
    """The recipe's tokenizer and rules for rendering."""
    from carelm.chat import load_tokenizer

    template = recipe.training.get("chat_template_path")
    tokenizer = load_tokenizer(
        recipe.base,
        revision=recipe.model.get("model_revision", "main"),
        trust_remote_code=recipe.training.get("trust_remote_code", False),
        template_file=locate(template) if template else None,
    )
    virtual = recipe.num_virtual_tokens if recipe.method == "prompt_tuning" else 0
    return Chat(
        tokenizer,
        trained_turns=recipe.trained_turns,
        max_length=recipe.max_length - virtual,
        too_long=recipe.too_long,
    )


def prepare(recipe: Recipe, chat: Chat) -> Prepared:
    """The data of a run in tokens. One rank per machine prepares, the others wait for its files.

    Raises:
        UserError: for whatever is wrong with the data, on the rank that prepares (the others end with it).
    """
    home = Path(os.environ.get("CARELM_CACHE", "~/.cache/carelm")).expanduser()
    key = _fingerprint(recipe, chat)
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
        samples=about["samples"][: recipe.num_sample_answers],
        report=about["report"],
        fingerprint=about["fingerprint"],
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


def _fingerprint(recipe: Recipe, chat: Chat) -> str:
    """Of the rows, the keys that shape them, the tokenizer with its template, and this code."""
    keys = {k: v for k, v in recipe.keys().items() if k in Recipe.__dataclass_fields__ and k not in NOT_ABOUT_DATA}
    parts: list[Any] = [__version__, keys, chat.max_length, chat.tokenizer.chat_template]
    parts.append(
        chat.tokenizer.backend_tokenizer.to_str().encode() if chat.tokenizer.is_fast else chat.tokenizer.get_vocab()
    )
    parts += [Path(__file__).read_bytes(), Path(__file__).with_name("chat.py").read_bytes()]
    if is_hub_id(recipe.dataset_name):
        # A Hub dataset is looked at again every day; the launcher's day, so that all ranks have one.
        parts.append([recipe.dataset_name, psutil.Process(os.getppid()).create_time() // 86400])
    else:
        for split, files in find_files(recipe).items():
            parts.append(split)
            for file in files:
                try:
                    parts += [file.name, file.read_bytes()]
                except OSError as error:
                    raise UserError(f"dataset_name: {file} cannot be read ({error.strerror})") from None
    return fingerprint(*parts)


def _write(recipe: Recipe, chat: Chat, folder: Path) -> None:
    examples, reports = make_examples(recipe)
    prepared, content, samples = [], [], []
    for split in ("train", "validation"):
        if not examples.get(split):
            continue
        rendered, counts = chat.render(examples[split])
        kept = [r for r in rendered if r is not None]
        if split == "validation":
            fitting = (e for e, r in zip(examples[split], rendered) if r is not None)
            fitting = (e for e in fitting if len(chat.prompt_ids(e.prompt)) <= chat.max_length)
            samples = [{"prompt": e.prompt, "completion": e.completion} for e in itertools.islice(fitting, 32)]
        _describe(reports[split], kept, counts)
        if not kept:
            raise UserError(f"max_length: nothing is left of the {split} split ({_counts(reports[split].dropped)})")
        arrays = {
            "tokens": np.concatenate([r.input_ids for r in kept]),
            "trained": np.concatenate([r.trained for r in kept]),
            "offsets": np.cumsum([0] + [len(r.input_ids) for r in kept]),
        }
        for name, array in arrays.items():
            np.save(folder / f"{split}.{name}.npy", array)
        content += [arrays["tokens"].tobytes(), arrays["trained"].tobytes()]
        prepared.append(split)
    if "test" in reports:
        reports["test"].used = len(examples["test"])
    about = {
        "prepared": prepared,
        "samples": samples,
        "report": {split: asdict(reports[split]) for split in SPLITS if split in reports},
        "fingerprint": fingerprint(*content),
    }
    (folder / "report.json").write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")


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
        report.truncated_share = sum(counts.values()) / len(kept)


def format_report(report: dict[str, dict[str, Any]]) -> str:
    """The data report as a small table for the terminal."""
    head = f"{'split':<11}{'rows':>7}{'used':>7}{'p50':>6}{'p95':>6}{'max':>6}{'truncated':>11}{'trained tokens':>16}  dropped"
    lines = [head]
    for split, r in report.items():
        tokens = (
            f"{r['length_p50']:>6}{r['length_p95']:>6}{r['length_max']:>6}{r['truncated_share']:>11.1%}{r['trained_tokens']:>16}"
            if r["tokens"]
            else " " * 45
        )
        lines.append(f"{split:<11}{r['rows']:>7}{r['used']:>7}{tokens}  {_counts(r['dropped'])}")
        if r["fitted"]:
            lines.append(f"{'':<11}of these {_counts(r['fitted'])}")
        if r["first_without_answer"]:
            lines.append(f"{'':<11}without an answer, first: {', '.join(r['first_without_answer'])}")
        if r["first_in_other_split"]:
            lines.append(f"{'':<11}also in validation or test, first: {'; '.join(r['first_in_other_split'])}")
    return "\n".join(lines)


def preview(recipe: Recipe, chat: Chat, number: int) -> str:
    """The first `number` training examples as the model sees them, trained tokens highlighted."""
    examples, _ = make_examples(recipe)
    rendered, _ = chat.render(examples["train"][:number])
    parts = []
    for example, tokens in zip(examples["train"], rendered):
        if tokens is None:
            parts.append(f"--- {example.source}: dropped, longer than max_length {recipe.max_length}")
        else:
            parts.append(
                f"--- {example.source}: {len(tokens.input_ids)} tokens, {int(tokens.trained.sum())} trained (highlighted)\n"
                + chat.highlight(tokens)
            )
    return "\n".join(parts)
