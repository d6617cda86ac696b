"""A linear layer whose result is multiplied by a learned factor a channel (LayerScale), without keeping that result.

Paper: Going deeper with Image Transformers, arXiv 2103.17239, section 2.1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_gates.kernels.launching import autocast_dtype, is_exporting

__all__ = ["scaled_linear"]


def scaled_linear(x: Tensor, linear: nn.Module, scale_C: Tensor | None) -> Tensor:
    """Compute ``scale_C * linear(x)``.

    In training the factor goes into the weights: its gradient then comes from theirs, and the layer's result, a whole
    map a layer, need not be kept for it. float16 multiplies afterwards, since small factors of small weights, such as
    LayerScale starts with, would round to zero there.

    Args:
        x: (..., in_features).
        linear: an ``nn.Linear``.
        scale_C: (out_features,), or None for the layer alone.
    """
    assert isinstance(linear, nn.Linear)
    if scale_C is None:
        return linear(x)
    dtype = autocast_dtype(x) or x.dtype
    if not torch.is_grad_enabled() or dtype == torch.float16 or is_exporting():
        return scale_C * linear(x)
    bias = None if linear.bias is None else scale_C * linear.bias
    return F.linear(x, scale_C[:, None] * linear.weight, bias)
