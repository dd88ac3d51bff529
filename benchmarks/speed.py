"""Times training with CareLM, an older commit of it, TRL's own script, LLaMA-Factory and the usual notebook loop, in turn.

    python demo/real_base.py && CARELM_DATA=../shared/data python benchmarks/speed.py
    python benchmarks/speed.py --list                                                # the pieces, each a minute or three
    python benchmarks/speed.py --folder /tmp/speed --only 'smollm2/*:carelm-bf16'     # some of them; adds to the JSON

Three pieces of work on the CPU, 8 rows a step, the same rows and settings for all sides (benchmarks/rivals.py):

    llama_27m/bitext_support   QLoRA r=8 of a Llama shape of 27 M random weights, cut at 512 tokens; its tokenizer of 16,384
                               entries is trained on all training rows under CARELM_DATA
    smollm2/bitext_support     LoRA r=16 of SmolLM2-135M-Instruct (demo/real_base.py), not quantised, cut at 384 tokens
    smollm2/medquad            the same on medical answers

A run is two epochs over the same rows, and the second is timed, step ends written down by the same callback for all
(benchmarks/timed.py): everything is warm, and each has trained on every row exactly once. Tokens are counted once, by the
base's chat template, without padding, and are the same for all. The start is timed from the launcher's to the end of the
first step, with nothing prepared or cached. Writes benchmarks/results/speed.json after every run; what it holds of sides that
are not timed now is kept, with its commit and date, where rows, settings, machine and versions are the same. Prints medians,
and what was reached of what is asked for. LLaMA-Factory is timed where --llamafactory names the Python of such an environment:

    python3.11 -m venv ENV && ENV/bin/pip install torch==2.13.0 transformers==5.6.0 trl==0.24.0 peft==0.18.1 accelerate==1.11.0
    ENV/bin/pip install datasets==4.0.0 torchdata==0.11.0 'tyro<0.9' 'av<=16' einops fastapi fire modelscope omegaconf
    ENV/bin/pip install --no-deps llamafactory==0.9.5 && touch ENV/lib/python3.11/site-packages/torchaudio.py
"""

import argparse
import fnmatch
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from launches import PROJECT, RESULTS, describe_machine, run, say
from rivals import BASES, BATCH_SIZE, EPOCHS, SAME, Side, command, unpack, write_rows
from timed import read_times

from carelm.files import write_whole

COLUMNS = {"bitext_support": ("instruction", "response"), "medquad": ("Question", "Answer")}
WORK = {  # and the steps of an epoch
    "llama_27m/bitext_support": 12,
    "smollm2/bitext_support": 8,
    "smollm2/medquad": 6,
}
FIGURES = ("tokens_per_second", "rows_per_second", "peak_memory_bytes", "seconds_to_first_step")


def sides(work: str, beside: str, has_llamafactory: bool) -> list[Side]:
    """The sides of one piece of work, in the order in which they take turns."""
    who = ["carelm", beside, "trl", "trl_grouped"]
    who += ["llamafactory"] if has_llamafactory and work.startswith("llama_27m") else []
    found = [Side(one, precision) for one in who for precision in ("fp32", "bf16")]
    found += [Side("notebook_loop", "fp32")] if work.startswith("llama_27m") else []
    if work.endswith("bitext_support"):
        found += [Side(one, precision, ranks=2) for one in ("carelm", "trl") for precision in ("fp32", "bf16")]
    return found


