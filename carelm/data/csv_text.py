"""The text of a CSV file: its encoding, what separates its columns, its rows."""

import codecs
import csv
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from carelm.errors import UserError

SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_SEPARATOR_LINE = re.compile(r"sep=([,;|\t])\r?\n")  # a first line that Excel writes and reads
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins as UTF-16's does: looked at first
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_NO_TEXT = {
    b"PK\x03\x04": "an Excel workbook or a ZIP archive",
    b"\xd0\xcf\x11\xe0": "an Excel workbook",
    b"\x1f\x8b": "gzip (call it .csv.gz)",
    b"PAR1": "Parquet",
}
_UTF8_LETTER = re.compile(rb"[\xc2-\xdf][\x80-\xbf]|[\xe0-\xef][\x80-\xbf]{2}")
_LETTERS = "A-Za-zÀ-ÖØ-öø-ÿŒœŠšŽžŸƒ"
# The letters beyond ASCII of German, French, Spanish, Portuguese, Italian, the Nordic languages and Dutch.
_ALPHABETS = [set(letters) for letters in ("äöüß", "àâæçèéêëîïôœùûüÿ", "áéíñóúü", "àáâãçéêíóôõú", "àèéìîòù", "åäöæøé",
                                           "èéêëïóöü")]  # fmt: skip
# Signs where they stand in such languages: between letters, after a unit, not after a letter, not between letters.
_SIGNS = re.compile(
    rf"[’‘–—·…®™\xa0]|(?<=m)(?<![{_LETTERS}]{{3}})[²³]|(?<=[nN])º|(?<![{_LETTERS}])[¿¡²³ºªµ¼½¾“„‚«‹(]"
    rf"|(?<![{_LETTERS}])[“”„‚«»‹›•€£¥¢§©°±´×÷]|[“”„‚«»‹›•€£¥¢§©°±´×÷](?![{_LETTERS}])"
)
_SIGNS_IN_A_ROW = re.compile(
    rf"[^\x00-\x7f{_LETTERS}“”„‚‘’«»–—…\xa0€]{{2,}}|[^\x00-\x7f{_LETTERS}“”‘’«»–—…\xa0€]{{3,}}"
)


def encoding_by_mark(head: bytes) -> str | None:
    """The encoding that a file's first four bytes name by a byte order mark."""
    return next((name for mark, name in _MARKS.items() if head.startswith(mark)), None)


def find_encoding(raw: bytes, path: Path) -> tuple[str, str]:
    """The encoding of a file's bytes, and how people call it; "" for UTF-8.

    Raises:
        UserError: where no encoding is certain, and for a NUL character.
    """
    for start, what in _NO_TEXT.items():
        if raw.startswith(start):
            raise UserError(f"{path}: no text but {what}; save it as CSV in UTF-8")
    encoding = encoding_by_mark(raw[:4]) or "utf-8"
    if encoding == "utf-8" and raw.count(0) > len(raw) / 4:  # every second byte of plain letters is 0
        even, odd = raw[::2].count(0), raw[1::2].count(0)
        encoding = "utf-16-le" if even * 9 < odd else "utf-16-be" if odd * 9 < even else encoding
    called = "" if encoding.startswith("utf-8") else encoding[:6].upper()
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        text = raw.decode("cp1252", errors="replace")
        example = None if called or _UTF8_LETTER.search(raw) else _western_word(text)
        if example is None:
            line = raw.count(b"\n", 0, error.start) + 1
            raise UserError(
                f"{path}: not {called or 'UTF-8'} on line {line}, and no other encoding is certain; save the file as UTF-8"
            ) from None
        encoding, called = "cp1252", f"cp1252 (such as {example})"
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{path}: a NUL character on line {line}; remove it, or save the file as UTF-8")
    return encoding, called


