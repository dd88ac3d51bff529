"""What a file holds, whatever its format: documents of sections, and a report of what became of them. Imports no torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

INSTALL = "pip install -e '.[retrieval]'"

LONGEST_TITLE = 200  # characters; of headings too

# What is not to be seen: joiners of width 0, marks of direction and the tags in which text hides, control characters. The
# two joiners that scripts and emoji need (U+200C, U+200D) stay.
_UNSEEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb"
                     "\U000e0000-\U000e007f]")  # fmt: skip
_LIGATURES = dict(zip(map(ord, "ﬀﬁﬂﬃﬄﬅﬆ"), ("ff", "fi", "fl", "ffi", "ffl", "st", "st")))


class Unreadable(Exception):
    """Why the text of a file cannot be had; the rest of a line that begins with the file's name."""


@dataclass(frozen=True)
class Section:
    """A stretch of text under one heading, of one page where there are pages.

    Attributes:
        text: paragraphs with a blank line between them; points of a list, rows of a table (`a | b`) and code are lines.
        page: counted from 1; None where the format has none.
        heading: with those above it: `Returns > How to pack`.
    """

    text: str
    page: int | None = None
    heading: str | None = None


@dataclass
class Document:
    """A file that is read, or a row of a table."""

    name: str  # of the file, as it is shown; of a row file:row
    sections: list[Section]
    title: str | None = None
    product: str | None = None
    columns: dict[str, str] = field(default_factory=dict)


@dataclass
class FileReport:
    """What became of a file; everything in it can be JSON."""

    documents: int = 0
    pages: int = 0
    passages: int = 0
    dropped: dict[str, int] = field(default_factory=dict)  # by what it was
    notes: list[str] = field(default_factory=list)
    unreadable: str | None = None  # the reason

    def drop(self, what: str, number: int = 1) -> None:
        if number:
            self.dropped[what] = self.dropped.get(what, 0) + number


def clean(text: str, as_laid_out: bool = False) -> str:
    """The text without what nobody sees: line ends as \\n, at most one blank line in a row, no blanks at a line's end. Several
    blanks are one, and none begins a line, unless the text is to stay `as_laid_out`."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # halves of a pair alone
    text = _UNSEEN.sub("", re.sub(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]", "\n", text)).translate(_LIGATURES)
    lines: list[str] = []
    for line in text.split("\n"):  # an expression that looks for blanks at ends takes the square of a long run's time
        line = re.sub(r"\s", " ", line).rstrip() if as_laid_out else " ".join(line.split())
        if line or (lines and lines[-1]):
            lines.append(line)
    return "\n".join(lines).rstrip()


def one_line(text: str | None, longest: int = LONGEST_TITLE) -> str | None:
    """A title, heading or name as one line of bounded length; None where nothing is left of it."""
    line = " ".join(clean(text or "").split())
    return (line if len(line) <= longest else line[: longest - 1].rstrip() + "…") or None


Headings = list[tuple[int, str]]  # those that hold for a stretch of text, each with its level, the outermost first


def under(headings: Headings, level: int, words: str) -> Headings:
    """The headings that hold from this one of `level` on: itself and those above it."""
    return [(above, of_it) for above, of_it in headings if above < level] + [(level, words)]


def only_top(stretches: Iterable[Headings]) -> str | None:
    """The heading of level 1 where there is one alone: the title."""
    top = {words for headings in stretches for level, words in headings if level == 1}
    return top.pop() if len(top) == 1 else None


def sections_of(
    stretches: list[tuple[Headings, str, int | None]], title: str | None, report: FileReport
) -> list[Section]:
    """Sections of texts with the headings that hold for them and their pages, without tables of contents, which are counted,
    and without the title among the headings. A heading with nothing below it is text, unless the title
    has it."""
    sections, seen = [], set()
    for i, (headings, text, page) in enumerate(stretches):
        lines = text.split("\n")
        full = [at for at, line in enumerate(lines) if line.strip()]
        gone = {full[at] for at in contents_lines([lines[at].strip() for at in full])}
        report.drop("contents line", len(gone))
        text = "\n".join(line for at, line in enumerate(lines) if at not in gone).strip("\n")
        following = stretches[i + 1][0] if i + 1 < len(stretches) else []
        is_empty = not text.strip() and not gone and headings and tuple(headings) not in seen
        is_leaf = is_empty and following[: len(headings)] != headings
        seen.add(tuple(headings))
        if is_leaf and headings[-1][1] not in (title or ""):
            headings, text = headings[:-1], headings[-1][1]
        if text.strip():
            path = " > ".join(words for _, words in headings if words != title)
            sections.append(Section(clean(text, as_laid_out=True), page, one_line(path)))
    if not sections and title and any(headings for headings, _, _ in stretches):
        sections.append(Section(title, stretches[0][2]))  # all that is there is a heading
    return sections


LEADERS = re.compile(r"(?:[.·…_‥]\s?){5,}|…{2,}")
_OUTLINE = re.compile(r"(?:^|\s)\d{1,2}\.\d{1,2}[.:]?\s")
_ENDS_IN_PAGE = re.compile(r"\s(\d{1,4}|[ivxl]{1,6})$")
_NUMBERS_ALONE = re.compile(r"[\d\s.ivxl]+")
_CONTENTS = re.compile(
    r"(?:table of )?contents|inhalt(?:sverzeichnis)?|index|sommaire|table des matières|índice|indice|inhoud"
)


def contents_lines(lines: list[str]) -> set[int]:
    """Which of these lines are a table of contents: three entries or more that lead by dots to a page's number, or below a
    heading that says so lines that end in growing numbers. The dotted lines of a form to be filled in are none."""
    found: set[int] = set()
    dotted = [len(LEADERS.findall(line)) for line in lines]
    at = 0
    while at < len(lines):
        headed = _CONTENTS.fullmatch(lines[at].strip(" .:").casefold()) is not None
        begin = end = at + headed
        while end < len(lines) and (
            dotted[end]
            or _NUMBERS_ALONE.fullmatch(lines[end])
            or (end > begin and dotted[end - 1] and any(dotted[end + 1 : end + 2]))  # the first line of a long entry
        ):
            end += 1
        entries, run = sum(dotted[begin:end]), lines[begin:end]
        led = sum(len(line.split()) if _NUMBERS_ALONE.fullmatch(line) else
                  bool(_ENDS_IN_PAGE.search(line)) + len(_OUTLINE.findall(line)) for line in run)  # fmt: skip
        if entries < 3 or not (headed or led * 2 >= entries):
            grown = _growing(lines, begin) if headed else begin
            if grown < begin + 3:
                at = max(end, at + 1)
                continue
            end = grown
        found |= set(range(at, end))
        at = end
    return found


def _growing(lines: list[str], at: int) -> int:
    """Where the lines from `at` on end that close with a number, none smaller than the one before."""
    last = 0
    while at < len(lines) and (page := _ENDS_IN_PAGE.search(lines[at])):
        if page[1].isdigit() and int(page[1]) < last:
            break
        last = int(page[1]) if page[1].isdigit() else last
        at += 1
    return at
