"""Markdown and plain text as documents. Imports no torch."""

import re

import yaml

from carelm.retrieval.content import (
    LEADERS,
    Document,
    FileReport,
    Headings,
    clean,
    one_line,
    only_top,
    sections_of,
    under,
)

NARROWEST = 40  # characters that a line has at least for its end to be that of the page
_POINT = re.compile(r"\s*(?:[-*+>•–]|\(?(?:\d{1,3}|[a-zA-Z])[.)])\s")
_BREAK = "\ue000"  # the end of a line that is to stay: a sign of nobody's
_FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\n(.*?\n)(?:---|\.\.\.)[ \t]*(?:\n|\Z)", re.S)
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_HEADING = re.compile(r" {0,3}(#{1,6})(?=[ \t]|$)(.*)")
_UNDERLINE = re.compile(r" {0,3}(=+|-{2,})[ \t]*")
_NO_PARAGRAPH = re.compile(r"[ \t]*(?:[-*+>|#]|\d+[.)]\s|$)|.*\|")  # what an underline does not make a heading of
_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.S)
_PICTURE = re.compile(r"!\[([^\[\]]*)\]\([^()\s]*(?:\s\"[^\"]*\")?\)")
_LINK = re.compile(r"\[([^\[\]]+)\]\(<?([^()<>\s]+)>?(?:\s\"[^\"]*\")?\)")
_STRONG = re.compile(r"(\*\*|__)(?=\S)(.{1,300}?)(?<=\S)\1|(?<![\w*])\*(?=[^\s*])([^*\n]+)(?<=\S)\*(?![\w*])")


def read_text(text: str, report: FileReport) -> Document:
    """Plain text. A line goes on in the next one where that one's first word would not have fit behind it. A first line that
    stands alone, with no point at its end, is the title."""
    paragraphs = [_unwrapped(paragraph.split("\n")) for paragraph in clean(text, as_laid_out=True).split("\n\n")]
    title = None
    if len(paragraphs) > 1 and len(paragraphs[0]) < 100 and not re.search(r"\n|[.,;:!?]$", paragraphs[0]):
        title = paragraphs.pop(0)
    return Document("", sections_of([([], "\n\n".join(paragraphs), None)], title, report), title)


def _unwrapped(lines: list[str]) -> str:
    width = max(map(len, lines))
    text = lines[0]
    for above, line in zip(lines, lines[1:]):
        goes_on = len(above) + 1 + len(line.split(maxsplit=1)[0]) > width >= NARROWEST and not _POINT.match(line)
        text += f" {line.lstrip()}" if goes_on and not LEADERS.search(above) else f"\n{line}"
    return text


def read_markdown(text: str, report: FileReport) -> Document:
    """Its text below its headings (`#`, or underlined), code as it is, without comments. What stands in front between two lines
    of --- becomes title and columns."""
    text = re.sub(r"\r\n?", "\n", text)
    columns: dict[str, str] = {}
    if front := _FRONT_MATTER.match(text):
        try:
            values = yaml.safe_load(front[1])
        except yaml.YAMLError:
            values = None
        if isinstance(values, dict):
            text = text[front.end() :]
            columns = {
                str(k): str(v) for k, v in values.items() if isinstance(v, (str, int, float)) or hasattr(v, "year")
            }
    stretches = _stretches(text)
    title = columns.get("title") or only_top(headings for headings, _ in stretches)
    sections = sections_of([(headings, "\n".join(lines), None) for headings, lines in stretches], title, report)
    return Document("", sections, title, columns=columns)


def _stretches(text: str) -> list[tuple[Headings, list[str]]]:
    """The lines below each heading, with the headings that hold there; words as they are read, code as it stands."""
    stretches: list[tuple[Headings, list[str]]] = [([], [])]
    words, fence = [], ""

    def close() -> None:
        if words:
            stretches[-1][1].extend(("", _joined(_plain("\n".join(words))), ""))
        words.clear()

    def begin(level: int, heading: str) -> None:
        close()
        if heading := one_line(_plain(heading)) or "":
            stretches.append((under(stretches[-1][0], level, heading), []))

    for line in text.split("\n"):
        marks = _FENCE.match(line)
        if fence:
            stretches[-1][1].append(clean(line, as_laid_out=True))
            if marks and marks[1].startswith(fence) and not line.strip(" `~"):
                fence = ""
        elif marks:
            close()
            fence = marks[1]
            stretches[-1][1].append(clean(line, as_laid_out=True))
        elif heading := _HEADING.fullmatch(line):
            begin(len(heading[1]), re.sub(r"(?:^|[ \t])#+$", "", heading[2].strip()))
        elif (rule := _UNDERLINE.fullmatch(line)) and words and not _NO_PARAGRAPH.match(words[-1]):
            begin(1 if rule[1][0] == "=" else 2, words.pop())
        elif not _is_rule(line):
            words.append(line)
    close()
    return stretches


def _is_rule(line: str) -> bool:
    """Whether a line draws what stands below a table's header."""
    return "|" in line and "--" in line and not line.strip("|:- \t")


def _joined(text: str) -> str:
    """With the lines of each paragraph and of each point of a list as one; those of code and of tables stay."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        lines = paragraph.split("\n")
        is_code = lines[0].startswith(("    ", "\t")) and not _POINT.match(lines[0])
        joined = lines[0]
        for above, line in zip(lines, lines[1:]):
            stays = is_code or _POINT.match(line) or " | " in line or " | " in above or above.endswith(_BREAK)
            joined += f"\n{line}" if stays else f" {line.lstrip()}"
        paragraphs.append(joined.replace(_BREAK, ""))
    return "\n\n".join(paragraphs)


def _plain(text: str) -> str:
    """A table's lines without what draws it, links as their words and addresses, pictures as their words, no comments."""
    text = re.sub(r"(?<=\S)(?: {2,}|\\)(?=\n)", _BREAK, _COMMENT.sub("", text))
    text = _PICTURE.sub(r"\1", text)
    text = _LINK.sub(
        lambda link: link[1] if link[2].startswith("#") or link[2] in link[1] else f"{link[1]} ({link[2]})", text
    )
    text = _STRONG.sub(lambda strong: strong[2] or strong[3], text)
    text = re.sub(
        r"^[ \t]*\|(.*)\|[ \t]*$", lambda row: " | ".join(map(str.strip, row[1].split("|"))), text, flags=re.M
    )
    return clean(text, as_laid_out=True)
