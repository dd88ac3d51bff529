"""Reading a YAML file of keys as CareLM reads them all. Imports no torch."""

import difflib
import re
from pathlib import Path
from typing import Any

import yaml

from carelm.errors import UserError
from carelm.files import PROJECT, here, near


class Loader(yaml.SafeLoader):
    """YAML as version 1.2 has it: booleans are true and false (a label may be yes or no), 01234 and 12:30 are text and no
    numbers of base 8 and 60. A key written twice is refused."""

    yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "int", "float")]
        for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):  # such as {{question}} without quotes
                raise UserError(
                    f"{self.name}: line {key_node.start_mark.line + 1} has a brace in a text without quotes; put all of it in "
                    "quotes"
                )
            if key_node.value in seen:
                raise UserError(
                    f"{self.name}: key '{key_node.value}' stands on line {seen[key_node.value]} and again on line "
                    f"{key_node.start_mark.line + 1}; remove one"
                )
            seen[key_node.value] = key_node.start_mark.line + 1
        for _, value in node.value:
            for word in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                self._check_quotes(word)
        return super().construct_mapping(node, deep)

    def _check_quotes(self, node: yaml.Node) -> None:
        """A text within typographic quotes, and within none of YAML's, is one that a word processor has changed."""
        is_plain = isinstance(node, yaml.ScalarNode) and not node.style and len(node.value) > 1
        if is_plain and node.value[0] in "“”„‘’‚«»" and node.value[-1] in "“”‘’«»":
            raise UserError(
                f"{self.name}: line {node.start_mark.line + 1} has {node.value[0]} in the place of a quote; write plain "
                f'ones: "{node.value[1:-1]}"'
            )


SLIPS = tuple(  # what people write that is no YAML, as an expression of the line, and what to write
    (re.compile(expression), what)
    for expression, what in (
        (r"^ *\t", "it begins with a tab; use spaces, not tabs"),
        (r"\u00a0", "it holds a blank that does not break a line (U+00A0); write a plain one"),
        (r"^\s*\w+:[^\s:/\\]", "a blank is missing after the colon; write key: value"),
        (r"^\s*\w+\s*=", "it has = after the key; write key: value"),
        (r'^\s*\w+: *"[^"]*\\', "\\ within double quotes begins an escape; write / in paths, or single quotes"),
        (r"^\s*\w+: *(\"[^\"]*|'[^']*)$", "a quote is opened there and not closed"),
        (r"^\s*\w+: *[%@`*&!]", "the value begins with a sign that YAML uses itself; put all of it in quotes"),
        (r"^\s*\w+: +[^\"'|>#\s].*?(: |[{}])", "a text with a colon or a brace stands in quotes, all of it"),
        (r"^\s*\w+: *\{.*\}.*[^}\s]", "a text with a colon or a brace stands in quotes, all of it"),
        (r"^\s*\w+: *([\"']).*\1 *[^#\s]", "text follows the closing quote; put all of it in quotes"),
        (r"^ +\w+:", "a key stands at the beginning of its line, without blanks before it"),
    )
)


def _slip(lines: list[str], at: int) -> tuple[int, str] | None:
    """Where lines at or just before the one that cannot be read (from 0) have what people often write by mistake, and what to
    write; None for other faults."""
    for number in [n for n in range(at, at - 3, -1) if 0 <= n < len(lines)]:
        if not lines[number].lstrip().startswith("#"):
            for expression, what in SLIPS:
                if expression.search(lines[number]):
                    return number, what
    return None


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9]\d*)$", re.ASCII), list("-+0123456789")
)
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:0|[1-9]\d*)\.\d*|\.\d+)(?:[eE][-+]?\d+)?$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$", re.ASCII
    ),
    list("-+.0123456789"),
)


def read_yaml(path: Path, what: str = "recipe") -> dict[str, Any]:
    """The keys of a YAML file; `what` is its word in an error."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{what} {here(path)} cannot be read ({error.strerror}); {_instead(path)}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{what} {path} line {line} is not YAML: it is no UTF-8; save the file as UTF-8") from None
    try:
        loader = Loader(text)
        loader.name = str(path)
        values = loader.get_single_data()
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or error
        lines = text.splitlines()
        at = min(mark.line, len(lines) - 1) if mark else 0
        if mark and "quoted scalar" in (getattr(error, "context", None) or ""):  # the mark is where the file ends
            at = error.context_mark.line
        at, problem = _slip(lines, at) or (at, problem)
        where = f" line {at + 1}" if mark else ""
        raise UserError(f"{what} {path}{where} is not YAML: {problem}") from None
    if not isinstance(values, dict):
        at, problem = next(filter(None, (_slip([line], 0) for line in text.splitlines())), (0, ""))
        raise UserError(f"{what} {path} holds no `key: value` lines{': ' * bool(problem)}{problem}")
    return values


def _instead(path: Path) -> str:
    """What to name in the place of a file that cannot be read."""
    if (path / "recipe.yaml").is_file():
        return f"did you mean {here(path / 'recipe.yaml')}?"
    if path.is_dir() and any(path.glob("*.yaml")):
        return "name a .yaml file in it"
    meant = did_you_mean(path, "recipes", "recipes/datasets", "recipes/overlays")
    return meant or "see recipes/ for those that come with CareLM"


def did_you_mean(path: Path, *folders: str) -> str:
    """The file beside this path, or in these folders of the project, whose name is nearest; empty where none is."""
    name = path.name if path.suffix else f"{path.name}.yaml"
    own = [PROJECT / folder for folder in folders] if PROJECT else []
    found = [p for folder in (path.parent, *own) for p in near(folder / name) if p.is_file()]
    if not found:
        return ""
    return f"did you mean {here(max(found, key=lambda p: difflib.SequenceMatcher(None, name, p.name).ratio()))}?"
