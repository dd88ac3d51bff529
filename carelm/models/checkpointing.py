"""Gradient checkpointing: which models take the way of it that makes the graph of a block once."""

import inspect

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

# What a block is given and returns no gradient to, but for the first: masks, places, caches (which checkpointing leaves out).
PLAIN = {
    "self", "hidden_states", "attention_mask", "position_ids", "position_embeddings", "past_key_values", "use_cache",
    "cache_position", "output_attentions", "args", "kwargs",
}  # fmt: skip


def may_reenter(model: torch.nn.Module) -> bool:
    """Whether blocks hand on hidden states alone. With `use_reentrant` a first forward has no graph, so that what goes from one
    block to a later one beside them, such as the keys and values of Gemma 3n and 4, would lose its gradient unsaid."""
    blocks = {type(module) for module in model.modules() if isinstance(module, GradientCheckpointingLayer)}
    return all(inspect.signature(kind.forward).parameters.keys() <= PLAIN for kind in blocks)
