"""The files that a file's name, a folder or a glob reaches, by split."""

import glob
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from carelm.data.readers import READ, data_suffix, stem
from carelm.data.report import shortened
from carelm.data.split_names import SPLITS, SplitNames
from carelm.errors import UserError
from carelm.files import locate, near
from carelm.recipe import Recipe

# What lies beside data and is none; every other file that is not read is named.
_ABOUT = re.compile(
    r"(?:readme|licen[cs]e|notice|copying|authors|citation|changelog|contributing|makefile|dockerfile|_success)(?:\W.*)?"
    r"|dataset_(?:infos?|dict)\.json|state\.json"
    r"|.*\.(?:md|rst|py|ipynb|sh|ya?ml|toml|cfg|ini|lock|log|png|jpe?g|gif|svg)"
)


@dataclass
class SplitFiles:
    """The files of each split, by their names below the folder or the glob's fixed part."""

    by_split: dict[str, dict[str, Path]]
    unnamed: set[str] = field(default_factory=set)  # train by default: nothing in their names says a split
    unused: list[str] = field(default_factory=list)


def find_files(recipe: Recipe) -> SplitFiles:
    """The files of each split, and what is reached and not used.

    In a folder names decide: train.csv, val-1.jsonl, test/x.parquet, data/dev.csv, or shop_train.csv beside shop_test.csv.
    The only data file of a folder is `train` (so are part-0.csv and part-1.csv), and so are all of a folder called train; in
    a glob every file is whose name says no split.

    Raises:
        UserError: where there is nothing to train on, or two names for one split.
    """
    place, names = Path(locate(recipe.dataset_name)), SplitNames(recipe)
    if place.is_file():
        if data_suffix(place.name) is None:
            is_workbook = place.suffix.lower() in (".xlsx", ".xlsm", ".xls", ".ods")
            way = "; save it from the spreadsheet as CSV in UTF-8" if is_workbook else ""
            raise UserError(f"dataset_name: {place} is not read; what is read: {READ}{way}")
        return SplitFiles({"train": {place.name: place}}, unnamed={place.name})
    try:
        reached = _walk(place, names) if place.is_dir() else _match(recipe.dataset_name, names)
    except OSError as error:
        raise UserError(f"dataset_name: {error.filename} cannot be read ({error.strerror})") from None
    files = {name: path for name, path in reached.items() if path and data_suffix(name)}
    words = _words(names, files, is_glob=not place.is_dir())
    names.check(((word, name) for name, word in words.items() if word), recipe.dataset_name)
    by_split = {s: {n: files[n] for n, word in words.items() if word in names.words[s]} for s in SPLITS}
    unnamed = files.keys() - words.keys()
    if place.is_dir() and (
        by_split["train"]
        or (
            len({re.sub(r"\d+", "", stem(name)) for name in files}) > 1
            and "train" not in names.splits(names.word(stem(place.resolve().name)))
        )
    ):
        unnamed = set()
    by_split["train"] |= {name: files[name] for name in sorted(unnamed)}
    if not by_split["train"]:
        there = ", ".join(reached) or "nothing"
        way = f"; --dataset_name '{place}/*' takes all others as train" if files.keys() - words.keys() else ""
        if not files:
            folders = reached and all(path is None for path in reached.values())
            way = "; name one of these folders" if folders else f"; what is read: {READ}"
        raise UserError(
            f"dataset_train_split: {place} has no file of a split '{names.words['train'][0]}' (there: {there[:400]}){way}"
        )
    by_split = {split: _once(of_split) for split, of_split in by_split.items() if of_split}
    used = {os.path.realpath(path) for of_split in by_split.values() for path in of_split.values()}
    unused = [name for name, path in reached.items() if path is None or os.path.realpath(path) not in used]
    return SplitFiles(by_split, unnamed, sorted(unused))