def _western_word(text: str) -> str | None:
    """A word or sign beyond ASCII of a text decoded as cp1252; None where the text may be in another encoding.

    In another code page of one byte (cp1250, cp1251, Mac, DOS) or of two, words need the letters of several languages at
    once, or signs stand inside words.
    """
    rest = _SIGNS.sub("", text)
    words = [word for word in re.findall(f"[{_LETTERS}]+", rest) if not word.isascii()]
    if _SIGNS_IN_A_ROW.search(text) or re.search(rf"[^\x00-\x7f{_LETTERS}]", rest):
        return None
    for word in set(words):
        if "õ" in re.sub("õ(?=e)", "", word.lower()):  # Portuguese has it before e alone; in cp1250 it is Hungarian
            return None
        if not any({c for c in word.lower() if c > "\x7f"} <= letters for letters in _ALPHABETS):
            return None
    return words[0] if words else re.search(r"[^\x00-\x7f]", text)[0]


def read_csv(raw: bytes, path: Path) -> tuple[list[dict[str, Any]], str]:
    """The rows of a CSV file, and what its encoding and its separator were taken for ("" for UTF-8 and commas).

    Raises:
        UserError: where encoding or separator are not certain, a column name stands twice or a row is ragged.
    """
    csv.field_size_limit(sys.maxsize)
    encoding, called = find_encoding(raw, path)
    separator = _separator(raw, encoding, path)
    usual = "\t" if path.name.removesuffix(".gz").lower().endswith(".tsv") else ","
    taken = [called, f"columns separated by {SEPARATORS.get(separator, separator)}" if separator != usual else ""]
    lines = _lines(raw, encoding, separator, path)
    names = [name.removeprefix("\ufeff") for name in next(lines, [])]  # a mark that a tool has put behind another
    rows = []
    for number, fields in enumerate(lines, 1):
        if len(fields) != len(names):
            title = (
                "; the first line must be the columns' names: take out what stands above them"
                if len(names) == 1
                else ""
            )
            raise UserError(
                f"{path}:{number}: the row's fields are {len(fields)}, the header's {len(names)} (it begins "
                f"{' '.join(fields[0].split())[:30]!r}); quote fields that hold "
                f"{SEPARATORS.get(separator, separator)}, and leave none out{title}"
            )
        rows.append(fields)
    used = [
        i for i, name in enumerate(names) if name.strip() or any(row[i] for row in rows)
    ]  # Excel saves empty columns
    for i in used:
        if (twice := names[:i].count(names[i])) and names[i]:
            raise UserError(f"{path}: the header has the column {names[i]!r} {twice + 1} times; rename or remove one")
    if sum(not names[i].strip() for i in used) > 1:
        raise UserError(f"{path}: the header has several columns without a name; name or remove them")
    rows = [{names[i]: fields[i] for i in used} for fields in rows]
    return rows, ", ".join(part for part in taken if part)


def _lines(raw: bytes, encoding: str, separator: str, path: Path) -> Iterator[list[str]]:
    """The lines as fields, blank ones left out."""
    file = io.TextIOWrapper(io.BytesIO(raw), encoding, newline="")
    skipped = 1 if _SEPARATOR_LINE.fullmatch(file.readline()) else 0
    if not skipped:
        file.seek(0)
    reader = csv.reader(file, delimiter=separator, strict=True)
    try:
        yield from (fields for fields in reader if len(fields) > 1 or (fields and fields[0].strip()))
    except csv.Error as error:
        raise UserError(f"{path}: not CSV on line {reader.line_num + skipped} ({error})") from None


def _separator(raw: bytes, encoding: str, path: Path) -> str:
    """What separates the header's names; where several can, the one that makes all lines of one length."""
    named = _SEPARATOR_LINE.fullmatch(io.TextIOWrapper(io.BytesIO(raw), encoding, newline="").readline())
    if named:
        return named[1]
    possible = [s for s in SEPARATORS if next(_widths(raw, encoding, s, path), 0) > 1]
    if len(possible) < 2:
        return possible[0] if possible else ","
    even = [s for s in possible if len(set(_widths(raw, encoding, s, path))) == 1]
    if len(even) != 1:
        raise UserError(
            f"{path}: the columns may be separated by {' or '.join(SEPARATORS[s] for s in possible)}; save the file with "
            "commas, and quote names that hold one"
        )
    return even[0]


def _widths(raw: bytes, encoding: str, separator: str, path: Path) -> Iterator[int]:
    """The number of fields of each line; -1 where it is no CSV with this separator."""
    try:
        yield from map(len, _lines(raw, encoding, separator, path))
    except UserError:
        yield -1
