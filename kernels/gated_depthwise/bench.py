"""Times gated_depthwise against PyTorch's convolution and product. What fails its check is not timed.

An error is the norm of the difference to the float64 reference, relative to the norm of the reference, of the output
and of each gradient. PyTorch may have 1e-5 plus eight times the error of rounding the exact result to the dtype (it
rounds every step), the kernel 1e-6 plus twice the error of PyTorch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vision_gates.kernels import gated_depthwise as operator
from vision_gates.kernels.checking import relative_error, result_and_gradients
from vision_gates.kernels.timing import machine_facts, measure

__all__ = ["CPU_SHAPES", "CUDA_SHAPES", "example", "rows"]

# (B, H, W, C): the groups of channels in the four stages of HorNet-T on 224 pixels.
CPU_SHAPES = ((8, 14, 14, 64),)
CUDA_SHAPES = (
    *((128, 56, 56, C) for C in (32, 64)),
    *((128, 28, 28, C) for C in (32, 64, 128)),
    *((128, 14, 14, C) for C in (32, 64, 128, 256)),
    *((128, 7, 7, C) for C in (32, 64, 128, 256, 512)),
)
_NAMES = ("the output", "dx", "dgate", "dweight", "dbias")


def rows(
    device: str | torch.device = "cpu",
    *,
    shapes: Sequence[tuple[int, int, int, int]] | None = None,
    dtype: torch.dtype | None = None,
    kernel_size: int = 7,
    min_seconds: float = 0.2,
) -> list[dict[str, Any]]:
    """Check and time each backend on each shape (B, H, W, C); columns as in ``timing.measure``.

    Defaults: CPU_SHAPES in float32, or CUDA_SHAPES in bfloat16. The reference is the peer: on a GPU, cuDNN's
    convolution and PyTorch's products, eager and through torch.compile ("compiled"). Each number is measured for about
    ``min_seconds``. ``worst_error`` is the largest error of the output and of the gradients.
    Raises RuntimeError when a backend misses its error limit.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
    about = {"dtype": str(dtype).removeprefix("torch."), **machine_facts(device)}
    result: list[dict[str, Any]] = []
    for shape in shapes or (CUDA_SHAPES if on_cuda else CPU_SHAPES):
        inputs, upstream = _inputs(shape, kernel_size, device, dtype)
        doubles = [x.detach().double().requires_grad_() for x in inputs]
        exact = result_and_gradients(_call("reference"), doubles, upstream.double())
        limits = [1e-5 + 8 * relative_error(x.to(dtype), x) for x in exact]
        for backend, function in _peers(on_cuda).items():
            errors = [
                relative_error(got, x)
                for got, x in zip(result_and_gradients(function, inputs, upstream), exact, strict=True)
            ]
            for name, error, limit in zip(_NAMES, errors, limits, strict=True):
                if not error <= limit:  # also when NaN
                    raise RuntimeError(
                        f"{backend} backend, shape {tuple(shape)}, {dtype}: error of {name} is {error:.1e}, "
                        f"above its limit {limit:.1e}; nothing was timed"
                    )
            if backend == "reference":
                limits = [1e-6 + 2 * error for error in errors]
            columns = measure(function, inputs, upstream, min_seconds=min_seconds)
            row = {"op": "gated_depthwise", "backend": backend, "shape": shape, "kernel_size": kernel_size}
            result.append({**row, **columns, "worst_error": max(errors), **about})
    return result


def example(device: torch.device) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """The operator, arguments of one shape and a gradient of the output: what a cold process runs once."""
    shape, dtype = ((128, 14, 14, 128), torch.bfloat16) if device.type == "cuda" else (CPU_SHAPES[0], torch.float32)
    return partial(operator.gated_depthwise, scale=0.5), *_inputs(shape, 7, device, dtype)


def _peers(on_cuda: bool) -> dict[str, Callable[..., Tensor]]:
    if not (on_cuda and operator._HAS_TRITON):
        return {"reference": _call("reference")}
    compiled = torch.compile(_call("reference"), dynamic=False)
    return {"reference": _call("reference"), "triton": _call("triton"), "compiled": compiled}


def _call(backend: str) -> Callable[..., Tensor]:
    return partial(operator.gated_depthwise, scale=0.5, backend=backend)


def _inputs(
    shape: Sequence[int], kernel_size: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    """x, gate, taps that keep x's size, a bias, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    x, gate, dy = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
    weight = torch.randn(shape[-1], 1, kernel_size, kernel_size, generator=generator) / kernel_size
    bias = torch.randn(shape[-1], generator=generator)
    leaves = [x, gate, weight.to(device, dtype), bias.to(device, dtype)]
    return [leaf.requires_grad_() for leaf in leaves], dy
