"""DOCX as a document: paragraphs and tables under their headings. Imports no torch."""

import io
import re
import zipfile
from collections.abc import Iterator
from typing import TYPE_CHECKING

from carelm.errors import first_line
from carelm.retrieval.content import (
    Document,
    FileReport,
    Headings,
    Unreadable,
    clean,
    one_line,
    only_top,
    sections_of,
    under,
)

if TYPE_CHECKING:
    import docx.document
    from lxml.etree import _Element

MOST_UNPACKED_BYTES = 2**28  # of all parts together; what an archive of a few kB can hold has no bound of its own
W = "{http://schemas.openxmlformats.org/wordprocessingml/2006/main}"
FALLBACK = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"  # the same again, for older programs
# Text that was deleted or moved away, that stands elsewhere, or that is read for itself.
PASSED = {W + "del", W + "moveFrom", W + "txbxContent", W + "instrText", FALLBACK}
SIGNS = {W + "tab": " ", W + "br": "\n", W + "cr": "\n", W + "noBreakHyphen": "-", W + "ptab": " "}


def read_docx(raw: bytes, report: FileReport) -> Document:
    """Its text under its headings, tables as rows, footnotes where they are called; without deleted and hidden text.

    Raises:
        Unreadable: for another archive, a damaged or an oversized one.
    """
    try:
        opened = _open(raw)
        title, product = one_line(opened.core_properties.title), one_line(opened.core_properties.subject)
        notes = _footnotes(opened.part)
        body = opened.element.body
        styles = [style for style in opened.styles if style.type == 1]  # of paragraphs
        levels = {style.style_id: _style_level(style) for style in styles}
        names = {style.style_id: (style.name or "").lower() for style in styles}  # English in every edition of Word
    except Unreadable:
        raise
    except Exception as error:  # of zipfile, zlib, lxml and python-docx: all mean that its parts do not fit together
        raise Unreadable(f"is damaged ({first_line(error)[:100]}); open it in Word and save it anew") from None
    headings: Headings = []
    stretches: list[tuple[Headings, list[str]]] = [(headings, [])]
    has_title = False
    for block in _blocks(body):
        if names.get(_style(block), "").startswith("toc") or block.tag == W + "sdt":
            report.drop("contents line", max(1, sum(1 for _ in block.iter(W + "p")) - (block.tag == W + "p")))
            continue
        if block.tag == W + "tbl":
            stretches[-1][1].append("\n" + "\n".join(_rows(block, notes)) + "\n")
            continue
        level, words = _level(block, levels), clean(_text(block, notes))
        if level is None or not words:
            is_point = block.find(f"{W}pPr/{W}numPr") is not None or names.get(_style(block), "").startswith("list")
            stretches[-1][1].append(f"- {words}" if is_point and words else f"\n{words}\n" if words else "")
        elif level == 0 and not has_title:
            title, has_title = one_line(words), True
        else:
            headings = under(headings, max(1, level), one_line(words) or "")
            stretches.append((headings, []))
    title = title or only_top(held for held, _ in stretches)
    sections = sections_of([(held, clean("\n".join(lines)), None) for held, lines in stretches], title, report)
    return Document("", sections, title, product)


def _open(raw: bytes) -> "docx.document.Document":
    import docx

    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        parts = archive.infolist()
    if not any(part.filename.startswith("word/") for part in parts):
        kinds = {"xl/": "an Excel workbook; save it as CSV", "ppt/": "a PowerPoint file; save it as PDF",
                 "META-INF/": "an OpenDocument or EPUB file; save it as DOCX or PDF"}  # fmt: skip
        of_parts = (kind for start, kind in kinds.items() for part in parts if part.filename.startswith(start))
        raise Unreadable(f"is {next(of_parts, 'a ZIP archive and no Word document; unpack it')}")
    if (size := sum(part.file_size for part in parts)) > MOST_UNPACKED_BYTES:
        most = MOST_UNPACKED_BYTES // 2**20
        raise Unreadable(f"unpacks to {size / 2**20:,.0f} MB, more than {most} are not read")
    return docx.Document(io.BytesIO(raw))


