"""HTML as plain text: what `strip_html` makes of rows, and of what a model is asked.

Only what is known as HTML goes: a < b, <order number> and & in an address stay as they are, and a text without a known tag or
entity is not touched.
"""

import html
import re

from carelm.data.personal import has_html

_ATTRIBUTES = r"""(?:\s(?:[^<>"']|"[^"]*"|'[^']*')*|\s[^<>]*)?/?"""
_UNSEEN = re.compile(rf"<(!--|script|style|head|title)(?:(?<=--)|{_ATTRIBUTES}>)", re.I)  # with all up to its end
_LINK = re.compile(
    r"""<a\s[^<>]*?href\s*=\s*["']?(?:mailto:|tel:)?([^"'<>\s]+)[^<>]*>([^<]*(?:<(?!/?a\b)[^<]*)*)</a\s*>""", re.I
)
_PARAGRAPHS = "p|h[1-6]|ul|ol|table|blockquote|pre"
_LINES = "hr|div|tr|section|article|header|footer|body|html|thead|tbody|dl|dt|dd|center|form"
_INLINE = (
    "a|b|i|u|s|em|tt|strong|small|big|sub|sup|span|font|code|img|meta|link|td|th|script|style|head|title|mark|del|ins|label|"
    "strike|kbd|abbr|cite|figure|picture|col|colgroup|caption|wbr|o:p"
)
_BLOCK = re.compile(rf"</?(?:{_PARAGRAPHS}|{_LINES}|br|li){_ATTRIBUTES}>", re.I)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#x[0-9a-f]{1,6}|[a-z][a-z0-9]{1,31});", re.I)
_REPLACED = [
    (re.compile(r"\s*</li\s*>\s*", re.I), "\n"),
    (re.compile(rf"\s*<li{_ATTRIBUTES}>\s*", re.I), "\n- "),
    (re.compile(rf"\s*</?(?:{_PARAGRAPHS}){_ATTRIBUTES}>\s*", re.I), "\n\n"),
    (re.compile(rf"(?:[ ]*</?(?:{_LINES}){_ATTRIBUTES}>[ ]*)+", re.I), "\n"),
    (re.compile(rf"[ ]*</?br{_ATTRIBUTES}>[ ]*", re.I), "\n"),
    (re.compile(r"</(?:td|th)\s*>", re.I), " "),
    (re.compile(rf"</?(?:{_INLINE}){_ATTRIBUTES}>", re.I), ""),
]


def plain_text(text: str) -> str:
    """The text without HTML: paragraphs and lines as line ends, points of a list behind "- ", entities as their letters, a
    link as its words and its address. What is there twice over (&amp;uuml;) is read twice, so that plain text stays as it is.
    """
    own_line_ends = True
    while has_html(text) and (plain := _once(text, own_line_ends)) != text:
        text, own_line_ends = plain, False
    return text


def _once(text: str, own_line_ends: bool) -> str:
    text = _LINK.sub(_words_and_address, _without_unseen(text))
    if own_line_ends and _BLOCK.search(
        text
    ):  # its own line ends are blanks; a text with a <b> alone has them for people
        text = re.sub(r"\s+", " ", text)
    for tag, instead in _REPLACED:
        text = tag.sub(instead, text)
    text = _ENTITY.sub(lambda entity: html.unescape(entity[0]), text).replace("\xa0", " ")
    text = re.sub(r"[ \t]+(?=\n)|(?<=\n)[ \t]+(?!-)", "", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def _without_unseen(text: str) -> str:
    """Comments, scripts and heads go, each with what it holds; one that does not end stays."""
    parts, at, endless = [], 0, set()
    for opening in _UNSEEN.finditer(text):
        kind = opening[1].lower()
        if opening.start() < at or kind in endless:
            continue
        closing = re.compile("-->" if kind == "!--" else rf"</{kind}\s*>", re.I).search(text, opening.end())
        if closing is None:
            endless.add(kind)
            continue
        parts.append(text[at : opening.start()])
        at = closing.end()
    return "".join(parts) + text[at:]


def _words_and_address(link: re.Match) -> str:
    address, words = html.unescape(link[1]), link[2]
    return (
        words if address in html.unescape(words) or not re.search(r"[:@.]|^\+?\d", address) else f"{words} ({address})"
    )
