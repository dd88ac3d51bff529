"""Talks to the models of a recipe: what they are asked is rendered as in training, and answered as in the evaluation.

    python train/chat.py --config recipes/shop.yaml
    python train/chat.py --config recipes/shop.yaml --models base adapter --temperature 0.7
    python train/chat.py --config recipes/shop.yaml --message "Where is my order?"
    python train/chat.py --config recipes/shop.yaml < question.txt > answer.txt

Without --models it is the run's result, or the base before there is one. At a terminal, /help lists the commands: marks for
answers, and /save, which writes rows that can be trained on. --message TEXT, or standard input that is no terminal, is one
message: the answer alone goes to standard output. Where the prompt_template has several columns it is a JSON object of them.

exit status: 0 the chat has ended or the message is answered, 2 something in the recipe, the models or the message is to be
mended, 130 an answer in a script was ended by Ctrl-C.
"""

import argparse
import dataclasses
import signal
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm import environment, interrupts, ranks  # noqa: F401
from carelm.chat import question
from carelm.command_line import own_options
from carelm.data.sources import stay_offline
from carelm.data.templates import template_columns
from carelm.errors import UserError
from carelm.next_steps import words_of
from carelm.recipe import Recipe
from carelm.recipe_file import load_recipe
from carelm.training.runs import untrained

KEYS = ("models", "system_prompt", "max_new_tokens", "temperature", "top_p")  # the chat's own, for --help
MOST_BYTES = 2**22  # of standard input: more is no message


def main() -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--message")
    options, keys = own_options(parser)
    recipe = for_chat(load_recipe(keys, usage=__doc__, first=KEYS))
    if ranks.world_size() > 1:
        raise UserError(f"num_processes: a chat is one process, not {ranks.world_size()}; start python train/chat.py")
    message = options.message
    if message is not None and not message.strip():
        raise UserError(
            '--message: it is empty; write it in quotes, --message "Where is my order?", or leave it out to chat'
        )
    if message is None and sys.stdin is None:
        raise UserError("standard input is closed; use --message TEXT")
    if message is None and not sys.stdin.isatty():
        message = question.decode(sys.stdin.buffer.read(MOST_BYTES + 1), MOST_BYTES)
    texts = None if message is None else question.parse(recipe, message)
    if texts:
        question.compose(recipe, texts)
    stay_offline(recipe)
    system, tagged_system = question.system_message(recipe)
    from carelm.evaluation.candidates import find_candidates

    candidates = find_candidates(recipe)
    ranks.say(f"loading {', '.join(candidate.name for candidate in candidates)}")

    import torch

    from carelm import quiet

    quiet.silence(has_gpu=torch.cuda.is_available(), is_first_rank=True)
    ranks.use_cpu(None)
    from carelm.talk.dialogue import Dialogue
    from carelm.talk.session import Session
    from carelm.talk.speaker import Speaker

    speakers = [Speaker(recipe, candidate) for candidate in candidates]
    for speaker in speakers:
        speaker.check_window(system)
    for speaker in speakers:
        speaker.load()
    names = [speaker.name for speaker in speakers]
    session = Session(recipe, names, system, time.strftime("%Y%m%d-%H%M%S"))
    dialogue = Dialogue(session, speakers, tagged_system, words_of(recipe, keys))
    if texts:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # who reads the answer may have enough of it
        if "cancelled" in dialogue.ask(texts):
            sys.exit(130)
    else:
        import readline  # noqa: F401  a line can be edited, and earlier ones come back

        ranks.say(f"talking to {', '.join(names)}; /help lists commands, Ctrl-C ends an answer, Ctrl-D the chat")
        dialogue.run()


def for_chat(recipe: Recipe) -> Recipe:
    """The recipe with the models to talk to: its own, or the run's result, or the base where there is none. What a chat takes
    otherwise than the evaluation is said."""
    if recipe.num_shots:
        ranks.say(f"num_shots: the {recipe.num_shots} examples are the evaluator's, a chat begins without")
    if empty := [c for c in recipe.optional_columns if c in template_columns(recipe.prompt_template or "", "")]:
        ranks.say(f"optional_columns: {', '.join(empty)} stay empty in a chat")
    if recipe.mask_personal_data:
        ranks.say(
            "mask_personal_data: the models read [EMAIL], [PHONE], [CARD] and [IBAN] for what you type, as in training"
        )
    if over_the_wire := [name for name in recipe.models if name.startswith("api:")]:
        raise UserError(f"models: {over_the_wire[0]} is for the evaluation alone; a chat is with models that run here")
    models, is_full = recipe.models, recipe.method == "full"
    if not models and (recipe.output_dir / ("config.json" if is_full else "adapter_config.json")).exists():
        models = [str(recipe.output_dir)] if is_full else ["adapter"]
    if not models:
        ranks.say(
            f"{recipe.output_dir} holds no result of training yet: the base answers ({untrained(recipe.output_dir)})"
        )
    return dataclasses.replace(recipe, num_shots=0, models=models or ["base"])


if __name__ == "__main__":
    ranks.run_main(main, kept="files that were saved before stay")
