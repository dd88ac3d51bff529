"""Writes a folder that vLLM serves and Ollama imports as the model was evaluated: weights, tokenizer, template, how it draws.

    python train/export.py --config recipes/shop.yaml --output_dir exported
    python train/export.py --model outputs/shop/merged --output_dir exported
    python train/export.py --model outputs/shop --output_dir exported

Without --model it is the run's merge, or what the run has trained where there is none; without --config too, the demo's. A
merged model or a full fine-tune is linked, or copied where it cannot be; an adapter is copied, and vLLM computes it on its
base. What vLLM does not compute as it was trained is to be merged first (python train/merge.py).

    bash exported/vllm.sh                                    # vLLM at http://127.0.0.1:8000/v1
    ollama create shop -f exported/Modelfile                 # of whole models

Other keys of a recipe may follow, where the base has moved since: --key value.

exit status: 0 the folder is there, 2 something is to be mended.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # carelm, also where it is not installed

from carelm import environment, ranks  # noqa: F401
from carelm.data.sources import stay_offline
from carelm.data.templates import template_columns
from carelm.errors import UserError
from carelm.files import made_whole, write_whole
from carelm.recipe import Recipe
from carelm.recipe_file import load_recipe
from carelm.training.checkpoint_folders import find_recipe

WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer.model")
ADAPTER = ("adapter_model.safetensors", "adapter_config.json")


def parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, help="folder of a merged model or a finished run")
    parser.add_argument("--output_dir", type=Path, required=True, help="folder to make")
    return parser.parse_known_args()


def main() -> None:
    options, keys = parse()
    if options.model and not any(key.partition("=")[0] == "--config" for key in keys):
        saved = find_recipe(options.model)
        if saved is None:
            raise UserError(f"--model: {options.model} belongs to no recipe.yaml; name its recipe with --config")
        keys = ["--config", str(saved), *keys]
    recipe = load_recipe(keys, usage=__doc__)
    if options.output_dir.exists() and not is_export(options.output_dir):
        raise UserError(
            f"--output_dir: {options.output_dir} is there already, and no earlier export; name another folder, or remove it"
        )
    if made := sorted(options.output_dir.glob("*.gguf")):  # by llama.cpp, beside what it reads
        raise UserError(
            f"--output_dir: {made[0]} would be lost with the earlier export; move it, or name another folder"
        )
    stay_offline(recipe)
    from carelm.evaluation import candidates

    candidate = candidates.find(recipe, name_of(recipe, options.model))
    candidate.check_base()
    candidate.check_finite()
    from carelm.chat.question import system_message
    from carelm.serving import vllm_command
    from carelm.serving.go_template import Untold
    from carelm.serving.modelfile import modelfile, why_not_imported

    (candidate,) = vllm_command.servable(recipe, [candidate])
    chat = candidate.make_chat()
    stops, positions = candidate.stops(chat), candidate.positions(recipe, chat)
    window = min(positions, recipe.max_length + recipe.max_new_tokens)
    system, tagged = system_message(recipe)
    untold = None
    with made_whole(options.output_dir, replaces=True) as aside:
        aside.mkdir(parents=True)
        chat.tokenizer.save_pretrained(aside)
        draws = vllm_command.drawing(recipe) | {
            "eos_token_id": sorted(stops),
            "pad_token_id": chat.tokenizer.pad_token_id,
        }
        if candidate.adapter:
            take(candidate.adapter, aside / "adapter", ADAPTER, may_link=False)
            words = vllm_command.options([candidate], model=base_of(candidate), max_model_len=window,
                                         adapters={candidate.name: Path("adapter")})  # fmt: skip
            words += ["--tokenizer", ".", "--generation-config", "."]
            untold = "of adapters there is none: merge it first (python train/merge.py)"
        else:
            take(Path(candidate.recipe.base), aside, WEIGHTS, may_link=True)
            draws["max_new_tokens"] = recipe.max_new_tokens  # where a request names no max_tokens
            words = vllm_command.options([candidate], model=".", max_model_len=window, adapters={})
            try:
                text = modelfile(recipe, chat, stops, folder=aside, system=system, num_ctx=window)
                write_whole(aside / "Modelfile", text)
            except Untold as error:
                untold = f"the chat template cannot be told in Go's language: {error}"
        write_whole(aside / "generation_config.json", json.dumps(draws, indent=2) + "\n")
        write_whole(aside / "vllm.sh", vllm_command.script(words))
    say_what_clients_do(recipe, system, tagged)
    ranks.say(f"vLLM: bash {shlex.quote(str(options.output_dir / 'vllm.sh'))}")
    if candidate.adapter and Path(base := base_of(candidate)).is_dir():
        ranks.say(
            f"vLLM: the base stays in {base}, as vllm.sh names it; on another machine copy it too, and mend that path"
        )
    if untold:
        ranks.say(f"Ollama: no Modelfile is written: {untold}")
    else:
        create = f"ollama create {name_for_ollama(recipe)} -f {shlex.quote(str(options.output_dir / 'Modelfile'))}"
        if reason := why_not_imported(options.output_dir):
            ranks.say(f"Ollama: not from these files: {reason}. Make a GGUF file of the folder with llama.cpp's "
                      f"convert_hf_to_gguf.py, set FROM in the Modelfile to it, then: {create}")  # fmt: skip
        else:
            ranks.say(f"Ollama: {create}")
        if 'eq .Role "system"' not in text:
            ranks.say("Ollama: a system message is left out there: the chat template takes none")
    print(json.dumps({"folder": str(options.output_dir), "model": candidate.name, "modelfile": not untold}), flush=True)


def is_export(folder: Path) -> bool:
    """Whether a folder is one that this file has made, which another takes the place of."""
    return all((folder / name).is_file() for name in ("vllm.sh", "generation_config.json", "tokenizer.json"))


def name_of(recipe: Recipe, folder: Path | None) -> str:
    """The model as the comparison names it."""
    if folder is not None and folder.resolve() == recipe.output_dir.resolve() and recipe.method != "full":
        return "adapter"
    if folder is not None and folder.resolve() == (recipe.output_dir / "merged").resolve():
        return "merged"
    if folder is not None:
        return str(folder)
    if (recipe.output_dir / "merged" / "merge.json").exists():
        return "merged"
    return str(recipe.output_dir) if recipe.method == "full" else "adapter"


def name_for_ollama(recipe: Recipe) -> str:
    """The run's name; Ollama takes letters, digits and some signs."""
    return re.sub(r"[^\w.-]", "-", recipe.output_dir.name, flags=re.ASCII)


