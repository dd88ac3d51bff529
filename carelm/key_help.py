"""What `--help` of a launched file prints: every key with its type and default, those of that command first."""

import argparse
from collections.abc import Sequence

from carelm.keys import (
    DEFAULTS,
    EVALUATION_KEYS,
    FREE_KEYS,
    NOT_ABOUT_DATA,
    REFUSED,
    RETRIEVAL_KEYS,
    SERVING_KEYS,
    Key,
    known_keys,
)

# Of a training those that most recipes set, in the order in which one comes to them.
MOST_SET = (
    "preview", "model_name_or_path", "load_in_4bit", "dataset_name", "prompt_template", "completion_template",
    "messages_column", "max_length", "method", "learning_rate", "num_train_epochs", "max_steps", "global_batch_size",
    "per_device_train_batch_size", "output_dir", "restart", "max_hours",
)  # fmt: skip
PLAIN = {  # in place of what TRL and transformers say of theirs
    "model_name_or_path": "The base: a folder or a Hub id.",
    "load_in_4bit": "Hold the base in 4 bits (NF4), in less memory: QLoRA.",
    "max_length": "Longest conversation, in tokens: older turns leave it first, then too_long says what becomes of the row.",
    "learning_rate": "How far one step goes (with objective: preferences 2e-5, for method: full 5e-6).",
    "num_train_epochs": "How often all rows are trained on, where max_steps does not say it.",
    "max_steps": "Steps to train for (-1: num_train_epochs says it).",
    "per_device_train_batch_size": "Examples that one process takes at a time: fewer take less memory, and the losses stay.",
    "output_dir": "Folder for what the command writes (default: outputs/ and the recipe's name).",
    "seed": "Draws the order of the rows, first weights, and answers.",
}
NEEDED = ("output_dir", "model_name_or_path", "max_length", "precision", "seed")  # by commands that train nothing


def format_help(usage: str, first: Sequence[str] = ()) -> str:
    """The text above the keys, and the keys in groups; `first` are those of a command that trains nothing, which takes the
    others as the recipe has them."""
    keys = {name: key for name, key in known_keys().items() if name not in REFUSED}
    own = [name for name, key in keys.items() if key.owner == "own"]
    about_data = [name for name in own if name not in NOT_ABOUT_DATA | FREE_KEYS]
    if first:
        groups = {
            "keys of this command": [*first, *NEEDED],
            "keys of the data and its templates, as the recipe has them": about_data,
            "keys of other commands": own,
        }
    else:
        groups = {
            "keys that most recipes set": MOST_SET,
            "other keys of a training": [
                name for name in own if name not in (*EVALUATION_KEYS, *SERVING_KEYS, *RETRIEVAL_KEYS)
            ],
            "keys of the base and of LoRA (TRL's ModelConfig)": [n for n, key in keys.items() if key.owner == "model"],
            "keys of the optimizer and its steps (TRL's SFTConfig, transformers' TrainingArguments)": [
                name for name, key in keys.items() if key.owner == "training"
            ],
            "keys that serving reads (serve/run.py)": SERVING_KEYS,
            "keys of documents and their index (serve/index.py, eval/retrieval.py)": RETRIEVAL_KEYS,
            "keys that the evaluation reads (eval/run.py)": EVALUATION_KEYS,
        }
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    listed: set[str] = set()
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        if not listed:
            group.add_argument("--config", metavar="", help="A recipe's file; of several a later one wins, key by key.")
        for name in names:
            if name not in listed:
                group.add_argument(f"--{name}", metavar="", help=_line(keys[name]))
        listed |= {*names}
    return parser.format_help()


def _line(key: Key) -> str:
    default = repr(DEFAULTS[key.name]) if key.name in DEFAULTS else key.default
    choices = f" One of: {', '.join(key.choices)}." if key.choices else ""
    return f"{PLAIN.get(key.name, key.help)}{choices} ({key.annotation}, default: {default})".replace(
        "%%", "%"
    ).replace("%", "%%")
