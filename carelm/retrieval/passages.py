"""Passages: what a document is cut into, what is found, and what stands in front of a question. Imports no torch."""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from carelm.data.report import number_of, shortened
from carelm.files import fingerprint
from carelm.recipe import Recipe
from carelm.retrieval.content import Document, FileReport, Unreadable
from carelm.retrieval.documents import read

Count = Callable[[str], int]  # of a text's tokens
LONGEST_TOKEN = 64  # characters; passages are at most as many times their bound
LISTED = 30  # files that a report has a line for, besides those with something to say


@dataclass(frozen=True)
class Passage:
    """A piece of a document, with where it stands there.

    Attributes:
        id: the same for as long as its document does not change, whatever other documents do.
        document: the name of its file, as it is shown.
        page: its page, counted from 1; None where the format has none.
        columns: of a row of a table its columns, but for long ones; of others what they say of themselves (`---`, meta).
    """

    id: str
    document: str
    title: str | None
    page: int | None
    heading: str | None
    product: str | None
    text: str
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def indexed(self) -> str:
        """What is searched: the text, and in front of it what it belongs to."""
        return "\n".join(filter(None, (self.title, self.product, self.heading, self.text)))


def passages_of(path: Path, name: str, recipe: Recipe, count: Count) -> tuple[list[Passage], FileReport]:
    """What one file comes to. It follows from the file's bytes, its name and the recipe alone, whatever other files there are.
    One that cannot be read has no passages, and the reason in its report.

    Raises:
        UserError: where the packages that read it are not installed, or a template is none.
    """
    report = FileReport()
    try:
        documents = read(path, name, recipe, report)
        passages = cut(documents, recipe.chunk_tokens, count)
        if not passages:
            raise Unreadable("has no text")
    except Unreadable as reason:
        return [], FileReport(pages=report.pages, unreadable=str(reason))
    report.documents, report.passages = len(documents), len(passages)
    return passages, report


def cut(documents: list[Document], chunk_tokens: int, count: Count) -> list[Passage]:
    """Passages of at most `chunk_tokens` tokens, each of one page and under one heading.

    They end where a paragraph does, else a line, else a sentence; only a sentence that is longer is cut at words, and a word
    that is longer (or a text that has no blanks) anywhere. Of a table that is cut each part begins with its first row.
    """
    passages, times = [], Counter()
    for document in documents:
        for section in document.sections:
            for text in _pieces(section.text, chunk_tokens, count):
                of = (document.name, section.page, section.heading, text)
                times[of] += 1  # a text may stand there twice
                passages.append(
                    Passage(fingerprint(*of, times[of]), document.name, document.title, section.page, section.heading,
                            document.product, text, document.columns)
                )  # fmt: skip
    return passages


def _pieces(text: str, limit: int, count: Count) -> Iterator[str]:
    """The text in pieces of at most `limit` tokens; one without a letter or digit is none."""
    if not re.search(r"\w", text):
        return
    if len(text) <= LONGEST_TOKEN * limit and count(text) <= limit:
        yield text
        return
    units = list(_units(text, limit, count))
    groups: list[list[_Unit]] = []
    at = 0
    while at < len(units):
        first, following = _below_header(units[at], limit, count), units[at + 1 : at + 1 + limit]
        sums = itertools.accumulate(unit.tokens for unit in [first, *following])
        low, high = 1, max(1, sum(1 for _ in itertools.takewhile(lambda tokens: tokens <= limit, sums)))
        middle = (
            high  # of the units that are no longer than the bound without what stands between them, all fit most times
        )
        while low < high:
            fits = count(_join([first, *following[: middle - 1]])) <= limit
            low, high = (middle, high) if fits else (low, middle - 1)
            middle = (low + high + 1) // 2
        groups.append([first, *following[: low - 1]])
        at += low
    if len(groups) > 1 and sum(unit.tokens for unit in groups[-1]) < limit / 3:
        groups[-2:] = _balanced([*groups[-2], *groups[-1]], limit, count) or groups[-2:]
    yield from map(_join, groups)


@dataclass(frozen=True)
class _Unit:
    """What is not cut; `before` stands between it and the one in front of it, `header` is its table's first row."""

    text: str
    before: str
    tokens: int
    header: str = ""


def _join(units: list[_Unit]) -> str:
    return units[0].text + "".join(unit.before + unit.text for unit in units[1:])


def _below_header(unit: _Unit, limit: int, count: Count) -> _Unit:
    text = f"{unit.header}\n{unit.text}"
    fits = unit.header and (tokens := count(text)) <= limit
    return _Unit(text, unit.before, tokens, unit.header) if fits else unit


