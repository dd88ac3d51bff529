"""A Modelfile for Ollama: a folder's weights, its chat template in Go's language, and how answers are drawn.

Names are those of Ollama's Modelfile reference (docs.ollama.com/modelfile). What its converter knows is read from its
convert/convert.go and convert/tokenizer.go: a newer one may know more.
"""

import hashlib
from pathlib import Path

from carelm.chat.chat import Chat
from carelm.files import read_json
from carelm.recipe import Recipe
from carelm.serving.go_template import Untold, tell

# Architectures that `ollama create` converts from safetensors.
CONVERTED = {
    "LlamaForCausalLM", "MixtralForCausalLM", "Ministral3ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM",
    "Gemma3ForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Olmo3ForCausalLM", "CohereForCausalLM", "GptOssForCausalLM",
    "DeepseekV3ForCausalLM", "Glm4MoeLiteForCausalLM", "Lfm2ForCausalLM",
}  # fmt: skip
# sha256 of the regular expressions by which a tokenizer parts text into words, as the converter knows them; it takes GPT-2's
# own way for a tokenizer that has none, and for all others.
KNOWN_WORDS = {
    "d98f9631be1e9607a9848c26c1f9eac1aa9fc21ac6ba82a2fc0741af9780a48f",  # Llama 3
    "03df5c5863ad70781dcfdef491ead25140f895fe8010964be0daefe27be32b02",  # DeepSeek LLM
    "21cde974d587f0d54dc8d56b183cc1e6239600172035c68fbd6d4b9f8da0576e",  # DeepSeek Coder
    "1ff7f41064896984db5d1bb6ff64fa4bc29007d08c1b439e505b7392777a319e",  # Qwen 2
}


def modelfile(recipe: Recipe, chat: Chat, stops: set[int], *, folder: Path, system: str | None, num_ctx: int) -> str:
    """The text of a Modelfile that lies in the model's folder.

    Args:
        folder: holds the model's tokenizer_config.json.
        system: the system message of a conversation that has none of its own.
        num_ctx: tokens of prompt and answer.

    Raises:
        Untold: where the chat template cannot be told in Go's language.
    """
    adds_bos = bool(
        read_json(folder / "tokenizer_config.json").get("add_bos_token")
    )  # then Ollama does, to every prompt
    template = tell(chat, adds_bos=adds_bos)
    if system and '"""' in system:
        raise Untold("the system_prompt holds three quotes, which end a text there")
    lines = ["FROM .", f'TEMPLATE """{template}"""', *([f'SYSTEM """{system}"""'] if system else [])]
    lines.append(f"PARAMETER temperature {recipe.temperature:g}")
    if recipe.temperature > 0:  # top_k is 40 otherwise
        lines += [f"PARAMETER top_p {recipe.top_p:g}", f"PARAMETER top_k {len(chat.tokenizer)}", "PARAMETER min_p 0"]
    lines += [
        "PARAMETER repeat_penalty 1",
        f"PARAMETER num_ctx {num_ctx}",
        f"PARAMETER num_predict {recipe.max_new_tokens}",
    ]
    for token in chat.tokenizer.convert_ids_to_tokens(sorted(stops)):
        lines.append(f'PARAMETER stop "{token}"')
    return "\n".join(lines) + "\n"


def why_not_imported(folder: Path) -> str | None:
    """Why `ollama create` would not read these files as they are meant, or None where nothing is known against it."""
    architecture = (read_json(folder / "config.json").get("architectures") or ["none"])[0]
    if architecture not in CONVERTED:
        return f"{architecture} is none of those that its converter is known to take"
    if (folder / "tokenizer.model").exists():
        return None
    tokenizer = read_json(folder / "tokenizer.json")
    steps = tokenizer.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if "ByteLevel" not in kinds:
        return (
            "it reads tokenizer.json as one of bytes, which this one is not: put the base's tokenizer.model beside it"
        )
    words = "".join(step["pattern"].get("Regex", "") for step in steps if step["type"] == "Split")
    if words:
        is_known = hashlib.sha256(words.encode()).hexdigest() in KNOWN_WORDS
    else:
        is_known = kinds == ["ByteLevel"] and steps[0].get("use_regex", True) and not steps[0].get("add_prefix_space")
    return (
        None if is_known else "it does not know how this tokenizer parts text into words, so that some ids may differ"
    )
