"""patch_rows in plain PyTorch: the specification, the CPU path and what torch.export and ONNX see."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["patch_rows_reference"]


def patch_rows_reference(x: Tensor, *, kernel_size: int, stride: int, padding: int) -> Tensor:
    """The window of each position as a row, zeros up to a multiple of 8; arguments as in :func:`patch_rows`."""
    x_BCHW = F.pad(x, (padding, padding, padding, padding))
    windows = x_BCHW.unfold(2, kernel_size, stride).unfold(3, kernel_size, stride)
    rows = windows.permute(0, 2, 3, 1, 4, 5).flatten(3)
    return F.pad(rows, (0, -rows.shape[-1] % 8)).contiguous()
