"""One model answers all test questions: every rank its share, then rank 0 measures the latency alone."""

import gc
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from carelm import ranks
from carelm.chat.chat import Chat
from carelm.data.label_form import Form
from carelm.errors import UserError
from carelm.evaluation import constrained
from carelm.evaluation.asked import Prepared
from carelm.evaluation.candidates import Candidate
from carelm.evaluation.pace import Pace
from carelm.evaluation.predictions import PredictionFile
from carelm.evaluation.questions import Question
from carelm.files import fingerprint, read_json, write_whole
from carelm.models import memory
from carelm.models.generation import Answer, Decoding, generate_all, latency
from carelm.provenance import git_commit, versions
from carelm.recipe import Recipe
from carelm.training.stops import HangWatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def prepare(
    recipe: Recipe,
    candidate: Candidate,
    questions: list[Question],
    folder: Path,
    form: Form | None = None,
    validation: Sequence[Question] = (),
    earlier: Sequence[Prepared] = (),
) -> Prepared:
    """Renders the questions for one model; all that can be wrong with it is found here, before any weights.

    Args:
        form: how answers hold their labels; each label is scored then, for the `validation` questions too.
        earlier: the same model on other question sets: validation questions that one of them has are asked there alone.

    Raises:
        UserError: for a base that is not there or is another one, no chat template, a precision that the hardware lacks, or
            no room for a prompt.
    """
    candidate.check_base()
    candidate.check_finite()
    chat = candidate.make_chat()
    decoding = Decoding(recipe.max_new_tokens, recipe.temperature, recipe.top_p, recipe.seed)
    made_by = [candidate.fingerprint(), sorted(chat.end_of_turn_ids), decoding.arguments(), recipe.seed]

    def part(questions: list[Question], name: str, of_validation: Prepared | None = None) -> Prepared:
        prompts, lengths = _make_prompts(recipe, candidate, chat, questions)
        file = PredictionFile(
            folder / f"predictions-{name}.jsonl",
            {q.id: fingerprint(*made_by, q.references, ids) for q, ids in zip(questions, prompts)},
        )
        return Prepared(candidate, chat, decoding, questions, prompts, lengths, file, form, of_validation)

    name = candidate.name
    of_validation = part([*validation], f"{name}.validation") if form and validation else None
    for other in (e.validation for e in earlier if of_validation and e.validation):
        if (other.form, other.file.made_by) == (form, of_validation.file.made_by):
            of_validation = other
            break
    return part(questions, name, of_validation)


