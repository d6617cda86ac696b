"""Padding images and volumes to sizes that strided layers divide."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_gates.kernels.launching import is_exporting

__all__ = ["pad_to_multiple"]


def pad_to_multiple(x_BCS: Tensor, divisors: Sequence[int]) -> Tensor:
    """Repeat the last positions of each spatial axis until its size is a multiple of the axis' divisor.

    Args:
        x_BCS: (B, C, *size).
        divisors: one a spatial axis.
    """
    size = x_BCS.shape[2:]
    if is_exporting() and not all(isinstance(n, int) for n in size):
        # How many are missing is not known: each position of the result says where it comes from.
        for axis, (n, divisor) in enumerate(zip(size, divisors, strict=True), start=2):
            source = torch.arange((n + divisor - 1) // divisor * divisor, device=x_BCS.device).clamp_max(n - 1)
            x_BCS = x_BCS.index_select(axis, source)
        return x_BCS
    missing = [-n % divisor for n, divisor in zip(size, divisors, strict=True)]
    if any(missing):
        x_BCS = F.pad(x_BCS, [pad for m in reversed(missing) for pad in (0, m)], mode="replicate")
    return x_BCS
