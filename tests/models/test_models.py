"""Parameter counts, precision and the guards around weights; no training."""

import json
import os
import shutil
import types

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from carelm.chat.chat import make_chat
from carelm.errors import UserError
from carelm.models import adapters
from carelm.models.base import (
    base_fingerprint,
    check_vocabulary,
    count_parameters,
    flops_per_token,
    load_base,
    load_config,
)
from carelm.models.precision import Precision, choose_precision
from carelm.recipe_file import load_recipe
from carelm.training.arguments import make_training_args

LLAMA3_8B = LlamaConfig(
    vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
    num_key_value_heads=8,
)  # fmt: skip
TINYLLAMA = LlamaConfig(
    vocab_size=32_000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32,
    num_key_value_heads=4,
)  # fmt: skip
QV = ("--lora_target_modules", "q_proj", "v_proj")


@pytest.mark.parametrize(
    "config, keys, trainable, total, percent",
    [
        (LLAMA3_8B, ("--lora_r", "16"), 41_943_040, 8_072_204_288, "0.52"),
        (TINYLLAMA, ("--lora_r", "8", *QV), 1_126_400, 1_101_174_784, "0.1023"),
        (TINYLLAMA, ("--lora_r", "4", *QV), 563_200, 1_100_611_584, "0.0512"),
        (TINYLLAMA, ("--method", "prompt_tuning", "--num_virtual_tokens", "10"), 20_480, 1_100_068_864, "0.0019"),
        (TINYLLAMA, ("--method", "prompt_tuning", "--num_virtual_tokens", "20"), 40_960, 1_100_089_344, "0.0037"),
    ],
)
def test_parameter_counts_are_the_published_ones(config, keys, trainable, total, percent):
    recipe = load_recipe(["--config", "recipes/demo.yaml", *keys], usage="")
    with torch.device("meta"):
        model = adapters.add_adapter(AutoModelForCausalLM.from_config(config), recipe)
    assert count_parameters(model) == (trainable, total)
    digits = len(percent.split(".")[1])
    assert f"{100 * trainable / total:.{digits}f}" == percent


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "keys, flops",
    # TinyLlama without its embedding is 1,034,420,224 weights in products (and 91 k in norms); LoRA adds 6,307,840.
    [(("--lora_r", "8"), 4 * 1_034_420_224 + 6 * 6_307_840), (("--method", "prompt_tuning"), 4 * 1_034_420_224),
     (("--lora_r", "8", "--lora_modules_to_save", "lm_head"), 4 * 1_034_420_224 + 6 * 6_307_840 + 2 * 32_000 * 2048),
     (("--method", "full", "--load_in_4bit", "false"), 6 * 1_034_420_224)],
)  # fmt: skip
def test_a_token_takes_four_operations_for_a_frozen_weight_and_six_for_a_trained_one(keys, flops, tied):
    recipe = load_recipe(["--config", "recipes/demo.yaml", *keys], usage="")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**TINYLLAMA.to_dict() | {"tie_word_embeddings": tied}))
        model = model if recipe.method == "full" else adapters.add_adapter(model, recipe)
    assert flops_per_token(model) == flops


def test_a_token_takes_the_experts_that_it_goes_to():
    with torch.device("meta"):
        model = MixtralForCausalLM(MixtralConfig(num_hidden_layers=1, tie_word_embeddings=False))
    attention, router, expert, head = 2 * 4096 * (4096 + 1024), 8 * 4096, 3 * 4096 * 14_336, 32_000 * 4096
    assert flops_per_token(model) == 6 * (attention + router + 2 * expert + head)


def test_a_4bit_base_counts_like_the_whole_one(base):
    recipe = load_recipe(["--config", "recipes/demo.yaml"], usage="")
    quantised = load_base(recipe, Precision("fp32", "test"), may_dequantize=False)
    whole = AutoModelForCausalLM.from_pretrained(base)
    assert count_parameters(quantised)[1] == sum(p.numel() for p in whole.parameters())
    of_quantised, of_whole = (flops_per_token(model.requires_grad_(False)) for model in (quantised, whole))
    assert of_quantised == of_whole


