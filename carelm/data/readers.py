"""One file -> its rows: .jsonl, .json, .csv and .parquet."""

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from carelm.errors import UserError

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


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
