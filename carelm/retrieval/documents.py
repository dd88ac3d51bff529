"""Documents: which files a recipe's `documents` reach, and what each of them says. Imports no torch."""

import fnmatch
import glob
import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from carelm.data.csv_text import find_encoding
from carelm.data.readers import DATA_SUFFIXES, data_suffix
from carelm.errors import UserError
from carelm.files import locate, near
from carelm.recipe import Recipe
from carelm.retrieval.content import INSTALL, Document, FileReport, Unreadable, one_line
from carelm.retrieval.docx import read_docx
from carelm.retrieval.html import looks_like_html, read_html
from carelm.retrieval.markdown import read_markdown, read_text
from carelm.retrieval.pdf import read_pdf
from carelm.retrieval.tables import read_table

HTML, MARKDOWN, TEXT = (".html", ".htm", ".xhtml"), (".md", ".markdown"), (".txt", ".text")
SUFFIXES = (".pdf", ".docx", *HTML, *MARKDOWN, *TEXT, *DATA_SUFFIXES)
READ = "PDF, DOCX, HTML, Markdown, text, and rows (CSV, JSONL, JSON, Parquet)"  # for messages
MOST_BYTES = 2**29
# Documents of other programs, each with the way to one that is read: they are named, where a picture or a program is not.
OTHERS = {
    **dict.fromkeys((".doc", ".dot", ".rtf", ".odt", ".pages", ".wpd", ".docm", ".dotx"), "save it as DOCX or PDF"),
    **dict.fromkeys((".ppt", ".pptx", ".odp", ".key", ".epub", ".xps", ".djvu", ".mht", ".mhtml"), "save it as PDF"),
    **dict.fromkeys((".xls", ".xlsx", ".xlsm", ".ods", ".numbers"), "save each sheet as CSV in UTF-8"),
    **dict.fromkeys((".eml", ".msg", ".rst", ".adoc", ".tex", ".xml"), "save it as text, HTML or PDF"),
}


@dataclass
class Found:
    """What `documents` reaches.

    Attributes:
        files: by the names that are shown, which hold no folder above the entry that reached them.
        unused: what lies there and is no document.
    """

    files: dict[str, Path] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def find(entries: list[str]) -> Found:
    """The files of files, folders (in depth) and globs, each once. Hidden files are left out.

    Raises:
        UserError: where an entry leads nowhere, or nothing that is reached is a document.
    """
    if not entries:
        raise UserError('documents: none is named; write documents: [docs/, "manuals/*.pdf"] (files, folders or globs)')
    found, reached = Found(), set()
    for entry in entries:
        for path, name in _reach(entry):
            if (real := os.path.realpath(path)) in reached:
                continue
            reached.add(real)
            is_named = path == Path(locate(entry))
            is_document = path.name.lower().endswith((*SUFFIXES, *OTHERS)) and not path.name.startswith(
                "~$"
            )  # Word's lock
            if path.is_dir():
                found.unused.append(f"{shown(name)}/ (cannot be read)")
            elif is_named or is_document:
                found.files[_alone(shown(name), path, found.files)] = path
            else:
                found.unused.append(shown(name))
    if not found.files:
        there = ", ".join(found.unused[:8]) or "nothing"
        raise UserError(f"documents: {', '.join(entries)} holds no document (there: {there}); what is read: {READ}")
    return found


def shown(name: str) -> str:
    """A file's name as it can be printed and written: what is no UTF-8 in it as a sign of its own, on one line."""
    return re.sub(r"[^\S ]|[\x00-\x1f\x7f]", "\ufffd", os.fsencode(name).decode("utf-8", "replace")) or "\ufffd"


def _alone(name: str, path: Path, files: dict[str, Path]) -> str:
    """The name, with as many of the folders above in front of it as tell it from the others."""
    parents = [p.name for p in Path(os.path.abspath(path)).parents if p.name]
    for number in range(len(parents) + 1):
        longer = "/".join([*map(shown, reversed(parents[:number])), name]) if number else name
        if longer not in files:
            return longer
    return _alone(f"{name} ", path, files)  # two names that differ in what is no UTF-8


def _reach(entry: str) -> Iterator[tuple[Path, str]]:
    """The files that one entry reaches, each with its name below it; of a folder that cannot be read the folder."""
    place = Path(locate(entry))
    if place.is_dir():
        yield from ((path, path.relative_to(place).as_posix()) for path in _walk(place))
    elif os.path.lexists(place):
        yield place, place.name
    elif glob.has_magic(entry):
        parts = Path(entry).parts
        fixed = next(i for i, part in enumerate(parts) if glob.has_magic(part))
        folder, pattern = Path(locate(str(Path(*parts[:fixed])))) if fixed else Path(), parts[fixed:]
        matches = _match(folder, pattern)
        if not matches:
            raise UserError(f"documents: no file matches {entry}; what is read: {READ}")
        yield from ((path, path.relative_to(folder).as_posix()) for path in matches)
    else:
        meant = "".join(f"; did you mean {alike}?" for alike in near(place)[:1])
        raise UserError(f"documents: there is no file, folder or glob {entry}{meant}")