def test_no_4bit_layer_is_repacked_on_a_cpu(base, monkeypatch):
    """Where the CPU has AVX512-BF16, as is pretended here."""
    import bitsandbytes.nn.modules
    from bitsandbytes.nn import Linear4bit

    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    assert Linear4bit(8, 8).support_avx512bf16_for_cpu
    recipe = load_recipe(["--config", "recipes/demo.yaml"], usage="")
    model = load_base(recipe, Precision("fp32", "test"), may_dequantize=False)
    layers = [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert layers and not any(m.support_avx512bf16_for_cpu for m in layers)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_4bit_base_is_dequantised_once_on_a_cpu_and_computes_the_same(base, capsys, precision):
    recipe = load_recipe(["--config", "recipes/demo.yaml"], usage="")
    held, whole = (load_base(recipe, Precision(precision, "test"), may) for may in (False, True))
    assert "the 4-bit base is dequantised once" in capsys.readouterr().err
    kinds = {type(module).__name__ for module in whole.modules()}
    assert "Linear" in kinds and "Linear4bit" not in kinds
    assert torch.equal(held(torch.arange(60)[None]).logits, whole(torch.arange(60)[None]).logits)


def test_a_base_saved_in_4_bits_whose_weights_are_not_of_its_configs_shapes_is_refused(base, tmp_path):
    recipe = load_recipe(["--config", "recipes/demo.yaml"], usage="")
    load_base(recipe, Precision("fp32", "test"), may_dequantize=False).save_pretrained(tmp_path)
    held = load_recipe(["--config", "recipes/demo.yaml", "--model_name_or_path", str(tmp_path)], usage="")
    load_base(held, Precision("fp32", "test"))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 2 * config["intermediate_size"]}))
    with pytest.raises(
        UserError, match=r"model_name_or_path: model.layers.0.mlp.\w+ is \[.*\] in the files of .* config.json"
    ):
        load_base(held, Precision("fp32", "test"))


@pytest.mark.parametrize("ranks, mebibytes", [(1, 10), (4, 60)])
def test_a_4bit_base_stays_so_where_memory_does_not_suffice(base, capsys, monkeypatch, ranks, mebibytes):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=mebibytes * 2**20))
    recipe = load_recipe(["--config", "recipes/demo.yaml"], usage="")
    model = load_base(recipe, Precision("fp32", "test"))
    assert "Linear4bit" in {type(module).__name__ for module in model.modules()}
    assert "the base stays in 4 bits, which is slower on a CPU" in capsys.readouterr().err


def change_config(base, folder, **changes):
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return load_recipe(["--config", "recipes/demo.yaml", "--model_name_or_path", str(folder)], usage="")


def test_a_base_that_is_quantised_already_is_named_as_what_it_is(base, tmp_path):
    held = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    recipe = change_config(base, tmp_path / "base", quantization_config=held)
    adapters.check_base(recipe)
    recipe.model["load_in_4bit"] = False
    with pytest.raises(UserError, match="is quantised already .bitsandbytes.; set load_in_4bit: true"):
        adapters.check_base(recipe)
    recipe = change_config(base, tmp_path / "gptq", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(UserError, match="gptq.; take its original in whole weights"):
        adapters.check_base(recipe)


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused():
    recipe = load_recipe([], usage="")
    chat = make_chat(recipe)
    check_vocabulary(chat, load_config(recipe))
    chat.tokenizer.add_tokens(["<tool>", "</tool>"])
    with pytest.raises(UserError, match="ids beyond the 2048 of the base .the first is 2048, '<tool>'"):
        check_vocabulary(chat, load_config(recipe))


def test_a_base_whose_loss_is_a_mean_per_batch_is_refused(monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "accepts_loss_kwargs", False, raising=False)
    with pytest.raises(UserError, match="LlamaForCausalLM takes a mean over each batch"):
        adapters.check_base(load_recipe(["--config", "recipes/demo.yaml"], usage=""))


TINY = {
    "vocab_size": 2048,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def save_base(base, folder, model):
    """A tiny random base with the demo's tokenizer, and the recipe that names it."""
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, folder / name)
    return load_recipe(["--model_name_or_path", str(folder), "--load_in_4bit", "false"], usage="")


@pytest.mark.parametrize(
    "model, line",
    [
        (lambda: BertForMaskedLM(BertConfig(**TINY)), "BertLMHeadModel. sees the tokens that it is to predict"),
        (lambda: XLNetLMHeadModel(XLNetConfig(vocab_size=2048, d_model=16, n_layer=1, n_head=2)), "takes a mean over each"),
    ],
)  # fmt: skip
def test_a_base_that_is_no_decoder_is_refused(base, tmp_path, model, line):
    recipe = save_base(base, tmp_path / "base", model())
    with pytest.raises(UserError, match=f"model_name_or_path: .*{line}"):
        adapters.check_base(recipe)


@pytest.mark.parametrize(
    "model",
    [
        lambda: MixtralForCausalLM(MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4,
                                                 output_router_logits=True, router_aux_loss_coef=5.0)),
        lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**TINY)),
        lambda: BertLMHeadModel(BertConfig(**TINY, is_decoder=True)),
    ],
)  # fmt: skip
def test_the_loss_of_a_base_is_the_sum_over_its_rows_however_they_are_batched(base, tmp_path, capsys, model):
    torch.manual_seed(0)
    recipe = save_base(base, tmp_path / "base", model())
    adapters.check_base(recipe)
    held = load_base(recipe, Precision("fp32", "test")).eval()
    ids, one = torch.randint(10, 2000, (4, 24)), torch.ones(())
    with torch.no_grad():
        whole = held(input_ids=ids, labels=ids, num_items_in_batch=one).loss
        parts = sum(held(input_ids=row[None], labels=row[None], num_items_in_batch=one).loss for row in ids)
    assert float(parts) == pytest.approx(float(whole), rel=1e-5)
    said = "adds to the loss (output_router_logits) is left out" in capsys.readouterr().err
    assert said == isinstance(held, MixtralForCausalLM)


