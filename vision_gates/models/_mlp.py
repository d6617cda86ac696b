"""The two-layer MLP of a transformer's block, with one wide result less to keep in training and in inference."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vision_gates.gates.layer_scale import fold_scale, scaled_linear
from vision_gates.gates.plain_linear import is_plain_linear
from vision_gates.kernels.launching import autocast_dtype, is_exporting

__all__ = ["LeanMlp"]


class LeanMlp(Mlp):
    """timm's Mlp without dropout: y = W2 GELU(W1 x + b1) + b2, on the last axis.

    In training GELU's result, as wide as its argument, is computed again in the backward pass instead of being kept:
    at four times the width of the block, it is a fifth of what a block keeps. In inference it takes its argument's
    place. Other layers in place of the two (LoRA, quantisation), or hooks on them, are called as usual.

    Args:
        dim: channels in and out.
        hidden_dim: channels between the two layers.
    """

    def __init__(self, dim: int, *, hidden_dim: int) -> None:
        super().__init__(dim, hidden_features=hidden_dim)

    def forward(self, x: Tensor, scale_C: Tensor | None = None) -> Tensor:
        """Map (..., dim) to (..., dim), times a LayerScale's factors (dim,) when they are given."""
        hidden = self.fc1(x)
        plain = type(self.act) is nn.GELU and is_plain_linear(self.fc1) and is_plain_linear(self.fc2)
        if not plain or is_exporting():
            return scaled_linear(self.act(hidden), self.fc2, scale_C)
        if not torch.is_grad_enabled():
            return scaled_linear(torch.ops.aten.gelu_(hidden), self.fc2, scale_C)
        if not self.training:
            return scaled_linear(F.gelu(hidden), self.fc2, scale_C)
        weight, bias, factor = fold_scale(self.fc2, scale_C, autocast_dtype(hidden) or hidden.dtype)
        if torch.compiler.is_compiling():
            # Its partitioner sees through an autograd function and would keep both; what it is told here, it heeds.
            y = checkpoint(_gelu_linear, hidden, weight, bias, use_reentrant=False, preserve_rng_state=False)
        else:
            dtype = hidden.dtype  # autocast does not reach into the backward pass
            y = _GeluLinear.apply(hidden, weight.to(dtype), None if bias is None else bias.to(dtype))
        return y if factor is None else factor * y


def _gelu_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.gelu(hidden), weight, bias)


class _GeluLinear(torch.autograd.Function):
    """:func:`_gelu_linear` that keeps its arguments only; a fraction of what a checkpoint costs the host."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.biased = bias is not None
        return _gelu_linear(hidden, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        dhidden = torch.ops.aten.gelu_backward(dy @ weight, hidden)
        rows = dy.flatten(0, -2)
        dweight = rows.t() @ F.gelu(hidden).flatten(0, -2)
        return dhidden, dweight, rows.sum(dim=0) if ctx.biased else None
