"""One file -> its rows: .jsonl, .json, .csv, .tsv and .parquet, each also as .gz but the last."""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from carelm.data.csv_text import read_csv
from carelm.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow

Rows = list[tuple[str, dict[str, Any]]]  # (file:row, row); rows count from 1

_TEXTS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
DATA_SUFFIXES = (*_TEXTS, ".parquet", *(suffix + ".gz" for suffix in _TEXTS))
READ = f"{', '.join(_TEXTS)} (each also as .gz) and .parquet"  # for messages


@dataclass(frozen=True)
class FileRows:
    """What one file holds: its rows by the keys of a JSON object with several lists, else under None."""

    by_key: dict[str | None, Rows]
    taken_for: str = ""  # the encoding and the separator, where they are not the usual ones


def data_suffix(name: str) -> str | None:
    """`Train.CSV` -> ".csv", `a.jsonl.gz` -> ".jsonl.gz"; None for a file that is not read."""
    return next((s for s in sorted(DATA_SUFFIXES, key=len, reverse=True) if name.lower().endswith(s)), None)


def stem(name: str) -> str:
    """`train.jsonl.gz` -> "train"."""
    return name[: len(name) - len(data_suffix(name) or "")]


def series(source: str) -> str:
    """The file of a row (file:row) less the numbers that tell parts apart: an id in train-1.csv is the same in train-2.csv,
    and may be another one's in shop.csv."""
    return re.sub(r"\d+", "", source.rpartition(":")[0])


def read_file(path: Path, name: str) -> FileRows:
    """The rows of one file, called `name` in messages to people; text stays as it is.

    Raises:
        UserError: for a file that cannot be read or parsed, with the row.
    """
    suffix = data_suffix(path.name) or ""
    try:
        if suffix == ".parquet":
            return FileRows({None: _number(name, _read_parquet(path))})
        with gzip.open(path) if suffix.endswith(".gz") else open(path, "rb") as file:
            if suffix.startswith((".csv", ".tsv")):
                rows, taken_for = read_csv(file.read(), path)
                return FileRows({None: _number(name, rows)}, taken_for)
            encoding = json.detect_encoding(file.read(4))  # JSON begins with two characters of ASCII
            taken_for = "" if encoding.startswith("utf-8") else encoding[:6].upper()
            file.seek(0)
            if suffix.startswith(".json") and not suffix.startswith(".jsonl"):
                lists = _read_json(_decode(file.read(), encoding, str(path)), path)
                rows = {k: _number(f"{name}:{k}" if len(lists) > 1 else name, v) for k, v in lists.items()}
                return FileRows(rows, taken_for)
            lines = _decode(file.read(), encoding, str(path)).encode().splitlines(True) if taken_for else file
            return FileRows({None: [(f"{name}:{number}", row) for number, row in _read_jsonl(lines, path)]}, taken_for)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"dataset_name: {path} cannot be read ({getattr(error, 'strerror', None) or error})") from None


def _number(name: str, rows: list[dict[str, Any]]) -> Rows:
    return [(f"{name}:{number}", row) for number, row in enumerate(rows, 1)]


