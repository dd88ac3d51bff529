"""A model behind an OpenAI-compatible endpoint as a candidate: `--models base adapter api:NAME` at the recipe's `api_url`.

It is asked the same questions as messages, which it renders itself, whole: no window cuts them. Tokens are those that its
`usage` counts. The first `num_latency_prompts` questions are asked one at a time and timed over the wire, the others several at
a time. The key is read from OPENAI_API_KEY and written nowhere.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from carelm import ranks
from carelm.errors import UserError
from carelm.evaluation.endpoint import AT_A_TIME, Endpoint, Unusable, check_address, complete_all
from carelm.evaluation.pace import Pace
from carelm.evaluation.predictions import PredictionFile
from carelm.files import fingerprint, read_json, write_whole
from carelm.recipe import Recipe
from carelm.training.stops import HangWatch

if TYPE_CHECKING:
    from carelm.evaluation.questions import Question  # with the scores' libraries, seconds to import

OF_MESSAGES = ("role", "content", "name", "tool_calls", "tool_call_id")
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class ApiModel:
    """A model of an endpoint; `name` as in the results and in the names of files."""

    name: str
    model: str
    url: str

    def computing_in(self, name: str) -> "ApiModel":
        return self

    def asked_by(self, recipe: Recipe) -> "ApiModel":
        return self

    def other_data_keys(self, recipe: Recipe) -> list[str]:
        return []

    def changed_data(self, recipe: Recipe) -> list[str]:
        return []


@dataclass(frozen=True)
class AskedApi:
    """A model of an endpoint, what it is asked, and where its answers are kept."""

    candidate: ApiModel
    endpoint: Endpoint
    questions: list["Question"]
    bodies: dict[str, dict[str, Any]]  # by the question's id
    file: PredictionFile


def find_api(recipe: Recipe, name: str) -> ApiModel:
    """The model that `api:NAME` stands for; nothing is sent yet.

    Raises:
        UserError: where NAME or `api_url` is missing, or the latter is no address or holds a password.
    """
    model = name.removeprefix("api:").strip()
    if not model:
        raise UserError("models: 'api:' names no model; write api:NAME, as the endpoint calls it")
    if not recipe.api_url:
        raise UserError(f"models: '{name}' needs api_url, the endpoint's address, such as https://api.openai.com/v1")
    url = check_address("api_url", recipe.api_url)
    return ApiModel(f"api:{model.replace('/', '-')}", model, url)


def prepare(recipe: Recipe, model: ApiModel, questions: list["Question"], folder: Path) -> AskedApi:
    """The requests of all questions; an endpoint that is down is found here, before any weights.

    Raises:
        UserError: where nothing answers at `api_url`, or what is to decide is not known of its answers.
    """
    if recipe.primary_metric.startswith("constrained"):
        raise UserError(
            f"primary_metric: {recipe.primary_metric} is not known of {model.name}, which tells no probabilities of labels; "
            f"set {recipe.primary_metric.removeprefix('constrained_')}"
        )
    endpoint = Endpoint(model.url, model.name)
    problem = endpoint.problem() if ranks.rank() == 0 else None
    if problem := ranks.share(problem):
        raise UserError(f"models: {model.name}: {model.url} {problem}; start it, or set api_url")
    bodies = {q.id: _body(recipe, model, q) for q in questions}
    made_by = {q.id: fingerprint(model.url, bodies[q.id], q.references) for q in questions}
    return AskedApi(
        model, endpoint, questions, bodies, PredictionFile(folder / f"predictions-{model.name}.jsonl", made_by)
    )


def answer(
    recipe: Recipe, asked: AskedApi, folder: Path, watch: HangWatch, pace: Pace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The predictions in the order of the questions, and what was measured, by rank 0; elsewhere both are empty.

    Answers are kept as they come: where the endpoint fails, the same command goes on with the others.

    Raises:
        UserError: for an endpoint that is down, too slow, refuses, or answers what is no answer, after three tries.
    """
    problem = None
    if ranks.rank() == 0:
        watch.look()
        try:
            _ask_all(recipe, asked, folder, watch, pace)
        except Unusable as error:
            kept = len(asked.file.read())
            problem = (
                f"models: {asked.candidate.name}: {asked.candidate.url} {error}; {kept} of {len(asked.questions)} answers are "
                "kept, and the same command goes on with the others"
            )
    watch.pause()
    if problem := ranks.share(problem):
        raise UserError(problem)
    if ranks.rank() != 0:
        return [], {}
    lines = asked.file.close()
    measured = read_json(folder / f"measured-{asked.candidate.name}.json")
    refused = measured.pop("refused", [])
    lengths = [line["prompt_tokens"] for line in lines]
    timed = [line["wire_ms"] for line in lines if line["wire_ms"] is not None][: recipe.num_latency_prompts]
    whole = {f"p{p}": round(float(np.percentile(timed, p)), 3) for p in PERCENTILES} if timed else {}
    p50, p95 = (int(np.percentile(lengths, p, method="lower")) for p in (50, 95))
    return lines, {
        "kind": "api",
        "folder": asked.candidate.url,
        "precision": "unknown",
        "bits": None,
        "unused_generation_config": {},
        "total_parameters": None,
        "trained_parameters": None,
        "load_seconds": None,
        "peak_memory_bytes": None,
        "prompt_tokens": {"p50": p50, "p95": p95, "max": max(lengths)},
        "usage": {"prompt_tokens": sum(lengths), "new_tokens": sum(line["new_tokens"] for line in lines)},
        "throughput": measured,
        "latency": {"prompts": len(timed), "over_the_wire": True, "ttft_ms": {}, "tpot_ms": {}, "e2e_ms": whole},
        "conditions": {
            "device": "over the wire",
            "endpoint": asked.candidate.url,
            "model": asked.candidate.model,
            **({"refused": refused} if refused else {}),
        },
    }


