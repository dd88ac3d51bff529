"""Builds an index, or brings it up to date: what has not changed is taken over, and a new version takes the old one's place."""

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from carelm.chat.chat import make_chat
from carelm.errors import UserError
from carelm.files import code_fingerprint, fingerprint, write_whole
from carelm.ranks import say
from carelm.recipe import Recipe
from carelm.retrieval.content import FileReport
from carelm.retrieval.documents import doubles, find
from carelm.retrieval.embedder import Embedder, check_installed, find_embedder
from carelm.retrieval.index import ALWAYS_FILTERED, COLUMNS, FLAT, MANIFEST, TABLE, Index, index_folder, to_passage
from carelm.retrieval.passages import Passage, format_report, passages_of
from carelm.retrieval.versions import building, current, next_version

PASSAGE_KEYS = ("chunk_tokens", "passage_template", "product_column", "title_column")
FRESH_NS = 2 * 10**9  # a file written so shortly before it is looked at may change again without its time showing it


@dataclass(frozen=True)
class Content:
    """What an index is made of.

    Attributes:
        files: those that one name stands for: it is read again where one of them has changed.
        read: the passages of a name, and what became of it, as JSON.
        settings: what the passages follow from besides the files, as JSON.
        filter_columns: columns of passages that a search can be narrowed by.
    """

    files: dict[str, list[Path]]
    read: Callable[[str], tuple[list[Passage], dict[str, Any]]]
    settings: dict[str, Any]
    filter_columns: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What an update has done.

    Attributes:
        changed: whether there is a new version.
        files: what became of each file, by name.
        unused: what lies among the documents and is of no kind that is read.
        read, removed: names of those that were opened, readable or not, and of those that are gone.
        embedded: passages whose vectors were made anew.
        too_long: of those the ones that the embedder does not read to their end.
    """

    index: str
    version: int = 0
    changed: bool = False
    passages: int = 0
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    read: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    embedder: str | None = None
    embedded: int = 0
    too_long: int = 0
    seconds: float = 0.0
    bytes: int = 0

    @property
    def not_read(self) -> dict[str, str]:
        """Why files could not be read, by name."""
        return {name: report["unreadable"] for name, report in self.files.items() if report.get("unreadable")}

    def lines(self) -> str:
        """For people: what became of each file, and the sum of it."""
        table = format_report({name: FileReport(**report) for name, report in self.files.items()}, self.unused)
        gone = "".join(f"\ngone: {name}" for name in self.removed)
        read = len(self.read) - len(self.not_read.keys() & {*self.read})
        done = f"{read} of {len(self.files)} files read, {self.embedded} passages embedded"
        what = f"version {self.version}: {done}, in {self.seconds:.1f} s" if self.changed else "nothing has changed"
        long = f"\n{self.too_long} of the embedded passages are longer than the embedder reads" if self.too_long else ""
        return (
            f"{table}{gone}{long}\nindex: {self.index}, {self.passages} passages, {self.bytes / 2**20:.1f} MB; {what}"
        )


def update(recipe: Recipe) -> Report:
    """The index of the recipe's documents, made or brought up to date.

    Raises:
        UserError: where there is no document, or no passage in any, and where the disk does not take the index.
    """
    tokenizer = make_chat(recipe).tokenizer
    found = find(recipe.documents)

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def read(name: str) -> tuple[list[Passage], dict[str, Any]]:
        passages, report = passages_of(found.files[name], name, recipe, count)
        return passages, dataclasses.asdict(report)

    settings = {key: getattr(recipe, key) for key in PASSAGE_KEYS}
    settings |= {
        "tokens": fingerprint(tokenizer.backend_tokenizer.to_str()),
        "code": code_fingerprint("carelm/retrieval"),
    }
    content = Content({name: [path] for name, path in found.files.items()}, read, settings, recipe.filter_columns)
    report = build(index_folder(recipe), content, find_embedder(recipe))
    report.unused = found.unused
    return report


def build(folder: Path, content: Content, embedder: Embedder | None) -> Report:
    """Makes the index in `folder` what `content` is; several builds of it wait for one another.

    Raises:
        UserError: where there is no passage, and where the disk does not take the index. The version before stays.
    """
    check_installed("lancedb")
    began, report = time.monotonic(), Report(str(folder), embedder=embedder and str(embedder.folder))
    with building(folder):
        old = _open(folder)
        before = old.manifest if old else {"files": {}, "settings": None, "embedder": None, "filters": None}
        same_settings = before["settings"] == content.settings
        manifest = {
            "settings": content.settings,
            "embedder": embedder and {"name": str(embedder.folder), "fingerprint": embedder.fingerprint},
            "filters": dict.fromkeys(ALWAYS_FILTERED) | dict.fromkeys(content.filter_columns),
            "files": {},
        }
        manifest["filters"] = {
            name: name if name in ALWAYS_FILTERED else f"filter_{number}"
            for number, name in enumerate(manifest["filters"])
        }
        kept, passages = set(), []
        earlier = before["files"] if same_settings else {}
        files = manifest["files"] = {name: _look(paths, earlier.get(name)) for name, paths in content.files.items()}
        double_of = doubles({name: file["sha256"] for name, file in files.items()})
        for name, file in files.items():
            file["double_of"] = double_of.get(name)
            if {**file, "report": None} == {**earlier.get(name, {}), "seen": file["seen"], "report": None}:
                kept.add(name)
                file["report"] = earlier[name]["report"]
            elif file["double_of"] and not files[file["double_of"]]["report"].get("unreadable"):
                file["report"] = {"unreadable": f"has the same content as {file['double_of']}"}
                report.read.append(name)
            else:
                found, file["report"] = content.read(name)
                passages += [(name, passage) for passage in found]
                report.read.append(name)
        report.removed = sorted(before["files"].keys() - files.keys())
        same_embedder = _fingerprint(before) == _fingerprint(manifest)
        is_same = (
            old and not (report.read or report.removed) and same_embedder and before["filters"] == manifest["filters"]
        )
        if is_same:
            if files != before["files"]:  # looked at again, and the same
                write_whole(old.version / MANIFEST, json.dumps(before | {"files": files}))
        else:
            rows = old.table.to_arrow() if old else None
            passages = [*_kept_passages(rows, kept), *passages] if rows else passages
            if not passages:
                raise UserError(f"documents: none of {len(content.files)} files has a passage{_why_none(files)}")
            vectors = None
            if embedder:
                vectors, report.embedded, report.too_long = _vectors(
                    embedder, passages, rows if same_embedder else None
                )
                manifest["embedder"]["precision"] = embedder.precision or before["embedder"]["precision"]
            manifest["passages"] = len(passages)
            with next_version(folder) as aside:
                _write(aside, manifest["filters"], passages, vectors)
                seconds = time.monotonic() - began
                manifest["built"] = {"seconds": seconds, "read": len(report.read), "embedded": report.embedded}
                (aside / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
            report.changed = True
        if old:
            old.close()
        now = Index(folder)
        report.version, report.passages = int(now.version.name), now.manifest["passages"]
        report.files = {name: state["report"] for name, state in now.manifest["files"].items()}
        report.bytes = sum(file.stat().st_size for file in now.version.rglob("*") if file.is_file())
        now.close()
    report.seconds = time.monotonic() - began
    return report


def _open(folder: Path) -> Index | None:
    """The version before; None where there is none, or a damaged one, which is said."""
    if current(folder) is None:
        return None
    try:
        return Index(folder)
    except UserError as error:
        say(f"{str(error).partition(';')[0]}: all is read anew")
        return None


def _look(paths: list[Path], earlier: dict[str, Any] | None) -> dict[str, Any]:
    """Size and time of files, and a hash of what is in them, taken only where one of the two is another than before."""
    now, seen = time.time_ns(), []
    for path in paths:
        try:
            about = path.stat()
        except OSError:
            seen.append([0, 0])
        else:
            seen.append([about.st_size, about.st_mtime_ns if about.st_mtime_ns < now - FRESH_NS else None])
    if earlier and earlier["seen"] == seen and None not in (at for _, at in seen):
        return {"seen": seen, "sha256": earlier["sha256"]}
    digest = hashlib.sha256()
    for path in paths:
        try:
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            digest.update(os.strerror(error.errno).encode())
    return {"seen": seen, "sha256": digest.hexdigest()}


def _fingerprint(manifest: dict[str, Any]) -> str | None:
    return manifest["embedder"] and manifest["embedder"]["fingerprint"]


def _why_none(files: dict[str, Any]) -> str:
    reasons = [f" ({name} {why})" for name, state in files.items() if (why := state["report"].get("unreadable"))]
    return reasons[0] if reasons else ""


def _kept_passages(rows: Any, kept: set[str]) -> list[tuple[str, Passage]]:
    return [
        (row["file"], to_passage(row)) for row in rows.select(["file", *COLUMNS]).to_pylist() if row["file"] in kept
    ]


def _vectors(embedder: Embedder, passages: list[tuple[str, Passage]], rows: Any) -> tuple[np.ndarray, int, int]:
    """The passages' vectors, float32 [passages, dimension], how many were made anew, and how many of those texts are too long;
    those of a text that `rows` have are taken over."""
    texts = [passage.indexed for _, passage in passages]
    known = {}
    if rows is not None:
        flat = rows["vector"].combine_chunks().flatten().to_numpy().reshape(rows.num_rows, -1)
        known = dict(zip(rows["indexed"].to_pylist(), flat))
    new = [text for text in dict.fromkeys(texts) if text not in known]
    too_long = 0
    if new:
        say(f"{len(new)} passages are embedded by {embedder.folder.name}")
        known |= zip(new, embedder.embed(new))
        too_long = embedder.count_too_long(new)
    return np.stack([known[text] for text in texts]), len(new), too_long


def _write(
    aside: Path, filters: dict[str, str], passages: list[tuple[str, Passage]], vectors: np.ndarray | None
) -> None:
    """The table and its indexes; `filters` are the columns that are filtered by, by the names that a search calls them."""
    import lancedb
    import pyarrow
    from lancedb.index import FTS, Bitmap, IvfFlat

    columns = {name: [getattr(passage, name) for _, passage in passages] for name in COLUMNS}
    columns["columns"] = [json.dumps(values, ensure_ascii=False) for values in columns["columns"]]
    columns["file"] = [name for name, _ in passages]
    columns["indexed"] = [passage.indexed for _, passage in passages]
    for name, column in filters.items():
        if name not in ALWAYS_FILTERED:
            columns[column] = [passage.columns.get(name) for _, passage in passages]
    arrays = {
        name: pyarrow.array(values, pyarrow.int32() if name == "page" else pyarrow.string())
        for name, values in columns.items()
    }
    if vectors is not None:
        arrays["vector"] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(vectors.reshape(-1)), vectors.shape[1])
    table = lancedb.connect(str(aside)).create_table(TABLE, pyarrow.table(arrays))
    table.create_index("indexed", config=FTS())  # English: stems, and no words such as `the`
    for column in filters.values():
        table.create_index(column, config=Bitmap())
    if vectors is not None and len(vectors) > FLAT:
        table.create_index("vector", config=IvfFlat(distance_type="cosine"))
