"""Answers the same prompts in three ways, in turn, and times them; then one rank beside two.

    python benchmarks/evaluator.py [--rounds 3] [--prompts 192]

(a) carelm.models.generation, as eval/run.py calls it; (b) one prompt at a time with transformers' generate; (c) EleutherAI's
lm-evaluation-harness (pip install lm_eval), its `hf` model with generate_until, at every batch size of --batch_sizes and with
its own automatic one. The same model in the same process, the same prompts of bitext_support, and the same number of new
tokens: those that would end an answer are suppressed. Then eval/run.py on the same rows: one rank with all cores as threads,
and two ranks that share them.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from launches import PROJECT, accelerate, describe_machine, run, say, threads, write_results

NEW_TOKENS = 48
KEYS = ("--config", "recipes/bitext_support.yaml", "--config", "recipes/overlays/demo_base.yaml", "--load_in_4bit", "false",
        "--models", "base", "--num_latency_prompts", 1, "--num_resamples", 10, "--max_new_tokens", NEW_TOKENS)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--batch_sizes", nargs="+", default=["auto", "16", "32", "64", "128"], help="of lm_eval")
    parser.add_argument("--no_write", action="store_true", help="leave benchmarks/results as it is")
    options = parser.parse_args()
    folder = Path(os.environ.get("CARELM_DATA", PROJECT.parent / "shared/data")) / "bitext_support"
    if not folder.is_dir():
        sys.exit(f"CARELM_DATA: there is no {folder}")
    machine = describe_machine()
    seconds, batch_size = time_in_turn(folder, options)
    medians = {who: statistics.median(times) for who, times in seconds.items()}
    best = min((who for who in medians if who.startswith("lm_eval")), key=medians.get)
    result = {
        "machine": machine,
        "prompts": options.prompts,
        "new_tokens": NEW_TOKENS,
        "carelm_largest_batch": batch_size,
        "seconds": {who: [round(t, 2) for t in times] for who, times in seconds.items()},
        "examples_per_second": {who: round(options.prompts / t, 2) for who, t in medians.items()},
        "ratios": {
            "carelm / one at a time": round(medians["one at a time"] / medians["carelm"], 2),
            f"carelm / {best}": round(medians[best] / medians["carelm"], 2),
        },
        "ranks": time_ranks(folder, options),
    }
    say(json.dumps({k: result[k] for k in ("examples_per_second", "ratios", "ranks")}, indent=1))
    if not options.no_write:
        say(f"written to {write_results('evaluator', result)}")


def time_in_turn(folder: Path, options: argparse.Namespace) -> tuple[dict[str, list[float]], int]:
    """Seconds of each way in each round, models loaded and warm, and the largest batch of (a)."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if importlib.util.find_spec("lm_eval") is None:
        sys.exit("lm_eval is not installed; it is no requirement of CareLM: pip install lm_eval")
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from carelm.chat.chat import make_chat
    from carelm.evaluation import candidates
    from carelm.evaluation.questions import make_questions
    from carelm.models import generation
    from carelm.recipe_file import load_recipe

    torch.set_num_threads(int(threads(1)))
    recipe = load_recipe(
        [*map(str, KEYS), "--dataset_name", str(folder), "--max_eval_samples", str(options.prompts)], usage=""
    )
    candidate = candidates.find(recipe, "base")
    chat = candidate.make_chat()
    model, _ = candidate.load(chat)
    ends = torch.tensor(chat.tokenizer.all_special_ids)  # no answer ends early, in any of the ways
    model.get_output_embeddings().register_forward_hook(lambda _, __, logits: logits.index_fill(-1, ends, -torch.inf))
    questions, _ = make_questions(recipe, make_chat(recipe))
    texts = [chat.text(q.messages, tools=q.tools, for_answer=True) for q in questions]
    decoding, cpu, largest = generation.Decoding(NEW_TOKENS), torch.device("cpu"), 0
    asked = [
        Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": NEW_TOKENS, "do_sample": False}), i)
        for i, text in enumerate(texts)
    ]

    def carelm() -> int:
        nonlocal largest
        answers = []
        prompts = [chat.prompt_ids(q.messages, tools=q.tools) for q in questions]
        spent = generation.generate_all(model, chat, prompts, decoding, device=cpu, done=lambda i, a: answers.append(a),
                                        max_batch_tokens=recipe.max_batch_tokens)  # fmt: skip
        largest = spent["batch_size"]
        return sum(a.new_tokens for a in answers)

    def one_at_a_time() -> int:
        new = 0
        for ids in (chat.prompt_ids(q.messages, tools=q.tools) for q in questions):
            new += model.generate(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                                  max_new_tokens=NEW_TOKENS, do_sample=False).shape[1] - len(ids)  # fmt: skip
        return new

    harnesses = {
        size: HFLM(pretrained=model, tokenizer=chat.tokenizer, batch_size=size, max_length=1024, add_bos_token=False)
        for size in options.batch_sizes
    }

    def lm_eval(batch_size: str) -> int:
        harnesses[batch_size].generate_until(asked, disable_tqdm=True)
        return NEW_TOKENS * len(questions)

    ways = {"carelm": carelm, "one at a time": one_at_a_time}
    ways |= {f"lm_eval, batch {size}": lambda size=size: lm_eval(size) for size in options.batch_sizes}
    seconds: dict[str, list[float]] = {who: [] for who in ways}
    for _ in range(options.rounds):
        for who, way in ways.items():
            started = time.perf_counter()
            new = way()
            seconds[who].append(time.perf_counter() - started)
            if new != NEW_TOKENS * len(questions):
                raise RuntimeError(
                    f"{who} made {new} tokens, not {NEW_TOKENS * len(questions)}: the figures would not compare"
                )
            say(f"{who}: {seconds[who][-1]:.2f} s")
    return seconds, largest


def time_ranks(folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """Examples per second that eval/run.py reports for one rank with all threads and for two ranks with half each."""
    found: dict[str, list[float]] = {"one rank": [], "two ranks": []}
    with tempfile.TemporaryDirectory(prefix="carelm-evaluator-") as name:
        for k in range(options.rounds):
            for ranks, (who, file) in enumerate((("one rank", "gpu"), ("two ranks", "cpu_zero2")), 1):
                out = Path(name) / f"{ranks}-{k}"
                keys = (*KEYS, "--dataset_name", folder, "--output_dir", out, "--max_eval_samples", options.prompts)
                command = accelerate(PROJECT / f"accelerate_configs/{file}.yaml", PROJECT / "eval/run.py", *keys)
                done = run(command, {"OMP_NUM_THREADS": threads(ranks)}, 900)
                if done.status != 0:
                    raise RuntimeError(done.last_error)
                model = json.loads((out / "eval/results.json").read_text())["models"]["base"]
                found[who].append(model["throughput"]["examples_per_second"])
                say(f"{who}: {found[who][-1]} examples/s")
    medians = {who: statistics.median(speeds) for who, speeds in found.items()}
    return {"examples_per_second": found, "two ranks / one rank": round(medians["two ranks"] / medians["one rank"], 3)}


if __name__ == "__main__":
    main()
