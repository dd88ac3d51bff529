"""A folder of versions: one is built beside the others and takes their place at once; who reads keeps what he has opened.

    FOLDER/current.json   the version that is read, and the format of it
    FOLDER/7/             a version, whole; its file `lock` is held by those who read it
    FOLDER/8.partial/     one that is being built, or was when its build was killed
    FOLDER/lock           held by the build

Imports no torch.
"""

import fcntl
import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from carelm.errors import UserError, first_line
from carelm.files import made_whole, read_json, write_whole
from carelm.keys import RETRIEVAL_KEYS
from carelm.next_steps import only
from carelm.ranks import say

CURRENT, LOCK = "current.json", "lock"
FORMAT = 1  # of what a version holds
OF_AN_INDEX = ("config", "model_name_or_path", "dataset_name", "output_dir", "strip_html", *RETRIEVAL_KEYS)


def current(folder: Path) -> int | None:
    """The version that is read; None where there is none.

    Raises:
        UserError: where it is of a newer format.
    """
    found = read_json(folder / CURRENT)
    if found.get("format", FORMAT) > FORMAT:
        raise UserError(
            f"index: {folder} is of format {found['format']}, which a newer CareLM has written (this one reads {FORMAT}); "
            "update CareLM, or set another folder"
        )
    is_there = found.get("format") == FORMAT and (folder / str(found["version"])).is_dir()
    return found["version"] if is_there else None


def open_current(folder: Path) -> tuple[Path, IO[bytes]]:
    """The folder of the current version, and a lock that keeps it for as long as it is open.

    Raises:
        UserError: where there is none, or only one that is half built.
    """
    while (version := current(folder)) is not None:
        path = folder / str(version)
        try:
            lock = open(path / LOCK, "rb")
        except FileNotFoundError:
            if path.is_dir():
                raise UserError(f"index: {path} is damaged (it has no {LOCK}); make it: {how_to_build()}") from None
            continue  # taken away since: another is current
        fcntl.flock(lock, fcntl.LOCK_SH)
        if path.is_dir():
            return path, lock
        lock.close()
    state = "is half built" if [*folder.glob("*.partial/")] else "is not there yet"
    raise UserError(f"index: {folder} {state}; make it: {how_to_build()}")


@contextmanager
def building(folder: Path) -> Iterator[None]:
    """Keeps other builds of this folder waiting; what killed ones have left is taken away, and versions that nobody reads.

    Raises:
        UserError: where the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "w")
    except OSError as error:
        raise UserError(f"index: {folder} cannot be written ({error.strerror}); set index to another folder") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another build of {folder} is under way; this one waits for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob("*.partial/"):
            shutil.rmtree(left, ignore_errors=True)
        yield
        for old in folder.iterdir():
            if old.name.isdecimal() and old.name != str(current(folder)):
                _remove_unread(old)


@contextmanager
def next_version(folder: Path) -> Iterator[Path]:
    """An empty folder that becomes the current version once all within has gone well; of one that fails nothing is left.

    Raises:
        UserError: for an error of the disk within.
    """
    version = 1 + max((int(path.name) for path in folder.iterdir() if path.name.isdecimal()), default=0)
    with made_whole(folder / str(version), key="index") as aside:
        aside.mkdir()
        (aside / LOCK).touch()
        try:
            yield aside
        except RuntimeError as error:  # what LanceDB raises of a disk
            raise OSError(reason_of(error)) from None
    write_whole(folder / CURRENT, json.dumps({"version": version, "format": FORMAT}))


def _remove_unread(version: Path) -> None:
    with open(version / LOCK, "a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return  # it is read; the next build asks again
        aside = version.with_name(f"{version.name}.partial")
        version.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def reason_of(error: Exception) -> str:
    """What LanceDB says, without the places in its source."""
    return re.sub(r",? /\S+\.rs:\S*", "", first_line(error))


def how_to_build() -> str:
    """The command that makes the index, with the words of this one that say what lies in it, and where."""
    return shlex.join(["python", "serve/index.py", *(only(sys.argv[1:], *OF_AN_INDEX) or ["--config", "RECIPE"])])
