"""Times upsample_concat, for the levels of a U-Net. What fails its check is not timed.

An error is the norm of the difference to the float64 reference relative to its norm, the worst of the result and both
gradients. The kernel may have 1e-6 plus twice the error of the reference in the same dtype.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vision_gates.kernels import upsample_concat as operator
from vision_gates.kernels.checking import relative_error, result_and_gradients
from vision_gates.kernels.timing import machine_facts, measure
from vision_gates.kernels.upsample_concat.reference import upsample_concat_reference

__all__ = ["CPU_SHAPES", "CUDA_SHAPES", "example", "rows"]

# Of the result without its channels, then the channels of skip and coarse map: the finest levels of the 3-D attention
# U-Net on patches of 128, and of a 2-D one on images of 512.
CPU_SHAPES = (((2, 32, 32, 32), (16, 32)), ((2, 128, 128), (32, 64)))
CUDA_SHAPES = (((2, 128, 128, 128), (32, 64)), ((2, 64, 64, 64), (64, 128)), ((16, 512, 512), (32, 64)))


def rows(
    device: str | torch.device = "cpu",
    *,
    shapes: Sequence[tuple[tuple[int, ...], tuple[int, int]]] | None = None,
    dtype: torch.dtype | None = None,
    min_seconds: float = 0.2,
) -> list[dict[str, Any]]:
    """Check and time each backend on each shape; columns as in ``timing.measure``.

    Defaults: CPU_SHAPES in float32, or CUDA_SHAPES in bfloat16. The reference is the peer: PyTorch's interpolation and
    concatenation of channels-last tensors. Each number is measured for about ``min_seconds``. Raises RuntimeError when
    the kernel misses its error limit.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
    backends = ("reference", "triton") if on_cuda and operator._HAS_TRITON else ("reference",)
    about = {"dtype": str(dtype).removeprefix("torch."), **machine_facts(device)}
    result: list[dict[str, Any]] = []
    for size, channels in shapes or (CUDA_SHAPES if on_cuda else CPU_SHAPES):
        inputs, dy = _inputs(size, channels, device, dtype)
        errors = _check(backends, inputs, dy)
        for backend, error in zip(backends, errors, strict=True):
            columns = measure(_call(backend), inputs, dy, min_seconds=min_seconds)
            row = {"op": "upsample_concat", "backend": backend, "shape": (*size, *channels)}
            result.append({**row, **columns, "worst_error": error, **about})
    return result


def example(device: torch.device) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """The operator, arguments of the first shape and a gradient of the output: what a cold process runs once."""
    shapes, dtype = (CUDA_SHAPES, torch.bfloat16) if device.type == "cuda" else (CPU_SHAPES, torch.float32)
    return operator.upsample_concat, *_inputs(*shapes[0], device, dtype)


def _call(backend: str) -> Callable[..., Tensor]:
    return partial(operator.upsample_concat, backend=backend)


def _inputs(
    size: tuple[int, ...], channels: tuple[int, int], device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """Skip connection and coarse map, and a gradient of the output; all channels-last."""
    generator = torch.Generator().manual_seed(0)
    batch, *fine = size
    coarse = [n // 2 for n in fine]

    def make(positions: Sequence[int], width: int) -> Tensor:
        x = torch.randn((batch, *positions, width), generator=generator)
        return x.to(device, dtype).movedim(-1, 1)

    skip_C, coarse_C = channels
    inputs = [make(fine, skip_C).requires_grad_(), make(coarse, coarse_C).requires_grad_()]
    return inputs, make(fine, skip_C + coarse_C)


def _check(backends: Sequence[str], inputs: Sequence[Tensor], dy: Tensor) -> list[float]:
    """The error of each backend."""
    exact = result_and_gradients(
        upsample_concat_reference, [x.detach().double().requires_grad_() for x in inputs], dy.double()
    )
    errors: list[float] = []
    for backend in backends:
        got = result_and_gradients(_call(backend), inputs, dy)
        errors.append(max(map(relative_error, got, exact)))
        limit = 1e-6 + 2 * errors[0]
        if not errors[-1] <= limit or errors[0] > 0.02:  # also when NaN
            raise RuntimeError(
                f"{backend} backend, shape {tuple(dy.shape)}, {dy.dtype}: error is {errors[-1]:.1e}, "
                f"above its limit {limit:.1e}; nothing was timed"
            )
    return errors
