"""Measures which method works under which ZeRO stage with the base in how many bits: a real launch for every cell.

    python benchmarks/methods.py
    python benchmarks/methods.py --only lora/zero3/4 prompt_tuning/zero3 dora

A cell is `train/sft.py` on two CPU ranks (one process where the stage is `none`) for three optimizer steps on
demo/data, under ZeRO-3 with a persistence threshold of 0, so that every parameter is sharded. What works is loaded
again by another process, with PEFT or transformers alone, and must give the validation loss that the run ended with.
The offload rows are the GPU files' DeepSpeed settings on two CPU ranks, without pinned memory. Writes
benchmarks/results/methods.json and prints the table.
"""

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from launches import ONE_PROCESS, PROJECT, accelerate, describe_machine, run, say, threads, write_recipe, write_results

METHODS = ("lora", "full", "prompt_tuning", "rslora", "dora")
STAGES = ("none", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
BITS = (32, 8, 4)
TOLERANCE = 1e-4  # between the run's own eval loss and that of the result loaded again
TIMEOUT_S = 420  # the first launch compiles DeepSpeed's CPU kernels


@dataclass(frozen=True)
class Cell:
    method: str
    stage: str
    bits: int

    @property
    def name(self) -> str:
        return f"{self.method}/{self.stage}/{self.bits}"


def all_cells() -> list[Cell]:
    """The whole table; rsLoRA and DoRA on 32 and 4 bits, offload with LoRA on 4 bits."""
    cells = [Cell(*c) for c in itertools.product(("lora", "full", "prompt_tuning"), STAGES[:4], BITS)]
    cells += [Cell(*c) for c in itertools.product(("rslora", "dora"), STAGES[:4], (32, 4))]
    return cells + [Cell("lora", stage, 4) for stage in STAGES[4:]]


def accelerate_file(stage: str, folder: Path) -> Path:
    """The stage's accelerate file on two CPU ranks; for ZeRO-3 and offload a variant made in `folder`."""
    if stage == "none":
        return ONE_PROCESS
    if stage in ("zero1", "zero2"):
        return PROJECT / f"accelerate_configs/cpu_{stage}.yaml"
    settings = json.loads((PROJECT / f"ds_configs/{stage}.json").read_text())
    zero = settings["zero_optimization"]
    if "stage3_param_persistence_threshold" in zero:
        zero["stage3_param_persistence_threshold"] = 0
    for part in ("offload_optimizer", "offload_param"):
        if part in zero:
            zero[part]["pin_memory"] = False  # pinned memory is a GPU's
    (folder / f"{stage}.json").write_text(json.dumps(settings))
    file = yaml.safe_load((PROJECT / "accelerate_configs/cpu_zero3.yaml").read_text())
    file["deepspeed_config"]["deepspeed_config_file"] = str(folder / f"{stage}.json")
    (folder / f"{stage}.yaml").write_text(yaml.safe_dump(file))
    return folder / f"{stage}.yaml"


def recipe(cell: Cell, output_dir: Path) -> dict[str, Any]:
    """The recipe of a cell: recipes/demo.yaml cut to three steps, with a learning rate that shows in the eval loss."""
    method = "lora" if cell.method in ("rslora", "dora") else cell.method
    return yaml.safe_load((PROJECT / "recipes/demo.yaml").read_text()) | {
        "output_dir": output_dir,
        "system_prompt": "You are the customer-care assistant of Harbour & Pine.",
        "method": method,
        "load_in_4bit": cell.bits == 4,
        "load_in_8bit": cell.bits == 8,
        "use_rslora": cell.method == "rslora",
        "use_dora": cell.method == "dora",
        "lora_r": 8,
        "lora_alpha": 32,
        "precision": "fp32",
        "max_samples": 64,
        "max_eval_samples": 64,
        "max_steps": 3,
        "max_length": 256,
        "learning_rate": {"full": 1e-3, "prompt_tuning": 1e-1}.get(method, 1e-2),
        "num_sample_answers": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
    }


def measure(cell: Cell, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Launches one cell: `works` (still to be checked), `refused` or `fails`, with figures or the message."""
    output_dir = folder / cell.name.replace("/", "-")
    file = write_recipe(folder / f"{output_dir.name}.yaml", recipe(cell, output_dir))
    command = accelerate(accelerate_file(cell.stage, folder), PROJECT / "train/sft.py", "--config", file)
    ranks = 1 if cell.stage == "none" else 2
    outcome = run(command, environment | {"OMP_NUM_THREADS": threads(ranks)}, TIMEOUT_S)
    about = {"method": cell.method, "stage": cell.stage, "bits": cell.bits, "seconds": round(outcome.seconds, 1)}
    about |= {"status": outcome.status}
    if outcome.status == 0:
        metrics = json.loads((output_dir / "train_metrics.json").read_text())
        stage = int(cell.stage[4]) if cell.stage.startswith("zero") else 0
        if (metrics["zero_stage"], metrics["world_size"]) != (stage, ranks):
            message = f"ran on {metrics['world_size']} ranks under ZeRO-{metrics['zero_stage']}"
            return about | {"result": "fails", "message": message}
        figures = ("eval_loss_before", "eval_loss", "train_loss", "trainable_parameters", "peak_memory_bytes")
        return about | {"result": "works", "folder": str(output_dir)} | {name: metrics[name] for name in figures}
    if outcome.refusal is not None:
        return about | {"result": "refused", "message": outcome.refusal.replace(str(folder), "")}
    return about | {"result": "fails", "message": outcome.last_error}


def reload_all(cells: list[dict[str, Any]], environment: dict[str, str]) -> None:
    """Loads what the cells that work have left in another process, and compares the eval losses."""
    working = [cell for cell in cells if cell["result"] == "works"]
    command = [sys.executable, __file__, "--reload", *(cell["folder"] for cell in working)]
    outcome = run(command, environment | {"OMP_NUM_THREADS": threads(1)}, TIMEOUT_S + 20 * len(working))
    losses = dict(json.loads(line) for line in outcome.stdout.splitlines() if line.startswith('["'))
    for cell in working:
        loss = losses.get(cell.pop("folder"))
        cell["eval_loss_reloaded"] = loss
        if not isinstance(loss, float):
            cell |= {"result": "fails", "message": f"loaded again: {loss or outcome.last_error}"}
        elif abs(loss - cell["eval_loss"]) > TOLERANCE:
            cell |= {
                "result": "fails",
                "message": f"loaded again, the eval loss is {loss:.6f}, not {cell['eval_loss']:.6f}",
            }
        elif abs(cell["eval_loss"] - cell["eval_loss_before"]) < 10 * TOLERANCE:
            cell |= {"result": "fails", "message": "training changed nothing that can be seen"}


def reload(folder: Path) -> float:
    """The mean loss over the trained tokens of the validation split, by PEFT or transformers and torch alone."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from carelm.chat.chat import make_chat
    from carelm.models import base
    from carelm.models.precision import choose_precision
    from carelm.recipe_file import load_recipe
    from carelm.training import batches, prepared

    recipe = load_recipe(["--config", str(folder / "recipe.yaml")], usage="")
    chat = make_chat(recipe)
    split = prepared.prepare(recipe, chat).validation
    if recipe.method == "full":
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = PeftModel.from_pretrained(base.load_base(recipe, choose_precision("fp32")), folder)
    model.eval()
    collate = batches.Collate(chat.tokenizer.pad_token_id)
    order = sorted(range(len(split)), key=lambda i: -split.lengths[i])
    total, tokens = 0.0, 0
    for start in range(0, len(order), 32):
        batch = collate([split[i] for i in order[start : start + 32]])
        labels = batch.pop("labels")
        with torch.no_grad():
            logits = model(**batch).logits[:, -labels.shape[1] :].float()  # virtual tokens come first
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="sum")
        total, tokens = total + losses.item(), tokens + int((labels[:, 1:] != -100).sum())
    return total / tokens


def print_reloads(folders: list[Path]) -> None:
    """One JSON line per folder: its name and its loss, or why it cannot be had."""
    for folder in folders:
        try:
            result: float | str = reload(folder)
        except Exception as error:  # whatever it is, it is the cell's result
            result = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        print(json.dumps([str(folder), result]), flush=True)


def table(cells: list[dict[str, Any]]) -> str:
    """The cells as markdown: a row per method and bits, a column per stage; what does not work is told below."""
    stages = [stage for stage in STAGES if any(cell["stage"] == stage for cell in cells)]
    lines = ["| method | bits | " + " | ".join(stages) + " |", "|---|---|" + "---|" * len(stages)]
    notes: list[str] = []
    for method, bits in dict.fromkeys((cell["method"], cell["bits"]) for cell in cells):
        row = []
        for stage in stages:
            cell = next((c for c in cells if (c["method"], c["bits"], c["stage"]) == (method, bits, stage)), None)
            if cell is None:
                row.append("")
            elif cell["result"] == "works":
                row.append(f"{cell['eval_loss']:.4f}")
            else:
                note = f"{cell['result']} (status {cell['status']}): {cell['message']}"
                if note not in notes:
                    notes.append(note)
                row.append(f"{cell['result']} [{notes.index(note) + 1}]")
        lines.append(f"| {method} | {bits} | " + " | ".join(row) + " |")
    return "\n".join(lines + [""] + [f"[{number}] {note}" for number, note in enumerate(notes, 1)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="cells whose name method/stage/bits starts with one of these")
    parser.add_argument("--no_write", action="store_true", help="leave benchmarks/results as it is")
    parser.add_argument("--reload", nargs="+", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.reload:
        return print_reloads(options.reload)
    chosen = [cell for cell in all_cells() if not options.only or cell.name.startswith(tuple(options.only))]
    if not chosen:
        parser.error(
            f"--only {' '.join(options.only)} names no cell; a name is method/stage/bits, such as lora/zero3/4"
        )
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="carelm-methods-") as name:
        environment = {"CARELM_CACHE": f"{name}/cache"}
        cells = []
        for number, cell in enumerate(chosen, 1):
            cells.append(measure(cell, Path(name), environment))
            say(f"{number}/{len(chosen)} {cell.name}: {cells[-1]['result']} {cells[-1].get('message', '')}")
        say("loading the results again")
        reload_all(cells, environment)
    if not options.no_write:
        settings = {"recipe": "recipes/demo.yaml", "steps": 3, "ranks": "2, none: 1", "tolerance": TOLERANCE}
        say(f"written to {write_results('methods', {'machine': machine, 'settings': settings, 'cells': cells})}")
    print(table(cells))


if __name__ == "__main__":
    main()
