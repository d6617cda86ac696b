"""Depthwise 3x3 convolution of channels-last images, with SiLU if wanted: the operator's public function."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from vision_gates.kernels.depthwise_conv3x3.reference import depthwise_conv3x3_reference
from vision_gates.kernels.launching import is_exporting

__all__ = ["depthwise_conv3x3"]

_BACKENDS = ("reference", "triton")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton, too, reads it once


def depthwise_conv3x3(x: Tensor, weight: Tensor, *, activation: bool = False, backend: str | None = None) -> Tensor:
    """Convolve each channel with its own 3x3 taps; stride 1, zeros around the image, no bias.

    The local view in ViG's token mixer (arXiv 2405.18425, section 3.3)::

        z[b, h, w, c] = sum over i, j in 0..2 of weight[c, 0, i, j] * x[b, h + i - 1, w + j - 1, c]

    and the result is z, or z * sigmoid(z) with ``activation``. The kernel sums in float32 and keeps nothing but ``x``
    and ``weight`` for the backward pass. Under autocast the arguments are cast as ``F.conv2d`` does.

    Args:
        x: images, (B, H, W, C), H and W from 1. Any strides; the kernel copies only what is not dense along C.
        weight: (C, 1, 3, 3), as ``nn.Conv2d(C, C, 3, groups=C)`` stores it; in x's dtype, or float32 where x is half.
        activation: apply SiLU to the result (ViG-T).
        backend: "reference" (PyTorch: any device, torch.compile, torch.export, ONNX) or "triton" (CUDA, not float64).
            By default CUDA tensors take the Triton kernel, float64 and all others the reference.

    Returns:
        (B, H, W, C) in x's dtype (under autocast in autocast's), contiguous, differentiable in both arguments (by the
        kernel: once).

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported or does not fit x's.
        ValueError: shapes or devices do not fit together, or the backend is unknown.
        RuntimeError: the backend "triton" was asked for and is not available.
    """
    _check_arguments(x, weight)
    if backend is None:
        # An exported graph holds plain operators, for whatever runs it.
        on_kernel = x.is_cuda and _HAS_TRITON and x.dtype != torch.float64 and not is_exporting()
        backend = "triton" if on_kernel else "reference"
    if backend == "reference":
        return depthwise_conv3x3_reference(x, weight, activation=activation)
    if backend != "triton":
        raise ValueError(f"backend must be one of {_BACKENDS} or None, got {backend!r}")
    _check_kernel_runs(x)
    from vision_gates.kernels.depthwise_conv3x3.kernel import depthwise_conv3x3_triton

    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        x = x.to(torch.get_autocast_dtype(device_type))
    return depthwise_conv3x3_triton(x, weight, activation=activation)


def _check_arguments(x: Tensor, weight: Tensor) -> None:
    for name, tensor in (("x", x), ("weight", weight)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must have shape (B, H, W, C) with H, W and C at least 1, got {tuple(x.shape)}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    if weight.shape != (x.shape[-1], 1, 3, 3):
        raise ValueError(f"weight must have shape ({x.shape[-1]}, 1, 3, 3) to fit x, got {tuple(weight.shape)}")
    if weight.dtype != x.dtype and (weight.dtype != torch.float32 or x.dtype == torch.float64):
        expected = "torch.float64 like x" if x.dtype == torch.float64 else f"{x.dtype} like x or torch.float32"
        raise TypeError(f"weight must be {expected}, got {weight.dtype}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")


def _check_kernel_runs(x: Tensor) -> None:
    if not _HAS_TRITON:
        raise RuntimeError("the backend 'triton' needs Triton, which is not installed: use 'reference'")
    if x.dtype == torch.float64:
        raise TypeError("the Triton kernel has no float64: use the backend 'reference'")
    if not (x.is_cuda or _INTERPRETED):
        raise RuntimeError(
            f"the backend 'triton' needs CUDA tensors, got {x.device}; "
            "for other devices start Python with TRITON_INTERPRET=1"
        )
