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
            if key_node.value in seen:
                raise UserError(
                    f"{self.name}: key '{key_node.value}' stands on line {seen[key_node.value]} and again on line "
                    f"{key_node.start_mark.line + 1}; remove one"
                )
            seen[key_node.value] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


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
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, Loader=Loader)
    except OSError as error:
        raise UserError(f"{what} {here(path)} cannot be read ({error.strerror}); {_instead(path)}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = f" line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise UserError(f"{what} {path}{where} is not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{what} {path} holds no `key: value` lines")
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
