"""A strided convolution of images as one matrix product."""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_gates.kernels.patch_rows import patch_rows

__all__ = ["embed_patches"]


def embed_patches(x_BCHW: Tensor, conv: nn.Module) -> Tensor:
    """Apply ``conv`` (few input channels, large kernel, large stride) to images; channels last in memory.

    cuDNN pads three channels to eight and copies the images for it, which takes several times as long as the product
    itself; on a GPU patches are gathered into rows instead. What is more than a plain square convolution (LoRA,
    quantisation, a hook) is called as usual.
    """
    if x_BCHW.is_cuda and x_BCHW.ndim == 4 and x_BCHW.is_floating_point() and _is_plain_square_conv(conv):
        return _embed_rows(x_BCHW, conv)
    return conv(x_BCHW)


def _embed_rows(x_BCHW: Tensor, conv: nn.Conv2d) -> Tensor:
    kind = x_BCHW.device.type
    if torch.is_autocast_enabled(kind) and x_BCHW.dtype != torch.float64:
        x_BCHW = x_BCHW.to(torch.get_autocast_dtype(kind))  # the product would, and rows are larger than images
    rows_BHWK = patch_rows(x_BCHW, kernel_size=conv.kernel_size[0], stride=conv.stride[0], padding=int(conv.padding[0]))
    weight = conv.weight.flatten(1)
    weight = F.pad(weight, (0, rows_BHWK.shape[-1] - weight.shape[1]))
    y_BHWC = F.linear(rows_BHWK, weight)
    if conv.bias is not None:  # apart: with a bias cuBLAS takes a kernel that is half as fast at this shape
        y_BHWC = y_BHWC + conv.bias.to(y_BHWC.dtype)
    return y_BHWC.permute(0, 3, 1, 2)


def _is_plain_square_conv(conv: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether calling the module is F.conv2d with its weight and bias, the same in both directions, and no more."""
    return (
        type(conv) is nn.Conv2d
        and not isinstance(conv.padding, str)
        and all(size[0] == size[1] for size in (conv.kernel_size, conv.stride, conv.padding))
        and (conv.dilation, conv.groups, conv.padding_mode) == ((1, 1), 1, "zeros")
        and "forward" not in conv.__dict__  # accelerate's hooks replace it
        and not (conv._forward_hooks or conv._forward_pre_hooks or conv._backward_hooks or conv._backward_pre_hooks)
    )