@pytest.mark.parametrize(
    "change",
    [{"hidden_size": "abc"}, {"num_attention_heads": 7}, {"hidden_act": "none_such"}, {"rope_parameters": {"rope_type": "no"}},
     {"dtype": "float99"}, {"vocab_size": -3}, {"num_hidden_layers": None}],
    ids=str,
)  # fmt: skip
def test_a_config_that_makes_no_model_is_one_line(base, tmp_path, change):
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    recipe = load_recipe(["--model_name_or_path", str(tmp_path / "base")], usage="")
    with pytest.raises(UserError, match=r"^model_name_or_path: .*base is no causal language model \(.+\)$"):
        adapters.check_base(recipe)


@pytest.mark.parametrize("bits", ["true", "false"])
@pytest.mark.parametrize("change", ["gone", "cut off"])
def test_weights_that_are_not_whole_are_never_drawn_at_random(base, tmp_path, change, bits):
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    if change == "gone":
        tensors = load_file(file)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, file, {"format": "pt"})
    else:
        file.write_bytes(file.read_bytes()[:-40])
    recipe = load_recipe(["--model_name_or_path", str(tmp_path / "base"), "--load_in_4bit", bits], usage="")
    line = (
        "lack 1 tensors of LlamaForCausalLM, such as model.layers.1.mlp.up" if change == "gone" else "cannot be loaded"
    )
    with pytest.raises(UserError, match=f"model_name_or_path: .*base.* {line}"):
        load_base(recipe, Precision("fp32", "test"))


@pytest.mark.parametrize(
    "values, left_out",
    [
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.8}, "temperature 0.7, top_p 0.8"),
        ({"min_p": 0.1, "top_k": 20}, "min_p 0.1, top_k 20"),
        ({"num_beams": 1, "early_stopping": True, "length_penalty": 2.0}, "early_stopping True, length_penalty 2.0"),
        ({"num_return_sequences": 3}, "num_return_sequences 3"),
        ({"output_scores": True, "max_new_tokens": -1}, "max_new_tokens -1, output_scores True"),
        ({"cache_implementation": "none such"}, "cache_implementation none such"),
        ({"do_sample": True, "temperature": 0.7, "repetition_penalty": 1.1}, None),
    ],
    ids=str,
)
def test_an_invalid_generation_config_is_repaired_and_said(base, tmp_path, capsys, values, left_out):
    shutil.copytree(base, tmp_path / "base")
    file = tmp_path / "base/generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    recipe = load_recipe(["--model_name_or_path", str(tmp_path / "base"), "--load_in_4bit", "false"], usage="")
    model = load_base(recipe, Precision("fp32", "test"))
    model.generation_config.save_pretrained(tmp_path)  # which transformers refuses for an invalid one
    kept = json.loads((tmp_path / "generation_config.json").read_text())
    names = [word.split()[0] for word in (left_out or "").split(", ") if word]
    assert {key: kept.get(key) for key in values} == {k: None if k in names else v for k, v in values.items()}
    assert kept["eos_token_id"] == json.loads(file.read_text())["eos_token_id"]
    said = capsys.readouterr().err
    assert f"is invalid; these are left out of it: {left_out}\n" in said if left_out else "invalid" not in said


