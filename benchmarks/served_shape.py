"""The serving cell of benchmarks/gpu.py: speed under many clients, and whether answers are the evaluation's."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lab import Lab, OutOfTime, RunFailed
from launches import keys, run
from safetensors.torch import load_file, save_file
from serving import NEW_TOKENS, free_port, measure

SERVE = [sys.executable, "serve/run.py"]


def served(lab: Lab) -> Iterator[dict[str, Any]]:
    """TinyLlama's shape in 16 bits for one client, 32 and 128; then the certificate of the example's adapter on whole weights
    in fp32 and in 16 bits, and on 4 bits."""
    port, loads = free_port(), [(1, 2), (4, 3)] if lab.small else [(1, 6), (32, 10), (128, 15)]
    words = keys(
        output_dir=lab.folder / "served", model_name_or_path=speaking(lab), load_in_4bit=False, precision=lab.fast_precision,
        models="base", port=port, max_new_tokens=NEW_TOKENS, max_queue=256, max_batch_tokens=65_536,
    )  # fmt: skip
    speed = measure([*SERVE, *words], port, "base", loads)
    answered = {name: each["statuses"] for name, each in speed.items() if isinstance(each, dict)}
    checks = {f"{name}: all are answered": set(statuses) == {200} for name, statuses in answered.items()}
    yield {"precision": lab.fast_precision, "new_tokens": NEW_TOKENS, "clients": speed, "checks": checks}
    adapter, questions = lab.folder / "plain-whole/output", 4 if lab.small else 64
    if not (adapter / "train_metrics.json").exists():
        lab.demo("plain-whole", lab.fast_precision, steps=8 if lab.small else 60)
    words = keys(output_dir=adapter, precision=lab.fast_precision, max_new_tokens=NEW_TOKENS, certify=questions, port=0)
    models = dict.fromkeys(["adapter", "adapter@fp32", f"adapter@{lab.fast_precision}"])
    outcome = run([*SERVE, *words, "--models", *models], {}, lab.left_s - 2)
    if outcome.status is None:
        raise OutOfTime
    if outcome.status:
        raise RunFailed(outcome.refusal or outcome.last_error)
    yield {"questions": questions, "certificate": json.loads(outcome.stdout.splitlines()[-1])}


def speaking(lab: Lab) -> Path:
    """TinyLlama's shape whose head makes only tokens that its tokenizer has, and never ends an answer."""
    base, folder = lab.base("tinyllama_1b"), lab.folder / "speaking"
    if not folder.exists():
        folder.mkdir()
        for file in base.iterdir():
            (folder / file.name).symlink_to(file)
        file = folder / "model-lm_head.safetensors"
        head = load_file(file)
        known = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
        head["lm_head.weight"][len(known["model"]["vocab"]) :] = 0
        for token in known["added_tokens"]:
            head["lm_head.weight"][token["id"]] = 0
        file.unlink()
        save_file(head, file, {"format": "pt"})
    return folder
