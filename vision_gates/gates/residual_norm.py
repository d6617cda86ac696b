"""Add to the residual stream and normalise the sum: one pass where the normalisation is an RMSNorm."""

import torch
from torch import Tensor, nn

from vision_gates.kernels.add_rms_norm import add_rms_norm

__all__ = ["add_norm"]


def add_norm(x: Tensor, residual: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Return norm(x + residual) and x + residual, both (..., C); without a residual norm(x) and x.

    Under autocast the normalised tensor comes in half precision, which the layers after it would cast it to.
    torch.compile fuses the plain form by itself.
    """
    if not _is_plain_rms_norm(norm) or torch.compiler.is_compiling():
        x = x if residual is None else x + residual
        return norm(x), x
    device_type = x.device.type
    out_dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
    return add_rms_norm(x, residual, norm.weight, eps=norm.eps, out_dtype=out_dtype)


def _is_plain_rms_norm(norm: nn.Module) -> bool:
    """Over the last axis, with a weight and an eps, and nothing hooked to it."""
    if type(norm) is not nn.RMSNorm or norm._forward_hooks or norm._forward_pre_hooks:
        return False
    return norm.weight is not None and norm.eps is not None and len(norm.normalized_shape) == 1
