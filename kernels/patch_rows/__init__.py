"""Patches of images as the rows of a matrix (im2col): the operator's public function."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from vision_gates.kernels.launching import is_exporting
from vision_gates.kernels.patch_rows.reference import patch_rows_reference

__all__ = ["patch_rows"]

_BACKENDS = ("reference", "triton")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None


def patch_rows(x: Tensor, *, kernel_size: int, stride: int, padding: int, backend: str | None = None) -> Tensor:
    """Gather the pixels that each position of a convolution sees into one row: its product with the weights is left.

    Row (i, j) holds x[c, stride * i + ky - padding, stride * j + kx - padding] in the order (c, ky, kx), as
    ``conv.weight.flatten(1)`` has it, with zeros outside of the image; the same as ``F.unfold``, transposed. Columns
    of zeros fill the rows up to a multiple of 8, so that each starts at an address that tensor cores can read.

    Args:
        x: (B, C, H, W), any strides.
        kernel_size, stride, padding: of the convolution, in pixels, the same both ways.
        backend: "reference" (PyTorch: any device, torch.compile, torch.export, ONNX) or "triton" (CUDA). By default
            CUDA tensors take the Triton kernel, float64 and all others the reference.

    Returns:
        (B, H', W', K) in x's dtype, contiguous, differentiable. H' = (H + 2 * padding - kernel_size) // stride + 1, so
        W'; K is C * kernel_size**2 rounded up to a multiple of 8.

    Raises:
        TypeError: x is no tensor or its dtype is not supported, or a size is no integer.
        ValueError: the shape of x, a size or the backend is not one of the above, or no window fits into the image.
        RuntimeError: the backend "triton" was asked for and is not available.
    """
    _check_arguments(x, kernel_size, stride, padding)
    if backend is None:
        on_kernel = _HAS_TRITON and x.is_cuda and x.dtype != torch.float64 and not is_exporting()
        backend = "triton" if on_kernel else "reference"
    if backend == "reference":
        return patch_rows_reference(x, kernel_size=kernel_size, stride=stride, padding=padding)
    if backend != "triton":
        raise ValueError(f"backend must be one of {_BACKENDS} or None, got {backend!r}")
    _check_kernel_runs(x)
    from vision_gates.kernels.patch_rows.kernel import patch_rows_triton

    return patch_rows_triton(x, kernel_size, stride, padding)


def _check_arguments(x: Tensor, kernel_size: int, stride: int, padding: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES:
        raise TypeError(f"x must be float64, float32, bfloat16 or float16, got {x.dtype}")
    for name, value, least in (("kernel_size", kernel_size, 1), ("stride", stride, 1), ("padding", padding, 0)):
        if not isinstance(value, int):
            raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if x.ndim != 4 or 0 in x.shape[1:]:
        raise ValueError(f"x must have shape (B, C, H, W) with C, H and W at least 1, got {tuple(x.shape)}")
    H, W = x.shape[2:]
    if min(H, W) + 2 * padding < kernel_size:
        raise ValueError(
            f"an image of {H}x{W} pixels with a padding of {padding} is too small for a kernel of {kernel_size}: "
            f"each side needs at least {kernel_size - 2 * padding}"
        )


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
