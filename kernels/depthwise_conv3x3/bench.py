"""Times depthwise_conv3x3 against PyTorch's convolution of the channels-last view. What fails its check is not timed.

An error is the norm of the difference to the float64 reference, relative to the norm of the reference, of the output
and of each gradient. PyTorch may have 1e-5 plus eight times the error of rounding the exact result to the dtype (it
rounds every step), the kernel 1e-6 plus twice the error of PyTorch.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vision_gates.kernels import depthwise_conv3x3 as operator
from vision_gates.kernels.checking import relative_error, result_and_gradients
from vision_gates.kernels.timing import machine_facts, measure

__all__ = ["CPU_SHAPES", "CUDA_SHAPES", "example", "rows"]

# (B, H, W, C): ViG-T on 224, 1024 and 2048 pixels, ViG-S and -B on 224, the first stage of ViG-H-T on 224.
CPU_SHAPES = ((8, 14, 14, 192), (1, 64, 64, 192))
CUDA_SHAPES = (
    (128, 14, 14, 192),
    (8, 64, 64, 192),
    (2, 128, 128, 192),
    (128, 14, 14, 384),
    (128, 14, 14, 768),
    (128, 56, 56, 96),
)
_NAMES = ("the output", "dx", "dweight")


def rows(
    device: str | torch.device = "cpu",
    *,
    shapes: Sequence[tuple[int, int, int, int]] | None = None,
    dtype: torch.dtype | None = None,
    activations: Sequence[bool] = (False, True),
    min_seconds: float = 0.2,
) -> list[dict[str, Any]]:
    """Check and time each backend on each shape (B, H, W, C); columns as in ``timing.measure``.

    Defaults: CPU_SHAPES in float32, or CUDA_SHAPES in bfloat16; without and with SiLU. The reference is the peer: on a
    GPU, cuDNN's convolution and PyTorch's SiLU. Each number is measured for about ``min_seconds``. ``worst_error`` is
    the largest error of the output and of the gradients.
    Raises RuntimeError when a backend misses its error limit.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
    about = {"dtype": str(dtype).removeprefix("torch."), **machine_facts(device)}
    backends = ("reference", "triton") if on_cuda and operator._HAS_TRITON else ("reference",)
    result: list[dict[str, Any]] = []
    for shape in shapes or (CUDA_SHAPES if on_cuda else CPU_SHAPES):
        inputs, upstream = _inputs(shape, device, dtype)
        doubles = [x.detach().double().requires_grad_() for x in inputs]
        for activation in activations:
            exact = result_and_gradients(_call("reference", activation), doubles, upstream.double())
            limits = [1e-5 + 8 * relative_error(x.to(dtype), x) for x in exact]
            for backend in backends:
                function = _call(backend, activation)
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
                row = {"op": "depthwise_conv3x3", "backend": backend, "shape": shape, "activation": activation}
                result.append({**row, **columns, "worst_error": max(errors), **about})
    return result


def example(device: torch.device) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """The operator, arguments of the first shape and a gradient of the output: what a cold process runs once."""
    shape, dtype = (CUDA_SHAPES[0], torch.bfloat16) if device.type == "cuda" else (CPU_SHAPES[0], torch.float32)
    return partial(operator.depthwise_conv3x3, activation=True), *_inputs(shape, device, dtype)


def _call(backend: str, activation: bool) -> Callable[..., Tensor]:
    return partial(operator.depthwise_conv3x3, activation=activation, backend=backend)


def _inputs(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """x, taps that keep its size, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    weight = (torch.randn(shape[-1], 1, 3, 3, generator=generator) / 3).to(device, dtype)
    return [x.requires_grad_(), weight.requires_grad_()], dy
