"""The depthwise 3x3 convolution in plain PyTorch: the specification and the CPU, float64, export and ONNX path."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["depthwise_conv3x3_reference"]


def depthwise_conv3x3_reference(x_BHWC: Tensor, weight: Tensor, *, activation: bool = False) -> Tensor:
    """Arguments as checked by `depthwise_conv3x3`; result (B, H, W, C), contiguous."""
    # Channels stay last in memory: the convolution sees an NCHW view of the same bytes.
    y_BCHW = F.conv2d(x_BHWC.permute(0, 3, 1, 2), weight.to(x_BHWC.dtype), padding=1, groups=x_BHWC.shape[-1])
    y_BHWC = y_BCHW.permute(0, 2, 3, 1)
    return (F.silu(y_BHWC) if activation else y_BHWC).contiguous()
