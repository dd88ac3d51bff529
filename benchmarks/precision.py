"""What bf16 costs in quality: the real base trained in fp32 and in bf16 on the same rows, and the eval loss after each.

    python demo/real_base.py && CARELM_DATA=../shared/data python benchmarks/precision.py [--only bitext_support medquad]
    python benchmarks/precision.py --self_test    # two steps of few rows in each precision; writes nothing

`precision: auto` may take bf16 on a CPU where this holds: after 100 steps of 8 rows its eval loss is within 0.5 % of fp32's.
CARELM_DATA names the folder with the datasets. Nothing is timed, so the machine may be busy (OMP_NUM_THREADS=1 helps there).
Results, each written as soon as it is there: benchmarks/results/precision.json. The same command again makes what is missing,
or was made with other settings or another commit.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from launches import ONE_PROCESS, PROJECT, RESULTS, accelerate, describe_machine, keys, run, say, threads, write_results

RECIPES = ("bitext_support", "medquad")
OVERLAY = "recipes/overlays/real_base.yaml"
SETTINGS = {
    "learning_rate": 5e-4,
    "max_length": 256,
    "too_long": "cut",
    "max_samples": 800,
    "max_steps": 100,
    "global_batch_size": 8,
    "per_device_train_batch_size": 8,
    "max_eval_samples": 48,
    "num_sample_answers": 0,
}
SELF_TEST = {"max_steps": 2, "max_samples": 16, "max_eval_samples": 4, "max_length": 64}
WITHIN = 0.005
KEPT = ("eval_loss_before", "eval_loss", "train_loss", "global_step", "num_train_tokens", "precision")
RUN_S = 5400


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--self_test", action="store_true", help="few steps, whose figures mean nothing")
    options = parser.parse_args()
    data = Path(os.environ.get("CARELM_DATA", PROJECT.parent / "shared/data"))
    if missing := [name for name in options.only if not (data / name).is_dir()]:
        sys.exit(f"CARELM_DATA: there is no {data / missing[0]}")
    settings = SETTINGS | (SELF_TEST if options.self_test else {})
    machine = describe_machine()
    file = RESULTS / "precision.json"
    result = json.loads(file.read_text()) if file.exists() and not options.self_test else {}
    for name in options.only:
        there = result.get(name, {})
        same = there.get("settings") == settings and there.get("machine", {}).get("git_commit") == machine["git_commit"]
        found = {"machine": machine, "settings": settings, "runs": there["runs"] if same else {}}
        for precision in ("fp32", "bf16"):
            if precision not in found["runs"]:
                found["runs"][precision] = train(name, data / name, precision, settings)
                say(f"{name} in {precision}: {found['runs'][precision]}")
            result[name] = found | compare(found["runs"])
            if not options.self_test:
                write_results("precision", result)
    print(table({name: result[name] for name in options.only}))


def train(name: str, rows: Path, precision: str, settings: dict[str, object]) -> dict[str, object]:
    """The figures of one run from the base on."""
    with tempfile.TemporaryDirectory(prefix="carelm-precision-") as folder:
        files = ["--config", f"recipes/datasets/{name}.yaml", "--config", OVERLAY]
        own = keys(**settings, dataset_name=rows, precision=precision, output_dir=folder, save_strategy="no")
        done = run(
            accelerate(ONE_PROCESS, "train/sft.py", *files, *own),
            {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads(1))},
            RUN_S,
        )
    if done.status != 0:
        sys.exit(f"{name} in {precision}: {done.refusal or done.last_error}")
    metrics = json.loads(done.stdout.strip().splitlines()[-1])
    return {key: metrics[key] for key in KEPT}


def compare(runs: dict[str, dict]) -> dict[str, object]:
    """How far bf16's eval loss is from fp32's, as a share of that; nothing where one is still to come."""
    if len(runs) < 2:
        return {}
    apart = runs["bf16"]["eval_loss"] / runs["fp32"]["eval_loss"] - 1
    return {"apart": apart, "within": WITHIN, "holds": abs(apart) <= WITHIN}


def table(result: dict[str, dict]) -> str:
    """The eval losses as Markdown."""
    lines = ["| rows | eval loss before | after, fp32 | after, bf16 | bf16 beside fp32 |", "|---|---|---|---|---|"]
    for name, found in result.items():
        fp32, bf16 = (found["runs"][precision] for precision in ("fp32", "bf16"))
        holds = "holds" if found["holds"] else f"beyond {WITHIN:.1%}"
        lines.append(f"| {name}, {fp32['global_step']} steps | {fp32['eval_loss_before']:.4f} | {fp32['eval_loss']:.4f} | "
                     f"{bf16['eval_loss']:.4f} | {found['apart']:+.2%}, {holds} |")  # fmt: skip
    return "\n".join(lines)


if __name__ == "__main__":
    main()
