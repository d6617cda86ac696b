"""A residual sum and its RMS normalisation in one pass: the operator's public function."""

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vision_gates.kernels.add_rms_norm.reference import add_rms_norm_reference
from vision_gates.kernels.launching import is_exporting

__all__ = ["add_rms_norm"]

_BACKENDS = ("reference", "triton")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None
_MAX_CHANNELS = 8192  # of the kernel, which holds whole rows


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a block's output to the residual stream, and normalise the sum over the last axis for the next block.

    ::

        s = x + residual
        y = s * rsqrt(mean of s^2 over the C channels + eps) * weight

    Source: Root Mean Square Layer Normalization, arXiv 1910.07467. y is computed in float32 (float64 for float64
    arguments) from s as it is returned, and rounded once; autocast changes nothing.

    Args:
        x: (..., C), any strides.
        residual: the residual stream in x's shape, of any of the dtypes; None: s is x itself.
        weight: (C,), of any of the dtypes.
        eps: added to the mean square before the root.
        out_dtype: of y; by default that of s. A half type spares the next, half-precision layer a pass.
        backend: "reference" (PyTorch: any device, torch.compile, torch.export, ONNX) or "triton" (CUDA, up to 8,192
            channels, not float64). By default CUDA tensors take the Triton kernel where it can, all others the
            reference.

    Returns:
        y and s, both (..., C); s in the dtype of x + residual. Differentiable in all tensors, through both results (by
        the kernel: once).

    Raises:
        TypeError: a tensor argument is no tensor, or a dtype is not supported.
        ValueError: shapes or devices do not fit together, the kernel cannot take them, or the backend is unknown.
        RuntimeError: the backend "triton" was asked for and is not available.
    """
    _check_arguments(x=x, residual=residual, weight=weight)
    if out_dtype is not None and out_dtype not in _DTYPES:
        raise TypeError(f"out_dtype must be float64, float32, bfloat16, float16 or None, got {out_dtype}")
    dtypes = (x.dtype, x.dtype if residual is None else residual.dtype, weight.dtype, out_dtype)
    kernel_fits = torch.float64 not in dtypes and x.shape[-1] <= _MAX_CHANNELS
    if backend is None:
        # An exported graph holds plain operators, for whatever runs it.
        backend = "triton" if x.is_cuda and _HAS_TRITON and kernel_fits and not is_exporting() else "reference"
    if backend == "reference":
        return add_rms_norm_reference(x, residual, weight, eps=eps, out_dtype=out_dtype)
    if backend != "triton":
        raise ValueError(f"backend must be one of {_BACKENDS} or None, got {backend!r}")
    if not kernel_fits:
        raise ValueError(
            f"the Triton kernel takes half and float32 tensors of up to {_MAX_CHANNELS} channels, "
            f"got {x.dtype} and {x.shape[-1]}: use the backend 'reference'"
        )
    if not _HAS_TRITON:
        raise RuntimeError("the backend 'triton' needs the package triton, which is not installed: use 'reference'")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"the Triton kernel needs CUDA tensors, got one on {x.device}: use the backend 'reference', or set "
            "TRITON_INTERPRET=1 to debug it on the CPU"
        )
    from vision_gates.kernels.add_rms_norm.kernel import add_rms_norm_triton

    return add_rms_norm_triton(x, residual, weight, eps=eps, out_dtype=out_dtype)


def _check_arguments(**tensors: Any) -> None:
    x = tensors["x"]
    for name, tensor in tensors.items():
        if name == "residual" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if x.ndim == 0 or x.shape[-1] == 0:
            raise ValueError(f"x must have shape (..., C) with C at least 1, got {tuple(x.shape)}")
        expected = x.shape[-1:] if name == "weight" else x.shape
        if tensor.shape != expected:
            raise ValueError(f"{name} must have shape {tuple(expected)} to fit x, got {tuple(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")
