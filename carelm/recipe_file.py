"""A recipe's YAML file, what is laid over it and the command line -> a checked recipe, and back. Imports no torch."""

import dataclasses
import glob
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from carelm.adapter_folder import decided_of_run
from carelm.checks import check
from carelm.command_line import Layer, command_line, split_command_line
from carelm.errors import UserError
from carelm.files import PROJECT, here, locate, near, write_whole
from carelm.key_help import format_help
from carelm.keys import (
    ALTERNATIVES,
    DEFAULTS,
    FREE_KEYS,
    FREE_PREFIXES,
    MEANT_ONCE,
    NOT_ABOUT_DATA,
    OF_A_TEST,
    PREFERENCE_RATES,
    default_of,
    identity_of,
    known,
    known_keys,
    typed,
)
from carelm.ranks import say
from carelm.recipe import ONCE, Recipe
from carelm.yaml_file import read_yaml

DEMO = "recipes/demo.yaml"


def load_recipe(arguments: list[str], usage: str, first: Sequence[str] = ()) -> Recipe:
    """Reads `[--config FILE ...] [--key value ...]` into a checked recipe; `--help` prints every key and exits.

    Of several files (`--config A --config B`) a later one wins, key by key, and the command line wins over all. Without a file
    it is the demo's recipe, and where other data is given, without what that says of its own.

    Args:
        arguments: the command line without the script's name.
        usage: the text above the list of keys in `--help`.
        first: the keys that `--help` lists first, for files that train nothing.

    Raises:
        UserError: for an unreadable file, and for a key that is unknown, abbreviated, doubled, refused or wrongly typed.
    """
    if "--help" in arguments or "-h" in arguments:
        print(format_help(usage, first), end="")
        sys.exit(0)
    files, given = split_command_line(arguments)
    if first and "adapter" in given:
        raise UserError("--adapter is what a training goes on from; to ask another model: --models FOLDER")
    if first and (once := [name for name in ONCE if name in given and name not in first]):
        raise UserError(f"--{once[0]} is not for this command but for {MEANT_ONCE[once[0]]}; leave it out")
    own, layers = command_line(given), read_layers(files or [DEMO])
    if files:
        _check_not_alone(layers, given)
    elif given.keys() - {"output_dir"}:
        layers = [_demo_of(*layers[0], own[1])]
    names = (  # a run's own recipe.yaml, which says where it lies, is called as its folder
        Path(place).resolve().parent.name
        if Path(place).name == "recipe.yaml" and "output_dir" in keys
        else Path(place).stem
        for place, keys in layers
    )
    name = "+".join(names)
    if not files and "dataset_name" not in layers[0][1]:
        name = re.sub(r"\W+", "-", Path(own[1]["dataset_name"]).stem).strip("-") or name
    return resolve([*layers, own], name=name)


def _demo_of(place: str, keys: dict[str, Any], own: dict[str, Any]) -> Layer:
    """The demo's recipe for a command line without a file, which is said: of its keys those that hold for other data too."""
    data = own.get("dataset_name", keys["dataset_name"])
    if identity_of("dataset_name", {"dataset_name": data}) == identity_of("dataset_name", keys):
        say(f"no --config: the recipe is {DEMO}")
        return place, keys
    of_its_data = [k for k in keys if known_keys()[k].owner == "own" and k not in NOT_ABOUT_DATA | FREE_KEYS]
    say(f"no --config: all but the keys of the data are those of {DEMO}")
    return place, {key: value for key, value in keys.items() if key not in of_its_data}


def _check_not_alone(layers: list[Layer], given: dict[str, list[str]]) -> None:
    """Raises UserError where what is laid over a recipe is the only file, and no key says where conversations are."""
    if {key for way in ALTERNATIVES[0] for key in way} & given.keys():
        return
    if all(Path(place).parent.name == "overlays" for place, _ in layers):
        over = layers[0][0]
        raise UserError(f"--config: {over} is an overlay, laid over a recipe: --config RECIPE --config {over}")


def read_layers(files: list[str]) -> list[Layer]:
    """The keys of several files, each with its path; raises UserError for one that cannot be read or is named twice."""
    paths = [Path(locate(file)) for file in files]
    for i, path in enumerate(paths):
        if path.resolve() in [p.resolve() for p in paths[:i]]:
            raise UserError(f"--config names {path} twice; remove one")
    return [(str(here(path)), read_recipe(path)) for path in paths]


