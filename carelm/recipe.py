"""The recipe: one flat YAML file that describes one complete run, and every check of it that needs no weights.

A key belongs to CareLM (the dataclass `Recipe`), to TRL's `SFTConfig` or to TRL's `ModelConfig`. The names, types and
defaults of the last two are read from their source with `ast`, because importing them costs five seconds; their
values are checked by TRL itself once the run starts. This module imports no torch.
"""

import argparse
import ast
import dataclasses
import difflib
import hashlib
import importlib.util
import json
import os
import re
import sys
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from string import Formatter
from typing import Any, NoReturn

import yaml

PROJECT = Path(__file__).resolve().parent.parent
DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


class UserError(Exception):
    """What a user can mend: one line that names the key, file or row and the fix."""

    exit_status = 2  # of the launched file
    label = "error"


def _key(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    metadata = {"help": help, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class Recipe:
    """One run. The fields are CareLM's own keys; `training` and `model` hold the keys of SFTConfig and ModelConfig."""

    # method and budget
    method: str = _key("lora", "What is trained.", ("lora", "full", "prompt_tuning"))
    precision: str = _key(
        "auto",
        "auto: bf16 on GPUs of compute capability 8.0 and newer, fp16 on older ones, fp32 on a CPU.",
        ("auto", "bf16", "fp16", "fp32"),
    )
    global_batch_size: int = _key(
        16, "Examples in one optimizer step over all ranks; gradient accumulation follows from it."
    )
    group_by_length: bool = _key(True, "Batch examples of like length; the groups depend on batch and seed alone.")
    num_virtual_tokens: int = _key(20, "Length of the trained prompt (method: prompt_tuning).")
    prompt_tuning_init_text: str | None = _key(None, "Text whose embeddings the trained prompt starts from.")
    early_stopping_patience: int | None = _key(
        None, "Stop after this many evaluations in a row without a lower eval loss, and keep the best."
    )
    num_sample_answers: int = _key(3, "Validation prompts that are answered at each evaluation, for TensorBoard.")
    sample_max_new_tokens: int = _key(64, "Longest such answer, in tokens.")
    # data
    dataset_name: str = _key("demo/data", "A .jsonl, .json, .csv or .parquet file, a folder, a glob, or a Hub id.")
    dataset_config: str | None = _key(None, "Configuration of a Hub dataset.")
    dataset_train_split: str = _key("train", "Name of the split to train on.")
    dataset_validation_split: str = _key("validation", "Name of the split for the eval loss.")
    dataset_test_split: str = _key("test", "Name of the split kept for the evaluator.")
    validation_fraction: float = _key(
        0.05, "Share of the train split to hold out where the data has no validation split."
    )
    test_fraction: float = _key(0.1, "Share of the train split to hold out where the data has no test split.")
    split_seed: int = _key(42, "Seed of these shares and of max_samples.")
    max_samples: int | None = _key(None, "Use at most this many training rows, drawn by split_seed.")
    max_eval_samples: int | None = _key(None, "Use at most this many validation rows, and as many test rows.")
    row_filter: dict[str, Any] | None = _key(None, "Keep rows by column: {category: [ORDER, REFUND], lang: en}.")
    system_prompt: str | None = _key(
        None, "System message of every conversation that has none; {column} is filled in, {{ is a brace."
    )
    prompt_template: str | None = _key(None, 'The user message, e.g. "{instruction}".')
    completion_template: str | None = _key(None, 'The answer, e.g. "{response}".')
    messages_column: str | None = _key(None, "Column with a list of messages, instead of the two templates.")
    role_key: str | None = _key(None, "Key of a message's role (default: role, from or speaker).")
    content_key: str | None = _key(None, "Key of a message's text (default: content, value, utterance or text).")
    user_roles: list[str] = _key([], "Values of the role that mean the user, where they are unusual.")
    assistant_roles: list[str] = _key([], "Values of the role that mean the assistant, where they are unusual.")
    trained_turns: str = _key("last", "Which assistant turns carry loss.", ("last", "all"))
    category_column: str | None = _key(None, "Column with the category, for scores by category.")
    id_column: str | None = _key(None, "Column with the row's id (default: file:row).")
    too_long: str = _key(
        "drop",
        "A row that is still over max_length once its old turns are gone: drop it, or cut its prompt and answer.",
        ("drop", "cut"),
    )
    max_empty_share: float = _key(0.1, "Stop when more than this share of the rows has no answer.")
    keep_test_questions: bool = _key(False, "Leave questions that also stand in validation or test in train.")
    # the evaluator
    models: list[str] = _key(
        [],
        "What is compared: base, adapter, merged, or folders; NAME@4bit, @8bit, @bf16, @fp16 or @fp32 holds one otherwise "
        "(default: base, the run's result, and its merge where it is there).",
    )
    num_shots: int = _key(0, "Training examples that stand in front of every prompt, drawn by split_seed.")
    max_new_tokens: int = _key(256, "Longest answer, in tokens.")
    max_batch_tokens: int = _key(
        16384, "Tokens of one batch, prompts and answers with padding; halved where memory ends."
    )
    temperature: float = _key(0.0, "0 takes the likeliest token; above it answers are drawn by `seed`.")
    top_p: float = _key(1.0, "Draw from the likeliest tokens that make up this probability.")
    reference_columns: list[str] = _key(
        [], "Columns of the test rows that hold references, where there are several: the best one counts."
    )
    labels: list[str] = _key([], "The labels that answers end with, for accuracy, macro F1 and the confusion table.")
    primary_metric: str = _key(
        "rougeL",
        "The score that decides which model is better.",
        ("rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf", "exact_match", "accuracy", "macro_f1"),
    )
    num_resamples: int = _key(1000, "Resamples of the test conversations for the intervals.")
    num_latency_prompts: int = _key(50, "Prompts that are timed one at a time (all, where there are fewer).")
    # the run
    max_hours: float | None = _key(None, "Save and stop in time to be done after this many hours from the launch.")
    stall_timeout: int = _key(
        1800,
        "Seconds without a step or an answer, loading included, after which a rank writes its stacks and ends; 0: never.",
    )
    restart: bool = _key(False, "Begin anew; an earlier run in output_dir is renamed, never deleted.")
    preview: int = _key(0, "Print this many rendered examples with the trained tokens marked, and exit.")

    name: str = ""
    training: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        return Path(self.training["output_dir"])

    @property
    def max_length(self) -> int:
        return self.training["max_length"]

    @property
    def seed(self) -> int:
        return self.training.get("seed", 42)

    @property
    def base(self) -> str:
        """The base model: a folder as an absolute path, or a Hub id."""
        return locate(self.model["model_name_or_path"])

    @property
    def bits(self) -> int | None:
        """4 or 8 for a quantised base, None for one in the run's precision."""
        return 4 if self.model.get("load_in_4bit") else 8 if self.model.get("load_in_8bit") else None

    @property
    def is_local(self) -> bool:
        """Whether the run needs nothing from a hub."""
        return os.path.exists(self.base) and not is_hub_id(self.dataset_name) and not self.training.get("push_to_hub")

    def keys(self) -> dict[str, Any]:
        """Every key of the run with its value, flat, as `recipe.yaml` holds it; secrets are left out."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if "help" in f.metadata}
        for once in ("restart", "preview"):
            del own[once]
        return {**own, **self.model, **{k: v for k, v in self.training.items() if k != "hub_token"}}


# Keys that the evaluator alone reads.
EVALUATION_KEYS = (
    "models", "num_shots", "max_new_tokens", "max_batch_tokens", "temperature", "top_p", "reference_columns", "labels",
    "primary_metric", "num_resamples", "num_latency_prompts",
)  # fmt: skip

# Keys that may change when a run goes on: where it runs, how much, what it shows.
FREE_PREFIXES = (
    "logging_",
    "log_",
    "save_",
    "eval_",
    "hub_",
    "dataloader_",
    "ddp_",
    "per_device_",
    "sample_",
    "trackio_",
)
FREE_KEYS = {
    "output_dir", "max_steps", "num_train_epochs", "report_to", "run_name", "project", "push_to_hub", "disable_tqdm",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "num_sample_answers", "skip_memory_metrics",
    "max_empty_share", "max_hours", "stall_timeout", "torch_empty_cache_steps", "precision", "tf32", "debug",
    "include_num_input_tokens_seen", "attn_implementation", *EVALUATION_KEYS,
}  # fmt: skip

# Keys of SFTConfig and ModelConfig that CareLM derives or that have no effect here, and what to use instead.
REFUSED = {
    "deepspeed": "name an accelerate file that holds it: accelerate launch --config_file accelerate_configs/zero2.yaml",
    "fsdp": "use DeepSpeed ZeRO-3: accelerate launch --config_file accelerate_configs/zero3.yaml",
    "fsdp_config": "use DeepSpeed ZeRO-3: accelerate launch --config_file accelerate_configs/zero3.yaml",
    "gradient_accumulation_steps": "set global_batch_size, the accumulation follows from it",
    "auto_find_batch_size": "set per_device_train_batch_size, which never changes the curve",
    **dict.fromkeys(("bf16", "fp16", "dtype", "bf16_full_eval", "fp16_full_eval"), "set precision"),
    "use_peft": "set method: lora, prompt_tuning or full",
    "lora_task_type": "CareLM trains causal language models only; leave it out",
    **dict.fromkeys(
        ("packing", "packing_strategy", "padding_free", "eval_packing", "train_sampling_strategy", "length_column_name"),
        "set group_by_length",
    ),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), "set trained_turns"),
    "truncation_mode": "set too_long",
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs"), "set prompt_template and completion_template"),
    **dict.fromkeys(("eos_token", "pad_token"), "the chat template decides: set chat_template_path"),
    "resume_from_checkpoint": "the same command goes on from the newest whole checkpoint; --restart begins anew",
    "use_cpu": "hide the GPUs: CUDA_VISIBLE_DEVICES= accelerate launch ...",
    "load_best_model_at_end": "set early_stopping_patience, which keeps the best checkpoint",
    **dict.fromkeys(
        (
            "model_init_kwargs", "loss_type", "shuffle_dataset", "dataset_num_proc", "activation_offloading",
            "router_aux_loss_coef", "dataloader_drop_last", "remove_unused_columns", "label_names", "ignore_data_skip",
            "average_tokens_across_devices", "save_only_model", "save_on_each_node", "enable_jit_checkpoint",
            "do_train", "do_eval", "do_predict", "local_rank", "accelerator_config", "parallelism_config",
            "restore_callback_states_from_checkpoint", "eval_accumulation_steps", "prediction_loss_only",
            "include_for_metrics", "batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object",
            "dataloader_persistent_workers", "dataloader_prefetch_factor", "dataloader_multiprocessing_context",
            "dataloader_in_order", "hub_revision", "log_level_replica",
            "hub_strategy", "hub_always_push", "use_cache", "logging_first_step", "metric_for_best_model",
            "greater_is_better", "eval_delay", "activation_checkpointing", "activation_checkpointing_kwargs",
        ),
        "it has no effect in CareLM; leave it out",
    ),
}  # fmt: skip

LAUNCHER_KEYS = (
    "config_file", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port",
)  # fmt: skip

# Where CareLM's defaults differ from TRL's: a recipe of four lines should be a good run.
DEFAULTS = {
    "model_name_or_path": "demo/base",
    "use_bnb_nested_quant": True,
    "lora_target_modules": ["all-linear"],
    "lora_dropout": 0.0,  # dropout draws other masks on other numbers of ranks: the curve would not be the same
    "max_length": 1024,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "eval_strategy": "epoch",
    "eval_on_start": True,
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": ["tensorboard"],
}


@dataclass(frozen=True)
class Key:
    """One key of a recipe: its type as annotated, its default as source text, and who owns it."""

    name: str
    annotation: str
    default: str
    help: str
    owner: str
    choices: tuple[str, ...] = ()


@cache
def known_keys() -> dict[str, Key]:
    """Every key by name: CareLM's from the dataclass, the others from the source of transformers and TRL."""
    keys = {}
    for package, file, class_name, owner in (
        ("transformers", "training_args.py", "TrainingArguments", "training"),
        ("trl", "trainer/base_config.py", "_BaseConfig", "training"),
        ("trl", "trainer/sft_config.py", "SFTConfig", "training"),
        ("trl", "trainer/model_config.py", "ModelConfig", "model"),
    ):
        source = Path(importlib.util.find_spec(package).origin).parent / file
        body = next(n.body for n in ast.parse(source.read_text()).body if getattr(n, "name", "") == class_name)
        for statement in body:
            if isinstance(statement, ast.AnnAssign) and not statement.target.id.startswith("_"):
                arguments = {k.arg: k.value for k in getattr(statement.value, "keywords", [])}
                metadata = arguments.get("metadata", ast.Dict([], []))
                help_nodes = [v for k, v in zip(metadata.keys, metadata.values) if getattr(k, "value", "") == "help"]
                try:
                    help = " ".join(ast.literal_eval(help_nodes[0]).split())
                except (IndexError, ValueError):  # no help, or one that is computed
                    help = ""
                name = statement.target.id
                default = ast.unparse(arguments["default"]) if "default" in arguments else "None"
                help = help or (keys[name].help if name in keys else "")
                keys[name] = Key(name, ast.unparse(statement.annotation), default, help, owner)
    for f in dataclasses.fields(Recipe):
        if "help" in f.metadata:
            annotation = f.type if isinstance(f.type, str) else str(f.type).replace("<class '", "").replace("'>", "")
            default = f.default if f.default is not dataclasses.MISSING else f.default_factory()
            keys[f.name] = Key(f.name, annotation, repr(default), f.metadata["help"], "own", f.metadata["choices"])
    return keys


@cache
def enum_values(name: str) -> tuple[str, ...]:
    """The values of one of transformers' string enums (SchedulerType, OptimizerNames ...), read from its source."""
    folder = Path(importlib.util.find_spec("transformers").origin).parent
    for file in ("trainer_utils.py", "training_args.py"):
        for node in ast.parse((folder / file).read_text()).body:
            if getattr(node, "name", "") == name:
                assigned = (statement for statement in node.body if isinstance(statement, ast.Assign))
                return tuple(s.value.value for s in assigned if isinstance(s.value, ast.Constant))
    return ()


class _Loader(yaml.SafeLoader):
    """YAML whose only booleans are true and false (a label may be yes or no), and that refuses a key written twice."""

    yaml_implicit_resolvers = {
        letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
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


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)


def load_recipe(arguments: list[str], usage: str, only_own: bool = False) -> Recipe:
    """Reads `[--config FILE] [--key value ...]` into a checked recipe; `--help` prints every key and exits.

    Args:
        arguments: the command line without the script's name.
        usage: the text above the list of keys in `--help`.
        only_own: `--help` lists CareLM's keys and few others, for files that train nothing.

    Raises:
        UserError: for an unreadable file, and for a key that is unknown, abbreviated, doubled, refused or wrongly typed.
    """
    if "--help" in arguments or "-h" in arguments:
        _print_help(usage, only_own)
    config, given = _split_command_line(arguments)
    path = Path(locate(config or "recipes/demo.yaml"))
    values = {}
    for key, value in _read_yaml(path).items():
        values[key] = _typed(_known(key, str(path)), value, f"{path}: ")
    for name, texts in given.items():
        key = _known(name, "command line")
        values[name] = _typed(key, _parse_texts(key, texts), "--")
    values = {**DEFAULTS, **values}
    values.setdefault("output_dir", f"outputs/{path.stem}")
    by_owner = {owner: {k: v for k, v in values.items() if known_keys()[k].owner == owner} for owner in
                ("own", "training", "model")}  # fmt: skip
    recipe = Recipe(**by_owner["own"], training=by_owner["training"], model=by_owner["model"], name=path.stem)
    _check(recipe)
    return recipe


def locate(name: str) -> str:
    """A path as the user means it: from the current folder, else from the project's; unchanged where neither has it."""
    for folder in (Path.cwd(), PROJECT):
        if (folder / Path(name).expanduser()).exists():
            return str(folder / Path(name).expanduser())
    return name


def is_hub_id(dataset_name: str) -> bool:
    """Whether a dataset name that is no file, folder or glob here has the shape of a Hub id (owner/name)."""
    if any(c in dataset_name for c in "*?[") or os.path.exists(locate(dataset_name)):
        return False
    looks_like_path = dataset_name.startswith((".", "/", "~")) or dataset_name.endswith(DATA_SUFFIXES)
    return not looks_like_path and dataset_name.count("/") <= 1


def template_columns(template: str, key: str) -> list[str]:
    """The columns that a template names, e.g. ["instruction"] for "{instruction}"; raises UserError on a bad one."""
    return [column for _, column in template_pieces(template, key) if column is not None]


def template_pieces(template: str, key: str) -> list[tuple[str, str | None]]:
    """A template as pieces of text, each with the column that follows it, or None; raises UserError on a bad one.

    A column is taken by its whole name, dots, brackets and colons included.
    """
    try:
        parsed = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{key}: {error}; write {{column}} for a column and {{{{ for a brace") from None
    return [(text, None if name is None else name + (form and f":{form}")) for text, name, form, _ in parsed]


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Writes the recipe as resolved, where it is not there yet as it is; `--config` reads it again."""
    text = yaml.safe_dump(recipe.keys(), sort_keys=True, allow_unicode=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)


def write_whole(path: Path, text: str) -> None:
    """Writes a file so that under its name there is all of it or nothing."""
    aside = path.with_name(path.name + ".partial")
    with open(aside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def check_identity(recipe: Recipe, path: Path) -> None:
    """Raises UserError where the run that wrote `path` (its recipe.yaml) is another run than this one."""
    before, now = {**DEFAULTS, **_read_yaml(path)}, recipe.keys()
    changed = []
    for key in sorted(before.keys() | now.keys()):
        if key in FREE_KEYS or key.startswith(FREE_PREFIXES) or key not in known_keys():
            continue
        try:
            default = ast.literal_eval(known_keys()[key].default)
        except ValueError:
            default = None
        was, is_now = before.get(key, default), now.get(key, default)
        if was != is_now:
            changed.append(f"{key} (was {was!r}, is {is_now!r})")
    if changed:
        raise UserError(
            f"output_dir {path.parent} holds another run, made with other values of {', '.join(changed)}: set another "
            "output_dir, or --restart to begin anew (the old folder is renamed and kept)"
        )


def micro_batch_size(recipe: Recipe, ranks: int) -> int:
    """Examples that one rank takes in one forward: `per_device_train_batch_size`, or less where its share is less.

    Raises:
        UserError: where the global batch does not divide, with the nearest sizes that do.
    """
    total, asked = recipe.global_batch_size, recipe.training.get("per_device_train_batch_size", 8)
    if total % ranks:
        below, above = total // ranks * ranks, -(-total // ranks) * ranks
        sizes = f"{below} or {above}" if below else str(above)
        raise UserError(f"global_batch_size: {total} does not divide by {ranks} ranks; the nearest sizes are {sizes}")
    share = total // ranks
    if asked >= share:
        return share
    if share % asked:
        divisors = [d for d in range(1, share + 1) if share % d == 0]
        below, above = max(d for d in divisors if d < asked), min(d for d in divisors if d > asked)
        raise UserError(
            f"per_device_train_batch_size: {asked} does not divide each rank's share of {share} (global_batch_size {total} "
            f"over {ranks} ranks); the nearest sizes are {below} and {above}"
        )
    return asked


def fingerprint(*parts: Any) -> str:
    """A short stable hash of anything that JSON can hold, or of bytes."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, bytes) else json.dumps(part, sort_keys=True, default=str).encode())
    return digest.hexdigest()[:16]


def _print_help(usage: str, only_own: bool) -> NoReturn:
    """Prints every key with its type and default, CareLM's first, and exits with status 0."""
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    groups = {
        "own": parser.add_argument_group("CareLM's keys"),
        "model": parser.add_argument_group("keys of TRL's ModelConfig"),
        "training": parser.add_argument_group("keys of TRL's SFTConfig and transformers' TrainingArguments"),
    }
    shared = ("output_dir", "model_name_or_path", "max_length", "seed")
    for key in known_keys().values():
        if key.name in REFUSED or (only_own and key.owner != "own" and key.name not in shared):
            continue
        default = repr(DEFAULTS[key.name]) if key.name in DEFAULTS else key.default
        choices = f" One of: {', '.join(key.choices)}." if key.choices else ""
        help = f"{key.help}{choices} ({key.annotation}, default: {default})".replace("%%", "%").replace("%", "%%")
        groups[key.owner].add_argument(f"--{key.name}", metavar="", help=help)
    parser.print_help()
    sys.exit(0)


def _split_command_line(arguments: list[str]) -> tuple[str | None, dict[str, list[str]]]:
    """`--config X --a 1 --b=2 --flag` -> ("X", {"a": ["1"], "b": ["2"], "flag": []})."""
    given: dict[str, list[str]] = {}
    name = None
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument[2:].partition("=")
            if name in given:
                raise UserError(f"--{name} stands twice on the command line; remove one")
            given[name] = [value] if equals else []
        elif name is None:
            raise UserError(
                f"'{argument}' is not a key: write --config {argument} for a recipe, --key value for the rest"
            )
        else:
            given[name].append(argument)
    config = given.pop("config", None)
    if config is not None and len(config) != 1:
        raise UserError("--config takes one recipe file")
    return (config[0] if config else None), given


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.load(file, Loader=_Loader)
    except OSError as error:
        raise UserError(
            f"recipe {path} cannot be read ({error.strerror}); see recipes/ for those that come with CareLM"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = f" line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise UserError(f"recipe {path}{where} is not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} holds no `key: value` lines")
    return values


def _known(key: str, where: str) -> Key:
    """The key of this name, if it is one that a recipe may hold; otherwise an error with the nearest one that is."""
    if key in REFUSED:
        raise UserError(f"{where}: key '{key}' is not set in a recipe: {REFUSED[key]}")
    if key in LAUNCHER_KEYS:
        raise UserError(f"{where}: '{key}' belongs to the launcher: accelerate launch --{key} ... train/sft.py ...")
    if key not in known_keys():
        names = [k for k in known_keys() if k not in REFUSED]
        starts = [k for k in names if str(key) and k.startswith(str(key))]
        near = starts[:1] or difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else "; --help lists all keys"
        raise UserError(f"{where}: unknown key '{key}'{hint}")
    return known_keys()[key]


def _parse_texts(key: Key, texts: list[str]) -> Any:
    """Words of the command line -> a value, by the same rules as YAML; a key without words is a switch."""
    if not texts:
        return True
    if key.annotation.replace(" | None", "") == "str":
        return " ".join(texts)
    try:
        values = [yaml.load(text, Loader=_Loader) for text in texts]
    except yaml.YAMLError:
        values = texts
    return values if len(values) > 1 else values[0]


def _typed(key: Key, value: Any, where: str) -> Any:
    """The value in the key's type. YAML reads 2e-4 as text, so text that is a number counts as one."""
    kinds = {kind.strip().split("[")[0] for kind in key.annotation.split("|")}
    problem = UserError(f"{where}{key.name}: {value!r} is not of type {key.annotation}")
    if isinstance(value, str) and value.lower() in ("none", "null") and "str" not in kinds:
        value = None
    if value is None:
        if "None" in kinds or key.default == "None":
            return None
        raise problem
    if isinstance(value, bool):
        if "bool" in kinds or "Literal" in kinds:
            return value
        if kinds & {"list"}:
            return [str(value).lower()]
        raise problem
    if "dict" in kinds and isinstance(value, (dict, str)):
        try:
            return json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError:
            raise problem from None
    if "list" in kinds and not isinstance(value, dict):
        values = value if isinstance(value, list) else [value]
        texts = "list[str]" in key.annotation
        return [str(v).lower() if isinstance(v, bool) else str(v) if texts else v for v in values]
    if "int" in kinds and isinstance(value, int):
        return value
    if "float" in kinds and isinstance(value, (int, float, str)):
        try:
            return float(value) if isinstance(value, str) else value
        except ValueError:
            raise problem from None
    if kinds & {"str", "SchedulerType", "OptimizerNames"} and isinstance(value, str):
        choices = key.choices or tuple(v for kind in kinds - {"str", "None"} for v in enum_values(kind))
        if choices and value not in choices:
            near = difflib.get_close_matches(value, choices, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"{where}{key.name}: '{value}' is none of {', '.join(choices)}{hint}")
        return value
    raise problem


def _check(recipe: Recipe) -> None:
    """What can be wrong between keys, found without torch."""
    for key in ("global_batch_size", "num_virtual_tokens", "sample_max_new_tokens", "max_new_tokens", "max_batch_tokens",
                "num_resamples", "num_latency_prompts"):  # fmt: skip
        if getattr(recipe, key) < 1:
            raise UserError(f"{key}: {getattr(recipe, key)} is not at least 1")
    for key in ("max_length", "per_device_train_batch_size", "per_device_eval_batch_size"):
        if recipe.training.get(key, 1) is None or recipe.training.get(key, 1) < 1:
            raise UserError(f"{key}: {recipe.training[key]} is not at least 1")
    if recipe.stall_timeout < 0:
        raise UserError(f"stall_timeout: {recipe.stall_timeout} is below 0; 0 is for never")
    if recipe.max_hours is not None and recipe.max_hours <= 0:
        raise UserError(f"max_hours: {recipe.max_hours} is not above 0; leave it out for no limit")
    for key in ("max_samples", "max_eval_samples", "early_stopping_patience"):
        if getattr(recipe, key) is not None and getattr(recipe, key) < 1:
            raise UserError(f"{key}: {getattr(recipe, key)} is not at least 1; leave it out for no limit")
    given = {**recipe.model, **recipe.training}
    for key in (
        "learning_rate",
        "lora_r",
        "lora_alpha",
        "num_train_epochs",
        "logging_steps",
        "eval_steps",
        "save_steps",
    ):
        if given.get(key) is not None and given[key] <= 0:
            raise UserError(f"{key}: {given[key]} is not above 0")
    for key in ("warmup_steps", "weight_decay", "max_grad_norm", "lora_dropout"):
        if given.get(key) is not None and given[key] < 0:
            raise UserError(f"{key}: {given[key]} is below 0")
    if given.get("max_steps", 1) < 1 and given["max_steps"] != -1:
        raise UserError(f"max_steps: {given['max_steps']} is not at least 1; leave it out to train num_train_epochs")
    for key in ("num_shots", "temperature"):
        if getattr(recipe, key) < 0:
            raise UserError(f"{key}: {getattr(recipe, key)} is below 0")
    if recipe.primary_metric in ("accuracy", "macro_f1") and not recipe.labels:
        raise UserError(f"primary_metric: {recipe.primary_metric} needs labels; list them, e.g. labels: [yes, no]")
    for key in ("validation_fraction", "test_fraction", "max_empty_share", "top_p"):
        if not 0 <= getattr(recipe, key) <= 1:
            raise UserError(f"{key}: {getattr(recipe, key)} is not between 0 and 1")
    if recipe.validation_fraction + recipe.test_fraction >= 1:
        raise UserError("validation_fraction and test_fraction leave nothing to train on; their sum must be under 1")
    if recipe.model.get("load_in_4bit") and recipe.model.get("load_in_8bit"):
        raise UserError("load_in_4bit and load_in_8bit: set only one of them")
    if recipe.method == "full" and recipe.bits:
        raise UserError(
            f"method: full cannot train a base held in {recipe.bits} bits; set method: lora, or leave out "
            f"load_in_{recipe.bits}bit"
        )
    if recipe.messages_column and (recipe.prompt_template or recipe.completion_template):
        raise UserError(
            f"messages_column and prompt_template: set one or the other (recipe {recipe.name} and command line)"
        )
    if not recipe.messages_column and not (recipe.prompt_template and recipe.completion_template):
        raise UserError(
            "the recipe does not say where the conversations are: set prompt_template and completion_template (such as "
            '"{instruction}" and "{response}"), or messages_column'
        )
    for key in ("system_prompt", "prompt_template", "completion_template"):
        if getattr(recipe, key) is not None:
            columns = template_columns(getattr(recipe, key), key)
            if key != "system_prompt" and not columns:
                raise UserError(f"{key}: {getattr(recipe, key)!r} names no column; write {{column}}")
    if recipe.training["save_strategy"] == "best":
        raise UserError(
            "save_strategy: best is not there; set steps, epoch or no (early_stopping_patience keeps the best checkpoint)"
        )
    if recipe.early_stopping_patience and recipe.training["eval_strategy"] == "no":
        raise UserError("early_stopping_patience needs evaluations: set eval_strategy: steps or epoch")
    if recipe.early_stopping_patience:  # the best checkpoint can only be kept where one is saved at each evaluation
        every = recipe.training.get("eval_steps") or recipe.training["logging_steps"]
        follow = {"save_strategy": recipe.training["eval_strategy"]}
        if recipe.training["eval_strategy"] == "steps":
            follow |= {"eval_steps": every, "save_steps": every}
        recipe.training.update(follow)
    base = recipe.model["model_name_or_path"]
    if base.startswith((".", "/", "~")) and not os.path.isdir(recipe.base):
        raise UserError(f"model_name_or_path: there is no folder {base}")
    beside = Path(locate(str(Path(base).parent)))
    if base.count("/") == 1 and not os.path.exists(recipe.base) and beside.is_dir():  # a Hub id, or a folder misspelt
        near = difflib.get_close_matches(Path(base).name, [p.name for p in beside.iterdir()], n=1)
        if near:
            raise UserError(
                f"model_name_or_path: there is no folder {base}; did you mean {Path(base).parent / near[0]}?"
            )
