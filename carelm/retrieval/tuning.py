"""Tunes an embedder on past questions: each is drawn to a passage that answers it, away from those that do not."""

import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from carelm.evaluation.verdicts import decide
from carelm.ranks import say
from carelm.retrieval.embedder import Embedder
from carelm.retrieval.gold import Asked
from carelm.retrieval.index import index_folder
from carelm.retrieval.refusals import FOLDS
from carelm.retrieval.retriever import Retriever
from carelm.retrieval.retriever_results import DEPTH, SCORES, gold_ranks, make_results, refusals_of
from carelm.retrieval.update import Content, build

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer

SCALE = 20.0  # of the cosines, as sentence-transformers has it
BETWEEN = 0.5  # the cosine between right and wrong
AT_A_TIME = 64  # questions of a step; what they are told apart by are the passages of all of them
TOGETHER = 16  # texts of nearly the same length, so that little is padded
WARM_UP = 0.1  # of the steps
BEFORE, TUNED = "before", "tuned"
DECIDES = f"MRR@{DEPTH}"


def hard_negatives(retriever: Retriever, questions: Sequence[Asked]) -> list[list[str]]:
    """Of each question the passages that the retriever takes for right and that are not, best first."""
    found = retriever.search_many([one.text for one in questions], DEPTH)
    return [
        [f.passage.id for f in of_one if f.passage.id not in one.gold | one.also]
        for one, of_one in zip(questions, found)
    ]


def tune(
    model: "SentenceTransformer",
    questions: Sequence[Asked],
    texts: dict[str, str],
    hard: Sequence[list[str]],
    *,
    epochs: float,
    learning_rate: float,
    seed: int,
) -> int:
    """Changes the model's weights; returns the number of steps.

    The loss has two parts, over the passages of a batch, a gold one and a hard negative of each question. The cross entropy of
    a softmax orders the passages of one question (multiple negatives ranking, Henderson et al. 2017,
    https://arxiv.org/abs/1705.00652). The other makes cosines comparable between questions, as a threshold needs them: the
    gold one's is drawn above a half, the highest of the wrong ones below, each by a sigmoid's cross entropy (Zhai et al. 2023,
    https://arxiv.org/abs/2303.15343). What may answer a question too is in neither, which the library's own losses do not
    know: past questions share few passages.

    Args:
        texts: of passages by their ids.
        hard: of each question the ids of passages that are wrong and look right.
        epochs: how often each question is seen.
    """
    import torch
    from torch.nn.functional import cross_entropy, softplus

    from carelm.models.precision import choose_precision

    precision = "bf16" if choose_precision("auto").name == "bf16" else "fp32"
    torch.manual_seed(seed)
    draw = random.Random(seed)
    steps = max(1, round(epochs * len(questions) / AT_A_TIME))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    warm = max(1, round(WARM_UP * steps))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min((k + 1) / warm, (steps - k) / (steps - warm + 1)))
    say(f"{len(questions)} questions, {steps} steps in {precision}")
    began, said, left, losses = time.monotonic(), time.monotonic(), [], []
    model.train()
    for step in range(1, steps + 1):
        if len(left) < AT_A_TIME:
            left += draw.sample(range(len(questions)), len(questions))
        batch, left = left[:AT_A_TIME], left[AT_A_TIME:]
        gold = [draw.choice(sorted(questions[k].gold)) for k in batch]
        others = [draw.choice(hard[k]) for k in batch if hard[k]]
        shown = list(dict.fromkeys(gold + others))
        right = torch.tensor([shown.index(id) for id in gold], device=model.device)
        may_answer = torch.tensor(
            [
                [id in questions[k].gold | questions[k].also and id != own for id in shown]
                for k, own in zip(batch, gold)
            ],
            device=model.device,
        )
        with torch.autocast(model.device.type, torch.bfloat16, enabled=precision == "bf16"):
            asked = _vectors(model, [questions[k].text for k in batch], ("query",))
            passages = _vectors(model, [texts[id] for id in shown], ("document", "passage", "corpus"))
        cosines = (asked @ passages.T).masked_fill(may_answer, -torch.inf)
        is_gold = torch.nn.functional.one_hot(right, len(shown)).bool()
        wrong = cosines.masked_fill(is_gold, -torch.inf).amax(1)
        sides = softplus(SCALE * (BETWEEN - cosines[is_gold])) + softplus(SCALE * (wrong - BETWEEN))
        loss = cross_entropy(SCALE * cosines, right) + sides.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step in (1, steps) or time.monotonic() - said > 20:
            said = time.monotonic()
            say(f"step {step} of {steps}, loss {np.mean(losses[-10:]):.3f}, {said - began:.0f} s")
    model.eval()
    return steps


