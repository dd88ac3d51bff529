"""Answers the same prompts in three ways, in turn, and times them; then one rank beside two.

    python benchmarks/evaluator.py                                      # all cells, one after the other
    python benchmarks/evaluator.py --only demo-192-fp32                 # one: MODEL-PROMPTS-PRECISION, prepare or ranks
    python benchmarks/evaluator.py --self_test                          # the same on six prompts in two minutes; writes nothing

(a) CareLM: carelm.models.generation.generate_all, as eval/run.py calls it; (b) one prompt at a time with transformers'
generate, on --sample of the prompts, spread evenly; (c) EleutherAI's lm-evaluation-harness, its `hf` model with
generate_until, at every batch size of --batch_sizes. The same loaded model, the same prompts of bitext_support (the rows
of its test split, then of its training split), greedy, until the model ends its turn or at --new_tokens. So that it does
end it, both models are tuned on bitext_support first by this project's own train/sft.py (cell prepare; --folder keeps
them): the demo base in fp32 for 100 steps of 16 rows, SmolLM2-135M-Instruct in bf16 for 16 steps of 8, then merged. Cell
ranks: eval/run.py on 192 prompts, the tuned demo base, by one rank with all cores as threads and by two ranks that share
them.

benchmarks/results/evaluator.json has each cell with its machine, and is written after every one; --sides measures some of
a cell's sides and leaves the others as they are. lm_eval gives texts without counts: a text that is CareLM's has CareLM's
count, another one that of the text, read by the tokenizer. `same texts` is CareLM's share of answers that are those of
(b), or of (c), in the same precision.

lm_eval is no requirement of CareLM. An environment of its own that sees this one's packages:

    python -m venv --without-pip lm-eval
    echo "import site; site.addsitedir('$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \\
        > lm-eval/lib/python3.11/site-packages/base.pth
    python -m pip --python lm-eval/bin/python install lm_eval
    PYTHONPATH=$PWD lm-eval/bin/python benchmarks/evaluator.py
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from launches import ONE_PROCESS, PROJECT, RESULTS, accelerate, describe_machine, keys, run, say, threads, write_results

from carelm.provenance import git_commit

MODELS = {
    "demo": {"overlay": "demo_base", "precision": "fp32", "max_steps": 100},
    "smollm2": {"overlay": "real_base", "precision": "bf16", "max_steps": 16, "global_batch_size": 8, "max_length": 384,
                "learning_rate": 5e-4},
}  # fmt: skip
CELLS = ["-".join(map(str, cell)) for cell in itertools.product(MODELS, (192, 2000), ("fp32", "bf16"))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=["prepare", *CELLS, "ranks"], metavar="CELL", help="default: all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--new_tokens", type=int, default=192, help="at most, of an answer")
    parser.add_argument("--sample", type=int, default=24, help="of the prompts, answered one at a time")
    parser.add_argument("--batch_sizes", nargs="+", default=["32", "64", "128"], help="of lm_eval; auto is one too")
    parser.add_argument(
        "--sides", nargs="+", default=["carelm", "one", "lm_eval"], choices=["carelm", "one", "lm_eval"]
    )
    parser.add_argument(
        "--folder", type=Path, default=PROJECT / "outputs/benchmark-evaluator", help="of the tuned models"
    )
    parser.add_argument("--self_test", action="store_true", help="few prompts, short answers; writes nothing")
    parser.add_argument("--no_write", action="store_true", help="leave benchmarks/results as it is")
    options = parser.parse_args()
    options.data = Path(os.environ.get("CARELM_DATA", PROJECT.parent / "shared/data")) / "bitext_support"
    if not options.data.is_dir():
        sys.exit(f"CARELM_DATA: there is no {options.data}")
    if "lm_eval" in options.sides and importlib.util.find_spec("lm_eval") is None:
        sys.exit("lm_eval is not installed here: --help says how, --sides carelm one leaves it out")
    os.environ["HF_HUB_OFFLINE"] = "1"
    if options.self_test:
        options.rounds, options.new_tokens, options.sample, options.batch_sizes = 1, 8, 3, ["4"]
    file = RESULTS / "evaluator.json"
    result = {"cells": json.loads(file.read_text()).get("cells", {}) if file.exists() else {}}
    for cell in options.only or (["demo-192-fp32", "ranks"] if options.self_test else ["prepare", *CELLS, "ranks"]):
        if cell == "prepare":
            for name in MODELS:
                prepare(name, options)
            continue
        machine = describe_machine()
        measured = time_ranks(options) if cell == "ranks" else time_in_turn(*cell.split("-"), options)
        before = result["cells"].get(cell, {})
        for part in (
            "ways",
            "same texts",
        ):  # sides that were measured by an earlier command stay, each with its own commit
            if part in measured and before.get("most_new_tokens") == options.new_tokens:
                measured[part] = {**before[part], **measured[part]}
        result["cells"][cell] = {"machine": machine, **measured}
        result["ratios"] = ratios(result["cells"])
        say(f"{cell}: {json.dumps(measured, indent=1)}")
        if not (options.no_write or options.self_test):
            say(f"written to {write_results('evaluator', result)}")
    say(json.dumps(ratios(result["cells"]), indent=1))


def prepare(name: str, options: argparse.Namespace) -> Path:
    """The folder of the tuned and merged model; made where it is not there."""
    values = dict(MODELS[name])
    folder, overlay = options.folder / values["overlay"], values.pop("overlay")
    if (folder / "merged/merge.json").exists():
        return folder / "merged"
    values |= {"max_steps": 2} if options.self_test else {}
    say(f"{name} is tuned into {folder}")
    recipe = ("--config", "recipes/datasets/bitext_support.yaml", "--config", f"recipes/overlays/{overlay}.yaml")
    words = keys(dataset_name=options.data, load_in_4bit=False, eval_strategy="no", output_dir=folder, **values)
    train = accelerate(ONE_PROCESS, PROJECT / "train/sft.py", *recipe, *words)
    merge = keys(
        adapter=folder, output_dir=folder / "merged", dtype="fp32", tolerance=1
    )  # one copy for both precisions
    for command in (train, [sys.executable, str(PROJECT / "train/merge.py"), *merge]):
        done = run(command, {"OMP_NUM_THREADS": threads(1)}, 3600)
        if done.status != 0:
            raise RuntimeError(done.last_error)
    return folder / "merged"


def write_data(folder: Path, options: argparse.Namespace, prompts: int) -> Path:
    """A folder whose test split has so many of the rows: those of the test file first, then those of the training file."""
    rows = [line for name in ("test", "train") for line in (options.data / f"{name}.jsonl").open(encoding="utf-8")]
    (folder / "test.jsonl").write_text("".join(rows[:prompts]), encoding="utf-8")
    (folder / "train.jsonl").write_text("".join(rows[-100:]), encoding="utf-8")
    return folder


def words_of(data: Path, options: argparse.Namespace, **values: object) -> list[str]:
    """The command line of eval/run.py for these prompts."""
    recipe = ["--config", "recipes/datasets/bitext_support.yaml", "--config", "recipes/overlays/demo_base.yaml"]
    return recipe + keys(dataset_name=data, load_in_4bit=False, max_new_tokens=options.new_tokens, num_latency_prompts=1,
                         num_resamples=10, **values)  # fmt: skip


def time_in_turn(name: str, number: str, precision: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each way in each round, the model loaded and warm, and how far the texts are the same."""
    import torch

    from carelm.chat.chat import make_chat
    from carelm.evaluation import candidates
    from carelm.evaluation.questions import make_questions
    from carelm.models import generation
    from carelm.recipe_file import load_recipe

    torch.set_num_threads(int(threads(1)))
    merged = prepare(name, options)
    with tempfile.TemporaryDirectory(prefix="carelm-evaluator-") as folder:
        data = write_data(Path(folder), options, 6 if options.self_test else int(number))
        recipe = load_recipe(words_of(data, options, precision=precision), usage="")
        questions, _ = make_questions(recipe, make_chat(recipe))
    candidate = candidates.find(recipe, str(merged))
    chat = candidate.make_chat()
    model, about = candidate.load(chat)
    prompts = [chat.prompt_ids(q.messages, tools=q.tools) for q in questions]
    texts = [chat.text(q.messages, tools=q.tools, for_answer=True) for q in questions]
    sample = list(range(0, len(prompts), max(1, len(prompts) // options.sample)))[: options.sample]
    said: dict[str, dict[int, str]] = {}
    counts: dict[int, int] = {}  # CareLM's new tokens
    largest = 0

    def carelm() -> int:
        nonlocal largest
        answers = {}
        spent = generation.generate_all(model, chat, prompts, generation.Decoding(options.new_tokens),
                                        device=torch.device("cpu"), done=answers.__setitem__,
                                        max_batch_tokens=recipe.max_batch_tokens)  # fmt: skip
        largest = spent["batch_size"]
        said["carelm"] = {i: answer.text for i, answer in answers.items()}
        counts.update({i: answer.new_tokens for i, answer in answers.items()})
        stopped.append(sum(answer.finish_reason == "stop" for answer in answers.values()) / len(answers))
        return spent["new_tokens"]

    def one_at_a_time() -> int:
        new = {}
        for i in sample:
            ids = torch.tensor([prompts[i]])
            new[i] = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                    max_new_tokens=options.new_tokens)[0, ids.shape[1]:].tolist()  # fmt: skip
        said["one at a time"] = {i: chat.spoken(ids) for i, ids in new.items()}
        return sum(map(len, new.values()))

    stopped: list[float] = []
    ways: dict[str, tuple[int, Callable[[], int]]] = {}
    if "carelm" in options.sides:
        ways["carelm"] = len(prompts), carelm
    if "one" in options.sides:
        ways["one at a time"] = len(sample), one_at_a_time
    if "lm_eval" in options.sides:
        ways |= {f"lm_eval, batch {size}": (len(prompts), way)
                 for size, way in harness(model, chat, texts, prompts, said, counts, options).items()}  # fmt: skip
    generation.generate_all(model, chat, prompts[:2], generation.Decoding(2), device=torch.device("cpu"),
                            max_batch_tokens=recipe.max_batch_tokens, done=lambda *_: None)  # fmt: skip
    measured = {who: {"examples": count, "seconds": [], "new_tokens": 0} for who, (count, _) in ways.items()}
    for _ in range(options.rounds):
        for who, (_, way) in ways.items():
            started = time.perf_counter()
            measured[who]["new_tokens"] = way()
            measured[who]["seconds"].append(round(time.perf_counter() - started, 2))
            say(f"{who}: {measured[who]['seconds'][-1]} s, {measured[who]['new_tokens']} new tokens")
    for figures in measured.values():
        seconds = statistics.median(figures["seconds"])
        figures["git_commit"] = git_commit()
        figures["examples_per_second"] = round(figures["examples"] / seconds, 3)
        figures["tokens_per_second"] = round(figures["new_tokens"] / seconds, 1)
    same = {f"{a} / {b}": round(statistics.mean(said[a][i].strip() == said[b][i].strip() for i in said[b]), 4)
            for a, b in itertools.permutations(said, 2) if said[b].keys() <= said[a].keys() and a == "carelm"}  # fmt: skip
    return {
        "prompts": len(prompts), "most_new_tokens": options.new_tokens, "precision": precision, "model": MODELS[name],
        "parameters": about["total_parameters"], "mean_prompt_tokens": round(statistics.mean(map(len, prompts)), 1),
        "ended_their_turn": [round(share, 3) for share in stopped[:1]], "carelm_largest_batch": largest,
        "ways": measured, "same texts": same,
        "lm_eval": version("lm_eval") if "lm_eval" in options.sides else None,
    }  # fmt: skip


def harness(model, chat, texts: list[str], prompts: list[list[int]], said: dict[str, dict[int, str]],
            counts: dict[int, int], options: argparse.Namespace) -> dict[str, Callable[[], int]]:  # fmt: skip
    """lm_eval's way at each batch size; what it says goes into `said`, `counts` are CareLM's new tokens."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    longest = max(map(len, prompts)) + options.new_tokens
    tokenizer = chat.tokenizer
    if [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] != prompts:
        raise RuntimeError("lm_eval would read other token ids than CareLM sends: the figures would not compare")
    ends = [tokenizer.decode(i) for i in sorted(chat.end_of_turn_ids)]

    def way(size: str) -> Callable[[], int]:
        reader = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, max_length=longest, add_bos_token=False)

        def answer() -> int:
            asked = [
                Instance("generate_until", {}, (text, {"until": list(ends), "max_gen_toks": options.new_tokens,
                                                       "do_sample": False}), i)
                for i, text in enumerate(texts)
            ]  # fmt: skip
            found = reader.generate_until(asked, disable_tqdm=True)
            said[f"lm_eval, batch {size}"] = dict(enumerate(found))
            # The same text is counted alike; another one has its own tokens and the end of turn.
            lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in found]
            return sum(counts[i] if i in counts and said["carelm"][i].strip() == text.strip() else
                       min(lengths[i], options.new_tokens) for i, text in enumerate(found))  # fmt: skip

        return answer

    return {size: way(size) for size in options.batch_sizes}


def ratios(cells: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each model and number of prompts: examples per second of each side in each precision, and CareLM's best over each
    rival's best."""
    found = {}
    for name, number in itertools.product(MODELS, (192, 2000)):
        speeds: dict[str, dict[str, float]] = {}
        for precision in ("fp32", "bf16"):
            for who, figures in cells.get(f"{name}-{number}-{precision}", {}).get("ways", {}).items():
                speeds.setdefault(who, {})[precision] = figures["examples_per_second"]
        best = {who: max(each.values()) for who, each in speeds.items()}
        rivals = {who: speed for who, speed in best.items() if who.startswith("lm_eval")}
        if "carelm" in best:
            of = {"one at a time": best.get("one at a time"), "lm_eval": max(rivals.values(), default=None)}
            over = {f"carelm / {who}": round(best["carelm"] / speed, 2) for who, speed in of.items() if speed}
            found[f"{name}-{number}"] = {"examples_per_second": speeds, **over}
    return found


def time_ranks(options: argparse.Namespace) -> dict[str, Any]:
    """Examples per second that eval/run.py reports for one rank with all threads and for two ranks that share them."""
    found: dict[str, list[float]] = {"one rank": [], "two ranks": []}
    merged, prompts = prepare("demo", options), 6 if options.self_test else 192
    with tempfile.TemporaryDirectory(prefix="carelm-evaluator-") as name:
        data = Path(name) / "data"
        data.mkdir()
        write_data(data, options, prompts)
        for k in range(options.rounds):
            for ranks, (who, file) in enumerate((("one rank", "gpu"), ("two ranks", "cpu_zero2")), 1):
                out = Path(name) / f"{ranks}-{k}"
                words = words_of(data, options, precision="fp32", models=merged, output_dir=out)
                command = accelerate(PROJECT / f"accelerate_configs/{file}.yaml", PROJECT / "eval/run.py", *words)
                done = run(command, {"OMP_NUM_THREADS": threads(ranks)}, 900)
                if done.status != 0:
                    raise RuntimeError(done.last_error)
                (model,) = json.loads((out / "eval/results.json").read_text())["models"].values()
                found[who].append(model["throughput"]["examples_per_second"])
                say(f"{who}: {found[who][-1]} examples/s")
    medians = {who: statistics.median(speeds) for who, speeds in found.items()}
    return {"prompts": prompts, "examples_per_second": found,
            "two ranks / one rank": round(medians["two ranks"] / medians["one rank"], 3)}  # fmt: skip


if __name__ == "__main__":
    main()
