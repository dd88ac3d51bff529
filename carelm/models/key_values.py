"""Keys and values of many requests in tensors made once, and attention over as much of them as each half of the rows uses."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from carelm.models.memory import total_memory_bytes


@dataclass
class Window:
    """Where the forward at hand writes, told once for all layers: newcomers from row `first` on, or, where `columns` is given,
    one token into each row."""

    places: int = 0
    capacity: int = 0
    first: int = 0
    rows: torch.Tensor | None = None
    columns: torch.Tensor | None = None
    width: int = 0  # columns in use
    parts: list[tuple[slice, int]] | None = None  # rows with the columns that they use, where that differs much


class Layer(DynamicLayer):
    """Keys and values of one layer: [places, heads, capacity, head_dim] each, zeros where nothing was written (what is masked
    is still multiplied by 0)."""

    def __init__(self, window: Window):
        super().__init__()
        self.window = window

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = (self._room(states) for states in (key_states, value_states))
        self.is_initialized = True

    def _room(self, states: torch.Tensor) -> torch.Tensor:
        return states.new_zeros(self.window.places, states.shape[1], self.window.capacity, states.shape[3])

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        at = self.window
        if at.columns is None:
            rows = slice(at.first, at.first + len(key_states))
            for kept, states in ((self.keys, key_states), (self.values, value_states)):
                kept[rows, :, : at.width] = states
                kept[rows, :, at.width :] = 0  # an earlier row may have left NaN there, and 0 times NaN is NaN
            return key_states, value_states
        self.keys[at.rows, :, at.columns] = key_states[:, :, 0]
        self.values[at.rows, :, at.columns] = value_states[:, :, 0]
        keys, values = (states[: len(key_states), :, : at.width] for states in (self.keys, self.values))
        keys.parts = at.parts
        return keys, values

    def get_seq_length(self) -> int:
        return 0 if self.window.columns is None else self.window.width - 1

    def move(self, sources: list[int], targets: list[int], width: int) -> None:
        for states in (self.keys, self.values):
            states[targets, :, :width] = states[sources, :, :width]
            states[targets, :, width:] = 0

    def lay_out_anew(self, rows: int, width: int) -> None:
        for name in ("keys", "values"):
            old = getattr(self, name)
            new = self._room(old)
            new[:rows, :, :width] = old[:rows, :, :width]
            setattr(self, name, new)


def attend_in_parts(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`, for each part of the rows over its own columns; by groups where each row has one query."""
    if more.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    attend = sdpa_attention_forward
    if (
        query.shape[2] == 1
        and query.device.type == "cpu"
        and getattr(attention_mask, "dtype", bool) in (bool, torch.bool)
    ):
        attend = attend_by_groups
    parts = getattr(key, "parts", None)
    if parts is None or attention_mask is None:
        return attend(module, query, key, value, attention_mask, **more)
    attended = [
        attend(
            module, query[rows], key[rows, :, :width], value[rows, :, :width], attention_mask[rows, :, :, :width], **more
        )[0]
        for rows, width in parts
    ]  # fmt: skip
    return torch.cat(attended), None


def attend_by_groups(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """One query a row: the heads that share keys and values stand as queries of one head. Torch's attention on a CPU reads
    them once then, and not once for each head, and in bf16 a single query takes it several times as long.

    Args:
        query: [rows, heads, 1, head_dim].
        key, value: [rows, key heads, columns, head_dim].
        mask: [rows, 1, 1, columns], True where a key counts; or None.

    Returns:
        [rows, 1, heads, head_dim].
    """
    rows, heads, _, size = query.shape
    groups = query.reshape(rows, key.shape[1], -1, size)
    attended = torch.nn.functional.scaled_dot_product_attention(groups, key, value, attn_mask=mask, scale=scaling)
    return attended.reshape(rows, 1, heads, -1), None


IN_PARTS = "sdpa_in_parts"
AttentionInterface.register(IN_PARTS, attend_in_parts)
AttentionMaskInterface.register(IN_PARTS, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextmanager
def attention_in_parts(model: torch.nn.Module) -> Iterator[None]:
    inner = causal_model(model)
    config = inner.config.get_text_config()
    before = config._attn_implementation
    if before == "sdpa" and inner._supports_attention_backend:  # others ask for it by name
        config._attn_implementation = IN_PARTS
    try:
        yield
    finally:
        config._attn_implementation = before


def cache_tokens(model: torch.nn.Module, device: torch.device) -> float:
    """So many tokens have their keys and values in an eighth of the device's memory; infinity for a model without heads."""
    config = causal_model(model).config.get_text_config()
    heads, key_heads = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    if not isinstance(heads, int):
        return math.inf
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = [
        getattr(config, name, None) or size for name in ("qk_head_dim", "v_head_dim")
    ]  # latent attention has its own
    numbers = config.num_hidden_layers * (key_heads if isinstance(key_heads, int) else heads) * sum(sizes)
    return total_memory_bytes(device) // 8 // (numbers * causal_model(model).dtype.itemsize)


def causal_model(model: torch.nn.Module) -> torch.nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model
