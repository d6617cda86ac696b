"""A U-Net's way up: enlarge the coarse map linearly and append it to the skip connection; the public function."""

import os
from importlib.util import find_spec

import torch
from torch import Tensor

from vision_gates.kernels.launching import is_exporting, surely_equal
from vision_gates.kernels.upsample_concat.reference import upsample_concat_reference

__all__ = ["upsample_concat"]

_BACKENDS = ("reference", "triton")
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HAS_TRITON = find_spec("triton") is not None


def upsample_concat(skip: Tensor, coarse: Tensor, *, backend: str | None = None) -> Tensor:
    """Resize ``coarse`` linearly to the size of ``skip`` and concatenate: skip's channels first.

    The same as ``torch.cat((skip, F.interpolate(coarse, size=..., align_corners=False)), dim=1)``, in images
    ("bilinear") and volumes ("trilinear").

    Args:
        skip: (B, C, *S), S two or three axes, any strides.
        coarse: (B, C', *S'), any strides. The kernel wants S = 2 S', the ratio of a U-Net's levels.
        backend: "reference" (PyTorch: any device and ratio, torch.compile, torch.export, ONNX) or "triton" (CUDA). By
            default CUDA tensors at the ratio 2 take the Triton kernel, float64 and all others the reference.

    Returns:
        (B, C + C', *S), differentiable. Of the kernel: in channels-last memory, whatever the inputs' is.

    Raises:
        TypeError: an argument is no tensor, its dtype is not supported, or the two differ in dtype.
        ValueError: the ranks, batch sizes or devices do not fit together, the backend is not one of the above, or it is
            "triton" and the sizes' ratio is not 2.
        RuntimeError: the backend "triton" was asked for and is not available.
    """
    _check_arguments(skip, coarse)
    doubles = surely_equal(skip.shape[2:], [2 * size for size in coarse.shape[2:]])
    if backend is None:
        on_kernel = _HAS_TRITON and doubles and skip.is_cuda and skip.dtype != torch.float64 and not is_exporting()
        backend = "triton" if on_kernel else "reference"
    if backend == "reference":
        return upsample_concat_reference(skip, coarse)
    if backend != "triton":
        raise ValueError(f"backend must be one of {_BACKENDS} or None, got {backend!r}")
    if not doubles:
        raise ValueError(
            f"the Triton kernel doubles the size, got {tuple(coarse.shape[2:])} for {tuple(skip.shape[2:])}: "
            "use the backend 'reference'"
        )
    _check_kernel_runs(skip)
    from vision_gates.kernels.upsample_concat.kernel import upsample_concat_triton

    return upsample_concat_triton(skip, coarse)


def _check_arguments(skip: Tensor, coarse: Tensor) -> None:
    for name, x in (("skip", skip), ("coarse", coarse)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dtype not in _DTYPES:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}")
        if x.ndim not in (4, 5) or 0 in x.shape[1:]:
            raise ValueError(
                f"{name} must have shape (B, C, H, W) or (B, C, D, H, W), C and sizes at least 1, got {tuple(x.shape)}"
            )
    if skip.dtype != coarse.dtype:
        raise TypeError(f"skip and coarse must have one dtype, got {skip.dtype} and {coarse.dtype}")
    if skip.ndim != coarse.ndim or skip.shape[0] != coarse.shape[0]:
        raise ValueError(
            "skip and coarse must have as many axes and the same batch size, "
            f"got {tuple(skip.shape)} and {tuple(coarse.shape)}"
        )
    if skip.device != coarse.device:
        raise ValueError(f"skip and coarse must be on one device, got {skip.device} and {coarse.device}")


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
