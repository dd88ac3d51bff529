"""LoRA on a CPU as one operation: y = x W' + s (x A') B', with its update added within the products.

PEFT makes four tensors of y's size on the way and casts each back; here there is one, and the backward keeps x A' besides x.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear


def use_fused_lora(model: torch.nn.Module) -> None:
    """Lets the LoRA of whole weights compute so on a CPU; its parameters and what is saved stay as they are."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLinear


class FusedLinear(Linear):
    """PEFT's layer; its own forward answers whatever is not one plain LoRA on one frozen matrix."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        base, autocast = self.base_layer, torch.is_autocast_enabled("cpu")
        is_plain = type(base) is torch.nn.Linear and not any(p.requires_grad for p in base.parameters())
        is_plain = is_plain and x.device.type == "cpu" and len(names) == 1 and not (args or kwargs)
        if not is_plain or self.merged or self.disable_adapters or names[0] in self.lora_variant:
            return super().forward(x, *args, **kwargs)
        name, dtype = names[0], torch.get_autocast_dtype("cpu") if autocast else x.dtype
        if self.lora_bias[name] or base.weight.dtype != dtype:
            return super().forward(x)
        dropped = self.lora_dropout[name](x)
        dropped = None if dropped is x else dropped.to(dtype).reshape(-1, x.shape[-1])
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        with torch.autocast("cpu", enabled=False):
            flat = x.to(dtype).reshape(-1, x.shape[-1])
            y = _Product.apply(flat, dropped, base.weight, base.bias, a, b, self.scaling[name])
        return y.view(*x.shape[:-1], y.shape[-1])  # here, as some models change it in place


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dropped, weight, bias, a, b, scaling):
        """
        Args:
            x: [tokens, in], of weight's dtype; `dropped` as well, which A sees in its place where it is not None.
            weight, bias: frozen, [out, in] and [out] or None.
            a, b: trained, [rank, in] and [out, rank], of any dtype; their gradients are of the same.
        """
        ctx.dtypes, ctx.scaling, ctx.is_dropped = (a.dtype, b.dtype), scaling, dropped is not None
        a, b = a.to(x.dtype), b.to(x.dtype)
        y = torch.nn.functional.linear(x, weight, bias)
        x = x if dropped is None else dropped
        low = torch.mm(x, a.t())
        y.addmm_(low, b.t(), alpha=scaling)
        ctx.save_for_backward(x, weight, a, b, low)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        x, weight, a, b, low = ctx.saved_tensors
        of_low = torch.mm(gradient, b).mul_(ctx.scaling)
        of_x = of_dropped = None
        if ctx.needs_input_grad[0]:
            of_x = torch.mm(gradient, weight)
            if not ctx.is_dropped:
                of_x.addmm_(of_low, a)
        if ctx.needs_input_grad[1]:
            of_dropped = torch.mm(of_low, a)
        of_a = torch.mm(of_low.t(), x).to(ctx.dtypes[0])
        # As low' g and not g' low, which took up to nine times as long for a rank of 8 in fp32.
        of_b = torch.mm(low.t(), gradient).t().to(ctx.dtypes[1]).mul_(ctx.scaling)
        return of_x, of_dropped, None, None, of_a, of_b, None
