"""Root mean square norms as one operation on a GPU, where transformers takes eight, each over all hidden states."""

import functools
import inspect

import torch
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRMSNorm


def use_fused_norms(model: PreTrainedModel) -> None:
    """Lets every norm whose forward is written as Llama's compute so; its weight stays as it is."""
    plain = inspect.getsource(LlamaRMSNorm.forward)
    for module in model.modules():
        kind = type(module)
        if kind.__name__.endswith("RMSNorm") and inspect.getsource(kind.forward) == plain:
            module.__class__ = _fused(kind)


@functools.cache
def _fused(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    return type(f"Fused{kind.__name__}", (_Fused, kind), {})


class _Fused:
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight, in fp32 within (Zhang and Sennrich 2019, equation 4), over the last dimension."""
        if x.dtype != self.weight.dtype:
            return super().forward(x)
        # Under torch's public name autocast would let it answer in fp32.
        return torch.ops.aten._fused_rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)[0]