def _balanced(units: list[_Unit], limit: int, count: Count) -> list[list[_Unit]] | None:
    """Two groups of about the same size instead of a full one and a rest."""
    sizes = [unit.tokens for unit in units]
    at = min(range(1, len(units)), key=lambda i: abs(sum(sizes[:i]) - sum(sizes[i:])))
    groups = [units[:at], [_below_header(units[at], limit, count), *units[at + 1 :]]]
    return groups if all(count(_join(group)) <= limit for group in groups) else None


def _units(text: str, limit: int, count: Count) -> Iterator[_Unit]:
    longest = LONGEST_TOKEN * limit
    for paragraph in text.split("\n\n"):
        if len(paragraph) <= longest and (tokens := count(paragraph)) <= limit:
            yield _Unit(paragraph, "\n\n", tokens)
            continue
        lines = paragraph.split("\n")
        header = lines[0] if all(" | " in line for line in lines[:2]) and len(lines[0]) <= longest else ""
        header = header if count(header) <= limit / 4 else ""
        for i, line in enumerate(lines):
            before = "\n" if i else "\n\n"
            if len(line) <= longest and (tokens := count(line)) <= limit:
                yield _Unit(line, before, tokens, header if i else "")
                continue
            for j, (blank, sentence) in enumerate(_sentences(line)):
                for k, (gap, piece) in enumerate(_cut_anywhere(sentence, limit, count)):
                    yield _Unit(piece, gap if k else blank if j else before, count(piece))


_END = re.compile(r"[.!?…][\"'”’»)\]]*\s+|[。！？][」』）]*\s*")
_SHORT = re.compile(
    r"(?:^|[\s(])(?:\w|\d{1,2}|(?:\w\.)+\w|mrs?|ms|dr|prof|no|nr|vs|approx|bzw|ca|inkl|incl|max|min|tel|st|art|fig|vol|ltd|inc|co)\.\s+$",
    re.I,
)


def _sentences(line: str) -> Iterator[tuple[str, str]]:
    """The sentences of a line, each with the blank before it, where there is one. A point behind a short form, a letter or a
    number of two digits ends none, nor one that a small letter follows."""
    begin, gap = 0, ""
    for end in _END.finditer(line):
        following = line[end.end() : end.end() + 9].lstrip("\"'“‘„«([¿¡")[:1]
        if following and not following.islower() and not _SHORT.search(line[max(begin, end.start() - 12) : end.end()]):
            yield gap, line[begin : end.end()].rstrip()
            begin, gap = end.end(), " " if end[0][-1].isspace() else ""
    yield gap, line[begin:]


def _cut_anywhere(sentence: str, limit: int, count: Count) -> Iterator[tuple[str, str]]:
    """A sentence in pieces of at most `limit` tokens, each with what stands before it: a blank, or nothing within a word."""
    before, longest = "", LONGEST_TOKEN * limit
    while len(sentence) > longest or (sentence and count(sentence) > limit):
        low, high = 1, min(len(sentence), longest)  # the most characters that fit
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if count(sentence[:middle].rstrip()) <= limit else (low, middle - 1)
        blank = sentence.rfind(" ", 1, low + 1)
        at = blank if blank > 0 else low
        yield before, sentence[:at].rstrip()
        before, sentence = (" " if blank > 0 else ""), sentence[at:].lstrip()
    if sentence:
        yield before, sentence


def format_report(files: dict[str, FileReport], unused: list[str]) -> str:
    """What became of all files, as a small table for the terminal; each that could not be read is named with the reason."""
    read_ones = {name: r for name, r in files.items() if r.unreadable is None}
    width = max([len("file"), *(min(len(name), 48) for name in read_ones)])
    lines = [f"{'file':<{width}}{'documents':>11}{'pages':>7}{'passages':>10}  dropped"]
    shown = [name for i, (name, r) in enumerate(read_ones.items()) if i < LISTED or r.notes]
    for name in shown:
        r = read_ones[name]
        dropped = ", ".join(number_of(number, what) for what, number in r.dropped.items()) or "nothing"
        lines.append(f"{name:<{width}}{r.documents:>11}{r.pages or '-':>7}{r.passages:>10}  {dropped}")
        lines += [f"{'':<{width}}  {note}" for note in r.notes]
    if len(read_ones) > len(shown):
        lines.append(f"and {len(read_ones) - len(shown)} more")
    total = [sum(getattr(r, what) for r in read_ones.values()) for what in ("documents", "pages", "passages")]
    lines.append(
        f"{'all':<{width}}{total[0]:>11}{total[1] or '-':>7}{total[2]:>10}  of {number_of(len(read_ones), 'file')}"
    )
    lines += [f"not read: {name} {r.unreadable}" for name, r in files.items() if r.unreadable is not None]
    if unused:
        lines.append(f"not used: {shortened(unused)}")
    return "\n".join(lines)
