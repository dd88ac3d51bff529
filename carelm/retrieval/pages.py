"""Lines of pages put together to paragraphs again, under headings; without what the pages repeat. Imports no torch."""

import itertools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

from carelm.retrieval.content import (
    LEADERS,
    Document,
    FileReport,
    Headings,
    clean,
    contents_lines,
    one_line,
    sections_of,
    under,
)

EDGE_LINES = 3  # at the top and the bottom of a page, where headers and footers stand
COLUMN = " | "  # between the cells of a row
HYPHENS = "-\u2010\ufffe\x02"  # the last two are PDFium's, where a line ends within a word
_POINT = re.compile(r"(?:[•●▪■‣◦○–—*·-]|\(?(?:\d{1,3}|[a-zA-Z])[.)]|[\uf0a7\uf0b7])\s")
# Words that keep the hyphen behind them where nothing else in the document tells.
_FIRST_PARTS = set("self well non co all high low long short full half part two three four first second third one cross e ex "
                   "pre post anti multi mid on off up in out over under best free real user ready time".split())  # fmt: skip


@dataclass(frozen=True)
class Line:
    """A line of a page; lengths in points, from the page's lower left corner."""

    text: str
    left: float
    right: float
    baseline: float  # of its first character
    last_baseline: float  # of the last: where PDFium joins two lines at a hyphen, the second's
    size: float  # of the font
    bold: bool
    first_word: float  # its width

    def stands_beside(self, other: "Line") -> bool:
        """Whether this one is to the right of `other`, on the same height."""
        return abs(other.last_baseline - self.baseline) < 0.2 * self.size and self.left > other.right - 1


@dataclass(frozen=True)
class Block:
    """A paragraph, a point of a list or a row of a table."""

    text: str
    page: int
    size: float
    bold: bool
    lines: int = 1
    close: bool = False  # it follows the one before without a gap, as rows and points do


def _title(pages: list[list[Line]]) -> str | None:
    """The lines of the largest font on the first page with text, where they are short and larger than what is read most."""
    first = next((lines for lines in pages if lines), [])
    letters: Counter[float] = Counter()
    for lines in pages:
        for line in lines:
            letters[round(line.size, 1)] += len(line.text)
    largest = max(line.size for line in first)
    at = next(i for i, line in enumerate(first) if line.size == largest)
    words = [line.text for line in itertools.takewhile(lambda line: line.size == largest, first[at:])]
    title = one_line(" ".join(words)) or ""
    is_larger = largest > 1.2 * letters.most_common(1)[0][0] and any(map(str.isalpha, title))
    return title if is_larger and len(words) <= 3 and len(title) <= 150 else None


def _without_repeated(pages: list[list[Line]], report: FileReport) -> list[list[Line]]:
    """Without the lines at the edges of the pages that stand there on most, numbers aside, or have the page's number."""
    by_height = [sorted(lines, key=lambda line: -line.baseline) for lines in pages]
    where: dict[str, set[tuple[int, Line]]] = defaultdict(set)
    for number, lines in enumerate(by_height):
        for line in (*lines[:EDGE_LINES], *lines[-EDGE_LINES:]):
            where[re.sub(r"\d+", "#", line.text.casefold())].add((number, line))
    with_text = sum(bool(lines) for lines in pages)
    seen = {(offset, place[0]) for places in where.values() for place in places for offset in _offsets(*place)}
    votes = Counter(offset for offset, _ in seen)
    counting = {offset for offset, on in votes.items() if on >= 2 and on * 2 > with_text}
    repeated: set[tuple[int, Line]] = set()
    for key, places in where.items():
        on = {number for number, _ in places}
        numbered = {place for place in places if counting & _offsets(*place)}
        if len(on) >= 3 and len(on) * 2 > with_text or re.fullmatch("[ivxl]+", key):
            repeated |= places
        elif len(numbered) > 1 or re.fullmatch(r"\W*#\W*", key) or re.search(r"\w\W+\w+\W+#$", key):
            repeated |= numbered
    kept = []
    for number, (lines, sorted_lines) in enumerate(zip(pages, by_height)):
        at_edge = [list(itertools.takewhile(lambda line: (number, line) in repeated, side))  # noqa: B023
                   for side in (sorted_lines[:EDGE_LINES], sorted_lines[: -EDGE_LINES - 1 : -1])]  # fmt: skip
        gone = {id(line) for side in at_edge for line in side}
        report.drop("repeated line", len(gone))
        kept.append([line for line in lines if id(line) not in gone])
    return kept


