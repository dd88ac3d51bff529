"""One model answers all test questions: every rank its share, then rank 0 measures the latency alone."""

import gc
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from carelm import memory, ranks
from carelm.candidates import Candidate, read_json
from carelm.chat import Chat
from carelm.generation import Answer, Decoding, generate_all, latency
from carelm.predictions import PredictionFile
from carelm.ranks import Launch
from carelm.recipe import Recipe, UserError, fingerprint, write_whole
from carelm.runs import git_commit, versions
from carelm.testset import Question

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def answer(
    recipe: Recipe, candidate: Candidate, questions: list[Question], folder: Path
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The predictions in the order of the questions, and what was measured; on ranks other than 0 both are empty.

    What an earlier run left in `folder` and is still what would be made today is not made again.
    """
    chat = candidate.make_chat()
    decoding = Decoding(recipe.max_new_tokens, recipe.temperature, recipe.top_p, recipe.seed)
    prompts, fitted = _make_prompts(recipe, candidate, chat, questions)
    made_by = [candidate.fingerprint(), decoding.arguments(), recipe.seed]
    file = PredictionFile(
        folder / f"predictions-{candidate.name}.jsonl",
        {q.id: fingerprint(*made_by, q.references, ids) for q, ids in zip(questions, prompts)},
    )
    saved = folder / f"measured-{candidate.name}.json"
    done = ranks.share(file.open() if ranks.rank() == 0 else None)
    measured = ranks.share(read_json(saved) if ranks.rank() == 0 else None)
    key = fingerprint(sorted(file.made_by.items()), recipe.num_latency_prompts)
    if len(done) < len(questions) or measured.get("key") != key:
        memory.reset_peak_memory()
        model, about = candidate.load(chat)
        device = next(p for p in model.parameters() if p.device.type != "meta").device
        speed = _answer_share(recipe, candidate, model, chat, decoding, questions, prompts, done, file, device)
        peak = max(ranks.gather(memory.peak_memory_bytes()))
        if ranks.rank() == 0:
            timed = prompts[:: max(1, len(prompts) // recipe.num_latency_prompts)][: recipe.num_latency_prompts]
            measured = {
                **about,
                "prompts": fitted,
                "throughput": speed if len(done) < len(questions) else measured.get("throughput", {}),
                "peak_memory_bytes": peak,
                "latency": {"prompts": len(timed), **latency(model, chat, timed, decoding, device=device)},
                "key": key,
            }
            write_whole(saved, json.dumps(measured, indent=1))
        del model
        gc.collect()
        ranks.share(None)  # the others wait while rank 0 measures
    else:
        ranks.say(f"{candidate.name}: all {len(questions)} answers are there; nothing to do")
    if ranks.rank() != 0:
        return [], {}
    return file.close(), {k: v for k, v in measured.items() if k != "key"}


def _make_prompts(
    recipe: Recipe, candidate: Candidate, chat: Chat, questions: list[Question]
) -> tuple[list[list[int]], dict[str, Any]]:
    """The ids of every prompt, as in training, with counts of what did not fit; lengths in tokens."""
    import numpy as np
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        candidate.recipe.base, trust_remote_code=recipe.training.get("trust_remote_code", False)
    )
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 2**31
    limit = positions - recipe.max_new_tokens - recipe.num_virtual_tokens
    if recipe.num_shots == 0:
        limit = min(limit, recipe.max_length)
    if limit < 1:
        raise UserError(
            f"max_new_tokens: {recipe.max_new_tokens} leaves no room for a prompt in the {positions} positions of "
            f"{candidate.name}; set it lower"
        )
    rendered = [chat.fit_prompt(question.messages, limit) for question in questions]
    changes = [change for _, change in rendered if change]
    lengths = [len(ids) for ids, _ in rendered]
    p50, p95 = (int(np.percentile(lengths, p, method="lower")) for p in (50, 95))
    about = {"tokens_p50": p50, "tokens_p95": p95, "tokens_max": max(lengths),
             **{change: changes.count(change) for change in set(changes)}}  # fmt: skip
    return [ids for ids, _ in rendered], about


def _answer_share(
    recipe: Recipe,
    candidate: Candidate,
    model: "PreTrainedModel",
    chat: Chat,
    decoding: Decoding,
    questions: list[Question],
    prompts: list[list[int]],
    done: set[str],
    file: PredictionFile,
    device: torch.device,
) -> dict[str, Any]:
    """This rank answers every so-manieth of the questions that are left, by length; returns the speed of all ranks."""
    left = sorted((i for i, q in enumerate(questions) if q.id not in done), key=lambda i: -len(prompts[i]))
    share = left[ranks.rank() :: ranks.world_size()]

    def keep(k: int, answer: Answer) -> None:
        question = questions[share[k]]
        file.append({
            "id": question.id,
            "conversation": question.conversation,
            "category": question.category,
            "question": next((m["content"] for m in reversed(question.messages) if m["role"] == "user"), ""),
            "prediction": answer.text,
            "references": question.references,
            "new_tokens": answer.new_tokens,
            "prompt_tokens": len(prompts[share[k]]),
            "finish_reason": answer.finish_reason,
            "made_by": file.made_by[question.id],
        })  # fmt: skip

    generate_all(model, chat, [prompts[i] for i in share[-2:]], Decoding(2), device=device, max_batch_tokens=1,
                 done=lambda *_: None)  # fmt: skip
    spent = generate_all(
        model, chat, [prompts[i] for i in share], decoding, device=device, max_batch_tokens=recipe.max_batch_tokens,
        done=keep, show=candidate.name if ranks.rank() == 0 else None,
    )  # fmt: skip
    everyone = ranks.gather(spent)
    seconds = max(s["seconds"] for s in everyone)
    return {
        "examples": len(left),
        "seconds": round(seconds, 3),
        "examples_per_second": round(len(left) / seconds, 3) if left else None,
        "tokens_per_second": round(sum(s["new_tokens"] for s in everyone) / seconds, 1) if left else None,
        "batch_size": max(s["batch_size"] for s in everyone),
        "ranks": ranks.world_size(),
    }


def conditions(recipe: Recipe, launch: Launch | None) -> dict[str, Any]:
    """Under what all models were measured."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "ranks": ranks.world_size(),
        "num_shots": recipe.num_shots,
        "max_new_tokens": recipe.max_new_tokens,
        "max_batch_tokens": recipe.max_batch_tokens,
        "decoding": "greedy" if recipe.temperature == 0 else f"temperature {recipe.temperature}, top_p {recipe.top_p}",
        "num_resamples": recipe.num_resamples,
        "seed": recipe.split_seed,
        "versions": versions(),
        "git_commit": git_commit(),
    }
