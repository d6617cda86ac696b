"""Log-decays of a gated linear attention from logits of low rank: the operator's public function."""

import math
import os
from importlib.util import find_spec

import torch
from torch import Tensor

from vision_gates.kernels.launching import autocast_dtype, is_exporting
from vision_gates.kernels.low_rank_decay.reference import low_rank_decay_reference

__all__ = ["low_rank_decay"]

_BACKENDS = ("reference", "triton")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None


def low_rank_decay(
    low_rank: Tensor, weight: Tensor, bias: Tensor, *, temperature: float, backend: str | None = None
) -> Tensor:
    """Bring gates of low rank to full width and turn them into log-decays: logsigmoid(low_rank W^T + b) / temperature.

    Source: GLA, arXiv 2312.06635, section 4.4; a higher temperature forgets more slowly. The kernel writes neither the
    logits nor their log-sigmoid, sums in float32 and keeps only its arguments for the backward pass. Under autocast
    they are cast as ``F.linear`` does.

    Args:
        low_rank: (..., R), any strides; rows of a wider projection are read where they are.
        weight: (K, R), as ``nn.Linear(R, K)`` stores it.
        bias: (K,).
        temperature: positive; divides the log-sigmoid.
        backend: "reference" (PyTorch: any device, torch.compile, torch.export, ONNX) or "triton" (CUDA). By default
            CUDA tensors take the Triton kernel, float64 and all others the reference.

    Returns:
        (..., K) in low_rank's dtype (under autocast in autocast's), at most 0, differentiable in the three tensors
        (once).

    Raises:
        TypeError: an argument is no tensor, or a dtype is not supported or differs from low_rank's.
        ValueError: shapes or devices do not fit together, the temperature is not positive and finite, or the backend is
            unknown.
        RuntimeError: the backend "triton" was asked for and is not available.
    """
    _check_tensors(low_rank, weight, bias)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    autocast = autocast_dtype(low_rank, weight, bias)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if autocast is None and tensor.dtype != low_rank.dtype:
            raise TypeError(f"{name} must be {low_rank.dtype} like low_rank, got {tensor.dtype}")
    if backend is None:
        on_kernel = _HAS_TRITON and low_rank.is_cuda and low_rank.dtype != torch.float64 and not is_exporting()
        backend = "triton" if on_kernel else "reference"
    if backend == "reference":
        return low_rank_decay_reference(low_rank, weight, bias, temperature=temperature)
    if backend != "triton":
        raise ValueError(f"backend must be one of {_BACKENDS} or None, got {backend!r}")
    _check_kernel_runs(low_rank)
    from vision_gates.kernels.low_rank_decay.kernel import low_rank_decay_triton

    if autocast is not None:
        low_rank, weight, bias = low_rank.to(autocast), weight.to(autocast), bias.to(autocast)
    return low_rank_decay_triton(low_rank, weight, bias, temperature=temperature)


def _check_tensors(low_rank: Tensor, weight: Tensor, bias: Tensor) -> None:
    for name, tensor in (("low_rank", low_rank), ("weight", weight), ("bias", bias)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device != low_rank.device:
            raise ValueError(f"{name} must be on low_rank's device {low_rank.device}, got {tensor.device}")
    if low_rank.ndim == 0 or low_rank.shape[-1] == 0:
        raise ValueError(f"low_rank must have shape (..., R) with R at least 1, got {tuple(low_rank.shape)}")
    if weight.ndim != 2 or weight.shape[0] == 0:
        raise ValueError(f"weight must have shape (K, R) with K at least 1, got {tuple(weight.shape)}")
    if weight.shape[1] != low_rank.shape[-1]:
        raise ValueError(
            f"weight must have as many columns as low_rank has channels, {low_rank.shape[-1]}, "
            f"got {tuple(weight.shape)}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},) like weight's rows, got {tuple(bias.shape)}")


def _check_kernel_runs(low_rank: Tensor) -> None:
    if not _HAS_TRITON:
        raise RuntimeError("the backend 'triton' needs the package triton, which is not installed: use 'reference'")
    if low_rank.dtype == torch.float64:
        raise TypeError("the Triton kernel has no float64: use the backend 'reference'")
    if not low_rank.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"the Triton kernel needs a CUDA tensor, got one on {low_rank.device}: use the backend 'reference', or set "
            "TRITON_INTERPRET=1 to debug it on the CPU"
        )
