"""What vLLM can serve of a comparison's models, and the command that serves it. Names are those of vLLM 0.32's `vllm serve`.

One vLLM holds one base, or one merged model, and computes LoRA adapters on it. What it does not compute as it was trained is
refused or left out, with the reason: another function would answer.
"""

import shlex
from pathlib import Path
from typing import Any

from carelm import ranks
from carelm.errors import UserError
from carelm.evaluation.candidates import Candidate
from carelm.files import read_json
from carelm.recipe import Recipe

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that --max-lora-rank takes
# Of an adapter_config.json: what vLLM refuses (vllm/lora/peft_helper.py), or older ones read past.
NOT_COMPUTED = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules of its own",
    "trainable_token_indices": "tokens of its own",
    "target_parameters": "LoRA on experts held as one tensor",
    "lora_bias": "biases of its own",
    "rank_pattern": "ranks that differ by layer",
    "alpha_pattern": "scales that differ by layer",
    "layer_replication": "layers of its own",
}


def why_not(candidate: Candidate) -> str | None:
    """Why vLLM would answer by another function than the one that was trained, or None where it would not."""
    if candidate.is_encoder_decoder:
        return "it is an encoder-decoder, which vLLM and Ollama do not take"
    if candidate.bits:
        return f"its base is held in {candidate.bits} bits, which vLLM rounds otherwise or not at all"
    if candidate.adapter is None:
        return None
    config = read_json(candidate.adapter / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        return "it is a trained prompt, which vLLM does not take and which cannot be merged: engine: batcher serves it"
    if found := [what for key, what in NOT_COMPUTED.items() if config.get(key)]:
        return f"it has {' and '.join(found)}, which vLLM does not compute"
    if _rank(candidate) > RANKS[-1]:
        return f"its rank is above {RANKS[-1]}, vLLM's highest"
    return None


def servable(recipe: Recipe, candidates: list[Candidate]) -> list[Candidate]:
    """The models that one vLLM serves together. Where the recipe names none, what does not fit is left out aloud: a merge goes
    where an adapter is served, and stands for one that vLLM does not compute.

    Raises:
        UserError: where one that is named cannot be served, or none is left.
    """
    reasons = {candidate.name: why_not(candidate) for candidate in candidates}
    able = [candidate for candidate in candidates if reasons[candidate.name] is None]
    first = min(able, key=lambda candidate: ("adapter", "checkpoint", "base").index(candidate.kind), default=None)
    for candidate in able:
        if not first.shares_base(candidate):
            reasons[candidate.name] = f"it stands on another base than {first.name}, and one vLLM holds one"
    for candidate in candidates:
        if (reason := reasons[candidate.name]) and recipe.models:
            raise UserError(f"models: {candidate.name} cannot be served by vLLM: {reason}; {_way_out(candidate)}")
        if reason:
            ranks.say(f"{candidate.name} is left out: {reason}")
    if first is None:
        raise UserError(f"models: vLLM can serve none of them; {_way_out(candidates[-1])}")
    return [candidate for candidate in candidates if reasons[candidate.name] is None]


def _way_out(candidate: Candidate) -> str:
    if candidate.is_encoder_decoder:
        return "train/chat.py talks to it, eval/run.py evaluates it"
    if candidate.adapter and read_json(candidate.adapter / "adapter_config.json").get("peft_type") != "LORA":
        return "set engine: batcher"
    if candidate.adapter and why_not(candidate):
        merged = shlex.quote(str(candidate.adapter / "merged"))
        return f"merge it first: python train/merge.py --adapter {shlex.quote(str(candidate.adapter))} --output_dir {merged}"
    return "name models that stand on one whole base, as --models base adapter, or --models merged"


def _rank(candidate: Candidate) -> int:
    return int(read_json(candidate.adapter / "adapter_config.json")["r"])


def options(candidates: list[Candidate], *, model: str, max_model_len: int, adapters: dict[str, Path]) -> list[str]:
    """The words behind `vllm serve` that make it hold these models, which `servable` has let through.

    Args:
        model: the folder or the Hub's name of what they stand on.
        max_model_len: tokens of prompt and answer.
        adapters: the folder of each that is an adapter, by name.
    """
    first = candidates[0]
    names = [candidate.name for candidate in candidates if candidate.adapter is None]
    words = [model, "--served-model-name", *(names or ["base"]), "--dtype", DTYPES[first.precision().name]]
    words += ["--max-model-len", str(max_model_len)]
    if first.kind != "checkpoint" and not Path(model).is_dir():
        words += ["--revision", first.recipe.revision]
    if first.recipe.training.get("trust_remote_code"):
        words.append("--trust-remote-code")
    if adapters:
        highest = max(_rank(candidate) for candidate in candidates if candidate.adapter)
        words += ["--enable-lora", "--max-lora-rank", str(next(rank for rank in RANKS if rank >= highest))]
        words += ["--max-loras", str(len(adapters)), "--lora-modules", *(f"{n}={path}" for n, path in adapters.items())]
    return words


def drawing(recipe: Recipe) -> dict[str, Any]:
    """How the evaluation drew its answers, as a generation_config.json that vLLM takes its defaults from: there `temperature`
    is 1 otherwise."""
    if recipe.temperature == 0:
        return {"do_sample": False, "temperature": 0.0}
    return {"do_sample": True, "temperature": recipe.temperature, "top_p": recipe.top_p, "top_k": 0}


def script(words: list[str]) -> str:
    """A script in the exported folder that starts vLLM with it."""
    return (
        "#!/usr/bin/env bash\n"
        "# vLLM at http://127.0.0.1:8000/v1, for this machine alone. VLLM_API_KEY=... in front: clients must send that key.\n"
        'cd "$(dirname "$0")" || exit 1\n'
        f'exec vllm serve {shlex.join(words)} --host 127.0.0.1 "$@"\n'
    )