def answer(
    recipe: Recipe, asked: Prepared, folder: Path, watch: HangWatch, pace: Pace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The predictions in the order of the questions, and what was measured; on ranks other than 0 both are empty.

    What an earlier run left in `folder` and is still what would be made today is not made again. Figures of speed stand with
    the place where they were measured, and are not mixed with those of another. `watch` and `pace` are told of every answer.
    """
    watch.look()
    name, number = asked.candidate.name, len(asked.prompts)
    saved = folder / f"measured-{name}.json"
    done = ranks.share(asked.file.open() if ranks.rank() == 0 else None)
    here = {**place(), "max_batch_tokens": recipe.max_batch_tokens, "versions": versions()}
    key = fingerprint(sorted(asked.file.made_by.items()))
    measured = ranks.share(read_json(saved) if ranks.rank() == 0 else None)
    measured = measured if measured.get("key") == key else {}
    timed = asked.prompts[:: max(1, number // max(1, recipe.num_latency_prompts))][: recipe.num_latency_prompts]
    scored = [part for part in (asked, asked.validation) if part and part.form]
    labels_missing = ranks.share(
        any(constrained.missing(part, part.form) for part in scored) if ranks.rank() == 0 else None
    )
    if len(done) == number and not labels_missing and measured.get("latency", {}).get("prompts") == len(timed):
        ranks.say(f"{name}: all {number} answers are there; nothing to do")
    else:
        model, about = asked.candidate.load(asked.chat)
        measured = measured if measured.get("conditions") == here else {}
        measured = {**measured, **about, "prompt_tokens": asked.lengths, "conditions": here, "key": key}
        device = next(p for p in model.parameters() if p.device.type != "meta").device
        if len(done) < number:
            memory.reset_peak_memory()
            measured["throughput"] = _answer_share(recipe, asked, model, done, device, watch, pace)
            measured["peak_memory_bytes"] = max(ranks.gather(memory.peak_memory_bytes()))
        if ranks.rank() == 0:
            write_whole(saved, json.dumps(measured, indent=1))
        for part in scored if labels_missing else ():
            if part.form.has_reason and part is not asked:
                there = ranks.share(part.file.open() if ranks.rank() == 0 else None)
                if len(there) < len(part.prompts):
                    _answer_share(recipe, part, model, there, device, watch, pace)
            spent = constrained.score_labels(recipe, part, part.form, model, device, watch)
            measured |= {"labels": spent} if part is asked else {}
        if ranks.rank() == 0:
            if measured.get("latency", {}).get("prompts") != len(timed):
                watch.look()
                measured["latency"] = {
                    "prompts": len(timed),
                    **latency(model, asked.chat, timed, asked.decoding, device=device, done=watch.look),
                }
            write_whole(saved, json.dumps(measured, indent=1))
        del model
        gc.collect()
    watch.pause()
    ranks.share(None)  # the others wait while rank 0 measures
    if ranks.rank() != 0:
        return [], {}
    unmeasured = {"throughput": {}, "peak_memory_bytes": None}
    return asked.file.close(), {**unmeasured, **{k: v for k, v in measured.items() if k != "key"}}


def _make_prompts(
    recipe: Recipe, candidate: Candidate, chat: Chat, questions: list[Question]
) -> tuple[list[list[int]], dict[str, Any]]:
    """The ids of every prompt, as in training, with counts of what did not fit; lengths in tokens."""
    limit = candidate.prompt_limit(recipe, chat)
    rendered = []
    for question in questions:
        try:
            rendered.append(chat.fit_prompt(question.messages, limit, tools=question.tools))
        except UserError as error:
            raise UserError(f"models: {candidate.name}, test row {question.id}: {error}") from None
    changes = [prompt.change for prompt in rendered if prompt.change]
    lengths = [len(prompt.ids) for prompt in rendered]
    p50, p95 = (int(np.percentile(lengths, p, method="lower")) for p in (50, 95))
    about = {"p50": p50, "p95": p95, "max": max(lengths), **{change: changes.count(change) for change in set(changes)}}
    return [prompt.ids for prompt in rendered], about


def _answer_share(
    recipe: Recipe,
    asked: Prepared,
    model: "PreTrainedModel",
    done: set[str],
    device: torch.device,
    watch: HangWatch,
    pace: Pace,
) -> dict[str, Any]:
    """This rank answers every so-manieth of the questions that are left, by length; returns the speed of all ranks."""
    questions, prompts, file = asked.questions, asked.prompts, asked.file
    left = sorted((i for i, q in enumerate(questions) if q.id not in done), key=lambda i: -len(prompts[i]))
    share = left[ranks.rank() :: ranks.world_size()]

    def keep(k: int, answer: Answer) -> None:
        watch.look()
        question = questions[share[k]]
        file.append({
            "id": question.id,
            "conversation": question.conversation,
            "category": question.category,
            "question": question.last_words(),
            "prediction": answer.text,
            "references": question.references,
            "new_tokens": answer.new_tokens,
            "prompt_tokens": len(prompts[share[k]]),
            "finish_reason": answer.finish_reason,
            "made_by": file.made_by[question.id],
        })  # fmt: skip
        pace.answered()

    generate_all(model, asked.chat, [prompts[i] for i in share[-2:]], Decoding(2), device=device, max_batch_tokens=1,
                 done=lambda *_: None)  # fmt: skip
    pace.begin(len(share))
    spent = generate_all(
        model, asked.chat, [prompts[i] for i in share], asked.decoding, device=device, done=keep,
        max_batch_tokens=recipe.max_batch_tokens, show=asked.candidate.name if ranks.rank() == 0 else None,
    )  # fmt: skip
    watch.pause()  # the others take as long as they take
    everyone = ranks.gather(spent)
    seconds = max(s["seconds"] for s in everyone)
    return {
        "examples": len(left),
        "of_examples": len(questions),
        "seconds": round(seconds, 3),
        "examples_per_second": round(len(left) / seconds, 3),
        "tokens_per_second": round(sum(s["new_tokens"] for s in everyone) / seconds, 1),
        "batch_size": max(s["batch_size"] for s in everyone),
    }


def place() -> dict[str, Any]:
    """Where a model is measured."""
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else f"CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "ranks": ranks.world_size(),
    }


def conditions(recipe: Recipe) -> dict[str, Any]:
    """What holds for all models; device, threads, ranks, batch and versions stand with each of them."""
    return {
        "num_shots": recipe.num_shots,
        "max_new_tokens": recipe.max_new_tokens,
        "decoding": "greedy" if recipe.temperature == 0 else f"temperature {recipe.temperature}, top_p {recipe.top_p}",
        "num_resamples": recipe.num_resamples,
        "seed": recipe.split_seed,
        "git_commit": git_commit(),
    }
