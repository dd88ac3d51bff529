"""Runs the five assistants of recipes/ in small: five steps each on the demo's base, and a few questions, offline.

    python demo/assistants.py        # or: make assistants

Shows that each recipe trains, answers and reports on this machine. The figures mean nothing: the base is the demo's, and the
rows in demo/assistants/ are a few dozen, invented, with the columns of the datasets that the recipes name. The same command
again goes on where it stopped; what is finished is not run again. The last lines on standard output are the reports.

exit status: 0 every report is written, 1 a command has failed.
"""

import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent
OVERLAYS = ("recipes/overlays/demo_base.yaml", "recipes/overlays/few_steps.yaml")
ROWS = "demo/assistants"
# In this order: customer_service is told the intents that the first one has predicted.
KEYS = {
    "intents": f"--dataset_name {ROWS}/support.json",
    "customer_service": f"--dataset_name {ROWS}/support.json --predicted_columns '{{intent: OUTPUTS/intents}}' "
    f"--also_test recipes/datasets/medquad.yaml={ROWS}/health.json",
    "ticket_matching": f"--dataset_name {ROWS}/pairs.json",
    "medical_dialogue": f"--dataset_name {ROWS}/patients.json",
    "dialogue_summary": f"--dataset_name {ROWS}/dialogues.json "
    f"--also_test recipes/datasets/bitext_support.yaml={ROWS}/support.json",
    "support_tinyllama": f"--dataset_name {ROWS}/support.json",
}


def words(name: str, outputs: Path) -> list[str]:
    """The command line of train/sft.py and of eval/run.py for one recipe."""
    configs = [word for path in (f"recipes/{name}.yaml", *OVERLAYS) for word in ("--config", path)]
    own = [word.replace("OUTPUTS", str(outputs)) for word in shlex.split(KEYS[name])]
    return [*configs, *own, "--output_dir", str(outputs / name)]


def start(command: list[str]) -> int:
    return subprocess.run([sys.executable, *command], cwd=PROJECT, stdout=subprocess.DEVNULL).returncode


def main(outputs: Path = Path("outputs/assistants"), start: Callable[[list[str]], int] = start) -> None:
    """Trains and evaluates one after the other by `start`, which returns the exit status."""
    for name in KEYS:
        for file in ("train/sft.py", "eval/run.py"):
            command = [file, *words(name, outputs)]
            print(f"\n$ python {shlex.join(command)}", file=sys.stderr, flush=True)
            if start(command):
                sys.exit(f"{name}: {file} has failed")
    for name in KEYS:
        print(f"{name}: {outputs / name / 'eval/report.html'}")


if __name__ == "__main__":
    main()