def _offsets(number: int, line: Line) -> set[int]:
    """By how much the numbers in a line are above that of the page, which counts from 0."""
    return {int(digits) - number for digits in re.findall(r"\d{1,5}", line.text)}


def _without_contents(pages: list[list[Line]], report: FileReport) -> list[list[Line]]:
    kept = []
    for lines in pages:
        gone = contents_lines([line.text for line in lines])
        report.drop("contents line", len(gone))
        kept.append([line for i, line in enumerate(lines) if i not in gone])
    return kept


def _pitch(pages: list[list[Line]]) -> float:
    """From one line to the next within most paragraphs, in points; 0 where no line has another close below it."""
    steps = ((a, a.last_baseline - b.baseline) for lines in pages for a, b in zip(lines, lines[1:]))
    common = Counter(round(step, 1) for line, step in steps if 0 < step < 1.8 * line.size).most_common(1)
    return common[0][0] if common else 0.0


def _blocks(lines: list[Line], page: int, pitch: float, words: Counter[str]) -> list[Block]:
    """The lines of a page as paragraphs: one goes on where the next line's first word would not have fit behind it."""
    blocks: list[Block] = []
    start = None
    for i, line in enumerate(lines):
        above = lines[i - 1] if i else None
        text = _whole_words(line.text, words)
        if above and start and _goes_on(start, above, line, pitch, lines):
            blocks[-1] = replace(blocks[-1], text=_joined(blocks[-1].text, text, words), lines=blocks[-1].lines + 1)
        else:
            close = above is not None and 0 <= above.last_baseline - line.baseline <= max(pitch * 1.15, line.size * 1.3)
            blocks.append(Block(text, page, line.size, line.bold, close=close))
            start = line
    return blocks


def _goes_on(start: Line, above: Line, line: Line, pitch: float, lines: list[Line]) -> bool:
    """Whether a line belongs to the paragraph that `start` begins and `above` is the last line of."""
    if abs(above.size - line.size) > 0.12 * above.size or above.bold != line.bold or _POINT.match(line.text):
        return False
    if not 0 < above.last_baseline - line.baseline <= max(pitch * 1.15, above.size * 1.5):
        return False
    if _POINT.match(start.text) and line.left < start.left + 1:  # back at the edge: the point has ended
        return False
    if above.text[-1] in HYPHENS[1:]:
        return True
    if COLUMN in above.text or COLUMN in line.text:
        return False
    if above.right - above.left < 14 * above.size or LEADERS.search(
        above.text
    ):  # names, prices, a form to be filled in
        return False
    if above.text[-1].isdigit() and line.text[0].isupper():  # rows
        return False
    edge = max(other.right for other in lines if abs(other.left - above.left) < 4 * above.size)
    return above.right + line.first_word + 0.2 * above.size > edge


def _joined(before: str, after: str, words: Counter[str]) -> str:
    if before[-1] in HYPHENS and before[-2:-1].isalpha() and after[0].isalpha():
        return _whole_words(f"{before[:-1]}\ufffe{after}", words)
    return f"{before} {after}"


def _whole_words(text: str, words: Counter[str]) -> str:
    """Words that a line's end has parted put together: without the hyphen, unless the document shows that it belongs there."""

    def whole(parts: re.Match) -> str:
        before, after = parts[1], parts[2]
        first, second = before.lower(), after.lower()
        with_hyphen, without = words[f"{first}-{second}"], words[first + second]
        if after[0].isupper() and not before.isupper():
            keeps = True
        elif with_hyphen or without:
            keeps = with_hyphen >= without
        else:
            keeps = first in _FIRST_PARTS or (
                len(first) > 3 and len(second) > 3 and words[first] > 1 and words[second] > 1
            )
        return f"{before}-{after}" if keeps else before + after

    text = re.sub(r"([^\W\d_]+)[\ufffe\x02]\s?([^\W\d_]+)", whole, text)
    return re.sub("[\ufffe\x02]", "-", text)


def bare(words: str) -> str:
    """Without what numbers it: bookmarks have it or not."""
    return re.sub(r"^[\d.\s]+|\W+", "", clean(words).casefold())


