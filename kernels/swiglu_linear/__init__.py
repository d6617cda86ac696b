"""SwiGLU's first half, a linear layer and its gate in one product: the operator's public function."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from vision_gates.kernels.launching import autocast_dtype, is_exporting
from vision_gates.kernels.swiglu_linear.reference import swiglu_linear_reference

__all__ = ["swiglu_linear"]

_BACKENDS = ("reference", "triton")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None


def swiglu_linear(x: Tensor, weight: Tensor, *, backend: str | None = None) -> Tensor:
    """Project the last axis twice and gate one product with the other: SiLU(x W_a^T) * (x W_b^T).

    Source: GLU Variants Improve Transformer, arXiv 2002.05202. The kernel writes neither product, sums in float32 and
    keeps nothing but ``x`` and ``weight`` for the backward pass. Under autocast both are cast as ``F.linear`` does.

    Args:
        x: (..., C), any strides.
        weight: (2 * D, C), as ``nn.Linear(C, 2 * D)`` stores it: W_a in the first D rows, W_b in the others.
        backend: "reference" (PyTorch: any device, torch.compile, torch.export, ONNX) or "triton" (CUDA). By default
            CUDA tensors take the Triton kernel, float64 and all others the reference.

    Returns:
        (..., D) in x's dtype (under autocast in autocast's), differentiable in both arguments (once).

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported or differs from x's.
        ValueError: shapes or devices do not fit together, or the backend is unknown.
        RuntimeError: the backend "triton" was asked for and is not available.
    """
    _check_tensors(x, weight)
    autocast = autocast_dtype(x, weight)
    if autocast is None and weight.dtype != x.dtype:
        raise TypeError(f"weight must be {x.dtype} like x, got {weight.dtype}")
    if backend is None:
        on_kernel = _HAS_TRITON and x.is_cuda and x.dtype != torch.float64 and not is_exporting()
        backend = "triton" if on_kernel else "reference"
    if backend == "reference":
        return swiglu_linear_reference(x, weight)
    if backend != "triton":
        raise ValueError(f"backend must be one of {_BACKENDS} or None, got {backend!r}")
    _check_kernel_runs(x)
    from vision_gates.kernels.swiglu_linear.kernel import swiglu_linear_triton

    if autocast is not None:
        x, weight = x.to(autocast), weight.to(autocast)
    return swiglu_linear_triton(x, weight)


def _check_tensors(x: Tensor, weight: Tensor) -> None:
    for name, tensor in (("x", x), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"x must have shape (..., C) with C at least 1, got {tuple(x.shape)}")
    if weight.ndim != 2 or weight.shape[0] == 0 or weight.shape[0] % 2:
        raise ValueError(f"weight must have shape (2 * D, C) with D at least 1, got {tuple(weight.shape)}")
    if weight.shape[1] != x.shape[-1]:
        raise ValueError(
            f"weight must have as many columns as x has channels, {x.shape[-1]}, got {tuple(weight.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")


def _check_kernel_runs(x: Tensor) -> None:
    if not _HAS_TRITON:
        raise RuntimeError("the backend 'triton' needs the package triton, which is not installed: use 'reference'")
    if x.dtype == torch.float64:
        raise TypeError("the Triton kernel has no float64: use the backend 'reference'")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"the Triton kernel needs a CUDA tensor, got one on {x.device}: use the backend 'reference', or set "
            "TRITON_INTERPRET=1 to debug it on the CPU"
        )
