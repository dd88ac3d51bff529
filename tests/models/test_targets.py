"""Which modules LoRA changes, with which ranks and first weights: keys of a recipe, checked on the meta device."""

import re

import pytest
import torch
import yaml
from conftest import PROJECT
from peft import PeftConfig
from test_models import LLAMA3_8B, QV, TINYLLAMA
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig, MixtralConfig, PhiConfig

from carelm.errors import UserError
from carelm.models import adapters
from carelm.models.base import count_parameters, load_base
from carelm.models.precision import Precision
from carelm.recipe_file import check_identity, load_recipe, save_recipe
from carelm.sweep.sweep_file import read_sweep

GPT2 = GPT2Config(n_layer=4, n_embd=64, n_head=4, vocab_size=100)
MIXTRAL = MixtralConfig(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, num_local_experts=4,
)  # fmt: skip


def recipe_of(*keys):
    return load_recipe(["--config", "recipes/demo.yaml", *keys], usage="")


def on_meta(config, *keys):
    with torch.device("meta"):
        return adapters.add_adapter(AutoModelForCausalLM.from_config(config), recipe_of(*keys))


def lora_layers(model):
    return {n.removeprefix("base_model.model."): m for n, m in model.named_modules() if hasattr(m, "lora_A")}


@pytest.mark.parametrize(
    "config, keys, trained",
    [
        # q_proj of TinyLlama has r * (2048 + 2048) weights, v_proj r * (2048 + 256)
        (TINYLLAMA, ("--lora_r", "8", *QV, "--layers_to_transform", *map(str, range(11))), 11 * 8 * (4096 + 2304)),
        (TINYLLAMA, ("--lora_r", "8", *QV, "--exclude_modules", "v_proj"), 22 * 8 * 4096),
        (TINYLLAMA, ("--lora_r", "8", *QV, "--exclude_modules", r".*\.(0|21)\..*"), 20 * 8 * (4096 + 2304)),
        (TINYLLAMA, ("--lora_r", "8", *QV, "--rank_pattern", '{"v_proj": 16}'), 22 * (8 * 4096 + 16 * 2304)),
        (TINYLLAMA, ("--lora_r", "8", "--lora_target_modules", "q_proj"), 22 * 8 * 4096),
        (LLAMA3_8B, ("--lora_r", "16", "--layers_to_transform", *map(str, range(32))), 41_943_040),
        (LLAMA3_8B, ("--lora_r", "16", "--layers_to_transform", "0", "31"), 41_943_040 // 16),
        (LLAMA3_8B, ("--lora_r", "16", "--layers_to_transform", "7", "--layers_pattern", "layers"), 41_943_040 // 32),
        # c_attn 64 -> 192, c_proj 64 -> 64, c_fc 64 -> 256, c_proj 256 -> 64
        (GPT2, ("--lora_r", "2", "--layers_to_transform", "3", "--layers_pattern", "h"), 2 * (256 + 128 + 320 + 320)),
        (MIXTRAL, ("--lora_r", "2", "--layers_to_transform", "1"), 2 * (64 + 64 + 48 + 48)),
    ],
)  # fmt: skip
def test_the_trained_parameters_are_those_of_the_named_layers_and_ranks(config, keys, trained):
    assert count_parameters(on_meta(config, *keys))[0] == trained


@pytest.mark.parametrize("keys", [("--layers_pattern", "[]"), ("--rank_pattern", "{}"), ("--exclude_modules", "[]")])
def test_an_empty_list_is_none(keys):
    assert count_parameters(on_meta(GPT2, *keys)) == count_parameters(on_meta(GPT2))


def test_a_pattern_changes_rank_and_alpha_of_its_modules_alone():
    keys = ("--lora_r", "8", "--lora_alpha", "16", "--rank_pattern", '{"q_proj": 4}')
    model = on_meta(TINYLLAMA, *keys, "--alpha_pattern", '{"layers.0.self_attn.v_proj": 64}')
    scaling = {name: layer.scaling["default"] for name, layer in lora_layers(model).items()}
    assert scaling.pop("model.layers.0.self_attn.v_proj") == 8
    assert {s for name, s in scaling.items() if name.endswith("q_proj")} == {4}
    assert {s for name, s in scaling.items() if not name.endswith("q_proj")} == {2}


def test_all_linear_beside_layers_is_what_it_is_without_them():
    assert lora_layers(on_meta(TINYLLAMA)).keys() == lora_layers(
        on_meta(TINYLLAMA, "--layers_to_transform", *map(str, range(22)))
    ).keys()  # fmt: skip


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit", None])
@pytest.mark.parametrize("start", ["true", "gaussian", "orthogonal"])
def test_however_the_weights_start_the_base_answers_as_before(base, start, bits):
    keys = (f"--{bits}", "true") if bits else ("--load_in_4bit", "false")
    recipe = recipe_of(*keys, "--lora_r", "8", "--init_lora_weights", start)
    precision = Precision("bf16", "test")
    plain = load_base(recipe, precision, may_dequantize=False)
    ids = torch.arange(40, 56)[None]
    with torch.no_grad():
        before = plain(input_ids=ids).logits.float()
        model = adapters.add_adapter(plain, recipe)
        after = model(input_ids=ids).logits.float()
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)
    layer = lora_layers(model)["model.layers.2.mlp.up_proj"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.dtype == b.dtype == torch.float32
    assert bool(b.any()) == (start == "orthogonal")
    if start == "gaussian":
        assert a.std().item() == pytest.approx(1 / 8, rel=0.1)
    if start == "orthogonal":
        assert (b @ a).abs().max() < 1e-6 < 1e-3 < b.abs().mean()


def test_the_same_seed_draws_the_same_orthogonal_weights():
    def weights(seed):
        recipe = recipe_of("--init_lora_weights", "orthogonal", "--seed", str(seed))
        model = adapters.add_adapter(AutoModelForCausalLM.from_config(GPT2), recipe)
        return next(iter(lora_layers(model).values())).lora_B["default"].weight

    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


def test_a_saved_adapter_holds_its_layers_and_patterns(tmp_path):
    keys = ("--layers_to_transform", "1", "2", "--rank_pattern", '{"up_proj": 4}', "--exclude_modules", "down_proj")
    model = on_meta(TINYLLAMA, *keys)
    model.peft_config["default"].save_pretrained(tmp_path)
    saved = PeftConfig.from_pretrained(tmp_path)
    assert (saved.layers_to_transform, saved.rank_pattern) == ([1, 2], {"up_proj": 4})
    with torch.device("meta"):
        again = adapters.get_peft_model(AutoModelForCausalLM.from_config(TINYLLAMA), saved)
    shapes = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    assert shapes == {name: p.shape for name, p in again.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "keys, line",
    [
        (("--layers_to_transform", "2", "4"), r"layers_to_transform: Llama.* in a layer 4 \(there: 0 to 3\)"),
        (("--layers_to_transform", "-1"), r"layers_to_transform: Llama.* in a layer -1 \(there: 0 to 3\)"),
        (("--layers_to_transform", "0", "--lora_target_modules", "lm_head"), r"layers_to_transform: .*\(there: none\)"),
        (("--layers_to_transform", "0", "--lora_target_modules", ".*q_proj"), "layers_to_transform: .* write them into"),
        (("--layers_to_transform", "0", "--layers_pattern", "h"), r"layers_pattern: Llama.* no layers 'h' \(there: layers\)"),
        (("--layers_to_transform", "0", "--layers_pattern", "layers", "h"), "layers_pattern: .* no layers 'h'"),
        (("--exclude_modules", "lm_haed"), "exclude_modules: Llama.* has no 'lm_haed' .*lm_head"),
        (("--exclude_modules", "q_proj", ".*v_proj"), "exclude_modules: Llama.* has no '.*v_proj'"),
        (("--exclude_modules", ".*"), "exclude_modules"),
        (("--rank_pattern", '{"q_prj": 4}'), "rank_pattern: 'q_prj' is for no module that LoRA changes .*q_proj"),
        (("--rank_pattern", '{"q_proj": 4}', *QV[:1], "v_proj", "k_proj"), "rank_pattern: 'q_proj' is for no .*k_proj, v_proj"),
        (("--rank_pattern", '{"up_proj": 4}', "--exclude_modules", "up_proj"), "rank_pattern: 'up_proj' is for no module"),
        (("--rank_pattern", '{"q_proj": 4, "layers.0.self_attn.q_proj": 8}'), "rank_pattern: 'q_proj' and 'layers.0"),
        (("--init_lora_weights", "orthogonal", "--lora_target_modules", "embed_tokens"), "init_lora_weights: .*embed_tokens"),
    ],
)  # fmt: skip
def test_what_the_base_does_not_have_is_one_line_before_any_weights(keys, line):
    with pytest.raises(UserError, match=line) as caught:
        adapters.check_base(recipe_of(*keys))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "keys, line",
    [
        ({"layers_to_transform": []}, "layers_to_transform: it names no layer"),
        ({"layers_to_transform": ["two"]}, "layers_to_transform: .'two'. is not of type"),
        ({"layers_to_transform": [1.0]}, "layers_to_transform: .1.0. is not of type"),
        ({"layers_to_transform": True}, "layers_to_transform: True is not of type"),
        ({"layers_to_transform": "0-3"}, "layers_to_transform: '0-3' is not of type"),
        ({"layers_pattern": "layers"}, "layers_pattern: set layers_to_transform too"),
        ({"rank_pattern": ["q_proj", 8]}, "rank_pattern: .* is not of type"),
        ({"rank_pattern": "8"}, "rank_pattern: '8' is not of type"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern: 'q_proj': 0 is no module with a whole number"),
        ({"alpha_pattern": {"q_proj": True}}, "alpha_pattern: 'q_proj': True is no module"),
        ({"alpha_pattern": {0: 8}}, "alpha_pattern: 0: 8 is no module"),
        ({"layers_to_transform": 1, "lora_target_parameters": ["a.b"]}, "layers_to_transform and lora_target_parameters"),
        ({"layers_to_transform": 0, "layers_pattern": "(h"}, "layers_pattern: '.h' is no regular expression"),
        ({"lora_target_modules": ["*q"]}, r"lora_target_modules: '\*q' is no regular expression"),
        ({"exclude_modules": ["*q"]}, r"exclude_modules: '\*q' is no regular expression"),
        ({"alpha_pattern": {"up_[proj": 4}}, "alpha_pattern: 'up_.proj' is no regular expression"),
        *(({"init_lora_weights": name}, f"init_lora_weights: '{name}' is none of true, gaussian, orthogonal")
          for name in ("pissa", "pissa_niter_4", "olora", "loftq", "eva", "corda", "lora_ga", "mica", "false")),
        ({"init_lora_weights": False}, "init_lora_weights: 'false' is none of true, gaussian, orthogonal"),
        ({"init_lora_weights": "gausian"}, "did you mean 'gaussian'"),
        ({"init_lora_weights": "orthogonal", "lora_r": 7}, "init_lora_weights: orthogonal needs even ranks, and lora_r has 7"),
        ({"init_lora_weights": "orthogonal", "rank_pattern": {"q": 3}}, "orthogonal needs even ranks, and q has 3"),
        *(({"method": method, key: value}, f"{key}: it is for method: lora, and this is {method}")
          for method in ("full", "prompt_tuning")
          for key, value in (("layers_to_transform", 1), ("rank_pattern", {"q": 1}), ("exclude_modules", "q"),
                             ("alpha_pattern", {"q": 1}), ("init_lora_weights", "gaussian"))),
    ],
    ids=str,
)  # fmt: skip
def test_a_value_that_cannot_be_is_one_line_without_torch(tmp_path, keys, line):
    keys = {"prompt_template": "{q}", "completion_template": "{a}"} | keys
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(keys))
    with pytest.raises(UserError, match=line):
        load_recipe(["--config", str(tmp_path / "small.yaml")], usage="")


@pytest.mark.parametrize(
    "changed",
    [
        ("--layers_to_transform", "1"),
        ("--exclude_modules", "q_proj"),
        ("--rank_pattern", '{"q_proj": 4}'),
        ("--alpha_pattern", '{"q_proj": 4}'),
        ("--init_lora_weights", "gaussian"),
    ],
)
def test_they_are_part_of_what_makes_it_this_run_and_not_of_its_data(tmp_path, changed):
    from carelm.chat.chat import make_chat
    from carelm.training import prepared

    before, after = recipe_of(), recipe_of(*changed)
    save_recipe(before, tmp_path / "recipe.yaml")
    with pytest.raises(UserError, match=changed[0].removeprefix("--")):
        check_identity(after, tmp_path / "recipe.yaml")
    save_recipe(after, tmp_path / "recipe.yaml")
    check_identity(load_recipe(["--config", str(tmp_path / "recipe.yaml")], usage=""), tmp_path / "recipe.yaml")
    chat = make_chat(before)
    assert prepared._fingerprint(before, chat, {}) == prepared._fingerprint(after, chat, {})


LLAMA3_1B = LlamaConfig(
    vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize(
    "name, base, config, trained, total",
    [
        # r=16 on all linear layers of Llama-3.2-1B trains 11,272,192, as others report; the upper 8 of its 16 layers half of it
        ("intents", "meta-llama/Llama-3.2-1B-Instruct", LLAMA3_1B, 11_272_192, 1_247_086_592),
        ("customer_service", "meta-llama/Llama-3.2-1B-Instruct", LLAMA3_1B, 5_636_096, 1_241_450_496),
        ("ticket_matching", "unsloth/llama-3-8b-Instruct-bnb-4bit", LLAMA3_8B, 41_943_040, 8_072_204_288),
        ("medical_dialogue", "meta-llama/Meta-Llama-3-8B-Instruct", LLAMA3_8B, 41_943_040, 8_072_204_288),
        ("dialogue_summary", "meta-llama/Llama-3.2-1B-Instruct", LLAMA3_1B, 11_272_192, 1_247_086_592),
        ("support_tinyllama", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", TINYLLAMA, 1_126_400, 1_101_174_784),
    ],
)
def test_an_assistants_recipe_trains_the_published_number_of_the_parameters_of_the_base_that_its_header_names(
    name, base, config, trained, total
):
    path = PROJECT / f"recipes/{name}.yaml"
    recipe = load_recipe(["--config", str(path)], usage="")
    assert recipe.model["model_name_or_path"] == base and f"# Base: {base} (" in path.read_text(encoding="utf-8")
    with torch.device("meta"):
        model = adapters.add_adapter(AutoModelForCausalLM.from_config(config), recipe)
    assert count_parameters(model) == (trained, total)
    layers = {int(re.search(r"layers\.(\d+)\.", layer)[1]) for layer in lora_layers(model)}
    assert layers == set(recipe.layers_to_transform or range(config.num_hidden_layers))


GATED = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    "name, config, modules, trained",
    [
        ("mistral-7b", MistralConfig(vocab_size=32_768), GATED, 41_943_040 // 2),
        ("llama-3.2-1b", LLAMA3_1B, GATED, 11_272_192 // 2),
        # q, k, v and dense 2560 -> 2560, fc1 2560 -> 10240 and back
        ("phi-2", PhiConfig(hidden_size=2560, intermediate_size=10_240, num_hidden_layers=32),
         {"q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"}, 16 * 16 * (4 * 5120 + 2 * 12_800)),
        # c_attn 768 -> 2304, c_proj 768 -> 768, c_fc 768 -> 3072 and back
        ("distilgpt2", GPT2Config(n_layer=6), {"c_attn", "c_proj", "c_fc"}, 3 * 16 * (3072 + 1536 + 2 * 3840)),
    ],
)  # fmt: skip
def test_the_ready_sweep_of_bases_changes_all_linear_layers_of_the_upper_half_of_each(
    tmp_path, name, config, modules, trained
):
    runs = read_sweep([str(PROJECT / "recipes/sweeps/bases.yaml"), "--output_dir", str(tmp_path)]).runs
    assert [run.name for run in runs] == ["mistral-7b", "llama-3.2-1b", "phi-2", "distilgpt2"]
    [recipe] = [run.recipe for run in runs if run.name == name]
    with torch.device("meta"):
        model = adapters.add_adapter(AutoModelForCausalLM.from_config(config), recipe)
    changed = [re.search(r"\.(?:layers|h)\.(\d+)\..*?(\w+)$", layer).groups() for layer in lora_layers(model)]
    half = config.num_hidden_layers // 2
    assert {int(number) for number, _ in changed} == set(range(half, 2 * half))
    assert {module for _, module in changed} == modules and count_parameters(model)[0] == trained