def resolve(layers: list[Layer], name: str) -> Recipe:
    """The checked recipe of these layers, of which a later one wins, key by key.

    Raises:
        UserError: for a key that is unknown, refused or wrongly typed, with the name of its layer; for keys at odds.
    """
    values: dict[str, Any] = {}
    for where, keys in layers:
        values = _lay_over(values, _typed_keys(where, keys), where)
    if "model_name_or_path" not in values:
        say(
            "the recipe names no base: demo/base is taken, a toy; set model_name_or_path, or add one of recipes/overlays/"
        )
    if "dataset_name" not in values:
        say("the recipe names no data: the demo's is taken; set dataset_name")
        if not any(values.get(key) for way in ALTERNATIVES[0] for key in way):
            values["messages_column"] = "messages"  # where its conversations are
    values.setdefault("output_dir", f"outputs/{name}")
    values = {**DEFAULTS, **_default_rate(values), **_decided_by_adapter(values), **values}
    by_owner = {owner: {k: v for k, v in values.items() if known_keys()[k].owner == owner} for owner in
                ("own", "training", "model")}  # fmt: skip
    recipe = Recipe(**by_owner["own"], training=by_owner["training"], model=by_owner["model"], name=name)
    check(recipe)
    recipe.mixed = _load_mixed(recipe)
    return recipe


