"""Attention for training in bf16 on a CPU, where the backward of torch's own takes longer than all else but the products.

The scores are made with whole matrix products and made again in the backward, so that nothing of [length, length] is kept.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "recomputed"
BLOCK = 2**22  # scores at a time, so that they stay near the cores
WIDTH = (
    32  # of whose multiple the scores are wide: torch's softmax in bf16 takes up to 2.4 times as long for other widths
)


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
    """As transformers' `sdpa_attention_forward`, which still answers whatever needs no gradients or is out of the ordinary:
    positions that see nothing, too, of which torch makes zeros.

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
    odd = dropout or kwargs.get("position_bias") is not None or kwargs.get("softcap") is not None
    is_plain = torch.is_grad_enabled() and query.dtype == torch.bfloat16 and query.device.type == "cpu" and not odd
    if attention_mask is None:
        is_causal = kwargs.get("is_causal")
        is_plain &= length == seen and (getattr(module, "is_causal", True) if is_causal is None else is_causal)
    else:
        is_plain = is_plain and attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1
        is_plain = is_plain and _all_see(attention_mask)
    if not is_plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if attention_mask is None:
        attention_mask = torch.ones(1, 1, length, seen, dtype=torch.bool).tril_()
    attention_mask = attention_mask.expand(len(query), 1, length, seen)
    with torch.autocast("cpu", enabled=False):
        return _Attention.apply(query, key, value, attention_mask, scaling or query.shape[-1] ** -0.5), None


def _all_see(mask: torch.Tensor) -> bool:
    """Whether every position sees one. The layers share the mask of a batch, which keeps the answer: to look through it takes
    long."""
    if not hasattr(mask, "all_see"):
        mask.all_see = bool(mask.any(-1).all())
    return mask.all_see


class _Attention(torch.autograd.Function):
    """softmax(scale q k' + mask) v; its backward is that of Dao et al. 2022, FlashAttention, appendix B.2.

    The query heads of one key head are one matrix to it, [key heads, members x length, width].
    """

    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        batch, heads, length, width = query.shape
        query = (query * scale).contiguous().view(batch, key.shape[1], -1, length, width)
        key, value = (F.pad(x, (0, 0, 0, -x.shape[2] % WIDTH)) for x in (key, value))
        output = query.new_empty(batch, length, *query.shape[1:3], value.shape[-1])
        for row, part, members, hidden in _blocks(query, key, mask):
            scores = _scores(query[row, part, members], key[row, part], hidden)
            products = torch.bmm(scores, value[row, part])
            output[row, :, part, members] = products.unflatten(1, (-1, length)).movedim(2, 0)
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return output.flatten(2, 3)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        query, key, value, mask = ctx.saved_tensors
        gradient = gradient.transpose(1, 2).contiguous().view(*query.shape[:-1], -1)
        of_query, of_key, of_value = torch.empty_like(query), *(x.new_zeros(x.shape) for x in (key, value))
        for row, part, members, hidden in _blocks(query, key, mask):
            scores = _scores(query[row, part, members], key[row, part], hidden)
            q, g, of_q = (x[row, part, members] for x in (query, gradient, of_query))
            q, g, of_q = (x.view(len(x), -1, x.shape[-1]) for x in (q, g, of_q))
            of_value[row, part].baddbmm_(scores.transpose(1, 2), g)
            of_scores = torch.bmm(g, value[row, part].transpose(1, 2))
            of_scores = torch._softmax_backward_data(of_scores, scores, -1, scores.dtype)
            of_key[row, part].baddbmm_(of_scores.transpose(1, 2), q)
            torch.bmm(of_scores, key[row, part], out=of_q)
        of_key, of_value = (x[:, :, : mask.shape[-1]] for x in (of_key, of_value))
        return of_query.mul_(ctx.scale).flatten(1, 2), of_key, of_value, None, None


def _blocks(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor):
    """Each row of the batch in parts of its heads: (row, slice of key heads, slice of the query heads of each, what is added to
    their scores: [length, key length], 0 where the mask is True)."""
    batch, key_heads, groups, length, _ = query.shape
    # The least number and not -inf, so that a row that sees nothing has a softmax; -inf where there is no key.
    hidden = torch.full((batch, length, key.shape[2]), -torch.inf, dtype=query.dtype)
    hidden[..., : mask.shape[-1]].zero_().masked_fill_(~mask[:, 0], torch.finfo(query.dtype).min)
    size = max(1, BLOCK // hidden[0].numel())
    heads, size = max(1, size // groups), min(size, groups)
    for row in range(batch):
        for first in range(0, key_heads, heads):
            for start in range(0, groups, size):
                yield row, slice(first, first + heads), slice(start, start + size), hidden[row]


def _scores(q: torch.Tensor, k: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """softmax(q k' + hidden): [key heads, members x length, key length]."""
    scores = torch.bmm(q.flatten(1, 2), k.transpose(1, 2))
    scores.view(*q.shape[:3], -1).add_(hidden)
    return torch.softmax(scores, -1)
