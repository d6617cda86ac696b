"""A strided convolution of images as one matrix product."""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["embed_patches"]


def embed_patches(x_BCHW: Tensor, conv: nn.Module) -> Tensor:
    """Apply ``conv`` (square, few input channels, large kernel, large stride) to images; channels last in memory.

    cuDNN pads three channels to eight and copies the images for it, which takes several times as long as the product
    itself; on a GPU patches are gathered into rows instead. The row length is a multiple of 8, as tensor cores want.
    """
    if not (x_BCHW.is_cuda and type(conv) is nn.Conv2d):  # another module in its place: LoRA, quantisation
        return conv(x_BCHW)
    size, stride, pad = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    windows = F.pad(x_BCHW, (pad, pad, pad, pad)).unfold(2, size, stride).unfold(3, size, stride)
    rows = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)  # (B, H', W', C * size * size)
    missing = -rows.shape[-1] % 8
    weight = F.pad(conv.weight.flatten(1), (0, missing))
    y_BHWC = F.linear(F.pad(rows, (0, missing)), weight, conv.bias)
    return y_BHWC.permute(0, 3, 1, 2)