def _read_jsonl(lines: Iterable[bytes], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        where = f"{path}:{number}"
        text = _decode(line, "utf-8-sig" if number == 1 else "utf-8", where)
        if not text.strip():
            continue
        row, twice = _parse(text, where)
        if twice:
            raise UserError(f"{where}: the key {twice[0][1]!r} stands twice in one object; rename or remove one")
        if not isinstance(row, dict):
            hint = "; a list of objects is .json" if isinstance(row, list) else ""
            raise UserError(f"{where}: a line of a .jsonl file must be an object, such as {{...}}{hint}")
        yield number, row


def _decode(raw: bytes, encoding: str, where: str) -> str:
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        name = encoding.removesuffix("-sig").upper()
        raise UserError(f"{where}: not {name} at byte {error.start + 1}; save the file as UTF-8") from None


def _parse(text: str, where: str) -> tuple[Any, list[tuple[dict, str]]]:
    """JSON text -> its value, and the objects in it that hold a key twice, each with that key."""
    twice = []

    def to_dict(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice.append((found, next(key for key in keys if keys.count(key) > 1)))
        return found

    try:
        return json.loads(text, object_pairs_hook=to_dict), twice
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        hint = "; one object a line is .jsonl" if error.msg == "Extra data" else ""
        if error.msg.startswith(("Unterminated string", "Invalid control character")) and not line:
            hint = "; the line ends within a text: it is cut, or a line end of the text is not written as \\n"
        reason = error.msg.removesuffix(" at").removesuffix(" starting")
        raise UserError(f"{where}: not JSON ({reason} at {line}character {error.colno}){hint}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists in lists
        raise UserError(f"{where}: JSON that cannot be read ({error})") from None


def _read_json(text: str, path: Path) -> dict[str | None, list[dict[str, Any]]]:
    value, twice = _parse(text, str(path))
    lists = {None: value} if isinstance(value, list) else _lists(value) if isinstance(value, dict) else {}
    if twice:
        places = [f"{path}:{key or ''}{':' if key else ''}{i}" for key, rows in lists.items()
                  for i, row in enumerate(rows, 1) if _holds(row, twice[0][0])]  # fmt: skip
        where = places[0] if places else str(path)
        raise UserError(f"{where}: the key {twice[0][1]!r} stands twice in one object; rename or remove one")
    for key, rows in lists.items():
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict):
                raise UserError(f"{path}: entry {number} of the list{f' {key!r}' if key else ''} is no object {{...}}")
    if not lists:
        keys = f" (its keys: {', '.join(map(str, value))[:200]})" if isinstance(value, dict) else ""
        raise UserError(f"{path}: a .json file must hold a list of objects, or an object with such lists{keys}")
    return lists


def _lists(value: dict[str, Any]) -> dict[str | None, list[Any]]:
    """The lists of objects of a JSON object, empty ones too; a list of anything else holds no row."""
    lists = {key: part for key, part in value.items() if isinstance(part, list)}
    return {key: part for key, part in lists.items() if not part or any(isinstance(row, dict) for row in part)}


def _holds(value: Any, wanted: dict) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is wanted or any(_holds(part, wanted) for part in parts)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        # ParquetFile and not read_table: a folder called lang=en adds no column.
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for name in names:
                if names.count(name) > 1:
                    raise UserError(f"{path}: the column '{name}' is there {names.count(name)} times; rename one")
            return [row for batch in file.iter_batches() for row in arrow_rows(pyarrow.Table.from_batches([batch]))]
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: not Parquet ({first_line(error)})") from None
    except (KeyError, ValueError, OverflowError) as error:  # a map with a key twice, a date of the year 10000
        reason = " ".join(str(error.args[0]).split())[:200]
        raise UserError(f"{path}: a value cannot be read ({reason}); write the column as text") from None


def arrow_rows(table: "pyarrow.Table") -> list[dict[str, Any]]:
    """The rows of an Arrow table: maps are objects, and a number of 16 or 32 bits has the digits that it was written with."""
    rows = table.to_pylist(maps_as_pydicts="strict")
    for field in table.schema:
        if re.search(r"\b(halffloat|float)\b", str(field.type)):
            for row in rows:
                row[field.name] = _with_own_digits(row[field.name], field.type)
    return rows


def _with_own_digits(value: Any, kind: "pyarrow.DataType") -> Any:
    """19.99 and not 19.989999771118164, in lists and objects too."""
    import numpy as np
    import pyarrow

    if value is None or not re.search(r"\b(halffloat|float)\b", str(kind)):
        return value
    if kind in (pyarrow.float16(), pyarrow.float32()):
        return float(str(np.dtype(kind.to_pandas_dtype()).type(value)))
    if pyarrow.types.is_dictionary(kind):
        return _with_own_digits(value, kind.value_type)
    if pyarrow.types.is_struct(kind):
        return {field.name: _with_own_digits(value[field.name], field.type) for field in kind}
    if pyarrow.types.is_map(kind):
        return {key: _with_own_digits(item, kind.item_type) for key, item in value.items()}
    return [_with_own_digits(item, kind.value_type) for item in value] if hasattr(kind, "value_type") else value
