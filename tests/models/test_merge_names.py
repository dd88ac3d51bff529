"""A merge finds the trained weights whatever the base's files call them, and loads like any model."""

import dataclasses
import shutil

import pytest
import torch
import transformers
from drawn import make_adapter
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from carelm.errors import UserError
from carelm.evaluation import candidates
from carelm.models import merge

SMALL = {"vocab_size": 2048, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}  # fmt: skip
OLD = {"vocab_size": 2048, "n_embd": 32, "hidden_size": 32, "n_layer": 2, "n_head": 4}
IMAGES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
          "patch_size": 14}  # fmt: skip
EXPERTS = {"num_experts_per_tok": 2}
CONFIGS = {
    "GPT2": OLD,
    "Bloom": OLD,
    "GPTNeoX": SMALL,
    "Gemma3": {"text_config": SMALL, "vision_config": IMAGES, "mm_tokens_per_image": 4, "image_token_index": 2047},
    "Mixtral": {**SMALL, **EXPERTS, "num_local_experts": 4},
    "Qwen3Moe": {**SMALL, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 16},
    "Llama": SMALL,
    "Qwen2": {**SMALL, "tie_word_embeddings": True},
}
OLD_NAMES = {"GPT2": "transformer.", "Bloom": "transformer.", "GPTNeoX": "gpt_neox."}  # which the files on the Hub lack


@pytest.fixture(scope="module")
def bases(tmp_path_factory, base):
    """A folder for each architecture, with drawn weights and the names that its files have on the Hub."""
    folder = tmp_path_factory.mktemp("bases")
    for name, settings in CONFIGS.items():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**settings)
        AutoModelForCausalLM.from_config(config).float().save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(base / file, folder / name / file)
        file = folder / name / "model.safetensors"
        bare = {key.removeprefix(OLD_NAMES.get(name, "-")): tensor for key, tensor in load_file(file).items()}
        save_file(bare, file, {"format": "pt"})
    return folder


def train(base, folder, **keys):
    """A drawn adapter on the base; (recipe, the model with it)."""
    keys = {
        "model_name_or_path": base,
        "precision": "fp32",
        "load_in_4bit": "false",
        "lora_target_modules": "all-linear",
        **keys,
    }
    words = [word for key, value in keys.items() for word in (f"--{key}", *str(value).split())]
    recipe = make_adapter(folder, "--lora_r", "4", *words, scale=0.1)
    candidate = candidates.find(recipe, "adapter")
    return recipe, candidate.load(candidate.make_chat())[0]


def merged_as(recipe, folder, target, onto="base", dtype="fp32"):
    """What plain `from_pretrained` makes of the merge."""
    merge.merge_weights(candidates.find(recipe, "adapter").recipe, folder, target, onto, dtype)
    model, loaded = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and not loaded["mismatched_keys"]
    return model.eval()


@torch.no_grad()
def divergence(model, other):
    """Mean KL in nats over a few drawn tokens."""
    ids = torch.randint(6, 2000, (1, 24), generator=torch.Generator().manual_seed(1))
    p, q = (m(input_ids=ids).logits.double().log_softmax(-1) for m in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("name", ["GPT2", "Bloom", "GPTNeoX", "Gemma3", "Mixtral", "Qwen3Moe"])
def test_the_merge_is_the_adapter_and_its_files_are_called_like_the_bases(bases, tmp_path, name):
    recipe, model = train(bases / name, tmp_path / "run")
    merged = merged_as(recipe, tmp_path / "run", tmp_path / "merged")
    assert divergence(model, merged) < 1e-6
    with model.disable_adapter():
        assert divergence(model, merged) > 1e-3
    names = [load_file(folder / "model.safetensors").keys() for folder in (bases / name, tmp_path / "merged")]
    assert names[0] == names[1]


@pytest.mark.parametrize(("name", "bits"), [("GPT2", 4), ("GPT2", 8), ("Mixtral", 4)])
def test_onto_the_weights_that_a_quantised_base_computes_with(bases, tmp_path, name, bits):
    recipe, model = train(bases / name, tmp_path / "run", **{"load_in_4bit": bits == 4, "load_in_8bit": bits == 8})
    merged = merged_as(recipe, tmp_path / "run", tmp_path / "merged", "quantized")
    onto_base = merged_as(recipe, tmp_path / "run", tmp_path / "other", "base")
    assert divergence(model, merged) < 1e-6
    assert bits == 8 or divergence(model, onto_base) > 1e-6  # at this size 8 bits round too little to be seen


def test_in_bf16_the_merge_is_rounded_once(bases, tmp_path):
    recipe, model = train(bases / "Mixtral", tmp_path / "run")
    assert divergence(model, merged_as(recipe, tmp_path / "run", tmp_path / "merged", dtype="bf16")) < 1e-4
    written = load_file(tmp_path / "merged/model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("Mixtral", {"lora_target_modules": "q_proj v_proj"}),
        ("Mixtral", {"lora_modules_to_save": "lm_head"}),
        ("Qwen2", {"lora_modules_to_save": "norm"}),
        ("Llama", {"lora_target_modules": "embed_tokens lm_head up_proj"}),
        ("GPT2", {"use_dora": "true"}),
    ],
    ids=str,
)
def test_parts_of_a_model_and_whole_modules_are_merged_too(bases, tmp_path, name, keys):
    recipe, model = train(bases / name, tmp_path / "run", **keys)
    assert divergence(model, merged_as(recipe, tmp_path / "run", tmp_path / "merged")) < 1e-6


@pytest.mark.parametrize(
    ("name", "keys", "what"),
    [
        ("GPT2", {"lora_target_modules": "wte c_attn"}, "transformer.wte"),
        ("Qwen2", {"lora_modules_to_save": "lm_head"}, "lm_head"),
    ],
    ids=str,
)
def test_word_embeddings_that_the_base_ties_are_refused_before_anything_is_written(bases, tmp_path, name, keys, what):
    recipe, _ = train(bases / name, tmp_path / "run", **keys)
    with pytest.raises(UserError, match=f"holds its own {what}, and the base ties"):
        merged_as(recipe, tmp_path / "run", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_adapter_of_a_base_of_another_size_or_kind_is_refused(bases, base, tmp_path):
    recipe, _ = train(bases / "Llama", tmp_path / "run")
    for other, why in ((bases / "GPT2", "Target modules"), (base, "is .* there and .* on this base")):
        held = dataclasses.replace(recipe, model={**recipe.model, "model_name_or_path": str(other)})
        with pytest.raises(UserError, match=f"belongs to another base than {other}.*{why}"):
            merge.merge_weights(held, tmp_path / "run", tmp_path / "merged", "base", "fp32")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("file", ["model.safetensors", "model.safetensors.index.json", "config.json"])
def test_a_base_whose_file_is_damaged_is_named(bases, tmp_path, file):
    recipe, _ = train(bases / "GPT2", tmp_path / "run")
    shutil.copytree(bases / "GPT2", tmp_path / "base")
    torn = tmp_path / "base" / file
    torn.write_bytes(torn.read_bytes()[:-9] if torn.exists() else b'{"weight_map": {"h')
    held = dataclasses.replace(recipe, model={**recipe.model, "model_name_or_path": str(tmp_path / "base")})
    with pytest.raises(UserError, match=str(tmp_path / "base")):
        merge.merge_weights(held, tmp_path / "run", tmp_path / "merged", "base", "fp32")
    assert not (tmp_path / "merged").exists()
