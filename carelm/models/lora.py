"""LoRA as one operation: y = x W' + s (x A') B', with its update added within the products; W is whole or held in 4 bits.

PEFT makes four tensors of y's size on the way and casts each back; here there is one, and the backward keeps x A' besides x.
What is in 4 bits is made whole for each product and let go; from the second forward of a checkpointed block it is kept for the
backward, which follows at once. On a GPU a step waits for its processor, so that fewer operations are what counts.
"""

import functools
from typing import Any

import torch
from peft.tuners.lora import Linear, LoraLayer
from transformers.modeling_layers import GradientCheckpointingLayer


def use_fused_lora(model: torch.nn.Module) -> None:
    """Lets plain LoRA on linear layers compute so; its parameters and what is saved stay as they are."""
    for module in model.modules():
        if type(module) is Linear or (isinstance(module, LoraLayer) and type(module).__name__ == "Linear4bit"):
            module.__class__ = _fused(type(module))
            if (state := getattr(module.base_layer.weight, "quant_state", None)) is not None and state.nested:
                _hold_scales(state)
    for block in model.modules():
        if isinstance(block, GradientCheckpointingLayer):
            for module in block.modules():
                if isinstance(module, FusedLora):
                    module.__dict__["block"] = block  # and not as a part of it


def _hold_scales(state: Any) -> None:
    """Keeps the scales of doubly quantised weights as bitsandbytes makes them for every product: in fp32 they take 0.37 bits a
    weight more, and two operations of three less."""
    from bitsandbytes.functional import dequantize_blockwise

    state.absmax = dequantize_blockwise(state.absmax, state.state2).add_(state.offset).float()
    state.nested, state.state2, state.offset = False, None, None


@functools.cache
def _fused(kind: type[LoraLayer]) -> type[LoraLayer]:
    return type(f"Fused{kind.__name__}", (FusedLora, kind), {})


class FusedLora:
    """Before PEFT's class of the layer, whose own forward answers whatever is not one plain LoRA on one frozen matrix.

    Attributes:
        block: the part of the model around it that gradient checkpointing computes again; None outside of one.
        cast: its matrices in the dtype of the products, from a block's first forward to its second.
    """

    block: GradientCheckpointingLayer | None = None
    cast: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        name = None if args or kwargs or torch.compiler.is_compiling() else self._plain_adapter(dtype)
        if name is None:
            return super().forward(x, *args, **kwargs)
        base, dropped = self.base_layer, self.lora_dropout[name](x)
        dropped = None if dropped is x else dropped.to(dtype).reshape(-1, x.shape[-1])
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        weights = self.lora_A[name].weight, self.lora_B[name].weight
        is_recomputed = self.block is not None and self.block.gradient_checkpointing and self.block.training
        is_second = is_recomputed and torch._C._current_graph_task_id() != -1  # as torch's checkpointing asks
        cast = (self.cast if is_second else None) or tuple(w.detach().to(dtype) for w in weights)
        self.cast = cast if is_recomputed and not is_second else None
        y = _Product.apply(flat, dropped, base.weight, base.bias, *weights, *cast, self.scaling[name], is_recomputed)
        return y.view(*x.shape[:-1], y.shape[-1])  # here, as some models change it in place

    def _plain_adapter(self, dtype: torch.dtype) -> str | None:
        """The adapter that is all there is to the layer in this dtype, where it is so."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if len(names) != 1 or self.merged or self.disable_adapters or names[0] in self.lora_variant:
            return None
        base, state = self.base_layer, getattr(self.base_layer.weight, "quant_state", None)
        if state is None:
            is_plain = type(base) is torch.nn.Linear and base.weight.dtype == dtype
        else:  # to answer, bitsandbytes has kernels of its own for few tokens
            is_plain = self.training and base.compute_dtype == dtype == state.dtype
            is_plain = is_plain and list(state.shape) == [base.out_features, base.in_features]
        is_plain = is_plain and not base.weight.requires_grad and (base.bias is None or not base.bias.requires_grad)
        return names[0] if is_plain and not self.lora_bias[names[0]] else None


def _whole(weight: torch.nn.Parameter) -> torch.Tensor:
    """A weight as it multiplies, [out, in]."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data.view(-1, 1), state)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropped, weight, bias, a_trained, b_trained, a, b, scaling, is_recomputed):
        """
        Args:
            x: [tokens, in], of the dtype of the products; `dropped` as well, which A sees in its place where it is not None.
            weight, bias: frozen, [out, in] and [out] or None; the weight in x's dtype, or in 4 bits.
            a_trained, b_trained: [rank, in] and [out, rank], of any dtype; their gradients are of the same.
            a, b: those two in x's dtype.
            is_recomputed: whether all this is done again just before the backward, so that only then anything is kept.
        """
        ctx.dtypes, ctx.scaling, ctx.is_dropped = (a_trained.dtype, b_trained.dtype), scaling, dropped is not None
        whole = _whole(weight)
        y = torch.nn.functional.linear(x, whole, bias)
        x = x if dropped is None else dropped
        low = torch.mm(x, a.t())
        y.addmm_(low, b.t(), alpha=scaling)
        ctx.weight = weight
        ctx.save_for_backward(x, a, b, low, whole if is_recomputed and whole is not weight else None)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, a, b, low, whole = ctx.saved_tensors
        of_low = torch.addmm(low, gradient, b, beta=0, alpha=ctx.scaling)
        of_x = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_x = torch.mm(gradient, _whole(ctx.weight) if whole is None else whole)
            if not ctx.is_dropped:
                of_x.addmm_(of_low, a)
        if ctx.needs_input_grad[1]:
            of_dropped = torch.mm(of_low, a)
        of_a = torch.mm(of_low.t(), x).to(ctx.dtypes[0])
        # As low' g and not g' low, which took up to nine times as long for a rank of 8 in fp32.
        of_b = torch.addmm(b.t(), low.t(), gradient, beta=0, alpha=ctx.scaling).t()
        of_b = of_b.to(ctx.dtypes[1], memory_format=torch.contiguous_format)
        return of_x, of_dropped, None, None, of_a, of_b, None, None, None, None
