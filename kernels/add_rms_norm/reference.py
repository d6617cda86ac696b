"""add_rms_norm in plain PyTorch: the specification, the CPU path and what torch.export and ONNX see."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["add_rms_norm_reference"]


def add_rms_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float = 1e-6, out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """s = x + residual, y = s / sqrt(mean(s^2) + eps) * weight; arguments and result as in :func:`add_rms_norm`."""
    s = x if residual is None else x + residual
    wide = torch.promote_types(s.dtype, torch.float32)
    y = F.rms_norm(s.to(wide), s.shape[-1:], weight.to(wide), eps)
    return y.to(out_dtype or s.dtype), s
