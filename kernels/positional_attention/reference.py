"""Positional attention mixed with attention by content, in plain PyTorch: the specification, and what CPUs run."""

import torch
from torch import Tensor

__all__ = ["positional_attention_reference"]


def positional_attention_reference(
    content_BNhD: Tensor, v_BNhD: Tensor, rows_hHH: Tensor, columns_hWW: Tensor, gate_h: Tensor
) -> Tensor:
    """Arguments as checked by `positional_attention`; result (B, N, h, D), contiguous. Tables take v's dtype."""
    dtype = v_BNhD.dtype
    v_BHWhD = v_BNhD.unflatten(1, (rows_hHH.shape[-1], columns_hWW.shape[-1]))
    position_BHWhD = torch.einsum("hxw,bpwhd->bpxhd", columns_hWW.to(dtype), v_BHWhD)
    position_BHWhD = torch.einsum("hyp,bpxhd->byxhd", rows_hHH.to(dtype), position_BHWhD)
    return torch.lerp(content_BNhD, position_BHWhD.flatten(1, 2), gate_h.to(dtype)[:, None]).contiguous()
