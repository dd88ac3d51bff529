"""A norm as one operation computes as the model's own."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from carelm.models.norms import use_fused_norms

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


@pytest.mark.parametrize("dtype, most", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("kind, number", [((LlamaForCausalLM, LlamaConfig), 5), ((Qwen3ForCausalLM, Qwen3Config), 9)])
def test_it_has_the_output_and_gradient_of_the_models_own(kind, number, dtype, most):
    assert_computes_as_its_own(kind, number, dtype, most, "cpu")


def assert_computes_as_its_own(kind, number: int, dtype: torch.dtype, most: float, device: str) -> None:
    torch.manual_seed(0)
    model = kind[0](kind[1](**SHAPE)).to(device, dtype)
    fused = copy.deepcopy(model)
    use_fused_norms(fused)
    pairs = [(a, b) for a, b in zip(model.modules(), fused.modules()) if type(a) is not type(b)]
    assert len(pairs) == number
    for plain, norm in pairs:
        torch.nn.init.normal_(plain.weight, 1, 0.2)
        norm.load_state_dict(plain.state_dict())
        norm.weight.requires_grad_(False)  # as a base's is
        x, found = 3 * torch.randn(2, 5, *plain.weight.shape, dtype=dtype, device=device), []
        for each in (plain, norm):
            leaf = x.clone().requires_grad_()
            with torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
                y = each(leaf)
            (y * torch.linspace(-1, 1, y.shape[-1], dtype=dtype, device=device)).sum().backward()
            found.append((y, leaf.grad))
        for one, other in zip(*found):
            assert one.dtype == other.dtype == dtype
            assert (one - other).float().norm() <= most * one.float().norm()


def test_what_is_not_written_as_llamas_stays():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE))
    kinds = [type(module) for module in model.modules()]
    use_fused_norms(model)
    assert [type(module) for module in model.modules()] == kinds
