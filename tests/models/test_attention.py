"""Attention that makes its scores again in the backward, beside torch's own."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from carelm.models import attention


class Layer(torch.nn.Module):
    is_causal = True

    def __init__(self, groups: int):
        super().__init__()
        self.num_key_value_groups = groups


def drawn(heads: int, key_heads: int, length: int) -> tuple[torch.Tensor, ...]:
    """query, key, value and the gradient of the output, float64, of a batch of two; in memory [batch, length, heads, width]."""
    generator = torch.Generator().manual_seed(length)
    shapes = [(2, length, n, 16) for n in (heads, key_heads, key_heads, heads)]
    *inputs, gradient = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return *(x.transpose(1, 2) for x in inputs), gradient


def output_and_gradients(function, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    *inputs, gradient = tensors
    inputs = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
    output = function(*inputs)
    output.backward(gradient.to(dtype))
    return [x.double() for x in (output.detach(), *(x.grad for x in inputs))]


def padded_on_the_left(length: int) -> torch.Tensor:
    mask = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    mask[0, :, :, :5] = False
    mask[0, :, :5] = True  # transformers lets positions that see nothing see all
    return mask


@pytest.mark.parametrize("block", [2**22, 600])
@pytest.mark.parametrize("heads, key_heads", [(6, 2), (4, 4), (3, 1)])
@pytest.mark.parametrize("is_masked", [True, False])
@pytest.mark.parametrize("length", [33, 64])
def test_it_is_as_near_to_the_exact_result_as_torchs_own(monkeypatch, length, block, heads, key_heads, is_masked):
    monkeypatch.setattr(attention, "BLOCK", block)
    tensors, mask = drawn(heads, key_heads, length), padded_on_the_left(length) if is_masked else None
    groups = heads // key_heads

    def torchs(query, key, value):
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        return scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None).transpose(1, 2)

    def ours(query, key, value):
        return attention.attend(Layer(groups), query, key, value, mask)[0]

    exact, theirs = (output_and_gradients(torchs, tensors, dtype) for dtype in (torch.float64, torch.bfloat16))
    found = output_and_gradients(ours, tensors, torch.bfloat16)
    for value, other, one in zip(found, theirs, exact):
        assert (value - one).norm() < 1.5 * (other - one).norm()


@pytest.mark.parametrize("told", [{}, {"is_causal": None}, {"is_causal": True}, {"is_causal": False}])
@pytest.mark.parametrize("of_module", [True, False])
@pytest.mark.parametrize("hides", [None, "nothing", "some rows"])
def test_what_a_position_sees_is_what_transformers_own_lets_it_see(told, of_module, hides):
    """`is_causal` may be told as None, and a row that sees nothing is zeros: no mean of what it must not see."""
    tensors, mask = drawn(4, 2, 12), None
    if hides:
        mask = torch.ones(2, 1, 12, 12, dtype=torch.bool).tril()
        mask[0, :, :3] &= hides == "nothing"
    layer = Layer(2)
    layer.is_causal = of_module

    def result(function):
        return output_and_gradients(lambda *x: function(layer, *x, mask, **told)[0], tensors, torch.bfloat16)

    for found, wanted in zip(result(attention.attend), result(attention.sdpa_attention_forward)):
        assert torch.allclose(found, wanted, atol=0.1, rtol=0.05)


def test_a_model_that_trains_in_bf16_takes_it_and_what_needs_no_gradient_does_not(monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                         num_attention_heads=4, num_key_value_heads=2)).bfloat16()  # fmt: skip
    attention.use_recomputed_attention(model)
    calls = []
    apply = attention._Attention.apply
    monkeypatch.setattr(attention._Attention, "apply", lambda *args: calls.append(1) or apply(*args))
    ids = torch.arange(12).view(2, 6)
    plain = model(ids).logits
    assert calls == [1]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain, rtol=0.05, atol=0.02)
    assert calls == [1]
    assert "attn" not in model.config.to_json_string()


def test_the_layers_look_through_the_mask_of_a_batch_once_and_those_without_gradients_never():
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=3,
                                         num_attention_heads=4, num_key_value_heads=2)).bfloat16()  # fmt: skip
    attention.use_recomputed_attention(model)
    ids, mask = torch.arange(12).view(2, 6), torch.tensor([[1] * 6, [1] * 4 + [0] * 2])

    def looks(batches: int) -> int:
        with torch.profiler.profile() as profile:
            for _ in range(batches):
                model(ids, attention_mask=mask)
        return sum(event.name == "aten::any" for event in profile.events())

    assert looks(1) == 1 and looks(2) == 2
    with torch.no_grad():
        assert looks(1) == 0