def _match(folder: Path, pattern: tuple[str, ...]) -> list[Path]:
    """The files below a folder that a pattern names, and those in folders that it names. ** is walked here: the standard
    library's goes round links that lead back until the path is too long."""
    if "**" not in pattern:
        matches = sorted(map(Path, glob.glob(str(Path(glob.escape(str(folder)), *pattern)))))
        return [file for match in matches for file in (_walk(match) if match.is_dir() else [match])]
    parts = ["(?:[^/]+/)*" if part == "**" else fnmatch.translate(part).removesuffix(r"\Z") + "/" for part in pattern]
    whole = re.compile(
        "".join(parts).removesuffix("/").removesuffix("(?:[^/]+/)*") + (".*" if pattern[-1] == "**" else "")
    )
    return [path for path in _walk(folder) if whole.fullmatch(path.relative_to(folder).as_posix())]


def _walk(folder: Path) -> list[Path]:
    """The files of a folder, in depth and sorted; each folder once, however many links lead to it."""
    files, folders, walked = [], [folder], set()
    while folders:
        folder = folders.pop()
        if (real := os.path.realpath(folder)) in walked:
            continue
        walked.add(real)
        try:
            entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
        except OSError:
            files.append(folder)
            continue
        for entry in entries:
            (folders if os.path.isdir(entry.path) else files).append(Path(entry.path))
    return sorted(files)


def doubles(sha256: dict[str, str]) -> dict[str, str]:
    """Of files by their hashes those with the content of another, each with the name of that one, the first of them."""
    first: dict[str, str] = {}
    for name in sorted(sha256):
        first.setdefault(sha256[name], name)
    return {name: first[digest] for name, digest in sha256.items() if first[digest] != name}


def read(path: Path, name: str, recipe: Recipe, report: FileReport) -> list[Document]:
    """What a file says: one document, of a table one for each row. What is left out is counted in the report.

    Raises:
        Unreadable: with the reason.
        UserError: where the packages that read it are not installed.
    """
    try:
        if not path.is_file():
            raise Unreadable("is gone, or a link that leads nowhere" if not path.exists() else "is no regular file")
        size = path.stat().st_size
        if size == 0:
            raise Unreadable("is empty (0 bytes)")
        if size > MOST_BYTES:
            raise Unreadable(f"has {size / 2**20:,.0f} MB, more than {MOST_BYTES // 2**20} are not read; split it")
        with open(path, "rb") as file:
            head = file.read(2**10)
            if data_suffix(path.name) and not head.startswith(b"%PDF-"):
                return read_table(path, name, recipe, report)
            document = _read(path, head, head + file.read(), report)
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from None
    document.name = name
    document.title = one_line(document.title) or one_line(re.sub(r"[_\W]+", " ", Path(name).stem)) or name
    said = document.columns  # product_column is that of tables, and may be any file's
    document.product = one_line(document.product or said.get(recipe.product_column or "") or said.get("product"))
    return [document]


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"documents: {package} is not installed, without which some are not read: {INSTALL}")


def _read(path: Path, head: bytes, raw: bytes, report: FileReport) -> Document:
    """By what the file is, which its name may not say."""
    suffix = path.suffix.lower()
    if head.startswith(b"%PDF-") or (suffix == ".pdf" and b"%PDF-" in head):
        _needs("pypdfium2")
        return read_pdf(raw, report)
    if suffix in OTHERS:
        raise Unreadable(f"has an ending that is not read ({suffix}); {OTHERS[suffix]}")
    if head.startswith(b"PK\x03\x04"):
        _needs("docx")
        return read_docx(raw, report)
    if head.startswith(b"\xd0\xcf\x11\xe0"):
        raise Unreadable("is a Word file of the old kind (.doc), or has a password; save it as DOCX without one")
    if head.startswith(b"{\\rtf"):
        raise Unreadable("is RTF; save it as DOCX or PDF")
    if suffix in HTML or (suffix not in MARKDOWN and looks_like_html(head)):
        if suffix not in HTML:
            report.notes.append("is read as HTML")
        _needs("lxml")
        return read_html(raw, report)
    if suffix in (".pdf", ".docx"):
        raise Unreadable(f"is no {suffix[1:].upper()} (it begins {head[:12]!r})")
    if suffix not in (*MARKDOWN, *TEXT):
        raise Unreadable(f"has an ending that is not read ({suffix or 'none'}); what is read: {READ}")
    try:
        encoding, called = find_encoding(raw, path)
    except UserError as error:
        raise Unreadable(
            str(error).removeprefix(f"{path}: ").replace("save it as CSV in UTF-8", "save it as text")
        ) from None
    report.notes += [f"is read as {called}"] if called else []
    text = raw.decode(encoding)
    return read_markdown(text, report) if suffix in MARKDOWN else read_text(text, report)
