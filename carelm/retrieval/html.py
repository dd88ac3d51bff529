"""HTML as a document: what a reader sees of it. Imports no torch."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    from lxml.etree import _Element

UNSEEN = {"head", "script", "style", "template", "noscript", "select", "datalist", "svg", "iframe", "object", "canvas", "audio",
          "video", "nav"}  # fmt: skip
BLOCKS = {"p", "div", "section", "article", "main", "header", "footer", "aside", "ul", "ol", "dl", "table", "blockquote", "pre",
          "form", "fieldset", "figure", "figcaption", "address", "details", "summary", "hr", "body", "caption", "center",
          "legend", "dialog", "search", "hgroup"}  # fmt: skip
LINES = {"br", "li", "tr", "dt", "dd", "option", "label", "button", "textarea"}
BESIDE = {"footer", "aside"}  # not below the heading that stands before them
HEADINGS = ("h1", "h2", "h3", "h4", "h5", "h6")
_HIDING = re.compile(r"(?:^|[;{\s])(?:display\s*:\s*none|visibility\s*:\s*(?:hidden|collapse))(?![\w-])", re.I)
_SIMPLE = re.compile(r"([a-z][\w-]*)?((?:[.#][\w-]+)*)", re.I)  # a selector of an element by its name, id and classes
_START = re.compile(
    rb"(?:\xef\xbb\xbf)?\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.I | re.S
)


def looks_like_html(head: bytes) -> bool:
    return _START.match(head) is not None


def read_html(raw: bytes, report: FileReport) -> Document:
    """Its text under its headings. What is not to be seen is left out, and so are menus (nav) and lists to choose from.

    Raises:
        Unreadable: where nothing is left, or elements stand too deep within one another (2,048).
    """
    from lxml import etree

    parser = etree.HTMLParser(huge_tree=True, remove_comments=True, remove_pis=True, encoding=_encoding(raw))
    try:
        root = etree.fromstring(raw, parser)
    except (etree.LxmlError, ValueError) as error:
        raise Unreadable(f"is no HTML ({error})") from None
    if any("depth" in entry.message for entry in parser.error_log):
        raise Unreadable("is HTML nested too deeply; save it as text")
    if root is None:
        raise Unreadable("is HTML without text")
    title = one_line(root.findtext(".//head/title"))
    metas = [(meta.get("name"), meta.get("content")) for meta in root.iter("meta")]
    columns = {name.lower(): content for name, content in metas if name and content}
    stretches = _Reading(_hidden_by_style(root)).read(root, report)
    title = only_top(headings for headings, _, _ in stretches) or title
    return Document("", sections_of(stretches, title, report), title, columns=columns)


def _encoding(raw: bytes) -> str | None:
    """UTF-8 where it can be that; else the parser goes by what the page says of itself, or its byte order mark."""
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    try:
        raw.decode()
        return "utf-8"
    except UnicodeDecodeError:
        return None if re.search(rb"<meta[^>]{0,200}charset|<\?xml[^>]{0,200}encoding", raw[:4096], re.I) else "cp1252"


@dataclass(frozen=True)
class _Selector:
    """Of an element, by its name, its classes and its id; those that are empty are anything."""

    name: str
    classes: set[str]
    id: str


class _Reading:
    """One pass over a page's elements, which takes down what is seen."""

    def __init__(self, hidden: dict[str, list[_Selector]]):
        self._hidden = hidden
        self._headings: Headings = []
        self._stretches: list[tuple[Headings, list[str]]] = [([], [])]
        self._held: list[list[str]] = []  # the text of headings and cells that are open
        self._pres = 0  # of those that are open

    def read(self, root: "_Element", report: FileReport) -> list[tuple[Headings, str, None]]:
        from lxml import etree

        walk = etree.iterwalk(root, events=("start", "end"))
        for event, element in walk:
            if event == "start":
                if not isinstance(element.tag, str) or element.tag in UNSEEN or self._is_hidden(element):
                    report.drop("hidden element", isinstance(element.tag, str) and element.tag not in UNSEEN)
                    walk.skip_subtree()
                    element.tag = "template"
                    continue
                self._open(element)
            else:
                if element.tag != "template":
                    self._close(element)
                if element is not root:
                    self._write(element.tail)
        return [
            (headings, re.sub(r"(?: \|)+$", "", clean("".join(parts), as_laid_out=True), flags=re.M), None)
            for headings, parts in self._stretches
        ]

    def _write(self, text: str | None) -> None:
        if text and not self._pres:
            text = re.sub(r"\s+", " ", text)
            text = text.lstrip() if not self._parts or self._parts[-1].endswith("\n") else text
        if text:
            self._parts.append(text)

    @property
    def _parts(self) -> list[str]:
        return self._held[-1] if self._held else self._stretches[-1][1]

    def _open(self, element: "_Element") -> None:
        tag = element.tag
        if tag in HEADINGS or (tag in ("td", "th") and _is_of_rows(element)):
            self._held.append([])
        elif tag in BESIDE and not self._held:
            self._stretches.append(([], []))
        elif tag in BLOCKS:
            self._parts.append("\n\n")
        elif tag in LINES:
            self._parts.append("\n- " if tag == "li" else "\n")
        if tag == "img" and element.get("alt"):
            self._parts.append(f" {element.get('alt')} ")
        if tag == "input" and element.get("type", "").lower() in ("submit", "button") and element.get("value"):
            self._parts.append(f" {element.get('value')} ")
        self._pres += tag == "pre"
        self._write(element.text)

    def _close(self, element: "_Element") -> None:
        tag = element.tag
        self._pres -= tag == "pre"
        if tag in HEADINGS:
            words = one_line("".join(self._held.pop()))
            if words and not self._held:
                self._headings = under(self._headings, int(tag[1]), words)
                self._stretches.append((self._headings, []))
            elif words:
                self._parts.append(f"\n{words}\n")
        elif tag in ("td", "th") and _is_of_rows(element):
            words = " ".join("".join(self._held.pop()).split())
            self._parts.append(words + " | " * any(True for _ in element.itersiblings("td", "th")))
        elif tag in BESIDE and not self._held:
            self._stretches.append((self._headings, []))
        elif tag in BLOCKS:
            self._parts.append("\n\n")
        elif tag in ("td", "th"):
            self._parts.append("\n")

    def _is_hidden(self, element: "_Element") -> bool:
        tag, get = element.tag, element.get
        own = set((get("class") or "").split())
        return (
            (get("hidden") is not None and get("hidden") != "until-found")
            or get("aria-hidden", "").strip().lower() == "true"
            or (tag == "dialog" and get("open") is None)
            or _HIDING.search(get("style") or "") is not None
            or any(
                rule.name in ("", tag) and rule.classes <= own and rule.id in ("", get("id"))
                for key in (tag, *own, f"#{get('id')}")
                for rule in self._hidden.get(key, ())
            )
        )


