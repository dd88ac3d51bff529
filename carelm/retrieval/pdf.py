"""PDF as a document: its lines, with where and how they stand on their pages, and what it says of itself. Imports no torch."""

import contextlib
import ctypes
import math
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from carelm.retrieval.content import Document, FileReport, Unreadable, one_line
from carelm.retrieval.pages import COLUMN, HYPHENS, Line, bare, document_of

if TYPE_CHECKING:
    import pypdfium2

WIDEST = 0.62  # of the font's size: what a character of running text takes at most, gaps between words included
GAP = 1.5  # of the font's size: blanks from there on part columns
_BOLD = re.compile(rb"bold|black|heavy|semib|demi|-bx|cmbx", re.I)
_MADE_UP_TITLE = re.compile(
    r"(?:microsoft (?:word|powerpoint|excel) - |untitled|about:blank|https?://|document\d*$|.*\.(?:docx?|pdf|indd|tex|rtf|odt|dvi|qxd)$)",
    re.I,
)


def read_pdf(raw: bytes, report: FileReport) -> Document:
    """Its text by pages and headings, as `document_of` has it.

    Raises:
        Unreadable: for one that is broken, encrypted or without text.
    """
    import pypdfium2

    try:
        pdf = pypdfium2.PdfDocument(raw)
    except pypdfium2.PdfiumError as error:
        if "assword" in str(error) or "ecurity" in str(error):
            raise Unreadable("is encrypted; save it without a password") from None
        raise Unreadable("is a broken PDF; write it anew (print it to PDF), or get it again") from None
    try:
        report.pages = len(pdf)
        pages = [_lines(pdf, number, report) for number in range(len(pdf))]
        outline = _outline(pdf)
        metadata = pdf.get_metadata_dict(skip_empty=True)
        _check_text(pdf, pages, report)
    finally:
        pdf.close()
    title = one_line(metadata.get("Title"))
    if title is not None and _MADE_UP_TITLE.match(title):
        title = None
    return document_of(pages, title, one_line(metadata.get("Subject")), outline, report)


def _check_text(pdf: "pypdfium2.PdfDocument", pages: list[list[Line]], report: FileReport) -> None:
    without = [number for number, lines in enumerate(pages) if not lines]
    scanned = [number for number in without if _has_picture(pdf, number)] if without else []
    if not pages:
        raise Unreadable("has no pages")
    if len(without) == len(pages):
        raise Unreadable("is scanned: has no text; run OCR first" if scanned else "has no text")
    if scanned:
        first = ", ".join(str(number + 1) for number in scanned[:5])
        report.notes.append(
            f"{len(scanned)} of {len(pages)} pages are scanned and have no text (first: {first}); run OCR first"
        )
    text = "".join(line.text for lines in pages for line in lines)
    unreadable = sum(c == "\ufffd" or "\ue000" <= c <= "\uf8ff" or c < " " for c in text)
    if unreadable * 3 > len(text):
        raise Unreadable("has fonts that do not say which letters they draw; run OCR on it")


def _has_picture(pdf: "pypdfium2.PdfDocument", number: int) -> bool:
    import pypdfium2
    import pypdfium2.raw

    try:
        pictures = pdf[number].get_objects(filter=[pypdfium2.raw.FPDF_PAGEOBJ_IMAGE], max_depth=3)
        return next(iter(pictures), None) is not None
    except pypdfium2.PdfiumError:
        return False


def _lines(pdf: "pypdfium2.PdfDocument", number: int, report: FileReport) -> list[Line]:
    import pypdfium2

    try:
        with contextlib.closing(pdf[number]) as page, contextlib.closing(page.get_textpage()) as text_page:
            return _lines_of(text_page)
    except pypdfium2.PdfiumError:
        report.notes.append(f"page {number + 1} is broken and not read")
        return []