def read_rows(file: Path, question: str, answer: str) -> list[tuple[str, str]]:
    """The rows of a training file, each question once (CareLM would leave doubled rows out)."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return list({row[question]: (row[question], row[answer]) for row in rows if row[answer].strip()}.values())


def read_texts(data: Path) -> Iterator[str]:
    """Every text column of every training row under the folder, for the tokenizer."""
    for file in sorted(data.glob("*/train.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            yield from (value for value in json.loads(line).values() if isinstance(value, str))


def write_base(base: str, data: Path, folder: Path) -> None:
    """The weights and tokenizer of a key of BASES."""
    import torch
    from random_base import DEMO_BASE, SHAPES, write_random_base
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if base == "smollm2":
        made = subprocess.run([sys.executable, "demo/real_base.py"], cwd=PROJECT, stdout=subprocess.PIPE, text=True)
        if made.returncode != 0:
            sys.exit(made.returncode)
        return folder.symlink_to(made.stdout.splitlines()[-1])
    tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
    tokenizer = tokenizer.train_new_from_iterator(read_texts(data), SHAPES[base]["vocab_size"], show_progress=False)
    tokenizer.model_max_length = BASES[base]["max_length"]
    tokenizer.save_pretrained(folder.with_name("tokenizer"))
    write_random_base(base, folder, folder.with_name("tokenizer"))
    for precision in ("fp32", "bf16"):  # LLaMA-Factory holds a base in the dtype that it has on disk
        copy, dtype = folder.with_name(f"base-{precision}"), {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).save_pretrained(copy)
        tokenizer.save_pretrained(copy)


def write_inputs(work: str, data: Path, folder: Path) -> dict[str, Any]:
    """Writes the base and the rows of one piece of work where they are not there; returns what describes them."""
    about = folder / "inputs.json"
    if about.exists():
        return json.loads(about.read_text())
    from transformers import AutoTokenizer

    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    base, dataset = work.split("/")
    write_base(base, data, folder / "base")
    rows = read_rows(data / dataset / "train.jsonl", *COLUMNS[dataset])
    rows = random.Random(42).sample(rows, WORK[work] * BATCH_SIZE)
    write_rows(folder / "rows", rows)
    tokenizer, longest = AutoTokenizer.from_pretrained(folder / "base"), BASES[base]["max_length"]
    lengths = []
    for question, answer in rows:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lengths.append(min(longest, len(tokenizer.apply_chat_template(messages)["input_ids"])))
    found = {"rows": len(rows), "tokens": sum(lengths), "longest_tokens": max(lengths), "vocabulary": len(tokenizer)}
    about.write_text(json.dumps(found))
    return found


def measure(
    work: str,
    side: Side,
    inputs: dict[str, Any],
    folder: Path,
    code: Path | None,
    llamafactory: str | None,
    timeout_s: float,
) -> dict[str, Any]:
    """One run: speed over its second epoch, and seconds until its first step had ended.

    Raises:
        SystemExit: where the run fails, or is not on the ranks or of the code that it should be.
    """
    with tempfile.TemporaryDirectory(prefix="run-", dir=folder) as name:
        launch, environment = command(side, work.split("/")[0], folder, Path(name), code, llamafactory)
        outcome = run(launch, environment, timeout_s)
        lines, losses, dtypes = read_times(Path(name) / "times.jsonl")
    steps = inputs["rows"] // BATCH_SIZE * EPOCHS
    if outcome.status != 0 or max(lines, default=0) != steps:
        sys.exit(f"{work}:{side.name}: {outcome.refusal or outcome.last_error}\n{outcome.stderr[-3000:]}")
    if lines[1]["world_size"] != side.ranks:
        sys.exit(f"{work}:{side.name}: {lines[1]['world_size']} rank(s), not {side.ranks}")
    if code is not None and not Path(lines[1]["code"]).is_relative_to(code):
        sys.exit(f"{work}:{side.name}: ran the code of {lines[1]['code']}, not of {code}")
    seconds = lines[steps]["time"] - lines[steps // EPOCHS]["time"]
    return {
        "tokens_per_second": round(inputs["tokens"] / seconds, 1),
        "rows_per_second": round(inputs["rows"] / seconds, 3),
        "peak_memory_bytes": lines[steps]["peak_memory_bytes"],  # of rank 0's process
        "seconds_to_first_step": round(lines[1]["time"] - outcome.started, 2),
        "seconds": round(outcome.seconds, 1),
        "first_loss": losses[1],
        "last_loss": losses[steps],
        "dtypes": dtypes,
    }


def time_short_commands() -> dict[str, Any]:
    """Seconds of `--help` and of a recipe with an unknown key, without a launcher: medians over five calls."""
    results = {}
    for name, words, status in (("help", ["--help"], 0), ("recipe_error", ["--learning_rat", "1e-4"], 2)):
        calls = [run([sys.executable, "train/sft.py", *words], {"PYTHONPATH": str(PROJECT)}, 60) for _ in range(5)]
        assert all(call.status == status for call in calls), calls[-1].stderr
        results[name] = round(statistics.median(call.seconds for call in calls), 2)
    return results


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians with lowest and highest of every kind of run."""
    summary = []
    for work, side in dict.fromkeys((r["work"], r["side"]) for r in runs):
        these = [r for r in runs if (r["work"], r["side"]) == (work, side)]
        line: dict[str, Any] = {"work": work, "side": side, "runs": len(these)}
        line["measured"] = sorted({f"{r['date'][:10]} at {r['git_commit'][:7]}" for r in these})
        for figure in FIGURES:
            values = [r[figure] for r in these]
            line[figure] = {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
        summary.append(line)
    return summary


def targets(summary: list[dict[str, Any]], beside: str) -> Iterator[dict[str, Any]]:
    """What is asked for: a ratio of medians, of each side's faster precision; None where a side has not been timed."""
    found = {(line["work"], line["side"]): line for line in summary}

    def line(work: str, who: str, ranks: int = 1, precisions: tuple[str, ...] = ("fp32", "bf16")) -> dict | None:
        lines = [found.get((work, Side(who, precision, ranks).name)) for precision in precisions]
        return max(filter(None, lines), key=lambda line: line["tokens_per_second"]["median"], default=None)

    def target(work: str, figure: str, ours: dict | None, theirs: dict | None, least: float | None, most=None) -> dict:
        about = {"work": work, "figure": figure, "at_least": least, "at_most": most}
        if ours is None or theirs is None:
            return about | {"ratio": None, "reached": None}
        ratio = ours[figure]["median"] / theirs[figure]["median"]
        about |= {"ours": ours["side"], "theirs": theirs["side"], "ratio": round(ratio, 3)}
        return about | {"reached": ratio >= least if most is None else ratio <= most}

    for work in WORK:
        ours, trl = line(work, "carelm"), line(work, "trl")
        if work.startswith("smollm2"):
            old = {precision: line(work, beside, precisions=(precision,)) for precision in ("fp32", "bf16")}
            yield target(work, "tokens_per_second", ours, old["fp32"], 2.5)
            yield target(work, "peak_memory_bytes", ours, old["fp32"], None, 0.5)
            yield target(work, "tokens_per_second", ours, old["bf16"], 1.8)
            yield target(work, "tokens_per_second", ours, trl, 3.5)
        else:
            yield target(work, "tokens_per_second", ours, trl, 4.0)
            yield target(work, "tokens_per_second", ours, line(work, "llamafactory"), 2.7)
        if work.endswith("bitext_support"):
            yield target(work, "tokens_per_second", line(work, "carelm", 2), ours, 0.95)
        yield target(work, "seconds_to_first_step", ours, trl, None, 1.0)


def report(summary: list[dict[str, Any]], asked: list[dict[str, Any]]) -> Iterator[str]:
    """The results as markdown, line by line."""
    yield "| work | side | runs | tokens/s (lowest to highest) | rows/s | peak GiB | s to first step | measured |"
    yield "|---|---|---|---|---|---|---|---|"
    for line in summary:
        tokens, rows, peak, start = (line[figure] for figure in FIGURES)
        yield (
            f"| {line['work']} | {line['side']} | {line['runs']} | {tokens['median']:.0f} ({tokens['lowest']:.0f} to "
            f"{tokens['highest']:.0f}) | {rows['median']:.2f} | {peak['median'] / 2**30:.2f} | {start['median']:.1f} | "
            f"{', '.join(line['measured'])} |"
        )
    yield from ("", "| work | figure | ours / theirs | asked | measured | reached |", "|---|---|---|---|---|---|")
    for t in asked:
        bound = f"at least {t['at_least']}" if t["at_least"] else f"at most {t['at_most']}"
        if t["ratio"] is None:
            yield f"| {t['work']} | {t['figure']} | | {bound} | not measured | |"
        else:
            shown = f"{t['ours']} / {t['theirs']} | {bound} | {t['ratio']:.2f} | {'yes' if t['reached'] else 'no'}"
            yield f"| {t['work']} | {t['figure']} | {shown} |"


def take_over(output: Path, results: dict[str, Any], pieces: list[tuple[str, Side]]) -> None:
    """Takes over the runs that the JSON holds, each with its own commit and date: those at this commit, and of other commits
    those of sides that are neither CareLM's own nor timed now.

    Raises:
        SystemExit: where the machine, the versions or the settings differ.
    """
    if not output.exists():
        return
    before, machine = json.loads(output.read_text()), results["machine"]
    is_same = before["settings"] == results["settings"] and before["beside"] == results["beside"]
    if not is_same or any(before["machine"][key] != machine[key] for key in ("cpu", "cores", "versions")):
        sys.exit(f"{output} is of another machine or other versions or settings; --restart begins a new one")
    timed_now = {(work, side.name) for work, side in pieces}

    def is_kept(run: dict[str, Any]) -> bool:
        is_ours_or_timed = run["side"].startswith("carelm-") or (run["work"], run["side"]) in timed_now
        return run["git_commit"] == machine["git_commit"] or not is_ours_or_timed

    kept = list(filter(is_kept, before["runs"]))
    if len(kept) < len(before["runs"]):
        say(f"{len(before['runs']) - len(kept)} runs at another commit, of CareLM or timed anew, are dropped")
    results |= before | {"machine": machine, "runs": kept}


def keep_work(results: dict[str, Any], work: str, inputs: dict[str, Any]) -> None:
    """Notes the rows of a piece of work; runs over other rows are dropped."""
    if results["inputs"].get(work, inputs) != inputs:
        say(f"{work}: the runs over other rows are dropped")
        results["runs"] = [run for run in results["runs"] if run["work"] != work]
    results["inputs"][work] = inputs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["*"], metavar="WORK:SIDE", help="these pieces; * is any text")
    parser.add_argument("--list", action="store_true", help="print the pieces, and run none")
    parser.add_argument("--rounds", type=int, default=1, help="how often they take turns (default: 1)")
    parser.add_argument("--beside", default="e57342b", help="the older commit of CareLM (default: e57342b)")
    parser.add_argument("--llamafactory", metavar="PYTHON", help="of LLaMA-Factory's environment; else it is not timed")
    parser.add_argument("--folder", type=Path, help="keep the bases and rows there (default: a temporary folder)")
    parser.add_argument("--output", type=Path, default=RESULTS / "speed.json", help="(default: benchmarks/results)")
    parser.add_argument("--restart", action="store_true", help="forget the runs that the output holds")
    parser.add_argument("--timeout_s", type=float, default=1200, help="of one run (default: 1200)")
    options = parser.parse_args()
    pieces = [(work, side) for work in WORK for side in sides(work, options.beside, bool(options.llamafactory))]
    pieces = [p for p in pieces if any(fnmatch.fnmatch(f"{p[0]}:{p[1].name}", pattern) for pattern in options.only)]
    if not pieces:
        parser.error(f"--only: no piece is named {' or '.join(options.only)}; --list shows them")
    if options.list:
        return print("\n".join(f"{work}:{side.name}" for work, side in pieces))
    data = Path(os.environ.get("CARELM_DATA", PROJECT.parent / "shared/data"))
    for dataset in {work.split("/")[1] for work, _ in pieces}:
        if not (data / dataset / "train.jsonl").is_file():
            sys.exit(f"CARELM_DATA: {data} has no {dataset}/train.jsonl; set it to a folder that has")
    settings = {"same": SAME, "bases": BASES, "batch_size": BATCH_SIZE, "steps_of_an_epoch": WORK}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what runs is ended as well
    results = {"machine": describe_machine(), "settings": settings, "beside": options.beside}
    results |= {"inputs": {}, "runs": []}
    if not options.restart:
        take_over(options.output, results, pieces)
    if options.only == ["*"]:
        results["short_commands_seconds"] = time_short_commands()
    with tempfile.TemporaryDirectory(prefix="carelm-speed-") as name:
        folder = options.folder or Path(name)
        if any(side.who == options.beside for _, side in pieces):
            unpack(options.beside, folder / options.beside)
        for _ in range(options.rounds):
            for work, side in pieces:
                here = folder / work.replace("/", "-")
                inputs = write_inputs(work, data, here)
                keep_work(results, work, inputs)
                code = {"carelm": PROJECT, options.beside: folder / options.beside}.get(side.who)
                about = {"work": work, "side": side.name}
                about |= {key: results["machine"][key] for key in ("git_commit", "date")}
                about["load_average"] = [round(load, 2) for load in os.getloadavg()]
                about |= measure(work, side, inputs, here, code, options.llamafactory, options.timeout_s)
                results["runs"].append(about)
                say(json.dumps(about))
                results["summary"] = summarize(results["runs"])
                results["targets"] = list(targets(results["summary"], options.beside))
                write_whole(options.output, json.dumps(results, indent=1) + "\n")
    print("\n".join(report(results["summary"], results["targets"])))


if __name__ == "__main__":
    main()
