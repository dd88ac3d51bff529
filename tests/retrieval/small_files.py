"""Small documents of every format for the tests, and readers of them."""

import importlib.util
import io
from pathlib import Path

from conftest import PROJECT

from carelm.recipe import Recipe
from carelm.retrieval.content import FileReport
from carelm.retrieval.documents import read
from carelm.retrieval.passages import passages_of

_spec = importlib.util.spec_from_file_location("write_pdf", PROJECT / "demo/write_pdf.py")
write_pdf = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(write_pdf)


def words(text: str) -> int:
    """As many tokens as words: what the tests cut by."""
    return len(text.split())


def page(*lines, left=70, top=780, step=14, size=11, **of_all) -> list:
    """Lines below one another; one may be (text, {size, bold, x, y})."""
    laid = []
    for i, line in enumerate(lines):
        text, own = line if isinstance(line, tuple) else (line, {})
        laid.append(write_pdf.Words(text, **{"x": left, "y": top - i * step, "size": size, **of_all, **own}))
    return laid


def flowing(text: str, **of_all) -> list:
    """A page of one paragraph in lines of 450 points."""
    return page(*write_pdf.wrapped(text, 450), **of_all)


def docx(build) -> bytes:
    """A DOCX file; `build(document)` fills it."""
    from docx import Document

    document = Document()
    build(document)
    file = io.BytesIO()
    document.save(file)
    return file.getvalue()


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def document_of(folder: Path, name: str, content: str | bytes, **keys):
    """The one document of a file, with its report."""
    report = FileReport()
    (document,) = read(put(folder, name, content), name, Recipe(**keys), report)
    return document, report


def texts_of(document) -> list[tuple]:
    return [(section.page, section.heading, section.text) for section in document.sections]


def reason_of(folder: Path, name: str, content: str | bytes, **keys) -> str:
    """Why a file is not read."""
    passages, report = passages_of(put(folder, name, content), name, Recipe(**keys), words)
    assert not passages and report.unreadable and "\n" not in report.unreadable
    return report.unreadable
