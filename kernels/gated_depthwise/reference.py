"""gated_depthwise and recursive_gating in plain PyTorch: the specification; the CPU, float64, export and ONNX path."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

__all__ = ["gated_depthwise_reference", "recursive_gating_reference"]


def gated_depthwise_reference(
    x_BHWC: Tensor, gate_BHWC: Tensor | None, weight: Tensor, bias: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """Arguments as checked by `gated_depthwise`; result (B, H, W, C), contiguous."""
    dtype, K = x_BHWC.dtype, weight.shape[-1]
    bias = bias if bias is None else bias.to(dtype)
    # Channels stay last in memory: the convolution sees an NCHW view of the same bytes.
    x_BCHW = x_BHWC.permute(0, 3, 1, 2)
    d_BCHW = F.conv2d(x_BCHW, weight.to(dtype), bias, padding=K // 2, groups=x_BHWC.shape[-1])
    d_BHWC = d_BCHW.permute(0, 2, 3, 1)
    d_BHWC = d_BHWC if scale == 1.0 else scale * d_BHWC
    return (d_BHWC if gate_BHWC is None else gate_BHWC * d_BHWC).contiguous()


def recursive_gating_reference(
    projected_BHWC: Tensor,
    weight: Tensor,
    bias: Tensor,
    matrices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    *,
    scale: float = 1.0,
) -> Tensor:
    """Arguments as checked by `recursive_gating`; result (B, H, W, width of the last order)."""
    convolved = weight.shape[0]
    y, q = projected_BHWC.split((projected_BHWC.shape[-1] - convolved, convolved), dim=-1)
    d = gated_depthwise_reference(q, None, weight, bias, scale=scale)
    first, *others = d.split((y.shape[-1], *(matrix.shape[0] for matrix in matrices)), dim=-1)
    y = y * first
    for gate, matrix, offset in zip(others, matrices, offsets, strict=True):
        y = F.linear(y, matrix, offset) * gate
    return y
