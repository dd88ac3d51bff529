"""Gradient checkpointing leaves every gradient what it is."""

import copy

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig, LlamaConfig, LlamaForCausalLM

from carelm.models.checkpointing import may_reenter

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
SHARED = {
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "vocab_size_per_layer_input": 61,
    "hidden_size_per_layer_input": 8,
}
IDS = torch.arange(60).view(3, 20)


def gradients(model, settings) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).train()
    if settings:
        model.gradient_checkpointing_enable(settings)
    model(IDS, labels=IDS).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "kind, config, reenters",
    [(LlamaForCausalLM, LlamaConfig(**SHAPE), True), (Gemma4ForCausalLM, Gemma4TextConfig(**SHAPE, **SHARED), False)],
)
def test_a_model_whose_blocks_share_keys_and_values_does_not_reenter(kind, config, reenters):
    """The later blocks of Gemma 4 read the keys and values of earlier ones, whose gradient would be lost."""
    torch.manual_seed(0)
    model = kind(config)
    assert may_reenter(model) == reenters
    wanted, found = gradients(model, None), gradients(model, {"use_reentrant": may_reenter(model)})
    assert found.keys() == wanted.keys()
    assert all(torch.allclose(found[name], wanted[name], rtol=1e-4, atol=1e-6) for name in wanted)
