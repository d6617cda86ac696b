"""Depthwise convolution of channels-last maps and the product with a gate, in one pass: the public function."""

import os
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from vision_gates.kernels.gated_depthwise.reference import gated_depthwise_reference, recursive_gating_reference
from vision_gates.kernels.launching import autocast_dtype, is_exporting

__all__ = ["gated_depthwise", "recursive_gating"]

_BACKENDS = ("reference", "triton")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LARGEST_K = 7  # of the kernel, whose code grows with K * K
_HAS_TRITON = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton, too, reads it once


def gated_depthwise(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Convolve each channel with its own K x K taps and multiply by the gate; stride 1, zeros around the image.

    The step of HorNet's recursive gated convolution (arXiv 2207.14284, section 3.1)::

        y[b, h, w, c] = gate[b, h, w, c] * scale * (
            bias[c] + sum over i, j in 0..K-1 of weight[c, 0, i, j] * x[b, h + i - K // 2, w + j - K // 2, c]
        )

    The kernel sums in float32, rounds the result once and keeps nothing but the arguments for the backward pass. Under
    autocast ``x`` and ``gate`` are cast as ``F.conv2d`` casts its input.

    Args:
        x: maps, (B, H, W, C), H, W and C from 1. Any strides, such as a slice of the channels of a wider map; the
            kernel copies only what is not dense along C.
        gate: like x, in its dtype; None stands for ones (a plain depthwise convolution).
        weight: (C, 1, K, K) with an odd K, as ``nn.Conv2d(C, C, K, groups=C)`` stores it; in x's dtype, or float32
            where x is half.
        bias: (C,), in x's dtype or float32, or None.
        scale: a number.
        backend: "reference" (PyTorch: any device, torch.compile, torch.export, ONNX) or "triton" (CUDA, not float64, K
            up to 7). By default CUDA tensors take the Triton kernel where it can, all others the reference.

    Returns:
        (B, H, W, C) in x's dtype (under autocast in autocast's), contiguous, differentiable in all four tensors (by
        the kernel: once).

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported or does not fit x's.
        ValueError: shapes or devices do not fit together, K is even or too large for "triton", or the backend is
            unknown.
        RuntimeError: the backend "triton" was asked for and is not available.
    """
    _check_shapes(x, gate, weight, bias)
    dtype = autocast_dtype(x)
    if dtype is not None:
        x, gate = x.to(dtype), gate if gate is None else gate.to(dtype)
    _check_dtypes(x, gate, weight, bias)
    backend = _backend(x, weight) if backend is None else backend
    if backend == "reference":
        return gated_depthwise_reference(x, gate, weight, bias, scale=scale)
    if backend != "triton":
        raise ValueError(f"backend must be one of {_BACKENDS} or None, got {backend!r}")
    _check_kernel_runs(x, weight)
    from vision_gates.kernels.gated_depthwise.kernel import gated_depthwise_triton

    return gated_depthwise_triton(x, gate, weight, bias, float(scale))


def recursive_gating(
    projected: Tensor,
    weight: Tensor,
    bias: Tensor,
    matrices: Sequence[Tensor],
    offsets: Sequence[Tensor],
    *,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """HorNet's gnConv between its two projections, of order n: n convolutions, each a gate of what came before.

    With widths c_0 .. c_(n-1)::

        p, q_0, ..., q_(n-1) = split(projected, c_0, c_0, ..., c_(n-1))
        y_0 = gated_depthwise(q_0, p)
        y_i = gated_depthwise(q_i, matrices[i - 1] y_(i-1) + offsets[i - 1])

    The kernel keeps the projection and each y_i for the backward pass, nothing else.

    Args:
        projected: (B, H, W, c_0 + c_0 + ... + c_(n-1)).
        weight: taps of all convolutions, (c_0 + ... + c_(n-1), 1, K, K) with an odd K.
        bias: of the convolutions, (c_0 + ... + c_(n-1),).
        matrices: n - 1 of shape (c_i, c_(i-1)), as ``nn.Linear`` has them, in projected's dtype (any under autocast).
        offsets: n - 1 of shape (c_i,), likewise.
        scale: of the convolutions.
        backend: as in :func:`gated_depthwise`.

    Returns:
        y_(n-1), (B, H, W, c_(n-1)), in projected's dtype (under autocast in autocast's), differentiable in all tensors
        (by the kernel: once).

    Raises:
        TypeError, ValueError, RuntimeError: as in :func:`gated_depthwise`; also where the widths do not add up.
    """
    dtype = autocast_dtype(projected)
    if dtype is not None:
        projected = projected.to(dtype)
        matrices, offsets = [x.to(dtype) for x in matrices], [x.to(dtype) for x in offsets]
    first = projected.shape[-1] - weight.shape[0]
    widths = [first, *(matrix.shape[0] for matrix in matrices)]
    if first < 1 or sum(widths) != weight.shape[0]:
        raise ValueError(
            f"projected must have {weight.shape[0]} channels to convolve and the first order's besides, got "
            f"{projected.shape[-1]} channels for orders of {widths}"
        )
    for i, (matrix, offset) in enumerate(zip(matrices, offsets, strict=True)):
        if matrix.shape != (widths[i + 1], widths[i]) or offset.shape != (widths[i + 1],):
            raise ValueError(
                f"matrices[{i}] and offsets[{i}] must have the shapes {(widths[i + 1], widths[i])} and "
                f"{(widths[i + 1],)}, got {tuple(matrix.shape)} and {tuple(offset.shape)}"
            )
        if not matrix.dtype == offset.dtype == projected.dtype:
            raise TypeError(
                f"matrices[{i}] and offsets[{i}] must be {projected.dtype}, got {matrix.dtype}, {offset.dtype}"
            )
    _check_shapes(projected[..., first:], None, weight, bias)
    _check_dtypes(projected, None, weight, bias)
    backend = _backend(projected, weight) if backend is None else backend
    arguments = projected, weight, bias, list(matrices), list(offsets)
    if backend == "reference":
        return recursive_gating_reference(*arguments, scale=scale)
    if backend != "triton":
        raise ValueError(f"backend must be one of {_BACKENDS} or None, got {backend!r}")
    _check_kernel_runs(projected, weight)
    from vision_gates.kernels.gated_depthwise.recursion import recursive_gating_triton

    return recursive_gating_triton(*arguments, float(scale))


def _backend(x: Tensor, weight: Tensor) -> str:
    # An exported graph holds plain operators, for whatever runs it.
    fits_kernel = x.is_cuda and x.dtype != torch.float64 and weight.shape[-1] <= _LARGEST_K
    return "triton" if fits_kernel and _HAS_TRITON and not is_exporting() else "reference"


def _check_shapes(x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("x", x), ("gate", gate), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor) and (tensor is not None or name in ("x", "weight")):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must have shape (B, H, W, C) with H, W and C at least 1, got {tuple(x.shape)}")
    C = x.shape[-1]
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"gate must have x's shape {tuple(x.shape)}, got {tuple(gate.shape)}")
    K = weight.shape[-1] if weight.ndim else 0
    if weight.shape != (C, 1, K, K) or K % 2 == 0:
        raise ValueError(f"weight must have shape ({C}, 1, K, K) with an odd K to fit x, got {tuple(weight.shape)}")
    if bias is not None and bias.shape != (C,):
        raise ValueError(f"bias must have shape ({C},) to fit x, got {tuple(bias.shape)}")
    for name, tensor in (("gate", gate), ("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {tensor.device}")


def _check_dtypes(x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if gate is not None and gate.dtype != x.dtype:
        raise TypeError(f"gate must be {x.dtype} like x, got {gate.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None or tensor.dtype == x.dtype:
            continue
        if tensor.dtype != torch.float32 or x.dtype == torch.float64:
            choice = "" if x.dtype in (torch.float32, torch.float64) else " or torch.float32"
            raise TypeError(f"{name} must be {x.dtype} like x{choice}, got {tensor.dtype}")


def _check_kernel_runs(x: Tensor, weight: Tensor) -> None:
    if not _HAS_TRITON:
        raise RuntimeError("the backend 'triton' needs Triton, which is not installed: use 'reference'")
    if x.dtype == torch.float64:
        raise TypeError("the Triton kernel has no float64: use the backend 'reference'")
    if weight.shape[-1] > _LARGEST_K:
        raise ValueError(f"the Triton kernel has K up to {_LARGEST_K}, got {weight.shape[-1]}: use 'reference'")
    if not (x.is_cuda or _INTERPRETED):
        raise RuntimeError(
            f"the backend 'triton' needs CUDA tensors, got {x.device}; "
            "for other devices start Python with TRITON_INTERPRET=1"
        )
