"""ConViT's attention by position, exact and separable, mixed with attention by content: the public function."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from vision_gates.kernels.launching import autocast_dtype, is_exporting
from vision_gates.kernels.positional_attention.reference import positional_attention_reference

__all__ = ["positional_attention"]

_BACKENDS = ("reference", "triton")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton, too, reads it once


def positional_attention(
    content_BNhD: Tensor,
    v_BNhD: Tensor,
    rows_hHH: Tensor,
    columns_hWW: Tensor,
    gate_h: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Attend by position, rows and columns of the grid one after the other, and mix with attention by content.

    The positional branch of ConViT (arXiv 2103.10697, section 3) as the product that it is::

        position[b, (y, x), h] = sum over p, w of rows[h, y, p] * columns[h, x, w] * v[b, (p, w), h]
        out = (1 - gate[h]) * content + gate[h] * position

    Any strides: the Triton kernel reads slices of a packed projection and transposed results of an attention as they
    lie, copies only what is not dense along the channels, and keeps nothing but its arguments for the backward pass.
    Under autocast ``content`` and ``v`` take autocast's dtype.

    Args:
        content_BNhD: what attention by content gave, (B, N, h, D); N = H * W tokens in rows of W, h heads.
        v_BNhD: the values, in content's shape and dtype.
        rows_hHH: attention from rows to rows, (h, H, H): [head, query, key]; float32 (beside float64: float64).
        columns_hWW: from columns to columns, (h, W, W), as ``rows_hHH``.
        gate_h: each head's share of the positional attention, (h,), as ``rows_hHH``.
        backend: "reference" (PyTorch: any device, torch.compile, torch.export, ONNX) or "triton" (CUDA, not float64).
            By default CUDA tensors take the Triton kernel, float64 and all others the reference.

    Returns:
        (B, N, h, D) in content's dtype, contiguous, differentiable in all tensors (by the kernel: once).

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported or does not fit content's.
        ValueError: shapes or devices do not fit together, or the backend is unknown.
        RuntimeError: the backend "triton" was asked for and is not available.
    """
    _check_arguments(content_BNhD, v_BNhD, rows_hHH, columns_hWW, gate_h)
    dtype = autocast_dtype(content_BNhD, v_BNhD)
    if dtype is not None:
        content_BNhD, v_BNhD = content_BNhD.to(dtype), v_BNhD.to(dtype)
    if backend is None:
        # An exported graph holds plain operators, for whatever runs it.
        on_kernel = v_BNhD.is_cuda and _HAS_TRITON and v_BNhD.dtype != torch.float64 and not is_exporting()
        backend = "triton" if on_kernel else "reference"
    if backend == "reference":
        return positional_attention_reference(content_BNhD, v_BNhD, rows_hHH, columns_hWW, gate_h)
    if backend != "triton":
        raise ValueError(f"backend must be one of {_BACKENDS} or None, got {backend!r}")
    _check_kernel_runs(v_BNhD)
    from vision_gates.kernels.positional_attention.kernel import positional_attention_triton

    return positional_attention_triton(content_BNhD, v_BNhD, rows_hHH, columns_hWW, gate_h)


def _check_arguments(content: Tensor, v: Tensor, rows: Tensor, columns: Tensor, gate: Tensor) -> None:
    tensors = {"content_BNhD": content, "v_BNhD": v, "rows_hHH": rows, "columns_hWW": columns, "gate_h": gate}
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if content.ndim != 4 or 0 in content.shape[1:]:
        raise ValueError(
            f"content_BNhD must have shape (B, N, h, D) with N, h and D at least 1, got {tuple(content.shape)}"
        )
    if v.shape != content.shape:
        raise ValueError(f"v_BNhD must have content's shape {tuple(content.shape)}, got {tuple(v.shape)}")
    _, n_tokens, n_heads, _ = content.shape
    for name, table in (("rows_hHH", rows), ("columns_hWW", columns)):
        if table.ndim != 3 or table.shape[0] != n_heads or table.shape[1] != table.shape[2]:
            raise ValueError(f"{name} must be a square table for each of {n_heads} heads, got {tuple(table.shape)}")
    if rows.shape[1] * columns.shape[1] != n_tokens:
        raise ValueError(
            f"a grid of {rows.shape[1]} rows and {columns.shape[1]} columns, by the tables, "
            f"does not have content's {n_tokens} tokens"
        )
    if gate.shape != (n_heads,):
        raise ValueError(f"gate_h must have shape ({n_heads},), one for each head, got {tuple(gate.shape)}")
    if content.dtype not in _DTYPES:
        raise TypeError(f"content_BNhD must be float64, float32, bfloat16 or float16, got {content.dtype}")
    table_dtype = torch.promote_types(content.dtype, torch.float32)
    for name, tensor in tensors.items():
        expected = content.dtype if name == "v_BNhD" else table_dtype
        if tensor is not content and tensor.dtype != expected:
            raise TypeError(f"{name} must be {expected} beside content of {content.dtype}, got {tensor.dtype}")
        if tensor.device != content.device:
            raise ValueError(f"{name} must be on content's device {content.device}, got {tensor.device}")


def _check_kernel_runs(v: Tensor) -> None:
    if not _HAS_TRITON:
        raise RuntimeError("the backend 'triton' needs Triton, which is not installed: use 'reference'")
    if v.dtype == torch.float64:
        raise TypeError("the Triton kernel has no float64: use the backend 'reference'")
    if not (v.is_cuda or _INTERPRETED):
        raise RuntimeError(
            f"the backend 'triton' needs CUDA tensors, got {v.device}; "
            "for other devices start Python with TRITON_INTERPRET=1"
        )
