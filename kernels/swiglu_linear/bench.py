"""Times swiglu_linear against PyTorch's composition and the linear layer alone. What fails its check is not timed.

An error is the norm of the difference to the float64 reference, relative to the norm of the reference, of the output
and of each gradient. The reference may have 1e-5 plus four times the error of rounding the exact result to the dtype
(it rounds the product before the gate), a kernel 1e-6 plus twice the error of the reference.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_gates.kernels import swiglu_linear as operator
from vision_gates.kernels.checking import result_and_gradients, worst_errors
from vision_gates.kernels.swiglu_linear.reference import swiglu_linear_reference
from vision_gates.kernels.timing import machine_facts, measure

__all__ = ["CPU_SHAPES", "CUDA_SHAPES", "example", "rows"]

# (M, C, D): ViG-T, -S, -B on 128 images of 224 x 224, ViG-T on 8 of 1024 x 1024; first and last stage of ViG-H-T.
CPU_SHAPES = ((1568, 192, 512),)
CUDA_SHAPES = (
    (25088, 192, 512),
    (25088, 384, 1024),
    (25088, 768, 2048),
    (32768, 192, 512),
    (401408, 96, 256),
    (6272, 768, 2048),
)
_NAMES = ("the output", "dx", "dweight")
_CHECKED_ROWS = 1111  # enough to see a mixed-up tile, and a remainder


def rows(
    device: str | torch.device = "cpu",
    *,
    shapes: Sequence[tuple[int, int, int]] | None = None,
    dtype: torch.dtype | None = None,
    min_seconds: float = 0.2,
    peers: bool = True,
) -> list[dict[str, Any]]:
    """Check and time each backend, then the peer, on each shape (M, C, D); columns as in ``timing.measure``.

    Defaults: CPU_SHAPES in float32, or CUDA_SHAPES in bfloat16. The peer: ``F.linear`` with the same arguments, whose
    result is twice as wide. ``tflops_*`` count the products of the definition, not those that a kernel repeats. Each
    number is measured for about ``min_seconds``. ``worst_error`` is the largest error of the output and the gradients.
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
            columns = _measure(_call(backend), inputs, upstream, min_seconds)
            row = {"op": "swiglu_linear", "backend": backend, "shape": shape}
            result.append({**row, **columns, "worst_error": worst_error, **about})
        if peers:
            columns = _measure(F.linear, inputs, torch.cat((upstream, upstream), dim=1), min_seconds)
            result.append({"op": "linear", "backend": "torch", "shape": shape, **columns, **about})
    return result


def example(device: torch.device) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """The operator, arguments of the first shape and a gradient of the output: what a cold process runs once."""
    shape, dtype = (CUDA_SHAPES[0], torch.bfloat16) if device.type == "cuda" else (CPU_SHAPES[0], torch.float32)
    return operator.swiglu_linear, *_inputs(shape, device, dtype)


def _call(backend: str) -> Callable[..., Tensor]:
    return lambda *tensors: operator.swiglu_linear(*tensors, backend=backend)


def _inputs(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """x, a weight that keeps its size, and a gradient of the output."""
    M, C, D = shape
    generator = torch.Generator().manual_seed(0)
    x, weight, dh = (torch.randn(size, generator=generator) for size in ((M, C), (2 * D, C), (M, D)))
    return [tensor.to(device, dtype).requires_grad_() for tensor in (x, weight * C**-0.5)], dh.to(device, dtype)


def _measure(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor, min_seconds: float
) -> dict[str, Any]:
    columns = measure(function, inputs, upstream, min_seconds=min_seconds)
    x, weight = inputs
    tera = 2e-12 * x.shape[0] * weight.numel()
    for name, products in (("forward", 1), ("forward_backward", 3)):
        milliseconds = columns[f"ms_{name}_graph"] or columns[f"ms_{name}"]
        columns[f"tflops_{name}"] = products * tera / (1e-3 * milliseconds)
    return columns


def _check(
    backends: Sequence[str], shape: tuple[int, int, int], device: torch.device, dtype: torch.dtype
) -> list[float]:
    """The worst error of each backend."""
    M, C, D = shape
    tensors, dh = _inputs((min(M, _CHECKED_ROWS), C, D), device, dtype)
    exact = result_and_gradients(
        swiglu_linear_reference, [x.detach().double().requires_grad_() for x in tensors], dh.double()
    )
    return worst_errors(
        backends,
        lambda backend: result_and_gradients(_call(backend), tensors, dh),
        exact,
        names=_NAMES,
        dtype=dtype,
        about=f"shape {shape}",
    )
