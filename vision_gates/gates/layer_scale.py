"""A linear layer whose result is multiplied by a learned factor a channel (LayerScale), without keeping that result.

Paper: Going deeper with Image Transformers, arXiv 2103.17239, section 2.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_gates.gates.plain_linear import is_plain_linear
from vision_gates.kernels.launching import autocast_dtype, is_exporting

__all__ = ["fold_scale", "scaled_linear"]


def scaled_linear(x: Tensor, linear: nn.Module, scale_C: Tensor | None) -> Tensor:
    """Compute ``scale_C * linear(x)``.

    In training the factor goes into the weights: its gradient then comes from theirs, and the layer's result, a whole
    map a layer, need not be kept for it.

    Args:
        x: (..., in_features).
        linear: an ``nn.Linear``.
        scale_C: (out_features,), or None for the layer alone.
    """
    if scale_C is None:
        return linear(x)
    if torch.is_grad_enabled() and not is_exporting() and is_plain_linear(linear):
        weight, bias, factor = fold_scale(linear, scale_C, autocast_dtype(x) or x.dtype)
        y = F.linear(x, weight, bias)
        return y if factor is None else factor * y
    y = linear(x)
    in_place = not torch.is_grad_enabled() and is_plain_linear(linear) and y.dtype == scale_C.dtype
    return y.mul_(scale_C) if in_place else scale_C * y


def fold_scale(
    linear: nn.Module, scale_C: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight and bias of the layer with the factors in them, and what its result is still to be multiplied by.

    float16 multiplies afterwards, since small factors of small weights, such as LayerScale starts with, would round to
    zero there.

    Args:
        linear: an ``nn.Linear``.
        scale_C: (out_features,), or None.
        dtype: in which the layer is computed.
    """
    assert isinstance(linear, nn.Linear)
    if scale_C is None or dtype == torch.float16:
        return linear.weight, linear.bias, scale_C
    return scale_C[:, None] * linear.weight, None if linear.bias is None else scale_C * linear.bias, None
