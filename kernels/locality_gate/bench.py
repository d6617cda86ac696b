"""Times locality_gate against PyTorch's composition, as it is and compiled. What fails its check is not timed.

An error is the norm of the difference to the float64 reference, relative to the norm of the reference, of the output
and of each gradient. PyTorch may have 1e-5 plus eight times the error of rounding the exact result to the dtype (it
rounds every step), the kernel 1e-6 plus twice the error of the reference.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vision_gates.kernels import locality_gate as operator
from vision_gates.kernels.checking import relative_error, result_and_gradients
from vision_gates.kernels.locality_gate.reference import locality_gate_reference
from vision_gates.kernels.timing import machine_facts, measure

__all__ = ["CPU_SHAPES", "CUDA_SHAPES", "example", "rows"]

# (B, N, H, V): ViG-T on 224 x 224 and on 1024 x 1024, ViG-B on 224 x 224.
CPU_SHAPES = ((8, 196, 3, 64),)
CUDA_SHAPES = ((128, 196, 3, 64), (8, 4096, 3, 64), (128, 196, 12, 64))
_NAMES = ("the output", "do", "dl", "dg_logits", "dw_o", "dw_l", "dgate_bias")


def rows(
    device: str | torch.device = "cpu",
    *,
    shapes: Sequence[tuple[int, int, int, int]] | None = None,
    dtype: torch.dtype | None = None,
    activation: bool = True,
    min_seconds: float = 0.2,
    peers: bool = True,
) -> list[dict[str, Any]]:
    """Check and time each backend, then the peer, on each shape (B, N, H, V); columns as in ``timing.measure``.

    Defaults: CPU_SHAPES in float32, or CUDA_SHAPES in bfloat16 with float32 weights; with ViG-T's activation. The gate
    has a bias, as ViG's. The peer: on a GPU, the reference under torch.compile. Each number is measured for about
    ``min_seconds``. ``worst_error`` is the largest error of the output and of the gradients.
    Raises RuntimeError when a backend or the peer misses its error limit.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
    about = {"dtype": str(dtype).removeprefix("torch."), "activation": activation, **machine_facts(device)}
    functions = {"reference": partial(_locality_gate, activation=activation, backend="reference")}
    if on_cuda and operator._HAS_TRITON:
        functions["triton"] = partial(_locality_gate, activation=activation, backend="triton")
    if on_cuda and peers:
        composition = partial(locality_gate_reference, activation=activation)
        functions["torch.compile"] = torch.compile(composition, dynamic=False)
    result: list[dict[str, Any]] = []
    for shape in shapes or (CUDA_SHAPES if on_cuda else CPU_SHAPES):
        inputs, upstream = _inputs(shape, device, dtype)
        exact = result_and_gradients(
            functions["reference"], [x.detach().double().requires_grad_() for x in inputs], upstream.double()
        )
        limits = [1e-5 + 8 * relative_error(x.to(dtype), x) for x in exact]
        kernel_limits = limits
        for backend, function in functions.items():
            errors = [
                relative_error(got, x)
                for got, x in zip(result_and_gradients(function, inputs, upstream), exact, strict=True)
            ]
            backend_limits = kernel_limits if backend == "triton" else limits
            for name, error, limit in zip(_NAMES, errors, backend_limits, strict=True):
                if not error <= limit:  # also when NaN
                    raise RuntimeError(
                        f"{backend} backend, shape {tuple(shape)}, {dtype}: error of {name} is {error:.1e}, "
                        f"above its limit {limit:.1e}; nothing was timed"
                    )
            if backend == "reference":
                kernel_limits = [1e-6 + 2 * error for error in errors]
            columns = measure(function, inputs, upstream, min_seconds=min_seconds)
            row = {"op": "locality_gate", "backend": backend, "shape": shape}
            result.append({**row, **columns, "worst_error": max(errors), **about})
    return result


def example(device: torch.device) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """The operator, arguments of the first shape and a gradient of the output: what a cold process runs once."""
    shape, dtype = (CUDA_SHAPES[0], torch.bfloat16) if device.type == "cuda" else (CPU_SHAPES[0], torch.float32)
    return _locality_gate, *_inputs(shape, device, dtype)


def _locality_gate(*tensors: Tensor, **options: Any) -> Tensor:
    return operator.locality_gate(*tensors[:-1], gate_bias=tensors[-1], **options)


def _inputs(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Both views, logits, both weights and the bias in float32, and a gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    o, local, logits, dy = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(4))
    w_o, w_l = (torch.rand(shape[-1], generator=generator).to(device) + 0.5 for _ in range(2))
    gate_bias = torch.randn(shape[-2:], generator=generator).to(device)
    return [x.requires_grad_() for x in (o, local, logits, w_o, w_l, gate_bias)], dy
