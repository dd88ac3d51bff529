"""Attention for training in bf16 on a CPU, where the backward of torch's own takes longer than all else but the products.

The scores are made with whole matrix products and made again in the backward, so that nothing of [length, length] is kept.
"""

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "recomputed"
BLOCK = 2**22  # scores at a time, so that they stay near the cores


def use_recomputed_attention(model: PreTrainedModel) -> None:
    """Trains with it where the model would take torch's own (`sdpa`); what was asked for, or what the model needs, stays."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' `sdpa_attention_forward`, which still answers whatever needs no gradients or is out of the ordinary.

    Args:
        query: [batch, heads, length, width].
        key, value: [batch, key heads, key length, width]; each key head serves as many query heads in turn.
        attention_mask: bool [batch, 1, length, key length], True where a position is seen; None for a causal one.

    Returns:
        [batch, length, heads, width], and None for the weights.
    """
    if torch.is_autocast_enabled("cpu"):
        query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
    length, seen = query.shape[2], key.shape[2]
    is_causal = attention_mask is None and kwargs.get("is_causal", getattr(module, "is_causal", True)) is not False
    is_plain = attention_mask.dtype == torch.bool if attention_mask is not None else is_causal and length == seen
    odd = dropout or kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
    if (
        not (torch.is_grad_enabled() and query.dtype == torch.bfloat16 and query.device.type == "cpu" and is_plain)
        or odd
    ):
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, length, seen, dtype=torch.bool).tril_()
    attention_mask = attention_mask.expand(len(query), 1, length, seen)
    with torch.autocast("cpu", enabled=False):
        return _Attention.apply(query, key, value, attention_mask, scaling or query.shape[-1] ** -0.5), None


class _Attention(torch.autograd.Function):
    """softmax(scale q k' + mask) v; its backward is that of Dao et al. 2022, FlashAttention, appendix B.2."""

    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        batch, heads, length, _ = query.shape
        query = query.contiguous()
        output = query.new_empty(batch, length, heads, value.shape[-1])
        for row, part, k, v in _blocks(query, key, value):
            scores = torch.softmax(_scores(query[row, part], k, mask[row], scale), -1)
            output[row, :, part] = torch.bmm(scores, v).transpose(0, 1)
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, mask = ctx.saved_tensors
        groups = query.shape[1] // key.shape[1]
        gradient = gradient.transpose(1, 2).contiguous()
        of_query, of_key, of_value = torch.empty_like(query), *(x.new_zeros(x.shape) for x in (key, value))
        for row, part, k, v in _blocks(query, key, value):
            q, g = query[row, part], gradient[row, part]
            scores = torch.softmax(_scores(q, k, mask[row], ctx.scale), -1)
            of_scores = torch.bmm(g, v.transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_scores, scores, -1, of_scores.dtype).mul_(ctx.scale)
            of_query[row, part] = torch.bmm(of_scores, k)
            owners = torch.arange(part.start, part.stop) // groups
            of_key[row].index_add_(0, owners, torch.bmm(of_scores.transpose(1, 2), q))
            of_value[row].index_add_(0, owners, torch.bmm(scores.transpose(1, 2), g))
        return of_query, of_key, of_value, None, None


def _blocks(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
    """Each row of the batch in parts of its heads: (row, slice of query heads, their keys and values)."""
    batch, heads, length, _ = query.shape
    groups = heads // key.shape[1]
    size = max(1, BLOCK // (length * key.shape[2]))
    for row in range(batch):
        k, v = (x[row].repeat_interleave(groups, 0) for x in (key, value))
        for start in range(0, heads, size):
            part = slice(start, min(start + size, heads))
            yield row, part, k[part], v[part]


def _scores(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """scale q k' where the mask is True, and the least number elsewhere, as softmax takes it: [heads, length, key length]."""
    hidden = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, torch.finfo(q.dtype).min)
    return torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=scale)
