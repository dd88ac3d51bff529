"""docs/troubleshooting.md has each line that begins with `error:` by its first words, and none that no code writes."""

import ast
import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from conftest import PROJECT

from carelm.errors import INTERRUPTED

GAP = "…"  # what a message has from elsewhere: a key, a name, a place
RETURNED = ("judge", "problem")  # functions that return one
MESSAGE = {"UserError": 0, "parse_json": 1}  # calls, and which of their arguments is the message


def texts_of(node: ast.AST, assigned: dict[str, list[ast.expr]]) -> list[str]:
    """What an expression may come to; a name is each text that its function assigns to it."""
    if isinstance(node, ast.Constant):
        return [node.value] if isinstance(node.value, str) else [GAP]
    if isinstance(node, ast.FormattedValue):
        return texts_of(node.value, assigned) if isinstance(node.value, ast.Name) else [GAP]
    if isinstance(node, ast.Name):
        return [text for value in assigned.get(node.id, ()) for text in texts_of(value, {})] or [GAP]
    if isinstance(node, ast.JoinedStr | ast.BinOp):
        parts = node.values if isinstance(node, ast.JoinedStr) else (node.left, node.right)
        return ["".join(texts) for texts in itertools.product(*(texts_of(part, assigned) for part in parts))]
    return [GAP]


def messages_of(path: Path) -> Iterator[str]:
    """The messages in a file of Python."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    yield from (
        text.removeprefix("error: ")
        for node in ast.walk(tree)
        for text in texts_of(node, {})
        if text.startswith("error: ")
    )
    for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
        assigned: dict[str, list[ast.expr]] = {}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                assigned.setdefault(node.targets[0].id, []).append(node.value)
        for node in ast.walk(function):
            if isinstance(node, ast.Return) and function.name in RETURNED:
                yield from texts_of(node.value, assigned)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in MESSAGE:
                yield from texts_of(node.args[MESSAGE[node.func.id]], assigned)


@cache
def messages() -> list[str]:
    """What stands behind `error: `, GAP for what differs. One that only hands on another has no letters."""
    paths = [p for place in ("carelm", "train", "eval", "serve") for p in (PROJECT / place).rglob("*.py")]
    paths += [PROJECT / "demo" / name for name in ("in_cache.py", "real_base.py", "embedder.py")]
    found = [text for path in paths for text in messages_of(path)]
    found.append(INTERRUPTED)
    for path in (PROJECT / "slurm").glob("*.sh"):
        found += [re.sub(r"\$\w+", GAP, text) for text in re.findall(r'echo "error: (.*?)"', path.read_text())]
    return sorted({text for text in found if re.search("[a-z]", text)})


@cache
def entries() -> dict[str, re.Pattern]:
    """The beginnings in the first column of the page's tables, as expressions; `...` is what differs."""
    page = (PROJECT / "docs/troubleshooting.md").read_text(encoding="utf-8")
    first_columns = re.findall(r"^\| (`.+?) \|", page, re.M)
    found = [entry for column in first_columns for entry in re.findall("`([^`]+)`", column)]
    assert len(found) == len(set(found)) and len(found) > 100, [e for e in found if found.count(e) > 1]
    gap = rf"[^A-Za-z]*{GAP}[^A-Za-z]*?"
    return {entry: re.compile(gap.join(map(re.escape, re.split(r"\.\.\. ?", entry)))) for entry in found}


def test_each_error_line_of_the_code_is_found_in_the_troubleshooting_page_by_its_first_words():
    missing = [text for text in messages() if not any(entry.match(text) for entry in entries().values())]
    assert len(messages()) > 300 and not missing, "\n".join(missing)


def test_each_beginning_in_the_troubleshooting_page_is_one_that_the_code_writes():
    gone = [entry for entry, begins in entries().items() if not any(begins.match(text) for text in messages())]
    assert not gone
