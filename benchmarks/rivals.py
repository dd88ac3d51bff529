"""What each side of benchmarks/speed.py starts: the same rows and settings in each side's own words.

carelm         train/sft.py of this working tree
COMMIT         train/sft.py of an older commit of this repository, unpacked, with its own code on the path
trl            trl/scripts/sft.py, what `trl sft` launches, as it comes
trl_grouped    the same with train_sampling_strategy group_by_length, which is off where nobody asks for it
notebook_loop  benchmarks/notebook_loop.py, every row padded to 512
llamafactory   LLaMA-Factory 0.9.5 in an environment of its own; the base is not quantised

All through benchmarks/timed.py, which writes step ends down from the outside.
"""

import importlib.util
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launches import EVERY_ROW_TRAINS, ONE_PROCESS, PROJECT, accelerate, keys, threads, write_recipe

BATCH_SIZE = 8
EPOCHS = 2
TIMED = PROJECT / "benchmarks/timed.py"
SAME = dict(  # one value for all
    learning_rate=2e-4,
    lr_scheduler_type="constant",
    num_train_epochs=EPOCHS,
    lora_dropout=0.0,
    gradient_checkpointing=False,
    logging_steps=1,
    report_to="none",
    save_strategy="no",
    seed=42,
)
# What the scripts of CareLM and TRL take beside it, for each base.
BASES = {
    "llama_27m": dict(max_length=512, load_in_4bit=True, use_bnb_nested_quant=True, lora_r=8, lora_alpha=16),
    "smollm2": dict(max_length=384, load_in_4bit=False, lora_r=16, lora_alpha=32),
}


@dataclass(frozen=True)
class Side:
    """One way to train: by whom, in which precision (fp32 or bf16), on how many ranks (two are under ZeRO-2)."""

    who: str
    precision: str
    ranks: int = 1

    @property
    def name(self) -> str:
        return f"{self.who}-{self.precision}" + ("" if self.ranks == 1 else f"-{self.ranks}ranks")


def write_rows(folder: Path, rows: list[tuple[str, str]]) -> None:
    """Writes (question, answer) rows in the shape that each side reads, a folder for each."""
    said = [
        ({"role": "user", "content": question}, {"role": "assistant", "content": answer}) for question, answer in rows
    ]
    shapes = {
        "carelm": [{"question": question, "answer": answer} for question, answer in rows],
        "trl": [{"prompt": [user], "completion": [assistant]} for user, assistant in said],
        "notebook_loop": [{"messages": [user, assistant]} for user, assistant in said],
    }
    for who, lines in shapes.items():
        (folder / who).mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / who / "train.jsonl").write_text(text, encoding="utf-8")
    columns = {"prompt": "question", "response": "answer"}  # LLaMA-Factory's list of datasets
    about = {"rows": {"file_name": "train.jsonl", "columns": columns}}
    (folder / "carelm/dataset_info.json").write_text(json.dumps(about), encoding="utf-8")


def unpack(commit: str, folder: Path) -> Path:
    """The files of an older commit of this repository."""
    folder.mkdir(parents=True, exist_ok=True)
    archive = subprocess.run(["git", "archive", commit], cwd=PROJECT, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-x", "-C", folder], input=archive, check=True)
    return folder


def command(
    side: Side, base: str, folder: Path, aside: Path, code: Path | None, llamafactory: str | None
) -> tuple[list[str], dict[str, str]]:
    """The launch of one run, and its environment.

    Args:
        base: a key of BASES.
        folder: has the base in base/, for LLaMA-Factory in base-PRECISION/, and what `write_rows` wrote in rows/.
        aside: an empty folder, where the run writes its results and `times.jsonl`.
        code: the folder whose CareLM runs, where the side is one of CareLM's.
        llamafactory: the Python of LLaMA-Factory's environment.
    """
    weights, rows = folder / "base", folder / "rows"
    environment = {
        "OMP_NUM_THREADS": threads(side.ranks),
        "CARELM_CACHE": str(aside / "carelm"),
        "HF_DATASETS_CACHE": str(aside / "datasets"),
    }
    times, output_dir = aside / "times.jsonl", aside / "output"
    config_file = ONE_PROCESS if side.ranks == 1 else PROJECT / "accelerate_configs/cpu_zero2.yaml"
    if side.who == "notebook_loop":
        words = keys(model=weights, rows=rows / side.who / "train.jsonl", times=times, epochs=EPOCHS)
        return [sys.executable, str(PROJECT / "benchmarks/notebook_loop.py"), *words], environment
    if side.who == "llamafactory":
        recipe = write_recipe(aside / "llamafactory.yaml", llamafactory_keys(side, base, folder, output_dir))
        (script,) = Path(llamafactory).parent.parent.glob("lib/python3.*/site-packages/llamafactory/launcher.py")
        return [llamafactory, *map(str, (TIMED, "--times", times, script, recipe))], environment
    same = SAME | BASES[base] | {"lora_target_modules": "all-linear", "model_name_or_path": weights}
    same["output_dir"] = output_dir
    if side.who.startswith("trl"):
        words = keys(
            **same,
            dataset_name=rows / "trl",
            use_peft=True,
            dtype={"fp32": "float32", "bf16": "bfloat16"}[side.precision],
            bf16=side.precision == "bf16",
            fp16=False,
            use_cpu=True,  # else bf16 is refused where there is no GPU
            per_device_train_batch_size=BATCH_SIZE // side.ranks,
            gradient_accumulation_steps=1,
            eval_strategy="no",
        )
        words += keys(train_sampling_strategy="group_by_length") if side.who == "trl_grouped" else []
        if side.ranks == 2:
            words += keys(ddp_backend="gloo")  # without it each rank takes itself for the only one
        script = Path(importlib.util.find_spec("trl").origin).parent / "scripts/sft.py"
        return accelerate(config_file, TIMED, "--times", times, script, *words), environment
    about: dict[str, Any] = {
        "dataset_name": rows / "carelm/train.jsonl",
        **EVERY_ROW_TRAINS,
        "precision": side.precision,
        "global_batch_size": BATCH_SIZE,
        "per_device_train_batch_size": BATCH_SIZE // side.ranks,
        "eval_strategy": "no",
    }
    recipe = write_recipe(aside / "recipe.yaml", same | about)
    words = [TIMED, "--times", times, code / "train/sft.py", "--config", recipe]
    return accelerate(config_file, *words), environment | {"PYTHONPATH": str(code)}


def llamafactory_keys(side: Side, base: str, folder: Path, output_dir: Path) -> dict[str, Any]:
    """Its YAML file. Without `template` it takes the tokenizer's own; `cutoff_len` is its max_length."""
    settings = BASES[base]
    return SAME | {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": settings["lora_r"],
        "lora_alpha": settings["lora_alpha"],
        "model_name_or_path": folder / f"base-{side.precision}",
        "dataset_dir": folder / "rows/carelm",
        "dataset": "rows",
        "cutoff_len": settings["max_length"],
        "packing": False,
        "disable_gradient_checkpointing": True,
        "bf16": side.precision == "bf16",
        "fp16": False,
        "use_cpu": True,  # else bf16 is refused where there is no GPU
        "per_device_train_batch_size": BATCH_SIZE,
        "gradient_accumulation_steps": 1,
        "output_dir": output_dir,
    }
