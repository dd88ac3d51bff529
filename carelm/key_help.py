"""What `--help` of a launched file prints: every key with its type and default, those of that command first."""

import argparse
from collections.abc import Sequence

from carelm.keys import DEFAULTS, EVALUATION_KEYS, FREE_KEYS, NOT_ABOUT_DATA, REFUSED, SERVING_KEYS, Key, known_keys

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
            "keys of a training": [name for name in own if name not in (*EVALUATION_KEYS, *SERVING_KEYS)],
            "keys of the base and of LoRA (TRL's ModelConfig)": [n for n, key in keys.items() if key.owner == "model"],
            "keys of the optimizer and its steps (TRL's SFTConfig, transformers' TrainingArguments)": [
                name for name, key in keys.items() if key.owner == "training"
            ],
            "keys that serving reads (serve/run.py)": SERVING_KEYS,
            "keys that the evaluation reads (eval/run.py)": EVALUATION_KEYS,
        }
    parser = argparse.ArgumentParser(
        usage=argparse.SUPPRESS, description=usage, formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False
    )
    listed: set[str] = set()
    for title, names in groups.items():
        group = parser.add_argument_group(title)
        for name in names:
            if name not in listed:
                group.add_argument(f"--{name}", metavar="", help=_line(keys[name]))
        listed |= {*names}
    return parser.format_help()


def _line(key: Key) -> str:
    default = repr(DEFAULTS[key.name]) if key.name in DEFAULTS else key.default
    choices = f" One of: {', '.join(key.choices)}." if key.choices else ""
    return f"{key.help}{choices} ({key.annotation}, default: {default})".replace("%%", "%").replace("%", "%%")
