"""Every key of a recipe: who owns it, its type, its default, and those that are refused or free to change.

A key belongs to CareLM (the dataclass `Recipe`), to TRL's `SFTConfig` or to TRL's `ModelConfig`. The names, types and
defaults of the last two are read from their source with `ast`, because importing them costs five seconds; their
values are checked by TRL itself once the run starts. Imports no torch.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from carelm.errors import UserError
from carelm.files import locate
from carelm.recipe import Recipe

# Keys that the evaluator alone reads.
EVALUATION_KEYS = (
    "models", "num_shots", "max_new_tokens", "max_batch_tokens", "temperature", "top_p", "reference_columns", "labels",
    "overlap_columns", "primary_metric", "num_resamples", "num_latency_prompts", "checks",
    "also_test", "api_url", "rate", "judge", "judge_url", "judge_samples", "judge_max_tokens", "judge_decides",
)  # fmt: skip
# Keys that serve/run.py alone reads.
SERVING_KEYS = (
    "host", "port", "api_key_file", "cors_origins", "max_queue", "answer_timeout", "max_body_bytes", "certify",
    "engine", "engine_command", "engine_url",
)  # fmt: skip
# Keys that serve/index.py, eval/retrieval.py and the shop assistant alone read.
RETRIEVAL_KEYS = (
    "documents", "passage_template", "product_column", "title_column", "filter_columns", "chunk_tokens", "index", "embedder",
    "retriever", "dense_weight", "num_passages", "answer_threshold", "tickets", "matcher", "gold_passages",
)  # fmt: skip
CARD_KEYS = ("card_notes", "card_questions")
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
    "include_num_input_tokens_seen", "attn_implementation", *CARD_KEYS, *EVALUATION_KEYS, *SERVING_KEYS,
    *RETRIEVAL_KEYS,
}  # fmt: skip
# Which modules LoRA changes and how its weights start: CareLM's own keys, for method: lora alone.
LORA_KEYS = (
    "layers_to_transform", "layers_pattern", "exclude_modules", "rank_pattern", "alpha_pattern", "init_lora_weights",
)  # fmt: skip
NOT_ABOUT_DATA = {
    "method", "precision", "global_batch_size", "group_by_length", "num_virtual_tokens", "prompt_tuning_init_text",
    "beta", "answer_weight",
    "early_stopping_patience", "num_sample_answers", "sample_max_new_tokens", "adapter", *LORA_KEYS,
    *CARD_KEYS, *EVALUATION_KEYS, *SERVING_KEYS,
    *RETRIEVAL_KEYS,
}  # fmt: skip
# What people change between runs, first the keys that all have, then those of a method.
COMPARED = (
    "method", "objective", "beta", "answer_weight", "model_name_or_path", "adapter", "dataset_name", "max_samples",
    "max_length", "trained_turns",
    "load_in_4bit", "load_in_8bit", "learning_rate", "lr_scheduler_type", "global_batch_size", "num_train_epochs", "max_steps",
    "seed",
)  # fmt: skip
COMPARED_OF = {
    "lora": ("lora_r", "lora_alpha", "lora_dropout", "use_dora"), "prompt_tuning": ("num_virtual_tokens",), "full": (),
}  # fmt: skip
# What a recipe in also_test says beside its data: how its questions are asked and scored.
OF_A_TEST = (
    "reference_columns", "labels", "overlap_columns", "primary_metric", "max_new_tokens", "checks",
    "max_empty_share", "max_length",
)  # fmt: skip
PLACES = ("dataset_name", "model_name_or_path", "adapter", "chat_template_path")  # each may name a file or folder
# What a recipe in also_train says beside its data.
OF_MIXED = ("labels", "max_empty_share")
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
        ("packing", "packing_strategy", "padding_free", "eval_packing"),
        "a row stands by itself, so that a step has the same examples on every rung and none sees another; group_by_length "
        "(true by default) batches rows of like length, which leaves little padding",
    ),
    **dict.fromkeys(("train_sampling_strategy", "length_column_name"), "set group_by_length"),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), "set trained_turns"),
    "truncation_mode": "set too_long",
    **dict.fromkeys(("dataset_text_field", "dataset_kwargs"), "set prompt_template and completion_template"),
    **dict.fromkeys(("eos_token", "pad_token"), "the chat template decides: set chat_template_path"),
    **dict.fromkeys(
        ("resume", "resume_from_checkpoint"),
        "the same command goes on from the newest whole checkpoint; --restart begins anew",
    ),
    "local_rank": "torch.distributed.launch and deepspeed add it; start the ranks with torchrun or accelerate launch",
    "use_cpu": "hide the GPUs: CUDA_VISIBLE_DEVICES= accelerate launch ...",
    "load_best_model_at_end": "set early_stopping_patience, which keeps the best checkpoint",
    **dict.fromkeys(
        (
            "model_init_kwargs", "loss_type", "shuffle_dataset", "dataset_num_proc", "activation_offloading",
            "router_aux_loss_coef", "dataloader_drop_last", "remove_unused_columns", "label_names", "ignore_data_skip",
            "average_tokens_across_devices", "save_only_model", "save_on_each_node", "enable_jit_checkpoint",
            "do_train", "do_eval", "do_predict", "accelerator_config", "parallelism_config",
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
# What others call a key whose name here is not like it.
MEANT = {
    **dict.fromkeys(("bits", "quantization", "quantization_bit", "quantize", "qlora", "4bit"), "load_in_4bit"),
    **dict.fromkeys(("base", "base_model", "pretrained_model", "model_id"), "model_name_or_path"),
    **dict.fromkeys(("data", "data_path", "data_files", "train_file", "train_data"), "dataset_name"),
    **dict.fromkeys(("r", "rank"), "lora_r"),
    **dict.fromkeys(("template", "prompt"), "prompt_template"),
    **dict.fromkeys(("chosen", "chosen_template"), "completion_template"),
    "chosen_column": "messages_column",
    "rejected": "rejected_template",
    "rpo_alpha": "answer_weight",
    "lr": "learning_rate",
    "alpha": "lora_alpha",
}
# Words of a command line that are no keys of a recipe, and whose they are.
OF_COMMANDS = {
    **dict.fromkeys(("config", "recipe"), "--config"),
    "help": "--help",
    "message": "--message of train/chat.py",
    "dry_run": "--dry_run of train/sweep.py, or --preview 2 of train/sft.py",
    **{name: f"--{name} of train/merge.py" for name in ("onto", "num_prompts", "tolerance")},
}
MEANT_ONCE = {  # and the file that takes it
    "restart": "train/sft.py", "preview": "train/sft.py", "rate": "eval/run.py", "certify": "serve/run.py",
}  # fmt: skip
LAUNCHER_KEYS = (
    "config_file", "num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port",
)  # fmt: skip
# Ways that exclude one another, each by the keys that choose it: a recipe has one of them. Those of a later file or of the
# command line displace the others of an earlier file.
ALTERNATIVES = (
    (
        ("prompt_template", "completion_template", "rejected_template"),
        ("messages_column", "rejected_column", "prompt_column"),
        ("text_column", "role_column", "conversation_column", "order_column", "date_order", "reply_to_column"),
    ),
    (("order_column", "date_order"), ("reply_to_column",)),
    (("load_in_4bit",), ("load_in_8bit",)),
    (("keep_test_questions",), ("drop_near_duplicates",)),
)
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
# The default learning_rate of objective: preferences. LoRA's is the highest measured at which preferred answers stay as likely.
PREFERENCE_RATES = {"lora": 2e-5, "full": 5e-6}


def identity_of(key: str, values: dict[str, Any], default: Any = None) -> Any:
    """What counts of a key's value when runs are compared: where predictions come from is no matter of training, nor from where
    a file or folder is named, and `phone_region` alone changes no row."""
    if key == "phone_region" and not values.get("mask_personal_data"):
        return None
    value = values.get(key, default)
    if key == "predicted_columns":
        return sorted(value or ())
    if key == "also_train" and isinstance(value, dict):
        return {"=".join(map(_located, str(file).split("=", 1))): rows for file, rows in value.items()}
    return _located(value) if key in PLACES and isinstance(value, str) else value


def _located(name: str) -> str:
    found = locate(name)
    return os.path.realpath(found) if os.path.exists(found) else name


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


def default_of(key: str) -> Any:
    """Its default here, where that is a plain value; None where it is computed."""
    if key in DEFAULTS:
        return DEFAULTS[key]
    try:
        return ast.literal_eval(known_keys()[key].default)
    except ValueError:
        return None


def in_effect(keys: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """These of a run's keys, defaults included, less those of another method and the budget that the other one overrules."""
    method, steps = keys.get("method", "lora"), keys.get("max_steps")
    idle = {key for other, own in COMPARED_OF.items() if other != method for key in own}
    if keys.get("objective", "answers") != "preferences":
        idle |= {"objective", "beta", "answer_weight"}
    idle.add("num_train_epochs" if isinstance(steps, int) and steps > 0 else "max_steps")
    return {name: keys.get(name, default_of(name)) for name in names if name not in idle}


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


