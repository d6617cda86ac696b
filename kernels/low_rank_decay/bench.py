"""Times low_rank_decay against PyTorch's composition, which is the reference. What fails its check is not timed.

An error is the norm of the difference to the float64 reference, relative to the norm of the reference, of the output
and of each gradient. The reference may have 1e-5 plus four times the error of rounding the exact result to the dtype
(it rounds the logits before their sigmoid), a kernel 1e-6 plus twice the error of the reference.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vision_gates.kernels import low_rank_decay as operator
from vision_gates.kernels.checking import result_and_gradients, worst_errors
from vision_gates.kernels.low_rank_decay.reference import low_rank_decay_reference
from vision_gates.kernels.timing import machine_facts, measure

__all__ = ["CPU_SHAPES", "CUDA_SHAPES", "example", "rows"]

# (M, R, K): ViG-T and -S on 128 images of 224 x 224, ViG-T on 8 of 1024 x 1024.
CPU_SHAPES = ((1568, 16, 192),)
CUDA_SHAPES = ((25088, 16, 192), (25088, 16, 384), (32768, 16, 192))
_TEMPERATURE = 16.0
_NAMES = ("the output", "dlow_rank", "dweight", "dbias")
_CHECKED_ROWS = 1111  # enough to see a mixed-up tile, and a remainder


def rows(
    device: str | torch.device = "cpu",
    *,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    dtype: torch.dtype | None = None,
    min_seconds: float = 0.2,
) -> list[dict[str, Any]]:
    """Check and time each backend on each shape (M, R, K); columns as in ``timing.measure``.

    Defaults: CPU_SHAPES in float32, or CUDA_SHAPES in bfloat16. As in ViG, ``low_rank`` is the end of rows that also
    hold 3 * K other channels; the copies that a CUDA graph goes through are packed. Each number is measured for about
    ``min_seconds``. ``worst_error`` is the largest error of the output and the gradients.
    Raises RuntimeError when a backend misses its error limit.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
    backends = ["reference", "triton"] if on_cuda and operator._HAS_TRITON else ["reference"]
    about = {"dtype": str(dtype).removeprefix("torch."), **machine_facts(device)}
    result: list[dict[str, Any]] = []
    for shape in shapes or (CUDA_SHAPES if on_cuda else CPU_SHAPES):
        worst_errors = _check(backends, shape, device, dtype)
        inputs, upstream = _inputs(shape, device, dtype)
        for backend, worst_error in zip(backends, worst_errors, strict=True):
            columns = measure(_call(backend), inputs, upstream, min_seconds=min_seconds)
            row = {"op": "low_rank_decay", "backend": backend, "shape": shape}
            result.append({**row, **columns, "worst_error": worst_error, **about})
    return result


def example(device: torch.device) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """The operator, arguments of the first shape and a gradient of the output: what a cold process runs once."""
    shape, dtype = (CUDA_SHAPES[0], torch.bfloat16) if device.type == "cuda" else (CPU_SHAPES[0], torch.float32)
    return _call(None), *_inputs(shape, device, dtype)


def _call(backend: str | None) -> Callable[..., Tensor]:
    return partial(operator.low_rank_decay, temperature=_TEMPERATURE, backend=backend)


def _inputs(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """low_rank, a weight that keeps its size, the bias, and a gradient of the output."""
    M, R, K = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((M, 3 * K + R), (K, R), (K,), (M, K))
    wide, weight, bias, dg = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    return [x.requires_grad_() for x in (wide[:, -R:], weight * R**-0.5, bias)], dg


def _check(
    backends: Sequence[str], shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> list[float]:
    """The worst error of each backend."""
    M, R, K = shape
    tensors, dg = _inputs((min(M, _CHECKED_ROWS), R, K), device, dtype)
    reference = partial(low_rank_decay_reference, temperature=_TEMPERATURE)
    exact = result_and_gradients(reference, [x.detach().double().requires_grad_() for x in tensors], dg.double())
    return worst_errors(
        backends,
        lambda backend: result_and_gradients(_call(backend), tensors, dg),
        exact,
        names=_NAMES,
        dtype=dtype,
        about=f"shape {shape}",
    )