def _is_of_rows(cell: "_Element") -> bool:
    """Whether a cell is one of data: its table is not there for the layout, as one is that holds tables or headings."""
    table = next(cell.iterancestors("table"), None)
    if table is None:
        return False
    if (layout := table.get("carelm-layout")) is None:
        holds = any(True for _ in table.iterdescendants("table", *HEADINGS))
        layout = "yes" if holds or table.get("role") in ("presentation", "none") else "no"
        table.set("carelm-layout", layout)
    return layout == "no"


def _hidden_by_style(root: "_Element") -> dict[str, list[_Selector]]:
    """What the page's own style sheets hide, each by the id, else a class, else the name that it asks for. What holds for some
    screens or for print alone (@media) hides nothing."""
    hidden: dict[str, list[_Selector]] = {}
    for style in root.iter("style"):
        for selectors, declarations in _rules(re.sub(r"/\*.*?(?:\*/|\Z)", "", style.text or "", flags=re.S)):
            if selectors.startswith("@") or not _HIDING.search(declarations):
                continue
            for selector in filter(None, map(str.strip, selectors.split(","))):
                if simple := _SIMPLE.fullmatch(selector):
                    names = re.findall(r"([.#])([\w-]+)", simple[2])
                    classes = {name for sign, name in names if sign == "."}
                    of_id = next((name for sign, name in names if sign == "#"), "")
                    key = f"#{of_id}" if of_id else min(classes, default=(simple[1] or "").lower())
                    hidden.setdefault(key, []).append(_Selector((simple[1] or "").lower(), classes, of_id))
    return hidden


def _rules(css: str) -> Iterator[tuple[str, str]]:
    """The outer rules of a style sheet, each with all that stands between its braces."""
    depth = start = 0
    selectors = ""
    for sign in re.finditer(r"[{};]", css):
        if sign[0] == "{":
            if depth == 0:
                selectors, start = css[start : sign.start()].strip(), sign.end()
            depth += 1
        elif sign[0] == "}" and depth:
            depth -= 1
            if depth == 0:
                yield selectors, css[start : sign.start()]
        if depth == 0:
            start = sign.end()