@pytest.mark.parametrize(
    "keys, line",
    [
        (
            ("--lora_target_modules", "q_proj", "none_such"),
            "lora_target_modules: LlamaForCausalLM has no 'none_such' "
            r"\(there: down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj\)$",
        ),
        (("--lora_target_modules", "all-linear", "lm_head"), "lora_target_modules: .* has no 'all-linear'"),
        (("--lora_modules_to_save", "score"), "lora_modules_to_save: .* has no 'score' .*lm_head"),
        (("--lora_target_parameters", "mlp.experts.up"), "lora_target_parameters: .* has no 'mlp.experts.up'"),
        (("--lora_target_modules", "none_such"), "lora_target_modules: .*none_such"),
    ],
)
def test_a_module_that_is_not_there_is_named_also_beside_others_that_are(keys, line):
    with pytest.raises(UserError, match=line):
        adapters.check_base(load_recipe(["--config", "recipes/demo.yaml", *keys], usage=""))


def test_modules_may_be_named_by_their_ends_or_by_one_expression():
    for names in (["q_proj", "layers.0.mlp.up_proj"], [".*(q|v)_proj"], ["all-linear"]):
        adapters.check_base(load_recipe(["--config", "recipes/demo.yaml", "--lora_target_modules", *names], usage=""))


def test_an_attention_that_is_not_installed_is_one_line():
    recipe = load_recipe(["--config", "recipes/demo.yaml", "--attn_implementation", "flash_attention_2"], usage="")
    with pytest.raises(UserError, match="attn_implementation: FlashAttention2"):
        adapters.check_base(recipe)


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_the_recipe_decides_the_precision_and_not_the_launchers_default(monkeypatch, name):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16" if name == "fp32" else "fp16")
    recipe = load_recipe(["--config", "recipes/demo.yaml"], usage="")
    prepared = types.SimpleNamespace(validation=[])
    arguments = make_training_args(recipe, prepared, Precision(name, "test"), torch.nn.Module())
    assert arguments.mixed_precision == os.environ["ACCELERATE_MIXED_PRECISION"] == {"fp32": "no"}.get(name, name)


def test_early_stopping_without_validation_rows_is_refused():
    recipe = load_recipe(["--config", "recipes/demo.yaml", "--early_stopping_patience", "2"], usage="")
    with pytest.raises(UserError, match="early_stopping_patience: .* set validation_fraction"):
        make_training_args(recipe, types.SimpleNamespace(validation=None), Precision("fp32", "test"), torch.nn.Module())


@pytest.mark.parametrize(
    "capability, requested, chosen", [((7, 5), "auto", "fp16"), ((8, 0), "auto", "bf16"), ((9, 0), "auto", "bf16"),
                                      ((7, 5), "fp32", "fp32"), ((9, 0), "fp16", "fp16")]
)  # fmt: skip
def test_precision_follows_the_compute_capability(monkeypatch, capability, requested, chosen):
    """A T4 (7.5) says that it supports bf16, and emulates it."""
    pretend_gpu(monkeypatch, capability)
    precision = choose_precision(requested)
    assert precision.name == chosen and precision.reason


def test_bf16_on_a_t4_is_refused(monkeypatch):
    pretend_gpu(monkeypatch, (7, 5))
    with pytest.raises(UserError, match="compute capability 8.0"):
        choose_precision("bf16")


def pretend_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")


def test_the_fingerprint_of_a_base_changes_with_its_weights(base, tmp_path):
    import shutil

    copy = shutil.copytree(base, tmp_path / "base")
    assert base_fingerprint(str(copy)) == base_fingerprint(str(base))
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(weights))
    assert base_fingerprint(str(copy)) != base_fingerprint(str(base))
