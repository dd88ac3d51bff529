"""The least that makes a PDF: pages of lines in Helvetica, which every reader of PDF has. Needs the standard library alone."""

from collections.abc import Iterator
from dataclasses import dataclass

A4 = (595, 842)  # points
# Widths of Helvetica's characters from blank to ~, in thousandths of the font's size (Adobe's metrics).
_WIDTHS = [
    int(w)
    for w in """
278 278 355 556 556 889 667 191 333 333 389 584 278 333 278 278 556 556 556 556 556 556 556 556 556 556 278 278 584 584
584 556 1015 667 667 722 722 667 611 778 722 278 500 667 556 833 722 778 667 778 722 667 611 722 667 944 667 667 611 278
278 278 469 556 333 556 556 500 556 556 278 556 556 222 222 500 222 833 556 556 556 556 333 500 278 556 500 722 500 500
500 334 260 334 584
""".split()
]
_BOLD_IS_WIDER = 1.08


@dataclass(frozen=True)
class Words:
    """A line of a page; x and y in points from the lower left corner."""

    text: str
    x: float
    y: float
    size: float = 11
    bold: bool = False


def width(text: str, size: float, bold: bool = False) -> float:
    """In points; of a character beyond ASCII about."""
    thousandths = sum(_WIDTHS[ord(c) - 32] if " " <= c <= "~" else 556 for c in text)
    return thousandths * size / 1000 * (_BOLD_IS_WIDER if bold else 1)


def wrapped(text: str, most: float, size: float = 11, bold: bool = False) -> Iterator[str]:
    """The text in lines of at most so many points."""
    line = ""
    for word in text.split():
        if line and width(f"{line} {word}", size, bold) > most:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    yield line


def pdf(pages: list[list[Words]], title: str = "", subject: str = "", bookmarks: list[tuple[str, int]] = ()) -> bytes:
    """The file; `bookmarks` are names with the page, from 0, that each leads to."""
    objects: list[bytes] = []

    def add(content: str | bytes) -> int:
        objects.append(content.encode("cp1252") if isinstance(content, str) else content)
        return len(objects)

    fonts = [add(f"<< /Type /Font /Subtype /Type1 /BaseFont /{name} /Encoding /WinAnsiEncoding >>")
             for name in ("Helvetica", "Helvetica-Bold")]  # fmt: skip
    tree = len(objects) + 2 * len(pages) + 1  # the number that the tree of pages will have
    numbers = []
    for words in pages:
        lines = (f"BT /F{int(w.bold)} {w.size} Tf {w.x} {w.y} Td {_text(w.text)} Tj ET" for w in words)
        drawn = "\n".join(lines).encode("cp1252")
        stream = add(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawn), drawn))
        numbers.append(add(f"<< /Type /Page /Parent {tree} 0 R /MediaBox [0 0 {A4[0]} {A4[1]}] /Contents {stream} 0 R "
                           f"/Resources << /Font << /F0 {fonts[0]} 0 R /F1 {fonts[1]} 0 R >> >> >>"))  # fmt: skip
    add(f"<< /Type /Pages /Count {len(pages)} /Kids [{' '.join(f'{n} 0 R' for n in numbers)}] >>")
    outline = ""
    if bookmarks:
        first = len(objects) + 2
        add(f"<< /Type /Outlines /First {first} 0 R /Last {first + len(bookmarks) - 1} 0 R /Count {len(bookmarks)} >>")
        outline = f"/Outlines {first - 1} 0 R"
        for i, (name, page) in enumerate(bookmarks):
            beside = f"/Next {first + i + 1} 0 R " * (i + 1 < len(bookmarks)) + f"/Prev {first + i - 1} 0 R " * (i > 0)
            add(f"<< /Title {_text(name)} /Parent {first - 1} 0 R {beside}/Dest [{numbers[page]} 0 R /Fit] >>")
    catalog = add(f"<< /Type /Catalog /Pages {tree} 0 R {outline} >>")
    info = add(f"<< /Title {_text(title)} /Subject {_text(subject)} >>")
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = (
        f"trailer\n<< /Size {len(objects) + 1} /Root {catalog} 0 R /Info {info} 0 R >>\nstartxref\n{len(out)}\n%%EOF\n"
    )
    return out + f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}{end}".encode()


def _text(text: str) -> str:
    for sign in "\\()":
        text = text.replace(sign, f"\\{sign}")
    return f"({text})"
