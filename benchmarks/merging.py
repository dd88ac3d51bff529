"""Merges the demo's adapter in every way and writes how far each merge is from it.

    make train && python benchmarks/merging.py

The tolerances in carelm/evaluation/certificate.py come from this: benchmarks/results/merging.json.
"""

import argparse
import itertools
import json
import sys
import tempfile
from pathlib import Path

import launches
from launches import PROJECT, describe_machine, run, say, write_results

from carelm.evaluation.certificate import ROUNDING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", type=Path, default=PROJECT / "outputs/demo")
    parser.add_argument("--num_prompts", type=int, default=100)
    parser.add_argument("--no_write", action="store_true", help="leave benchmarks/results as it is")
    options = parser.parse_args()
    merges = {}
    with tempfile.TemporaryDirectory(prefix="carelm-merging-") as folder:
        for onto, dtype in itertools.product(("quantized", "base"), ROUNDING):
            keys = {"adapter": options.adapter, "output_dir": f"{folder}/{onto}-{dtype}", "onto": onto, "dtype": dtype,
                    "num_prompts": options.num_prompts, "tolerance": 100}  # fmt: skip
            done = run([sys.executable, "train/merge.py", *launches.keys(**keys)], {}, 600)
            if done.status != 0:
                sys.exit(done.refusal or done.last_error)
            certificate = json.loads(done.stdout.strip().splitlines()[-1])
            kept = ("prompts", "tokens", "mean_kl", "max_kl", "top1_agreement", "same_text_share")
            merges[f"{onto} {dtype}"] = {key: certificate[key] for key in kept}
            say(f"{onto} {dtype}: {merges[f'{onto} {dtype}']}")
    result = {"machine": describe_machine(), "merges": merges}
    if not options.no_write:
        say(f"written to {write_results('merging', result)}")


if __name__ == "__main__":
    main()
