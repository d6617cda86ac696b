"""Linear layers that a fused step may read instead of calling, and rows that Inductor leaves as they are."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["is_plain_linear", "wide_linear"]

_INDUCTOR_PADS_BEYOND = 1024  # torch._inductor.config.padding_stride_threshold
_CACHE_LINE = 64  # elements of a half dtype


def is_plain_linear(module: nn.Module) -> bool:
    """Whether calling the module is F.linear with its weight and bias and nothing more."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__  # accelerate's hooks replace it
        and not (
            module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        )
    )


def wide_linear(x: Tensor, linear: nn.Module) -> Tensor:
    """Compute ``linear(x)``, a projection of which kernels then read parts: (..., in) to (..., out).

    Inductor stretches rows of more than 1024 elements to whole cache lines, and then copies every part that a kernel
    reads back to the strides it was promised. Rows of whole cache lines it leaves as they are: here the weights get
    rows of zeros, and the result is the front part.
    """
    if not (x.is_cuda and torch.compiler.is_compiling() and is_plain_linear(linear)):
        return linear(x)
    assert isinstance(linear, nn.Linear)
    width = linear.out_features
    missing = -width % _CACHE_LINE
    if width <= _INDUCTOR_PADS_BEYOND or not missing:
        return linear(x)
    bias = None if linear.bias is None else F.pad(linear.bias, (0, missing))
    return F.linear(x, F.pad(linear.weight, (0, 0, 0, missing)), bias)[..., :width]
