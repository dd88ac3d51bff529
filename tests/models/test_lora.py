"""LoRA as one operation, on whole weights and on those in 4 bits, beside PEFT's own forward."""

import copy

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit, Params4bit
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from carelm.chat.chat import make_chat
from carelm.models import adapters, lora
from carelm.models.precision import Precision
from carelm.recipe_file import load_recipe

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(60).view(3, 20)


def with_lora(*keys: str, kind=(LlamaForCausalLM, LlamaConfig), dtype=torch.float32, bits=None, nested=True):
    """A small model under PEFT's LoRA on all linear layers, its updates not zero."""
    model_class, config_class = kind
    torch.manual_seed(0)
    base = model_class(config_class(**SHAPE)).to(dtype)
    for name, parameter in base.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    if bits == 4:
        in_4_bits(base, dtype, nested)
    keys = keys if "--lora_dropout" in keys else (*keys, "--lora_dropout", "0")
    recipe = load_recipe(["--config", "recipes/demo.yaml", *keys], usage="")
    model = adapters.add_adapter(base, recipe).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def in_4_bits(base, dtype, nested: bool) -> None:
    """Holds the layers of a base's body as bitsandbytes does, which is kept from its CPU kernels (carelm/models/base.py)."""
    base.is_loaded_in_4bit = True
    for name, module in list(base.model.named_modules()):
        if isinstance(module, torch.nn.Linear):
            held = Linear4bit(module.in_features, module.out_features, module.bias is not None, dtype, nested, "nf4")
            held.weight = Params4bit(module.weight.data, False, compress_statistics=nested, quant_type="nf4").to("cpu")
            held.bias, held.support_avx512bf16_for_cpu = module.bias, False
            base.model.set_submodule(name, held)


def fused(model):
    model = copy.deepcopy(model)
    lora.use_fused_lora(model)
    return model


def calls_of(monkeypatch) -> list:
    """An entry for each layer that computed as one operation."""
    calls, apply = [], lora._Product.apply
    monkeypatch.setattr(lora._Product, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


def logits_and_gradients(model) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    logits = model(IDS).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), IDS[:, 1:].flatten()).backward()
    return {"logits": logits.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_computes_as(model, other):
    found, wanted = logits_and_gradients(model), logits_and_gradients(other)
    assert found.keys() == wanted.keys() and len(found) > 1
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype
        assert torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize(
    "keys",
    [(), ("--use_rslora", "true"), ("--lora_dropout", "0.3"), ("--lora_modules_to_save", "lm_head"),
     ("--lora_target_modules", "q_proj", "down_proj", "lm_head")],
)  # fmt: skip
@pytest.mark.parametrize("kind", [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)])
def test_it_has_the_output_and_gradients_of_pefts_own(monkeypatch, kind, keys):
    """Qwen2 has a bias in its layers; the same elements are dropped."""
    calls, model = calls_of(monkeypatch), with_lora(*keys, kind=kind)
    assert_computes_as(fused(model), model)
    assert len(calls) == (5 if "down_proj" in keys else 14)


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("keys", [(), ("--lora_dropout", "0.3")])
@pytest.mark.parametrize("kind", [(LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)])
def test_it_has_them_on_4_bits(monkeypatch, kind, keys, nested):
    calls, model = calls_of(monkeypatch), with_lora(*keys, kind=kind, bits=4, nested=nested)
    assert_computes_as(fused(model), model)
    assert len(calls) == 14


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("reentrant", [False, True])
def test_it_has_them_with_gradient_checkpointing(monkeypatch, bits, reentrant):
    """Twice, with other weights the second time: what a first forward leaves for the second is not taken later."""
    calls, model = calls_of(monkeypatch), with_lora("--lora_dropout", "0.3", bits=bits)
    for each in (model, other := fused(model)):
        each.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_computes_as(other, model)
    assert len(calls) == 2 * 14


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_first_forward_that_no_second_one_follows_leaves_nothing_for_later(reentrant):
    """The trained matrices as they are cast go from the first forward of a checkpointed block to its second, not farther."""
    model = fused(with_lora("--lora_r", "4", dtype=torch.bfloat16, bits=4))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            model(IDS)
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.mul_(1.5)
        again = copy.deepcopy(model)
        for module in again.modules():
            module.__dict__.pop("cast", None)
        found, wanted = logits_and_gradients(model), logits_and_gradients(again)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert not any(getattr(module, "cast", None) for module in model.modules())


def test_a_weight_in_4_bits_is_kept_whole_from_the_second_forward_of_a_block_alone():
    model = fused(with_lora(bits=4))
    held = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": True})
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(tuple(x.shape)) or x, lambda x: x):
            loss = model(IDS).logits.sum()
        assert (32, 48) not in held and (48, 32) not in held
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(tuple(x.shape)) or x, lambda x: x):
        loss.backward()
    assert held.count((32, 48)) == 2 and held.count((48, 32)) == 4