def _vectors(model: "SentenceTransformer", texts: list[str], prompts: Sequence[str]) -> "torch.Tensor":
    """Vectors of length 1, float32 [texts, dimension], with gradients; in front the words that the model has for such texts."""
    import torch

    prompt = next((model.prompts[name] for name in prompts if model.prompts.get(name)), None)
    order = sorted(range(len(texts)), key=lambda k: len(texts[k]))
    made = []
    for start in range(0, len(order), TOGETHER):
        features = model.preprocess([texts[k] for k in order[start : start + TOGETHER]], prompt=prompt)
        moved = {name: v.to(model.device) if torch.is_tensor(v) else v for name, v in features.items()}
        made.append(model(moved)["sentence_embedding"].float())
    back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=model.device)
    return torch.nn.functional.normalize(torch.cat(made), dim=-1)[back]


def compare(before: Retriever, tuned: Embedder, questions: Sequence[Asked]) -> dict[str, Any]:
    """What the tuned embedder changes on questions that it was not tuned on, by the retriever that the recipe names: scores
    of both with intervals, the paired `differences`, what a threshold refuses, and whether it `is_better` in MRR@10, by
    the evaluation's own rule: ten questions at least, and an interval of the difference above zero."""
    recipe, passages = before.recipe, before.index.passages()
    with tempfile.TemporaryDirectory(prefix="carelm-index-") as folder:
        beside = replace(recipe, index=folder, embedder=str(tuned.folder))
        build(index_folder(beside), Content({"documents": []}, lambda name: (passages, {}), {}), tuned)
        retrievers = {BEFORE: before, TUNED: Retriever(beside)}
        ranks = {name: gold_ranks(retriever, questions) for name, retriever in retrievers.items()}
        results = make_results(questions, ranks, BEFORE, recipe.num_resamples, recipe.seed)
        refused = {}
        if len(questions) >= FOLDS:
            for name, retriever in retrievers.items():
                of_one = refusals_of(retriever, questions, recipe.seed)
                refused[name] = {kind: of_one[kind] for kind in ("answerable", "unanswerable")}
    differences = results["pairs"][0]["scores"]
    return {
        "questions": len(questions),
        **results["retrievers"],
        "differences": differences,
        "refused": refused,
        "is_better": decide(differences[DECIDES], len(questions)) == "better",
    }


def verdicts(found: dict[str, Any]) -> list[str]:
    """Of what `compare` has found, a line for each score and one for what is refused."""
    lines = [
        f"{score}: {found[BEFORE][score]['value']:.3f} before, {found[TUNED][score]['value']:.3f} tuned (difference "
        f"{found['differences'][score]['low']:+.3f} to {found['differences'][score]['high']:+.3f})"
        for score in SCORES
    ]
    if found["refused"]:
        both = (
            f"{of_one['unanswerable']['value']:.0%} {name} (with {of_one['answerable']['value']:.0%} of the answerable)"
            for name, of_one in found["refused"].items()
        )
        lines.append(f"questions without their passages that a threshold refuses: {', '.join(both)}")
    return lines


def source(before: Embedder, found: dict[str, Any], about: dict[str, Any]) -> str:
    """source.json of a tuned embedder."""
    told = {"weights": f"{before.folder.name}, tuned on past questions", "of": before.fingerprint, **about}
    return json.dumps(told | {"validation": found}, indent=1)