def _blocks(parent: "_Element") -> Iterator["_Element"]:
    """Paragraphs and tables in their order, also those that stand in content controls and text boxes; a table of contents as
    the control (sdt) that holds it."""
    waiting = [iter(parent)]
    while waiting:
        element = next(waiting[-1], None)
        if element is None:
            waiting.pop()
        elif element.tag == W + "tbl":
            yield element
        elif element.tag == W + "p":
            yield element
            waiting.append(iter([box for box in element.iter(W + "txbxContent") if not _is_fallback(box, element)]))
        elif element.tag == W + "sdt" and any(
            "Contents" in g.get(W + "val", "") for g in element.iter(W + "docPartGallery")
        ):
            yield element
        elif element.tag not in PASSED or element.tag == W + "txbxContent":
            waiting.append(iter(element))


def _is_fallback(box: "_Element", paragraph: "_Element") -> bool:
    for above in box.iterancestors():
        if above is paragraph:
            return False
        if above.tag in (FALLBACK, W + "txbxContent"):  # one within another is reached by way of that one
            return True
    return False


def _text(paragraph: "_Element", notes: dict[str, str]) -> str:
    parts, waiting = [], [iter(paragraph)]
    while waiting:
        element = next(waiting[-1], None)
        if element is None:
            waiting.pop()
        elif element.tag == W + "t":
            parts.append(element.text or "")
        elif element.tag in SIGNS:
            parts.append(SIGNS[element.tag])
        elif element.tag in (W + "footnoteReference", W + "endnoteReference"):
            note = notes.get(element.tag.removesuffix("Reference") + element.get(W + "id", ""))
            parts.append(f" ({note})" if note else "")
        elif element.tag not in PASSED and not _is_hidden(element):
            waiting.append(iter(element))
    return "".join(parts)


def _is_hidden(run: "_Element") -> bool:
    vanish = run.find(f"{W}rPr/{W}vanish")
    return vanish is not None and vanish.get(W + "val", "true") not in ("0", "false", "off")


def _rows(table: "_Element", notes: dict[str, str]) -> Iterator[str]:
    """Each row as `a | b`; of a table in a cell its text stands in that cell."""
    for row in table.iter(W + "tr"):
        if next(row.iterancestors(W + "tbl")) is table:
            cells = [cell for cell in row.iter(W + "tc") if next(cell.iterancestors(W + "tr")) is row]
            words = [" ".join(" ".join(_text(p, notes) for p in cell.iter(W + "p")).split()) for cell in cells]
            if any(words):
                yield " | ".join(words)


def _style(paragraph: "_Element") -> str:
    style = paragraph.find(f"{W}pPr/{W}pStyle")
    return style.get(W + "val", "") if style is not None else ""


def _level(paragraph: "_Element", levels: dict[str, int | None]) -> int | None:
    """0 of a title, 1 to 9 of a heading, None of other paragraphs."""
    own = paragraph.find(f"{W}pPr/{W}outlineLvl")
    if own is not None and own.get(W + "val", "9").isdigit() and int(own.get(W + "val", "9")) < 9:
        return int(own.get(W + "val")) + 1
    return levels.get(_style(paragraph))


def _style_level(style) -> int | None:
    """By its name, its outline level, or those of the style that it is based on."""
    for _ in range(20):
        if style is None:
            return None
        if named := re.fullmatch(r"(?:heading (\d)|(title))", (style.name or "").lower()):
            return int(named[1] or 0)
        outline = style.element.find(f"{W}pPr/{W}outlineLvl")
        if outline is not None and outline.get(W + "val", "9").isdigit() and int(outline.get(W + "val", "9")) < 9:
            return int(outline.get(W + "val")) + 1
        style = style.base_style
    return None


def _footnotes(part) -> dict[str, str]:
    """The text of foot- and endnotes by kind and id."""
    from docx.oxml import parse_xml

    notes = {}
    for relation in part.rels.values():
        if not relation.is_external and relation.reltype.endswith(("/footnotes", "/endnotes")):
            for note in parse_xml(relation.target_part.blob):
                words = " ".join(" ".join(_text(p, {}) for p in note.iter(W + "p")).split())
                if note.get(W + "type") is None and words:
                    notes[note.tag + note.get(W + "id", "")] = words
    return notes