def _walk(folder: Path, names: SplitNames, prefix: str = "", inside: bool = False) -> dict[str, Path | None]:
    """The files of a folder, of its `data` folder and of folders called as a split; what is no file has no path."""
    reached: dict[str, Path | None] = {}
    for path in sorted(folder.iterdir()):
        name = prefix + path.name
        if path.name.startswith(".") or (path.is_symlink() and folder.resolve().is_relative_to(path.resolve())):
            continue
        if not path.is_dir():
            if not _ABOUT.fullmatch(path.name.lower()):
                reached[name] = path if path.is_file() or path.is_symlink() else None  # a pipe would wait for ever
        elif inside or names.word(stem(path.name)) or name.lower() == "data":
            reached |= _walk(path, names, f"{name}/", inside or names.word(stem(path.name)) is not None)
        else:
            reached[f"{name}/"] = None
    return reached


def _match(pattern: str, names: SplitNames) -> dict[str, Path | None]:
    pattern = os.path.expanduser(pattern)
    matches = [Path(p) for p in sorted(glob.glob(pattern, recursive=True))]
    if not matches:
        raise UserError(f"dataset_name: there is no file, folder or glob {pattern}{_instead(pattern)}")
    fixed = Path(
        *[
            part
            for i, part in enumerate(Path(pattern).parts)
            if not glob.has_magic("".join(Path(pattern).parts[: i + 1]))
        ]
    )
    reached: dict[str, Path | None] = {}
    for path in matches:
        name = path.relative_to(fixed).as_posix()
        if not path.is_dir():
            if not _ABOUT.fullmatch(path.name.lower()):
                reached[name] = path if path.is_file() or path.is_symlink() else None
        elif "**" not in pattern:  # which reaches the files of folders itself
            if names.word(stem(path.name)):
                reached |= _walk(path, names, f"{name}/", inside=True)
            else:
                reached[f"{name}/"] = None
    return reached


def _instead(name: str) -> str:
    """What could have been meant by a name that leads nowhere, or why it does."""
    folder = Path(locate(os.path.dirname(name) or "."))
    if glob.has_magic(name):
        return ""
    if not folder.is_dir():
        return f", and no folder {folder}"
    if found := near(folder / Path(name).name):
        return f"; did you mean {' or '.join(str(path) for path in found)}?"
    there = [path.name for path in sorted(folder.iterdir()) if data_suffix(path.name)]
    return f"; data files in {folder.resolve()}: {shortened(there) or 'none'}"


def _words(names: SplitNames, files: dict[str, Path], is_glob: bool) -> dict[str, str | None]:
    """The word of a split in each file's name; None where it says two, absent where it says none.

    Folders and whole names count first. A word inside longer names counts where it tells several splits apart that are
    called the same otherwise: shop_train and shop_test, and not blood_test beside train.
    """
    words: dict[str, str | None] = {}
    families: dict[str, dict[str, str]] = defaultdict(dict)
    for name in files:
        *folders, file = name.split("/")
        found = {word for part in (*folders, file) if (word := names.word(stem(part)))}
        if len({tuple(names.splits(word)) for word in found}) > 1:
            words[name] = None
        elif found:
            words[name] = found.pop()
        elif inside := names.word_inside(stem(file)):
            word, family = inside
            families["/".join((*folders, family))][name] = word
    told_apart = [
        family for family in families.values() if len({s for word in family.values() for s in names.splits(word)}) > 1
    ]
    if any(word in names.words["train"] for word in words.values() if word) and not is_glob:
        return words
    if len(told_apart) > 1 and not is_glob:
        some = ", ".join(next(iter(family)) for family in told_apart)
        raise UserError(
            f"dataset_name: {some} and their like are several data sets in one folder; give each a folder of its own"
        )
    for family in told_apart:
        words |= family
    return words


def _once(files: dict[str, Path]) -> dict[str, Path]:
    """The files without those that are reached by a second name.

    Raises:
        UserError: for one name in two formats, which is mostly the same rows twice.
    """
    first: dict[str, str] = {}
    kept: dict[str, Path] = {}
    seen: set[str] = set()
    for name, path in files.items():
        if (real := os.path.realpath(path)) in seen:
            continue
        seen.add(real)
        if (other := first.setdefault(stem(name), name)) != name:
            raise UserError(f"dataset_name: {other} and {name} are one name in two formats; remove one of them")
        kept[name] = path
    return kept