def _ask_all(recipe: Recipe, asked: AskedApi, folder: Path, watch: HangWatch, pace: Pace) -> None:
    done = asked.file.open()
    timed = sum(line["wire_ms"] is not None for line in asked.file.read().values())
    left = [q for q in asked.questions if q.id not in done]
    if not left and not timed and recipe.num_latency_prompts:
        left = asked.questions[:1]  # all of them came several at a time, in a larger test: one is timed
    if not left:
        return ranks.say(f"{asked.candidate.name}: all {len(done)} answers are there; nothing to do")
    number = max(0, recipe.num_latency_prompts - timed)
    alone = left[:: max(1, len(left) // max(1, number))][:number]  # spread over all, as for a model here
    ids = {question.id for question in alone}
    several = [question for question in left if question.id not in ids] or alone  # by which the throughput is told
    with tqdm(total=len(left), desc=asked.candidate.name, unit="example", dynamic_ncols=True) as bar:

        def ask(question: "Question", is_alone: bool) -> int:
            line = _ask(asked, question, is_alone)
            asked.file.append(line)
            watch.look()
            pace.answered()
            bar.update()
            return line["new_tokens"]

        pace.begin(len(left))
        started = time.perf_counter()
        tokens = sum([ask(question, True) for question in alone])
        if several is not alone:
            started = time.perf_counter()
            tokens = sum(complete_all(lambda question: ask(question, False), several))
    seconds = time.perf_counter() - started
    write_whole(folder / f"measured-{asked.candidate.name}.json", json.dumps({
        "examples": len(several),
        "of_examples": len(asked.questions),
        "seconds": round(seconds, 3),
        "examples_per_second": round(len(several) / seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "batch_size": 1 if several is alone else AT_A_TIME,
        "refused": asked.endpoint.refused,
    }))  # fmt: skip


def _ask(asked: AskedApi, question: "Question", is_alone: bool) -> dict[str, Any]:
    """The line of one question; `Unusable` after the last try."""
    reply = asked.endpoint.complete(asked.bodies[question.id])
    return {
        "id": question.id,
        "conversation": question.conversation,
        "category": question.category,
        "question": question.last_words(),
        "prediction": reply.text,
        "references": question.references,
        "new_tokens": reply.new_tokens,
        "prompt_tokens": reply.prompt_tokens,
        "finish_reason": reply.finish_reason,
        "wire_ms": reply.wire_ms if is_alone else None,
        "made_by": asked.file.made_by[question.id],
    }


def _body(recipe: Recipe, model: ApiModel, question: "Question") -> dict[str, Any]:
    messages = [{key: _calls(m[key]) if key == "tool_calls" else m[key] for key in OF_MESSAGES if key in m} for m in
                question.messages]  # fmt: skip
    body = {"model": model.model, "messages": messages, "max_tokens": recipe.max_new_tokens}
    body |= {"temperature": recipe.temperature}
    if recipe.temperature > 0:
        body |= {"top_p": recipe.top_p, "seed": recipe.seed}
    return body | ({"tools": question.tools} if question.tools else {})


def _calls(calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tool calls with their arguments as text, as the protocol has them."""
    functions = [call.get("function", {}) for call in calls]
    texts = [
        f.get("arguments") if isinstance(f.get("arguments"), str) else json.dumps(f.get("arguments")) for f in functions
    ]
    return [call | {"function": f | {"arguments": text}} for call, f, text in zip(calls, functions, texts)]
