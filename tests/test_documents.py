"""What the documents say can be typed: every command is parsed by the program that it names, every key and file is there."""

import ast
import importlib.util
import itertools
import json
import re
import shlex
import sys
import textwrap
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT

from carelm.keys import known_keys
from carelm.recipe_file import load_recipe
from carelm.sweep.sweep_file import TYPES, read_sweep

PAGES = [
    *PROJECT.glob("*.md"),
    *PROJECT.glob("docs/*.md"),
    *PROJECT.glob("demo/*.md"),
    *PROJECT.glob("recipes/results/*.md"),
]
NOTEBOOKS = [*PROJECT.glob("notebooks/*.ipynb")]
FILES = [p for place in ("train", "eval", "serve", "benchmarks", "demo") for p in (PROJECT / place).glob("*.py")]
RECIPES = [*PROJECT.glob("recipes/**/*.yaml")]
OURS = ("accelerate", "torchrun", "python", "sbatch", "make", "pip")
OTHERS = ("source", "tensorboard", "tail", "squeue", "ssh", "head", "git", "echo", "touch", "nvidia-smi", "hf")
EXAMPLES = ("recipes/shop.yaml", "recipes/other.yaml", "recipes/NAME.yaml")  # of the reader
STANDS_FOR = {
    "R": "recipes/demo.yaml",
    "N": "2",
    "FOLDER": "demo/data",
    "...": "owner/name",
    "$RECIPE": "recipes/demo.yaml",
}


@pytest.fixture(autouse=True)
def reader(tmp_path, monkeypatch):
    """A folder with the recipe that the README has the reader write; all else is the project's."""
    yamls = [
        block for block in blocks((PROJECT / "README.md").read_text(encoding="utf-8")) if "# recipes/shop.yaml" in block
    ]
    (tmp_path / "recipes").mkdir()
    for example in EXAMPLES:
        (tmp_path / example).write_text(yamls[0], encoding="utf-8")
    monkeypatch.chdir(tmp_path)