def test_4_bits_are_answered_with_by_bitsandbytes(monkeypatch):
    """Whose kernels for a few tokens do not make the weight whole."""
    model = fused(with_lora(bits=4)).eval()
    calls = calls_of(monkeypatch)
    model(IDS)
    assert not calls


def two_adapters(model):
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])


def one_not_on_the_base(model):
    model.add_adapter("second", model.peft_config["default"])
    model.set_adapter("second")
    model.delete_adapter("default")


@pytest.mark.parametrize(
    "keys, change, number",
    [
        (("--use_dora", "true"), lambda model: None, 0),
        ((), two_adapters, 0),
        ((), one_not_on_the_base, 14),
        ((), lambda model: model.merge_adapter(), 0),
        ((), lambda model: model.base_model.disable_adapter_layers(), 0),
    ],
)
def test_what_is_not_one_plain_lora_is_computed_by_peft(monkeypatch, keys, change, number):
    model = with_lora(*keys)
    other = fused(model)
    for each in (model, other):
        torch.manual_seed(5)
        change(each)
    calls = calls_of(monkeypatch)
    assert torch.allclose(other(IDS).logits, model(IDS).logits, atol=1e-5)
    assert len(calls) == number


def test_in_bf16_it_is_nearer_to_the_exact_result_than_pefts_own():
    model = with_lora("--lora_r", "4", dtype=torch.bfloat16)
    exact = logits_and_gradients(copy.deepcopy(model).double())
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    with torch.autocast("cpu", torch.bfloat16):
        theirs, ours = logits_and_gradients(copy.deepcopy(model)), logits_and_gradients(fused(model))

    def distance(found):
        names = exact.keys() - {"logits"}
        assert all(found[name].dtype == torch.float32 for name in names)
        squares = sum((found[name] - exact[name]).square().sum() for name in names)
        return (squares / sum(exact[name].square().sum() for name in names)).sqrt()

    assert distance(ours) < distance(theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_layer_in_4_bits_has_the_gradients_of_the_weight_that_its_bits_stand_for(dtype):
    """In 16 bits under autocast, with trained weights in fp32, beside the same products in fp64."""
    assert_exact(dtype, "cpu")


def assert_exact(dtype: torch.dtype, device: str) -> None:
    layer = fused(with_lora(dtype=dtype, bits=4).to(device)).base_model.model.model.layers[0].mlp.up_proj
    weight = dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state).double()
    x = torch.randn(3, 5, 32, dtype=dtype, device=device, requires_grad=True)
    gradient = torch.randn(3, 5, 48, dtype=dtype, device=device)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.autocast(device, dtype):
        y = layer(x)
    y.backward(gradient)
    exact = [each.detach().double().requires_grad_() for each in (x, a, b)]
    wanted = exact[0] @ weight.T + layer.scaling["default"] * exact[0] @ exact[1].T @ exact[2].T
    wanted.backward(gradient.double())
    assert (y.dtype, a.grad.dtype, b.grad.dtype) == (dtype, torch.float32, torch.float32)
    for found, true in [(y, wanted), *((each.grad, one.grad) for each, one in zip((x, a, b), exact))]:
        assert (found - true).norm() < 3 * torch.finfo(dtype).eps * true.norm()


def test_the_adapter_and_its_merge_stay_what_they_are(tmp_path):
    model = with_lora()
    other = fused(model)
    for name, each in (("own", model), ("fused", other)):
        each.save_pretrained(tmp_path / name)
    own, of_fused = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("own", "fused"))
    assert own == of_fused
    one, another = (each.merge_and_unload().state_dict() for each in (model, other))
    assert one.keys() == another.keys() and all(torch.equal(one[name], another[name]) for name in one)


@pytest.mark.parametrize("shape", [(2, 3), (0, 3), ()])
def test_its_output_can_be_changed_in_place(shape):
    """As OLMo's clip_qkv does."""
    model = with_lora()
    found = []
    for each in (model, fused(model)):
        torch.manual_seed(7)
        x = torch.randn(*shape, 32, requires_grad=True)
        output = each.base_model.model.model.layers[0].self_attn.q_proj(x).clamp_(-0.5, 0.5)
        output.sum().backward()
        found.append((output, x.grad))
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(*found))


@pytest.mark.parametrize("zero_stage, is_fused", [(0, True), (2, True), (3, False)])
def test_training_takes_it_where_parameters_are_not_gathered_around_each_forward(zero_stage, is_fused):
    recipe = load_recipe(["--config", "recipes/demo.yaml"], usage="")
    model = adapters.load_model(recipe, make_chat(recipe), Precision("fp32", "test"), zero_stage=zero_stage)
    assert any(isinstance(module, lora.FusedLora) for module in model.modules()) == is_fused
