"""Serves the models of a recipe: OpenAI's API and a page, on this machine alone unless it is told otherwise.

    python serve/run.py
    python serve/run.py --config recipes/shop.yaml --port 8080 --models base adapter merged
    python serve/run.py --config recipes/shop.yaml --host 0.0.0.0 --api_key_file key.txt
    python serve/run.py --config recipes/shop.yaml --engine vllm --engine_command /opt/vllm/bin/vllm
    python serve/run.py --config recipes/shop.yaml --certify 50        # served and evaluated answers compared, and no server

What is asked is rendered as in training and answered as in the evaluation. Without --models it is the base, the run's result,
and its merge where it is there. Ctrl-C or SIGTERM stops it: answers that have begun are finished.

exit status: 0 it was stopped, or the certificate is written; 2 something in the recipe or the models is to be mended.
"""

import dataclasses
import importlib.util
import json
import os
import shlex
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm import environment, ranks  # noqa: F401
from carelm.chat.question import form_of
from carelm.data.readers import read_file
from carelm.data.sources import stay_offline
from carelm.data.templates import fill, template_columns
from carelm.errors import UserError
from carelm.files import here
from carelm.keys import SERVING_KEYS
from carelm.next_steps import words_of
from carelm.recipe import FEEDBACK, Recipe
from carelm.recipe_file import load_recipe

if TYPE_CHECKING:
    from carelm.retrieval.assistant import Assistant
    from carelm.retrieval.tickets import Tickets

KEYS = ("models", "max_new_tokens", "temperature", "top_p", "max_batch_tokens", *SERVING_KEYS)  # for --help
NEEDED = ("fastapi", "uvicorn", "prometheus_client", "httpx")  # of the extra `serve`


def main() -> None:
    recipe = for_serving(load_recipe(sys.argv[1:], usage=__doc__, first=KEYS))
    check_writable(recipe)
    from carelm.serving import security

    key = security.read_key(recipe)
    stay_offline(recipe)
    import torch

    from carelm import quiet

    quiet.silence(has_gpu=torch.cuda.is_available(), is_first_rank=True)
    assistant, tickets = open_shop(recipe)
    from carelm.evaluation.candidates import find_candidates

    candidates = find_candidates(recipe)
    if apart := [candidate.name for candidate in candidates if candidate.is_encoder_decoder]:
        raise UserError(
            f"models: {apart[0]} is an encoder-decoder, which neither engine serves; train/chat.py talks to it, eval/run.py "
            "evaluates it"
        )
    if recipe.engine == "vllm":
        from carelm.serving.vllm_command import servable

        candidates = servable(recipe, candidates)
    ranks.say(f"loading {', '.join(candidate.name for candidate in candidates)}")
    ranks.use_cpu(None)
    from carelm.serving import certificate, server
    from carelm.serving.gateway import Gateway

    if recipe.engine == "vllm":
        from carelm.serving.vllm import VllmEngine as Engine
    else:
        from carelm.serving.engine import BatcherEngine as Engine
    from carelm.talk.speaker import Speaker

    listening = server.bind(recipe)
    begin_shop(assistant, tickets)
    speakers = [Speaker(recipe, candidate) for candidate in candidates]
    if not template_columns(recipe.system_prompt or "", "system_prompt"):
        for speaker in speakers:
            speaker.check_window(fill(recipe.system_prompt or "", {}) or None)
    for sentence in dict.fromkeys(speaker.window() for speaker in speakers):
        ranks.say(sentence)
    gateway = Gateway(recipe, speakers, Engine(recipe, speakers), assistant, tickets)
    server.listen(recipe, listening)
    if recipe.certify:
        found = certificate.certify(recipe, speakers, gateway, key, listening)
        for sentence in certificate.sentences(found):
            ranks.say(sentence)
        print(json.dumps(found["models"]), flush=True)
        return
    say_address(recipe, server.address_of(listening), gateway.engine.models, key, has_shop=bool(assistant))
    server.serve(gateway, key, listening)
    if gateway.marks:
        say_feedback(recipe, gateway.marks, words_of(recipe, sys.argv[1:]))
    ranks.say("stopped")