def blocks(text: str) -> Iterator[str]:
    """Indented and fenced blocks of a page, without their indentation, each command on one line; output is left out."""
    text = re.sub(r"^```text\n.*?^```\n", "", text, flags=re.M | re.S)
    text = re.sub(
        r"^```\w*\n(.*?)^```", lambda m: "\n" + textwrap.indent(m[1], "    ") + "\n-\n", text, flags=re.M | re.S
    )
    for block in re.findall(r"(?<=\n\n)((?: {4}.*\n|\s*\n)+)", text + "\n"):
        yield textwrap.dedent(block).replace("\\\n", " ")


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command: of blocks that hold one, line by line, and of those within sentences."""
    for block in blocks(text):
        lines = [line for line in block.splitlines() if line.strip() and not line.startswith("#")]
        if any(words and words[0] in OURS for line in lines for words in split(line)):
            for line in lines:
                yield from split(line)
    for span in re.findall("`([^`]+)`", text):
        if span.startswith(OURS) and " " in span and "..." not in span:
            launches = span.startswith(("accelerate launch", "torchrun")) and ".py" not in span
            yield from split(" ".join(span.split()) + " train/sft.py" * launches)


def split(line: str) -> Iterator[list[str]]:
    """The commands of a line of a shell, up to a redirection or pipe, without variables in front."""
    optional = re.sub(r"\[(--.*?)\]", r"\1", line)
    try:
        words = [STANDS_FOR.get(word, word) for word in lexed(optional)]
    except ValueError:  # an apostrophe: no command
        return
    while words:
        end = next((i for i, word in enumerate(words) if re.fullmatch("[<>|&;]+", word)), len(words))
        command, words = words[:end], words[end + 1 :] if "&&" in words[end : end + 1] else []
        while command and re.match(r"[A-Z_]+=", command[0]):
            command = command[1:]
        program = re.sub(r".*bin/|3(\.\d+)?$", "", command[0]) if command else ""
        yield [program, *command[1:]]


def lexed(line: str) -> list[str]:
    lexer = shlex.shlex(line, posix=True, punctuation_chars="<>|&;")
    lexer.whitespace_split = True
    return list(lexer)


def check(words: list[str]) -> None:
    """Raises where the program would not take these words."""
    match words:
        case ["accelerate", "launch"]:
            pass
        case ["accelerate", "launch", *rest]:
            options = launcher().parse_args(rest)
            assert options.config_file is None or (PROJECT / options.config_file).is_file()
            check_file(options.training_script, options.training_script_args)
        case ["torchrun", *rest]:
            from torch.distributed.run import parse_args

            options = parse_args(rest)
            check_file(options.training_script, options.training_script_args)
        case ["python", "-m", program, *rest]:
            assert importlib.util.find_spec(program)
            assert all((PROJECT / word).exists() for word in rest if word.startswith("tests"))
        case ["python", "-c", code, *_]:
            ast.parse(code)
        case ["python", file, *rest]:
            check_file(file, rest)
        case ["sbatch", *rest]:
            (at,) = [i for i, word in enumerate(rest) if word.endswith(".sh")]
            check_script(*rest[at:])
        case ["make", *rest]:
            targets = set(re.findall(r"^([\w-]+):", (PROJECT / "Makefile").read_text(), re.M))
            assert {word for word in rest if "=" not in word} <= targets
        case ["pip", "install", *rest]:
            check_install(rest)
        case [program, *_]:
            assert program in OTHERS


@cache
def launcher():
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()


def check_file(file: str, words: list[str]) -> None:
    """A launched file's own parser; of benchmarks and the demo's scripts, whether they know the options."""
    assert (PROJECT / file).is_file()
    if "--help" in words:
        return
    if file == "train/sweep.py":
        read_sweep([word for word in words if word != "--dry_run"])
    elif file in (
        "train/merge.py",
        "train/export.py",
        "train/make_rows.py",
        "train/make_pairs.py",
        "train/add_column.py",
        "train/embedder.py",
        "eval/grounding.py",
    ):
        _, keys = module(file, words).parse()
        load_recipe(keys if "--config" in keys else ["--config", EXAMPLES[0], *keys], usage="")
    elif file == "train/runs.py":
        module(file, words).parse()
    elif file in (
        "train/sft.py",
        "eval/run.py",
        "eval/retrieval.py",
        "train/chat.py",
        "serve/run.py",
        "serve/index.py",
    ):
        if file == "train/chat.py" and "--message" in words:
            words = words[: words.index("--message")] + words[words.index("--message") + 2 :]
        load_recipe(words, usage="", first=() if file == "train/sft.py" else ("models", "rate", "certify"))
    else:
        own = itertools.takewhile(lambda word: not word.endswith(".py"), words)  # what follows is another's
        code = (PROJECT / file).read_text(encoding="utf-8")
        assert not [word for word in own if word.startswith("--") and f'"{word}"' not in code]


def module(file: str, words: list[str]):
    """A launched file as a module that sees these words."""
    sys.argv = [file, *words]
    spec = importlib.util.spec_from_file_location(Path(file).stem + "_file", PROJECT / file)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def check_script(script: str, recipe: str, *words: str) -> None:
    assert (PROJECT / script).is_file()
    if script == "slurm/sweep.sh":
        read_sweep([recipe, *words])
    else:
        load_recipe(["--config", recipe, *words], usage="")


def check_install(words: list[str]) -> None:
    import tomllib

    extras = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words:
        if found := re.fullmatch(r"(?:\.|carelm)\[(\w+)\]", word):
            assert found[1] in extras
        assert not word.endswith(".txt") or (PROJECT / word).is_file()


def problems(text: str) -> list[str]:
    """The commands that are not taken, each with the reason."""
    found = []
    for words in commands(text):
        try:
            check(words)
        except (Exception, SystemExit) as error:
            found.append(f"{shlex.join(words)}: {error!r}")
    return found


def names(path: Path) -> str:
    return str(path.relative_to(PROJECT))


@pytest.mark.parametrize(
    "command",
    [
        "python train/sft.py --lora_rank 4",
        "FOO=1 python3 train/chat.py --config recipes/none.yaml > answer.txt",
        "accelerate launch --num_procs 2 eval/run.py",
        "accelerate launch --config_file accelerate_configs/none.yaml eval/run.py",
        "pip install -r requirements.txt && python benchmarks/speed.py --none",
        "sbatch --nodes 2 slurm/sweep.sh recipes/demo.yaml",
        "make none",
    ],
)
def test_a_command_that_its_program_does_not_take_is_found(command):
    assert len(problems(f"A line.\n\n    {command}   # why\n")) == 1


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_command_in_a_page_is_one_that_its_program_takes(page):
    assert not problems(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_key_in_a_page_is_one_of_a_recipe_or_of_a_sweep(page):
    """Blocks of YAML, and blocks of options that go on top of a recipe."""
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.startswith("--"):
            load_recipe(next(split(" ".join(block.split("#")[0].split()))), usage="")
            continue
        if re.match(r"(python|accelerate|sbatch|curl|make|pip) ", block):
            continue
        try:
            keys = yaml.safe_load(block)
        except yaml.YAMLError:
            continue
        if isinstance(keys, dict):
            assert not keys.keys() - known_keys().keys() - TYPES.keys()


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_every_link_and_file_of_the_project_in_a_page_is_there(page):
    text = page.read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)]+)\)", text) if not link.startswith("http")]
    assert not [link for link in links if link and not (page.parent / link).exists()]
    rooms = "carelm|train|eval|serve|recipes|accelerate_configs|ds_configs|slurm|demo|docs|tests|benchmarks|notebooks"
    files = re.findall(rf"(?<![\w/.])((?:{rooms})/[\w/.-]+\.(?:py|yaml|md|json|sh|ipynb|txt))\b", text)
    assert not [file for file in files if not (PROJECT / file).exists() and file not in EXAMPLES]


def test_every_command_that_a_file_of_python_opens_with_is_one_that_its_program_takes():
    opening = {path: ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) for path in FILES}
    found = {names(path): problems(text) for path, text in opening.items() if text}
    assert len(found) > 20 and not {name: those for name, those in found.items() if those}


def test_every_command_in_a_recipes_header_is_one_that_its_program_takes():
    found = {}
    for path in RECIPES:
        header = re.match("(?:#.*\n)*", path.read_text(encoding="utf-8"))[0].replace("\\\n#", " ")
        lines = re.findall(rf"^#(?:.*?:)? +((?:{'|'.join(OURS)}) .*?)(?: {{2,}}\(.*)?$", header, re.M)
        found[names(path)] = problems("\n\n" + textwrap.indent("\n".join(lines), "    ") + "\n")
    assert len(found) > 30 and not {name: those for name, those in found.items() if those}


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=names)
def test_every_command_in_a_notebook_is_one_that_its_program_takes(notebook):
    cells = ["".join(cell["source"]) for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
    lines = [
        line[1:].strip() for cell in cells for line in cell.replace("\\\n", " ").splitlines() if line.startswith("!")
    ]
    assert lines and not problems("\n\n" + textwrap.indent("\n".join(lines), "    ") + "\n")


@pytest.mark.parametrize("page", [p for p in PAGES if p.parent.name == "docs" and p.stem != "architecture"], ids=names)
def test_every_chapter_opens_with_a_command(page):
    first = page.read_text(encoding="utf-8").split("\n\n")[1]
    assert next(split(first.strip()))[0] in OURS


def test_every_test_file_opens_with_the_promise_that_it_holds():
    """As CONTRIBUTING.md says, which lists them by their first lines."""
    files = [*PROJECT.glob("tests/test_*.py"), *PROJECT.glob("tests/*/test_*.py")]
    assert files and not [names(p) for p in files if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))]