def _load_mixed(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes in `also_train` by their names there, each as this run with the other's data. RECIPE=DATA puts other data in
    the place of the recipe's."""
    mixed: dict[str, Recipe] = {}
    places: list[tuple[Path, str]] = []
    for file, rows in (recipe.also_train or {}).items():
        if type(rows) is not int or rows < 1:
            if rows != "all" and not re.fullmatch("[1-9][0-9]? times", str(rows)):
                raise UserError(
                    f"also_train: {file}: {rows!r} is no number of rows, such as 500, nor all, nor so many times all: 3 times"
                )
        path, data = _with_its_data(str(file))
        if (place := (path.resolve(), os.path.realpath(locate(data)) if data else "")) in places:
            raise UserError(f"also_train: {file} stands there twice; remove one")
        places.append(place)
        try:
            own = _typed_keys(str(path), read_recipe(path)) | ({"dataset_name": data} if data else {})
            if own.get("also_train"):
                raise UserError("it has also_train itself; name its recipes here too, and a recipe without it")
            template, ours = own.get("chat_template_path"), recipe.training.get("chat_template_path")
            if template and (not ours or Path(locate(template)).resolve() != Path(locate(ours)).resolve()):
                raise UserError(
                    f"chat_template_path: {template} is not this run's ({ours}), and a run has one; set it here too"
                )
            values = _about_data(recipe, own, OF_A_TEST) | {"max_samples": None, "also_train": None}
            mixed[file] = dataclasses.replace(recipe, **values, name=str(file))
            check(mixed[file])
        except UserError as error:
            raise UserError(f"also_train: {file}: {error}") from None
    return mixed


def load_also_tests(recipe: Recipe) -> dict[str, Recipe]:
    """The recipes in `also_test` by their files' names, each as this run with the other's data, references, labels, checks,
    lengths and primary metric. RECIPE=DATA puts other data in the place of the recipe's. Nothing is timed there.

    Raises:
        UserError: for one that cannot be read, is there twice or has `also_test` itself, and for keys that do not agree.
    """
    tests: dict[str, Recipe] = {}
    paths: list[Path] = []
    for entry in recipe.also_test:
        path, data = _with_its_data(entry)
        if path.resolve() in paths:
            raise UserError(f"also_test: {entry} stands there twice; remove one")
        if path.stem in tests:
            raise UserError(f"also_test: two are called '{path.stem}'; rename one of the files")
        paths.append(path.resolve())
        own = _typed_keys(str(path), read_recipe(path)) | ({"dataset_name": data} if data else {})
        if own.get("also_test"):
            raise UserError(
                f"also_test: {entry} has also_test itself; name its recipes here too, and a recipe without it"
            )
        try:
            tests[path.stem] = _with_test_of(recipe, own, path.stem)
        except UserError as error:
            raise UserError(f"also_test: {entry}: {error}") from None
    return tests


def load_named(key: str, entry: str) -> Recipe:
    """The recipe that a key names as RECIPE, or as RECIPE=DATA with other data in the place of its own.

    Raises:
        UserError: with the key in front, where it cannot be read.
    """
    path, data = _with_its_data(entry)
    try:
        return load_recipe(["--config", str(path), *(["--dataset_name", data] if data else [])], usage="")
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _with_its_data(entry: str) -> tuple[Path, str]:
    """The file of RECIPE or RECIPE=DATA, and the data ("" for the recipe's own)."""
    file, _, data = (entry, "", "") if Path(locate(entry)).exists() else entry.partition("=")
    return Path(locate(file)), data


def _with_test_of(recipe: Recipe, own: dict[str, Any], name: str) -> Recipe:
    values = _about_data(recipe, own, OF_A_TEST)
    limits = [limit for limit in (recipe.max_eval_samples, values["max_eval_samples"]) if limit is not None]
    values["max_eval_samples"] = min(limits, default=None)
    training = recipe.training | {"max_length": own.get("max_length", DEFAULTS["max_length"])}
    test = dataclasses.replace(recipe, **values, training=training, also_test=[], name=name)
    check(test)
    return dataclasses.replace(test, num_latency_prompts=0)


def _about_data(recipe: Recipe, own: dict[str, Any], more: tuple[str, ...]) -> dict[str, Any]:
    """CareLM's keys about data, and `more` of them, as another recipe's file has them or by default; what the run masks or
    strips is masked and stripped in rows of other recipes too."""
    fields = {f.name: f for f in dataclasses.fields(Recipe) if "help" in f.metadata}
    about_data = [key for key in fields if key not in NOT_ABOUT_DATA | FREE_KEYS]
    values = {}
    for key in (*about_data, *(key for key in more if key in fields)):
        field = fields[key]
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        values[key] = own.get(key, DEFAULTS.get(key, default))
    values["strip_html"] |= recipe.strip_html
    values["mask_personal_data"] |= recipe.mask_personal_data
    values["phone_region"] = values["phone_region"] or recipe.phone_region
    return values


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the recipe as resolved, where it is not there yet as it is; `--config` reads it again."""
    text = yaml.safe_dump(recipe.keys(), sort_keys=True, allow_unicode=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)


def check_identity(recipe: Recipe, path: Path) -> None:
    """Raises UserError where the run that wrote `path` (its recipe.yaml) is another run than this one."""
    before, now = read_yaml(path), recipe.keys()
    changed = []
    for key in sorted(before.keys() | now.keys()):
        if key in FREE_KEYS or key.startswith(FREE_PREFIXES) or key not in known_keys():
            continue
        was, is_now = (identity_of(key, values, default_of(key)) for values in (before, now))
        if was != is_now:
            changed.append(f"{key} (was {was!r}, is {is_now!r})")
    if changed:
        raise UserError(
            f"output_dir {path.parent} holds another run, made with other values of {', '.join(changed)}: set another "
            "output_dir, or --restart to begin anew (the old folder is renamed and kept)"
        )


def _default_rate(values: dict[str, Any]) -> dict[str, Any]:
    is_preferences, method = values.get("objective") == "preferences", values.get("method", "lora")
    return {"learning_rate": PREFERENCE_RATES[method]} if is_preferences and method in PREFERENCE_RATES else {}


def _decided_by_adapter(values: dict[str, Any]) -> dict[str, Any]:
    """What the recipe's `adapter` decides; that a key of the recipe says otherwise is found when the run begins."""
    if not values.get("adapter"):
        return {}
    saved = Path(values["output_dir"]) / "recipe.yaml"
    decided = decided_of_run(values["adapter"], read_yaml(saved) if saved.is_file() else {})
    decided = {key: value for key, value in decided.items() if value is not None or key in DEFAULTS}
    return {key: typed(known_keys()[key], value, f"adapter {values['adapter']}: ") for key, value in decided.items()}


def _lay_over(values: dict[str, Any], own: dict[str, Any], where: str) -> dict[str, Any]:
    """`own` over `values`, key by key; what says in another way what `own` says is taken out, and said."""
    values = dict(values)
    for ways in ALTERNATIVES:
        chosen = [key for way in ways for key in way if own.get(key)]
        others = [key for way in ways if not set(way) & set(chosen) for key in way]
        for key in others if chosen else []:
            if values.pop(key, None):
                say(f"{where}: {chosen[0]} takes the place of {key}")
    return {**values, **own}


def _typed_keys(where: str, keys: dict[str, Any]) -> dict[str, Any]:
    place = "--" if where == "command line" else f"{where}: "
    if place != "--" and (once := [name for name in ONCE if keys.get(name)]):
        raise UserError(f"{where}: {once[0]} is meant once, so it stands on the command line alone: --{once[0]}")
    found = {name: typed(known(name, where), value, place) for name, value in keys.items()}
    if place == "--" and "preview" in found and found["preview"] < 1:
        raise UserError(f"--preview: {found['preview']} is not at least 1; leave it out to train")
    return found


def read_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe's file, its data looked for beside it too (`with_data_beside`)."""
    return with_data_beside(path, read_yaml(path))


def with_data_beside(path: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """Keys that stand in this file. Data that lies beside the file, and not where its name leads from another current folder or
    the project's, is named by its whole path; so is data that is nowhere, where something beside it is called alike."""
    name = keys.get("dataset_name")
    if isinstance(name, str) and name and not os.path.isabs(os.path.expanduser(name)):
        beside = path.resolve().parent / name
        is_own_folder = beside == Path.cwd() / name and Path.cwd() != PROJECT
        if is_own_folder or not (os.path.exists(locate(name)) or glob.glob(name, recursive=True)):
            if glob.glob(str(beside), recursive=True) or beside.exists() or (Path(name).suffix and near(beside)):
                return keys | {"dataset_name": str(beside)}
    return keys
