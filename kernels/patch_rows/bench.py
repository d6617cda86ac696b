"""Times patch_rows, for the first convolution of ViG. What fails its check is not timed.

The output has to be that of the reference, bit for bit. An error is the norm of the difference of the gradient to that
of the float64 reference, relative to its norm. The reference may have 1e-5 plus four times the error of rounding the
exact gradient to the dtype (it rounds every sum), the kernel 1e-6 plus twice the error of the reference.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vision_gates.kernels import patch_rows as operator
from vision_gates.kernels.checking import relative_error
from vision_gates.kernels.patch_rows.reference import patch_rows_reference
from vision_gates.kernels.timing import machine_facts, measure

__all__ = ["CPU_SHAPES", "CUDA_SHAPES", "example", "rows"]

# (B, C, H, W): images of 224, 1024 and 2048 pixels.
CPU_SHAPES = ((8, 3, 224, 224),)
CUDA_SHAPES = ((128, 3, 224, 224), (8, 3, 1024, 1024), (2, 3, 2048, 2048))
_WINDOW = {"kernel_size": 9, "stride": 8, "padding": 1}  # of ViG's first convolution


def rows(
    device: str | torch.device = "cpu",
    *,
    shapes: Sequence[tuple[int, int, int, int]] | None = None,
    dtype: torch.dtype | None = None,
    min_seconds: float = 0.2,
) -> list[dict[str, Any]]:
    """Check and time each backend on each shape (B, C, H, W); columns as in ``timing.measure``.

    Defaults: CPU_SHAPES in float32, or CUDA_SHAPES in bfloat16. The reference is the peer: PyTorch's padding and one
    copy of a view. Each number is measured for about ``min_seconds``. ``worst_error`` is the error of the gradient.
    Raises RuntimeError when an output differs or a backend misses its error limit.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
    backends = ("reference", "triton") if on_cuda and operator._HAS_TRITON else ("reference",)
    about = {"dtype": str(dtype).removeprefix("torch."), **machine_facts(device)}
    result: list[dict[str, Any]] = []
    for shape in shapes or (CUDA_SHAPES if on_cuda else CPU_SHAPES):
        (x,), dy = _inputs(shape, device, dtype)
        errors = _check(backends, x, dy)
        for backend, error in zip(backends, errors, strict=True):
            columns = measure(_call(backend), [x], dy, min_seconds=min_seconds)
            row = {"op": "patch_rows", "backend": backend, "shape": shape}
            result.append({**row, **columns, "worst_error": error, **about})
    return result


def example(device: torch.device) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """The operator, arguments of the first shape and a gradient of the output: what a cold process runs once."""
    shape, dtype = (CUDA_SHAPES[0], torch.bfloat16) if device.type == "cuda" else (CPU_SHAPES[0], torch.float32)
    return partial(operator.patch_rows, **_WINDOW), *_inputs(shape, device, dtype)


def _call(backend: str) -> Callable[..., Tensor]:
    return partial(operator.patch_rows, **_WINDOW, backend=backend)


def _inputs(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Images, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(device, dtype)
    dy = torch.randn(patch_rows_reference(x, **_WINDOW).shape, generator=generator).to(device, dtype)
    return [x.requires_grad_()], dy


def _run(function: Callable[..., Tensor], x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def _check(backends: Sequence[str], x: Tensor, dy: Tensor) -> list[float]:
    """The error of each backend's gradient."""
    about = f"backend, shape {tuple(x.shape)}, {x.dtype}"
    reference = partial(patch_rows_reference, **_WINDOW)
    exact_y, exact_dx = _run(reference, x.detach().double().requires_grad_(), dy.double())
    limit = 1e-5 + 4 * relative_error(exact_dx.to(x.dtype), exact_dx)
    errors = []
    for backend in backends:
        y, dx = _run(_call(backend), x, dy)
        if not torch.equal(y, exact_y.to(x.dtype)):
            raise RuntimeError(f"{backend} {about}: the output is not that of the reference; nothing was timed")
        error = relative_error(dx, exact_dx)
        if not error <= limit:  # also when NaN
            raise RuntimeError(
                f"{backend} {about}: error of dx is {error:.1e}, above its limit {limit:.1e}; nothing was timed"
            )
        if backend == "reference":
            limit = 1e-6 + 2 * error
        errors.append(error)
    return errors
