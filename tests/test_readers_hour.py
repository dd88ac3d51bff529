"""The commands of README and of the chapters run one after the other, as a reader types them, on rows of the reader's own."""

import csv
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import PROJECT
from launching import command, environment
from test_documents import blocks, commands

PAGES = ("README.md", "docs/data.md", "docs/templates.md", "docs/training.md", "docs/evaluation.md")
# In the place of the README's base and of a real run's length; one process, whatever the machine.
SMALL = {
    "model_name_or_path": str(PROJECT / "demo/base"), "precision": "fp32", "learning_rate": 2e-3, "max_steps": 4,
    "global_batch_size": 4, "num_sample_answers": 0, "max_new_tokens": 8, "num_latency_prompts": 1, "num_resamples": 50,
}  # fmt: skip
CANNOT_RUN_HERE = {
    "--api_url": "asks another company's machine",
    "--judge_url": "asks another company's machine",
    "--push_to_hub": "writes to the Hub",
    "multi_gpu.yaml": "wants several GPUs",
    "--layers_to_transform": "names layers of a larger base; tests/models/test_targets.py has its keys",
    "--config recipes/datasets": "trains on rows of the Hub",
    "--config recipes/medical_dialogue": "wants the Hub's model; `make assistants` runs it in small",
    "--config recipes/intents": "wants the Hub's model; `make assistants` runs it in small",
    "--config recipes/customer_service": "wants the Hub's model; `make assistants` runs it in small",
}


def readers_folder(folder: Path) -> None:
    """What the pages say that the reader has: a recipe, two weeks of tickets, a saved chat, a template, another run."""
    (text,) = [b for b in blocks((PROJECT / "README.md").read_text(encoding="utf-8")) if "# recipes/shop.yaml" in b]
    (folder / "recipes").mkdir()
    (folder / "recipes/shop.yaml").write_text(yaml.safe_dump({**yaml.safe_load(text), **SMALL}))
    (folder / "data").mkdir()
    for name, things in {"tickets": "mug bowl jug pan cup", "week_32": "fork spoon knife plate tray"}.items():
        with open(folder / f"data/{name}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["question", "reply"])
            for thing in things.split():
                for number in range(12):
                    rows.writerow(
                        [f"Where is {thing} number {number} of {name}?", f"The {thing} {number} is on its way."]
                    )
    said = [{"role": "user", "content": "Where is my mug?"}, {"role": "assistant", "content": "On its way."}]
    (folder / "chat.jsonl").write_text((json.dumps({"messages": said, "mark": "good"}) + "\n") * 30)
    (folder / "my.jinja").write_text((PROJECT / "demo/base/chat_template.jinja").read_text())
    (folder / "outputs").mkdir()
    (folder / "outputs/other").symlink_to("shop")


def readers_commands() -> list[list[str]]:
    """Each once, in the order of the pages; training comes before what needs it, as in README."""
    found = [words for page in PAGES for words in commands((PROJECT / page).read_text(encoding="utf-8"))]
    launched = [
        w
        for w in found
        if any(word in ("train/sft.py", "train/merge.py", "train/chat.py", "eval/run.py") for word in w)
    ]
    return [shlex.split(line) for line in dict.fromkeys(map(shlex.join, launched))]


@pytest.mark.long
def test_every_command_of_the_pages_runs_in_the_order_in_which_they_are_read(tmp_path):
    readers_folder(tmp_path)
    failed, ran = {}, 0
    for words in readers_commands():
        line = shlex.join(words)
        if any(part in line for part in CANNOT_RUN_HERE) or "shop" not in line and "--help" not in line:
            continue
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        start = (
            command(script=PROJECT / words[at]) if words[0] == "accelerate" else [sys.executable, PROJECT / words[at]]
        )
        done = subprocess.run([*map(str, start), *words[at + 1 :]], cwd=tmp_path, env=environment(PYTHONPATH=str(PROJECT)),
                              input="Where is my parcel?\n", capture_output=True, text=True, timeout=300)  # fmt: skip
        ran += 1
        if done.returncode:
            failed[line] = done.stderr[-1500:]
    assert not failed and ran > 12, "\n".join(f"{line}\n{why}" for line, why in failed.items())