def for_serving(recipe: Recipe) -> Recipe:
    """The recipe as it is served; raises UserError for what cannot be."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"{' and '.join(missing)} not installed: pip install -e '.[serve]'")
    if ranks.world_size() > 1:
        raise UserError(f"num_processes: a server is one process, not {ranks.world_size()}; start python serve/run.py")
    if over_the_wire := [name for name in recipe.models if name.startswith("api:")]:
        raise UserError(f"models: {over_the_wire[0]} is for the evaluation alone; models that run here are served")
    if recipe.num_shots:
        ranks.say(f"num_shots: the {recipe.num_shots} examples are the evaluator's, a conversation begins without")
    port = 0 if recipe.certify else recipe.port  # nobody else asks it meanwhile
    return dataclasses.replace(recipe, num_shots=0, port=port)


def check_writable(recipe: Recipe) -> None:
    """Says that feedback will be lost where the run's folder cannot be written; raises UserError for a certificate."""
    folder = recipe.output_dir.absolute()
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if os.access(there, os.W_OK):
        return
    if recipe.certify:
        raise UserError(
            f"certify: {here(folder)} cannot be written, where the certificate goes; look at its permissions"
        )
    ranks.say(f"output_dir: {here(folder)} cannot be written: feedback is refused; look at its permissions")


def open_shop(recipe: Recipe) -> "tuple[Assistant | None, Tickets | None]":
    """The shop assistant, where the recipe has documents, and its past tickets, where it has any; raises UserError where an
    index or the matcher cannot be used."""
    assistant = tickets = None
    if (form := form_of(recipe)) and recipe.documents:
        ranks.say(
            f"documents: no shop assistant, for prompt_template has several columns, {form}; it takes plain questions"
        )
    elif recipe.documents:
        from carelm.retrieval.assistant import Assistant

        assistant = Assistant(recipe)
    if recipe.tickets:
        from carelm.retrieval.tickets import Tickets

        tickets = Tickets(recipe)
    return assistant, tickets


def begin_shop(assistant: "Assistant | None", tickets: "Tickets | None") -> None:
    """Loads what they need before somebody waits for it, and says what there is."""
    if assistant:
        assistant.look_up([{"role": "user", "content": "Hello"}])
        retriever = assistant.retriever
        number = retriever.index.manifest["passages"]
        ranks.say(f"the shop assistant: {number} passages, found by {retriever.way}, at POST /v1/shop/chat")
    if tickets:
        if tickets.matcher:
            tickets.matcher.load()
        tickets.match("Hello", 1)
        without = "no model says which are the same (matcher names none)"
        says = "a model says which are the same" if tickets.matcher else without
        number = tickets.retriever.index.manifest["passages"]
        ranks.say(f"past tickets: {number}, at POST /v1/tickets/match; {says}")


def say_address(recipe: Recipe, address: str, models: list[str], key: str | None, has_shop: bool = False) -> None:
    """Where it is asked, and a command that asks; one that works with this recipe's template."""
    header = " -H 'Authorization: Bearer KEY'" if key else ""
    message = {"role": "user", "content": form_of(recipe) or "What does delivery cost?"}
    path, body = ("shop/chat", {}) if has_shop else ("chat/completions", {"model": models[-1]})
    asked = shlex.quote(json.dumps({**body, "messages": [message]}, ensure_ascii=False))
    ranks.say(f"serving {', '.join(models)}: the page is {address}, the API {address}/v1; Ctrl-C stops it")
    if recipe.host.strip("[]") in ("0.0.0.0", "::"):
        ranks.say(f"from other machines it is http://{socket.gethostname()}:{address.rpartition(':')[2]}")
    if form := form_of(recipe):
        ranks.say(f"prompt_template has several columns: what a user says is sent as JSON, {form}, each time")
    ranks.say(f"try: curl {address}/v1/{path}{header} -H 'Content-Type: application/json' -d {asked}")


def say_feedback(recipe: Recipe, marks: list[str | None], words: list[str]) -> None:
    """What was thought of answers, and the command that trains on the good ones."""
    from carelm.talk.marked import say_training

    file, good = here(recipe.output_dir / FEEDBACK), marks.count("good")
    ranks.say(f"feedback: {len(marks)} row{'s' * (len(marks) > 1)} more, {good} of them good: {file}")
    try:
        rows = read_file(file, str(file)).by_key[None]
    except UserError as error:  # people edit it
        return ranks.say(str(error))
    good_rows = [row for _, row in rows if row.get("mark") == "good"]
    answers: dict[str, set[str]] = {}
    for row in good_rows:
        *before, answer = row.get("messages") or [None]
        answers.setdefault(json.dumps(before), set()).add(json.dumps(answer))
    if several := sum(len(of_one) > 1 for of_one in answers.values()):
        ranks.say(f"feedback: {several} question{'s have' if several > 1 else ' has'} several good answers, all of which are "
                  "trained: take the mark of those that no longer hold away")  # fmt: skip
    if good_rows:
        say_training(recipe, file, len(good_rows), words, "feedback")


if __name__ == "__main__":
    ranks.run_main(main)