def document_of(
    pages: list[list[Line]], title: str | None, product: str | None, outline: dict[str, int], report: FileReport
) -> Document:
    """The lines of pages under their headings: larger or bold letters, and those of `outline` (as `bare` has them, with
    their levels from 1). What pages repeat and tables of contents are counted, and left out."""
    title = title or _title(pages)
    pages = _without_contents(_without_repeated(pages, report), report)
    texts = (line.text.lower() for lines in pages for line in lines)
    words = Counter(word for text in texts for word in re.findall(r"[^\W\d_]+(?:-[^\W\d_]+)*", text))
    pitch = _pitch(pages)
    blocks = [block for number, lines in enumerate(pages, 1) for block in _blocks(lines, number, pitch, words)]
    letters: Counter[tuple[float, bool]] = Counter()
    for block in blocks:
        letters[round(block.size, 1), block.bold] += len(block.text)
    (body, body_is_bold), _ = letters.most_common(1)[0] if letters else ((0.0, True), 0)
    marked = {id(block) for block in blocks if _is_heading(block, body, body_is_bold, outline)}
    if sum(len(block.text) for block in blocks if id(block) in marked) * 3 > sum(
        letters.values()
    ):  # slides: all is large
        marked = {id(block) for block in blocks if bare(block.text) in outline and block.lines <= 3}
    fonts = sorted({(round(block.size), block.bold) for block in blocks if id(block) in marked}, reverse=True)
    headings: Headings = []
    stretches: list[tuple[Headings, list[Block], int]] = []
    above: Block | None = None
    for block in blocks:
        is_heading = id(block) in marked
        if is_heading and title and bare(block.text) == bare(title):
            continue
        goes_on = above is not None and id(above) in marked and block.close and above.size == block.size
        if is_heading and goes_on and above.page == block.page:  # a heading of two lines
            headings[-1] = (headings[-1][0], one_line(f"{headings[-1][1]} {block.text}") or "")
        elif is_heading:
            level = outline.get(bare(block.text)) or 1 + fonts.index((round(block.size), block.bold))
            headings = under(headings, level, one_line(block.text) or "")
            stretches.append((headings, [], block.page))
        else:
            if not stretches or stretches[-1][2] != block.page:
                stretches.append((headings, [], block.page))
            stretches[-1][1].append(block)
        above = block
    return Document("", sections_of(_texts(stretches), title, report), title, product)


def _is_heading(block: Block, body: float, body_is_bold: bool, outline: dict[str, int]) -> bool:
    if len(block.text) > 150 or block.lines > 3 or COLUMN in block.text or not any(map(str.isalpha, block.text)):
        return False
    if len(block.text) > 3 and bare(block.text) in outline:
        return True
    if block.text[-1] in ".,;" or _POINT.match(block.text) and not re.match(r"\d", block.text):
        return False
    is_bold = block.bold and not body_is_bold and block.size > 0.95 * body and block.text[-1] != ":"
    return is_bold or block.size > 1.12 * body


def _texts(stretches: list[tuple[Headings, list[Block], int]]) -> list[tuple[Headings, str, int]]:
    """The stretches as text; a sentence that goes on on the next page stands whole on the page where it begins."""
    texts = []
    for _, blocks, _ in stretches:
        gaps = ["\n" if block.close and block.lines < 3 else "\n\n" for block in blocks]
        texts.append(clean("".join(gap + _as_point(block.text) for gap, block in zip(gaps, blocks))))
    for i in range(len(texts) - 1):
        follows = stretches[i][2] + 1 == stretches[i + 1][2] and stretches[i][0] == stretches[i + 1][0]
        if follows and re.search(r"[\w,;\-–]$", texts[i]) and texts[i + 1][:1].islower():
            rest = re.match(r".*?(?:[.!?…][\"')\]”’]*(?=\s)|\n\n|\Z)", texts[i + 1], re.S)[0]
            texts[i], texts[i + 1] = f"{texts[i]} {' '.join(rest.split())}", texts[i + 1][len(rest) :].strip()
    return [(headings, text, page) for (headings, _, page), text in zip(stretches, texts)]


def _as_point(text: str) -> str:
    return re.sub(r"^[•●▪■‣◦○·\uf0a7\uf0b7]\s*", "- ", text)
