"""The words of a command line -> keys of a recipe, and a launched file's own options. Imports no torch."""

import argparse
import sys
from typing import Any, NoReturn

import yaml

from carelm.errors import UserError
from carelm.keys import OF_COMMANDS, WANTED, Key, known, known_keys
from carelm.yaml_file import Loader

Layer = tuple[str, dict[str, Any]]  # where keys stand, and the keys


def split_command_line(arguments: list[str]) -> tuple[list[str], dict[str, list[str]]]:
    """`--config X --config Y --a 1 --b=2 --flag` -> (["X", "Y"], {"a": ["1"], "b": ["2"], "flag": []})."""
    files: list[list[str]] = []
    given: dict[str, list[str]] = {}
    name = None
    for argument in arguments:
        word = argument.lstrip("-–—")
        is_key = (start := word.partition("=")[0]) in known_keys() or start in OF_COMMANDS
        is_bare = word == argument and "=" in word and name in (None, "config")
        if is_key and (is_bare or argument[0] in "–—" or argument[0] == "-" != argument[1]):
            raise UserError(f"'{argument}' is not a key: write --{word}")
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            if name in given and name != "config":
                raise UserError(f"--{name} stands twice on the command line; remove one")
            given[name] = [value] if equals else []
            files += [given[name]] if name == "config" else []
        elif name is None:
            raise UserError(
                f"'{argument}' is not a key: write --config {argument} for a recipe, --key value for the rest"
            )
        else:
            given[name].append(argument)
    given.pop("config", None)
    if any(len(words) != 1 or not words[0] for words in files):
        raise UserError(
            "--config takes one file; what is laid over a recipe has its own: --config RECIPE --config OVERLAY"
        )
    return [words[0] for words in files], given


def own_parser(description: str) -> argparse.ArgumentParser:
    """A parser for a launched file's own options, whose help is the file's docstring."""
    return argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def own_options(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, list[str]]:
    """A launched file's options that are no keys of a recipe, and the words that are left.

    Raises:
        UserError: for one that is unknown, stands twice, or has no value or a wrong one.
    """

    parser.error = refuse
    options, left = parser.parse_known_args()
    if not {"-h", "--help"} & {*left}:
        split_command_line(sys.argv[1:])
        command_line(split_command_line(left)[1])
    return options, left


def refuse(message: str) -> NoReturn:
    """Says in one line what argparse says below the usage."""
    raise UserError(message.replace("argument --", "--"))


def command_line(given: dict[str, list[str]]) -> Layer:
    """The keys of the command line, from its words."""
    return "command line", {name: _parse_texts(known(name, "command line"), words) for name, words in given.items()}


def _parse_texts(key: Key, texts: list[str]) -> Any:
    """Words of the command line -> a value, by the same rules as YAML; a key without words is a switch."""
    if not texts:
        if "bool" not in key.annotation and "Literal" not in key.annotation:
            hint = next((hint for kind, hint in WANTED.items() if kind in key.annotation), "; give a value")
            raise UserError(f"--{key.name}: nothing follows it{hint}")
        return True
    if key.annotation.replace(" | None", "") == "str":
        return " ".join(texts)
    try:
        values = [yaml.load(text, Loader=Loader) for text in texts]
    except yaml.YAMLError:
        values = texts
    if len(values) > 1 and not {"list", "dict"} & {kind.strip().split("[")[0] for kind in key.annotation.split("|")}:
        raise UserError(
            f"--{key.name}: it takes one value, and '{texts[1]}' follows {texts[0]}: write --config FILE for a recipe, --key "
            "value for the rest"
        )
    return values if len(values) > 1 else values[0]
