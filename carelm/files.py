"""Files and folders: where a name leads, writing whole, hashes. Imports no torch."""

import difflib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from carelm.errors import UserError, first_line

ROOT = Path(__file__).resolve().parent.parent  # where the package lies
PROJECT = ROOT if (ROOT / "train/sft.py").is_file() else None  # none of it lies beside an installed wheel
# The project that this one is a copy of, where a SLURM job has made it (carelm.cluster.job).
ORIGIN = Path((ROOT / "ORIGIN").read_text(encoding="utf-8")) if (ROOT / "ORIGIN").is_file() else None
OWN_CACHE = "~/.cache/carelm"
REAL_BASE = "bases/smollm2-135m-instruct"  # in the cache, once demo/real_base.py has made it, and as a recipe names it
OWN_EMBEDDER = "embedders/all-minilm-l6-v2"  # in the cache, once demo/embedder.py has made it
CODE = (".py", ".j2", ".json", ".yaml", ".sh", ".html", ".js", ".css")


def locate(name: str, *others: Path) -> str:
    """A path as the user means it: from the current folder, else from the project's, else from `others`; unchanged where
    none has it.

    In a SLURM job, what the job has a copy of is that copy, also where it was named as seen from the project's folder.
    """
    there = os.path.expanduser(name)  # unchanged where there is no such home
    for folder in filter(None, (Path.cwd(), PROJECT, ORIGIN, *others)):
        path = folder / there
        if path.exists():
            plain = Path(os.path.normpath(path))
            kept = ROOT / plain.relative_to(ORIGIN) if ORIGIN and plain.is_relative_to(ORIGIN) else path
            return str(kept if kept.exists() else path)
    return name


def here(path: Path) -> Path:
    """A path as seen from the current folder, where it lies below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def near(path: Path) -> list[Path]:
    """What lies in the folder of a file that is not there and is called most like it, the nearest first; at most three."""
    there = {p.name.casefold(): p for p in sorted(path.parent.iterdir())} if path.parent.is_dir() else {}
    found = [there[name] for name in difflib.get_close_matches(path.name.casefold(), there)]
    return [
        p for p in found if difflib.get_close_matches(path.stem.casefold(), [p.stem.casefold()])
    ]  # .yaml is not alike


def cache() -> Path:
    """Where CareLM keeps what it has made and can make again; raises UserError where the user has no home for it."""
    folder = os.path.expanduser(os.environ.get("CARELM_CACHE", OWN_CACHE))
    if folder.startswith("~"):
        raise UserError(
            "CARELM_CACHE: this user has no home folder; set HOME, or CARELM_CACHE to a folder that can be written"
        )
    return Path(folder)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that under its name there is all of it or nothing."""
    aside = path.with_name(path.name + ".partial")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """The same for rows, each a line of JSON."""
    write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


@contextmanager
def made_whole(
    folder: Path, *errors: type[Exception], key: str = "--output_dir", replaces: bool = False
) -> Iterator[Path]:
    """A name beside `folder`, for one that takes its place once all within has gone well; of one that fails nothing is left.
    One that `replaces` a folder leaves that as it is until then.

    Raises:
        UserError: for an OSError or one of `errors` within, which names `key`.
    """
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)  # of one that was killed
    try:
        yield aside
        if replaces and folder.exists():
            before = folder.rename(folder.with_name(folder.name + ".before"))
            aside.rename(folder)
            shutil.rmtree(before)
        else:
            aside.rename(folder)
    except (OSError, *errors) as error:
        raise UserError(
            f"{key}: {folder} is not made, nothing of it is left ({first_line(error)}); see that the disk has room and the "
            "folder can be written to"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def code_fingerprint(*places: str) -> str:
    """A hash of the code and settings in these files and folders of the project, in depth."""
    paths = [ROOT / place for place in places]
    files = (f for p in paths for f in ([p] if p.is_file() else sorted(p.rglob("*"))) if f.suffix in CODE)
    return fingerprint(*(part for f in files for part in (str(f.relative_to(ROOT)), f.read_bytes())))


def fingerprint(*parts: Any) -> str:
    """A short stable hash of anything that JSON can hold, or of bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def read_json(path: Path) -> dict[str, Any]:
    """The file's object; an empty one where there is no file.

    Raises:
        UserError: where it is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is damaged and no JSON ({error}); remove it, or make its folder again") from None