def known(key: str, where: str) -> Key:
    """The key of this name, if it is one that a recipe may hold; otherwise an error with the nearest one that is."""
    if (refused := str(key).replace("-", "_")) in REFUSED:
        raise UserError(f"{where}: key '{key}' is not set in a recipe: {REFUSED[refused]}")
    if key in LAUNCHER_KEYS:
        raise UserError(f"{where}: '{key}' belongs to the launcher: accelerate launch --{key} ... train/sft.py ...")
    if key == "recipe" and where != "command line":
        raise UserError(f"{where}: 'recipe' is a key of a sweep: python train/sweep.py {where}")
    if key not in known_keys():
        key = str(key)
        names = [k for k in known_keys() if k not in REFUSED] + (list(OF_COMMANDS) if where == "command line" else [])
        near = [MEANT[key]] if key in MEANT else [key] if key in names else []
        near = near or [k for k in names if key and k.startswith(key)]
        near = near or difflib.get_close_matches(key.replace("-", "_"), names, n=1, cutoff=0.5)
        meant = near and (f"'{near[0]}'" if near[0] in known_keys() else OF_COMMANDS[near[0]])
        hint = f"; did you mean {meant}?" if near else "; --help lists all keys"
        raise UserError(f"{where}: unknown key '{key}'{hint}")
    return known_keys()[key]