def base_of(candidate) -> str:
    base = candidate.recipe.base
    return str(Path(base).resolve()) if Path(base).is_dir() else base


def take(source: Path, target: Path, patterns: tuple[str, ...], *, may_link: bool) -> None:
    """Puts these files there; whole models as links, which take no room twice."""
    target.mkdir(exist_ok=True)
    for file in [file for pattern in patterns for file in sorted(source.glob(pattern))]:
        if may_link and file.suffix == ".safetensors":
            try:
                os.link(file.resolve(), target / file.name)
                continue
            except OSError:  # another disk
                ranks.say(f"{file.name} is copied: it cannot be linked from here")
        shutil.copyfile(file, target / file.name)


def say_what_clients_do(recipe: Recipe, system: str | None, tagged: str | None) -> None:
    """What serve/run.py does to a conversation, and neither vLLM nor Ollama."""
    if system or tagged:
        ranks.say("system_prompt: clients of vLLM send it themselves, as the first message")
    columns = template_columns(recipe.prompt_template or "", "prompt_template")
    if recipe.prompt_template and recipe.prompt_template.strip() != f"{{{columns[0]}}}":
        ranks.say(
            "prompt_template: clients put what a user says into it themselves; python serve/run.py does it for them"
        )
    if recipe.strip_html:
        ranks.say("strip_html: clients send plain text themselves; python serve/run.py makes it of HTML for them")
    if recipe.mask_personal_data:
        ranks.say("mask_personal_data: clients mask it themselves; python serve/run.py does it for them")


if __name__ == "__main__":
    ranks.run_main(main)
