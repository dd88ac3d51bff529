"""The certificate of parity: what is served is what was evaluated, token for token, on questions of the test split."""

import dataclasses
import gc
import json
import re
import socket
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from carelm import ranks
from carelm.chat.question import asked_columns, compose, parse
from carelm.data.tags import used_tags
from carelm.data.templates import fill
from carelm.errors import UserError
from carelm.evaluation.questions import Question, make_questions
from carelm.files import write_whole
from carelm.models.generation import generate_all
from carelm.provenance import versions
from carelm.recipe import CERTIFIED, Recipe
from carelm.serving import requests
from carelm.serving.gateway import Gateway
from carelm.serving.server import address_of, serve
from carelm.talk.speaker import Speaker

AT_ONCE = 8  # requests, or as many as the queue holds, so that answers are made beside others, as they are served


def certify(
    recipe: Recipe, speakers: list[Speaker], gateway: Gateway, key: str | None, listening: socket.socket
) -> dict[str, Any]:
    """Asks `certify` test questions through the API and by the evaluation's way, with models loaded anew, and writes what is
    equal into the run's folder.

    Raises:
        UserError: where there are no test questions, or none that the API can be asked.
    """
    questions, _ = make_questions(recipe, speakers[0].chat)
    bodies = [(q, body) for q in questions if (body := to_body(gateway, q))]
    bodies = bodies[:: max(1, len(bodies) // recipe.certify)][: recipe.certify]
    if not bodies:
        raise UserError(
            "certify: no question of the test split can be asked through the API as it stands there: its template has columns "
            "that a conversation leaves empty (optional_columns), or its system_prompt is made of columns"
        )
    ranks.say(f"certifying {', '.join(gateway.engine.models)} on {len(bodies)} of {len(questions)} test questions")
    at_once = min(AT_ONCE, recipe.max_queue)
    served = serve(gateway, key, listening, lambda: _ask_all(address_of(listening), key, speakers, bodies, at_once))
    gateway.engine = None
    for speaker in speakers:
        speaker.__dict__.pop("model", None)
    gc.collect()
    torch.cuda.empty_cache()
    models = {s.name: _compare(recipe, s, [q for q, _ in bodies], served[s.name]) for s in speakers}
    decoding = dataclasses.asdict(speakers[0].decoding)
    found = {
        "engine": recipe.engine,
        "questions": len(bodies),
        "decoding": decoding,
        "models": models,
        "versions": versions(),
    }
    write_whole(recipe.output_dir / CERTIFIED, json.dumps(found, indent=1))
    return found


def to_body(gateway: Gateway, question: Question) -> dict[str, Any] | None:
    """What a client sends to ask this question; None where no request comes to it."""
    turns = []
    for message in question.messages:
        turn = {key: value for key, value in message.items() if key != "train"}
        if turn["role"] == "user":
            if (text := to_words(gateway.recipe, turn["content"])) is None:
                return None
            turn["content"] = text
        for call in turn.get("tool_calls", ()):
            function = call["function"] | {"arguments": json.dumps(call["function"]["arguments"])}
            turn["tool_calls"] = [c if c is not call else call | {"function": function} for c in turn["tool_calls"]]
        turns.append(turn)
    without_system = [turn for turn in turns if turn["role"] != "system"]
    wanted = [{key: value for key, value in m.items() if key != "train"} for m in question.messages]
    for messages in (without_system, turns):
        body = {"model": "", "messages": messages} | ({"tools": question.tools} if question.tools else {})
        try:
            asked = requests.parse(requests.ChatRequest, json.dumps(body).encode())
            made = gateway.prompts.as_trained(asked.messages)
        except requests.Problem:
            continue
        if made == wanted:
            return body
    return None


def to_words(recipe: Recipe, content: str) -> str | None:
    """What a user says for the recipe's template to make this of it; None where nothing does."""
    if not recipe.prompt_template:
        return content
    columns, tags = asked_columns(recipe), used_tags(recipe)
    places = {name: f"\0{i}\0" for i, name in enumerate([*columns, *tags])}
    pattern = re.escape(fill(recipe.prompt_template, places))
    for i in range(len(places)):
        place = re.escape(f"\0{i}\0")
        pattern = pattern.replace(place, f"(?P<part{i}>.*)", 1).replace(place, f"(?P=part{i})")
    if not (found := re.fullmatch(pattern, content, re.DOTALL)):
        return None
    values = {column: found[f"part{i}"] for i, column in enumerate(columns)}
    text = json.dumps(values) if len(columns) > 1 else values[columns[0]]
    try:
        return text if compose(recipe, parse(recipe, text)) == content else None
    except UserError:
        return None


def _ask_all(
    address: str, key: str | None, speakers: list[Speaker], bodies: list[tuple[Question, dict[str, Any]]], at_once: int
) -> dict[str, list[dict[str, Any]]]:
    """Each model's replies, in the order of the questions."""

    direct = urllib.request.build_opener(
        urllib.request.ProxyHandler({})
    )  # no proxy stands before this machine's own address

    def ask(speaker: Speaker, body: dict[str, Any]) -> dict[str, Any]:
        decoding = speaker.decoding
        how = {"temperature": decoding.temperature, "top_p": decoding.top_p or 1.0, "seed": decoding.seed}
        data = json.dumps(body | how | {"model": speaker.name, "return_token_ids": True}).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        request = urllib.request.Request(f"{address}/v1/chat/completions", data, headers)
        try:
            with direct.open(request) as reply:
                return json.load(reply)
        except urllib.error.HTTPError as error:
            return json.load(error)

    with ThreadPoolExecutor(at_once) as pool:
        return {s.name: list(pool.map(lambda pair, s=s: ask(s, pair[1]), bodies)) for s in speakers}


def _compare(
    recipe: Recipe, speaker: Speaker, questions: list[Question], replies: list[dict[str, Any]]
) -> dict[str, Any]:
    """What the evaluation answers to the same questions, beside what was served."""
    prompts = [speaker.chat.fit_prompt(q.messages, speaker.limit, tools=q.tools).ids for q in questions]
    answers: dict[int, tuple[int, ...]] = {}
    speaker.load()
    generate_all(
        speaker.model, speaker.chat, prompts, speaker.decoding, device=speaker.device, show=speaker.name,
        max_batch_tokens=recipe.max_batch_tokens, done=lambda i, answer: answers.__setitem__(i, answer.ids),
    )  # fmt: skip
    del speaker.model
    equal_prompts = equal_answers = failed = 0
    first = None
    for i, (question, reply) in enumerate(zip(questions, replies)):
        if "error" in reply:
            failed += 1
            continue
        equal_prompts += reply["prompt_token_ids"] == prompts[i]
        served, evaluated = reply["choices"][0]["token_ids"], list(answers[i])
        equal_answers += served == evaluated
        if served != evaluated and first is None:
            at = next((k for k, pair in enumerate(zip(served, evaluated)) if pair[0] != pair[1]), -1)
            at = at if at >= 0 else min(len(served), len(evaluated))
            first = {"question": question.id, "token": at, "served": served[at:][:1], "evaluated": evaluated[at:][:1]}
    return {
        "in_short": f"{equal_answers} of {len(questions)} ({recipe.engine})",
        "fingerprint": speaker.candidate.fingerprint(),
        "precision": speaker.candidate.precision().name,
        "equal_prompts": equal_prompts,
        "equal_answers": equal_answers,
        "failed": failed,
        "share": equal_answers / len(questions),
        "first_divergence": first,
    }


def sentences(found: dict[str, Any]) -> list[str]:
    """What a certificate says, a model a sentence."""
    number, said = found["questions"], []
    for name, of_model in found["models"].items():
        sentence = (
            f"{name} as served: {of_model['equal_prompts']} of {number} prompts and {of_model['equal_answers']} of {number} "
            f"answers are the evaluation's, token for token ({of_model['precision']}, {found['engine']})"
        )
        if of_model["failed"]:
            sentence += f"; {of_model['failed']} were refused"
        if first := of_model["first_divergence"]:
            sentence += f"; the first other token is number {first['token'] + 1} of question {first['question']}"
        said.append(sentence)
    return said