def _lines_of(text_page: "pypdfium2.PdfTextPage") -> list[Line]:
    import pypdfium2.raw

    text = text_page.get_text_range()
    if len(text) != text_page.count_chars():  # a character in two parts, or one that has no letter
        raw = (pypdfium2.raw.FPDFText_GetUnicode(text_page, i) for i in range(text_page.count_chars()))
        text = "".join(chr(code) if code not in range(0xD800, 0xE000) and code < 0x110000 else "\ufffd" for code in raw)
    lines = []
    for match in re.finditer(r"[^\r\n]+", text):
        if not (words := match[0].strip()):
            continue
        first = match.start() + len(match[0]) - len(match[0].lstrip())
        last = first + len(words) - 1
        left, right = _box(text_page, first)[0], _box(text_page, last)[2]
        if (hyphen := max(words.rfind(sign) for sign in HYPHENS[2:])) > 0:
            right = max(right, _box(text_page, first + hyphen - 1)[2])
        word_end = _box(text_page, first + len(words.split(maxsplit=1)[0]) - 1)[2]
        middle = first + len(words) // 2 - (words[len(words) // 2] == " ")  # a point's sign may be of another font
        bold = _is_bold(text_page, middle) and _is_bold(text_page, last)
        line = Line(words, left, right, _baseline(text_page, first), _baseline(text_page, last), _size(text_page, middle), bold,
                    word_end - left)  # fmt: skip
        if right - left > WIDEST * line.size * len(words):
            line = replace(line, text=_with_columns(text_page, words, first, line.size))
        if lines and line.stands_beside(lines[-1]):
            gap = COLUMN if line.left - lines[-1].right > GAP * line.size else " "
            line = replace(lines[-1], text=f"{lines.pop().text}{gap}{line.text}", right=line.right)
        lines.append(line)
    return lines


def _with_columns(text_page: "pypdfium2.PdfTextPage", words: str, first: int, size: float) -> str:
    """The line with its columns parted: PDFium makes one blank of any gap."""
    parts = []
    for blank in re.finditer(" ", words):
        before, after = _box(text_page, first + blank.start() - 1)[2], _box(text_page, first + blank.end())[0]
        parts.append(COLUMN if after - before > GAP * size else " ")
    return "".join(word + gap for word, gap in zip(words.split(" "), [*parts, ""]))


def _box(text_page: "pypdfium2.PdfTextPage", index: int) -> tuple[float, float, float, float]:
    return text_page.get_charbox(index, loose=True)


def _baseline(text_page: "pypdfium2.PdfTextPage", index: int) -> float:
    import pypdfium2.raw

    x, y = ctypes.c_double(), ctypes.c_double()
    pypdfium2.raw.FPDFText_GetCharOrigin(text_page, index, x, y)
    return y.value


def _size(text_page: "pypdfium2.PdfTextPage", index: int) -> float:
    """Of the font as it is drawn: 1 times a matrix of 12 is 12."""
    import pypdfium2.raw

    matrix = pypdfium2.raw.FS_MATRIX()
    pypdfium2.raw.FPDFText_GetMatrix(text_page, index, matrix)
    return pypdfium2.raw.FPDFText_GetFontSize(text_page, index) * math.hypot(matrix.c, matrix.d)


def _is_bold(text_page: "pypdfium2.PdfTextPage", index: int) -> bool:
    import pypdfium2.raw

    name, flags = ctypes.create_string_buffer(128), ctypes.c_int()
    length = pypdfium2.raw.FPDFText_GetFontInfo(text_page, index, name, len(name), flags)
    is_named = 0 < length <= len(name) and _BOLD.search(name.value) is not None
    return is_named or bool(flags.value & 2**18)  # ForceBold


def _outline(pdf: "pypdfium2.PdfDocument") -> dict[str, int]:
    """The bookmarks' words, with their levels from 1."""
    import pypdfium2

    try:
        return {bare(mark.get_title()): mark.level + 1 for mark in pdf.get_toc(max_depth=6)}
    except (pypdfium2.PdfiumError, UnicodeDecodeError):
        return {}
