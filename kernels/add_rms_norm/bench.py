"""Times add_rms_norm against PyTorch's composition. What fails its check is not timed.

An error is the norm of the difference to the float64 reference, relative to the norm of the reference, of each result
and of each gradient. The reference may have 1e-5 plus four times the error of rounding the exact result to the dtype
(it rounds the sum before the normalisation), a kernel 1e-6 plus twice the error of the reference.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_gates.kernels import add_rms_norm as operator
from vision_gates.kernels.add_rms_norm.reference import add_rms_norm_reference
from vision_gates.kernels.checking import worst_errors
from vision_gates.kernels.timing import machine_facts, measure

__all__ = ["CPU_SHAPES", "CUDA_SHAPES", "example", "rows"]

# (M, C): ViG-T, -S, -B on 128 images of 224 x 224, ViG-T on 8 of 1024 x 1024.
CPU_SHAPES = ((1568, 192),)
CUDA_SHAPES = ((25088, 192), (25088, 384), (25088, 768), (32768, 192))
_NAMES = ("y", "s", "dx", "dresidual", "dweight")
_CHECKED_ROWS = 11111  # enough for several turns of the backward kernel's loop, and a remainder


def rows(
    device: str | torch.device = "cpu",
    *,
    shapes: Sequence[tuple[int, int]] | None = None,
    dtype: torch.dtype | None = None,
    min_seconds: float = 0.2,
    peers: bool = True,
) -> list[dict[str, Any]]:
    """Check and time each backend, then the peer, on each shape (M, C); columns as in ``timing.measure``.

    Defaults: CPU_SHAPES in float32, or CUDA_SHAPES in bfloat16. The peer: a sum, then ``F.rms_norm``, all in the dtype;
    the reference normalises in float32. Each number is measured for about ``min_seconds``. ``worst_error`` is the
    largest error of the results and the gradients. Raises RuntimeError when a backend misses its error limit.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
    backends = ["reference", "triton"] if on_cuda and operator._HAS_TRITON else ["reference"]
    about = {"dtype": str(dtype).removeprefix("torch."), **machine_facts(device)}
    result: list[dict[str, Any]] = []
    for shape in shapes or (CUDA_SHAPES if on_cuda else CPU_SHAPES):
        errors = _check(backends, shape, device, dtype)
        inputs, dy = _inputs(shape, device, dtype)
        for backend, error in zip(backends, errors, strict=True):
            columns = measure(_one_result(_call(backend)), inputs, dy, min_seconds=min_seconds)
            row = {"op": "add_rms_norm", "backend": backend, "shape": shape}
            result.append({**row, **columns, "worst_error": error, **about})
        if peers:
            columns = measure(_one_result(_composition), inputs, dy, min_seconds=min_seconds)
            result.append({"op": "add, rms_norm", "backend": "torch", "shape": shape, **columns, **about})
    return result


def example(device: torch.device) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """The operator, arguments of the first shape and a gradient of y: what a cold process runs once."""
    shape, dtype = (CUDA_SHAPES[0], torch.bfloat16) if device.type == "cuda" else (CPU_SHAPES[0], torch.float32)
    return _one_result(operator.add_rms_norm), *_inputs(shape, device, dtype)


class _SendGradient(torch.autograd.Function):
    """y itself; in the backward pass s receives ``ds``, as from the rest of a network."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, s: Tensor, ds: Tensor) -> Tensor:
        ctx.save_for_backward(ds)
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return dy, *ctx.saved_tensors, None


def _one_result(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """For ``measure``, which takes one result. ds, an argument, and s, no result, weigh the same in its bytes."""

    def run(x: Tensor, residual: Tensor, weight: Tensor, ds: Tensor) -> Tensor:
        return _SendGradient.apply(*function(x, residual, weight), ds)

    return run


def _composition(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    s = x + residual
    return F.rms_norm(s, weight.shape, weight, 1e-6), s


def _call(backend: str) -> Callable[..., tuple[Tensor, Tensor]]:
    return lambda *tensors: operator.add_rms_norm(*tensors, backend=backend)


def _inputs(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """[x, residual, weight, ds] and dy; ds takes no gradient."""
    generator = torch.Generator().manual_seed(0)
    x, residual, ds, dy = (torch.randn(*shape, generator=generator).to(device, dtype) for _ in range(4))
    weight = (1 + 0.1 * torch.randn(shape[-1], generator=generator)).to(device, dtype)
    return [x.requires_grad_(), residual.requires_grad_(), weight.requires_grad_(), ds], dy


def _run(function: Callable[..., tuple[Tensor, Tensor]], tensors: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    *leaves, ds = tensors
    y, s = function(*leaves)
    return [y.detach(), s.detach(), *torch.autograd.grad((y, s), leaves, (dy, ds))]


def _check(backends: Sequence[str], shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> list[float]:
    """The worst error of each backend."""
    M, C = shape
    tensors, dy = _inputs((min(M, _CHECKED_ROWS), C), device, dtype)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]
    exact = _run(add_rms_norm_reference, wide, dy.double())
    return worst_errors(
        backends,
        lambda backend: _run(_call(backend), tensors, dy),
        exact,
        names=_NAMES,
        dtype=dtype,
        about=f"shape {shape}",
    )