PATHS = ("dataset_name", "model_name_or_path", "output_dir", "adapter", "chat_template_path")
WANTED = {"bool": "; write true or false", "int": "; give a whole number", "float": "; give a number"}


def typed(key: Key, value: Any, where: str) -> Any:
    """The value in the key's type. YAML reads 2e-4 as text, so text that is a number counts as one."""
    kinds = {kind.strip().split("[")[0] for kind in key.annotation.split("|")}
    hint = next((hint for kind, hint in WANTED.items() if kind in kinds), "")
    if isinstance(value, dict) and "str" in kinds:
        hint = "; in YAML a text that begins with { stands in quotes"
    elif isinstance(value, bool) and "str" in kinds:
        hint = "; in YAML the words yes, no, on and off stand in quotes"
    elif "float" in kinds and isinstance(value, str) and re.fullmatch(r"[-+]?\d*,\d+(?:[eE][-+]?\d+)?", value):
        hint = f"; write it with a point: {value.replace(',', '.')}"
    elif "float" in kinds and isinstance(value, str) and re.fullmatch(r"\d+(?:[.,]\d+)? ?%", value):
        hint = f"; write it as a fraction: {float(value.rstrip('% ').replace(',', '.')) / 100:g}"
    elif "int" in kinds and isinstance(value, str) and re.fullmatch(r"\d{1,3}(?:[.,'_ ]\d{3})+", value):
        hint = f"; write it without separators: {re.sub(r'[^0-9]', '', str(value))}"
    elif "dict" in kinds and where == "--":
        hint = """; on a command line it stands in quotes, as '{"key": "value"}'"""
    problem = UserError(f"{where}{key.name}: {value!r} is not of type {key.annotation}{hint}")
    if isinstance(value, str) and value.lower() in ("none", "null") and "str" not in kinds:
        value = None
    if value is None:
        if "None" in kinds or key.default == "None":
            return None
        raise problem
    if isinstance(value, bool):
        if "bool" in kinds or "Literal" in kinds:
            return value
        if kinds & {"list"} and "list[int]" not in key.annotation:
            return [str(value).lower()]
        if not key.choices:
            raise problem
        value = str(value).lower()
    if "dict" in kinds and isinstance(value, (dict, str)):
        try:
            value = json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError:
            raise problem from None
        if isinstance(value, dict):
            return value
    if "list" in kinds and not isinstance(value, dict):
        values = value if isinstance(value, list) else [value]
        if "list[int]" in key.annotation and not all(type(v) is int for v in values):
            raise problem
        texts = "list[str]" in key.annotation
        if texts and None in values:
            raise UserError(
                f"{where}{key.name}: one of its words is null, that is nothing; write it in quotes, '\"null\"'"
            )
        if texts and (odd := [v for v in values if isinstance(v, (dict, list))]):
            raise UserError(
                f"{where}{key.name}: {odd[0]!r} is no text; one with a colon, [ or {{ in it stands in quotes"
            )
        return [str(v).lower() if isinstance(v, bool) else str(v) if texts else v for v in values]
    if "int" in kinds and isinstance(value, int):
        return value
    if "float" in kinds and isinstance(value, (int, float, str)):
        try:
            value = float(value) if isinstance(value, str) else value
        except ValueError:
            raise problem from None
        if not math.isfinite(value):
            raise UserError(f"{where}{key.name}: {value} is no finite number")
        return value
    if kinds & {"str", "SchedulerType", "OptimizerNames"} and isinstance(value, str):
        choices = key.choices or tuple(v for kind in kinds - {"str", "None"} for v in enum_values(kind))
        if choices and value not in choices:
            near = difflib.get_close_matches(value, choices, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise UserError(f"{where}{key.name}: '{value}' is none of {', '.join(choices)}{hint}")
        if key.name in PATHS and (odd := [letter for letter in value if ord(letter) < 32]):
            raise UserError(
                f"{where}{key.name}: {value!r} holds {odd[0]!r}, which \\ within double quotes makes in YAML; write / in "
                "paths, or single quotes"
            )
        return value
    raise problem
