"""gnConv between its projections as one operator: every order's gate on the kernel, products with matrices between.

One call instead of two an order: launching costs the host more than the GPU takes for small maps. And the backward pass
decides what is kept: the projection and each order's result; what the matrices made of it is computed again. The
gradients of all orders' convolutions are one launch, and go straight into the gradient of the projection.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vision_gates.kernels.gated_depthwise.kernel import _convolve, _tap_gradients

__all__ = ["recursive_gating_triton"]

Tensors = list[Tensor]


def _forward(
    projected: Tensor, weight: Tensor, bias: Tensor, matrices: Tensors, offsets: Tensors, scale: float
) -> Tensors:
    """The result of each order, the last one being the chain's."""
    weight = _channels_last_taps(weight)
    gate, q = _split(projected, weight)
    results: Tensors = []
    for i, part in enumerate(_parts(gate, matrices)):
        if i > 0:
            gate = F.linear(results[-1], matrices[i - 1], offsets[i - 1])
        y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        _convolve(q[..., part], weight[part], bias[part], scale, gate=gate, y=y)
        results.append(y)
    return results


def _backward(
    dy: Tensor,
    projected: Tensor,
    weight: Tensor,
    bias: Tensor,
    matrices: Tensors,
    offsets: Tensors,
    results: Tensors,
    scale: float,
) -> Tensors:
    """Gradients of projected, weight, bias, then of the matrices, then of the offsets."""
    weight = _channels_last_taps(weight)
    first, q = _split(projected, weight)
    d_projected = torch.empty(projected.shape, dtype=projected.dtype, device=projected.device)
    dp, dq = _split(d_projected, weight)
    dd = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    d_matrices, d_offsets = [torch.empty_like(x) for x in matrices], [torch.empty_like(x) for x in offsets]
    for i, part in reversed(list(enumerate(_parts(first, matrices)))):
        gate = F.linear(results[i - 1], matrices[i - 1], offsets[i - 1]) if i > 0 else first
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if i > 0 else dp
        _convolve(q[..., part], weight[part], bias[part], scale, gate=dy, y=dgate, partner=gate, product=dd[..., part])
        if i > 0:
            rows = dgate.flatten(0, 2)
            torch.mm(rows.t(), results[i - 1].flatten(0, 2), out=d_matrices[i - 1])
            torch.sum(rows, dim=0, out=d_offsets[i - 1])
            dy = torch.mm(rows, matrices[i - 1]).view(results[i - 1].shape)
    _convolve(dd, weight, None, scale, y=dq, flip=True)
    return [d_projected, *_tap_gradients(dd, q, weight, bias, scale), *d_matrices, *d_offsets]


def _channels_last_taps(weight: Tensor) -> Tensor:
    """(C, 1, K, K) with channels next to each other in memory, as the kernel reads them."""
    return weight if weight.stride(0) == 1 else weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def _split(projected: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The first gate, and the channels that are convolved."""
    convolved = weight.shape[0]
    return projected[..., :-convolved], projected[..., -convolved:]


def _parts(first_gate: Tensor, matrices: Tensors) -> list[slice]:
    """Of the convolved channels: those of each order."""
    parts, start = [], 0
    for width in (first_gate.shape[-1], *(matrix.shape[0] for matrix in matrices)):
        parts.append(slice(start, start + width))
        start += width
    return parts


class _RecursiveGating(torch.autograd.Function):
    """Eager mode. Lists are spread out: autograd sees tensors that are arguments, not those within one."""

    @staticmethod
    def forward(ctx: Any, scale: float, projected: Tensor, weight: Tensor, bias: Tensor, *linear: Tensor) -> Tensor:
        half = len(linear) // 2
        results = _forward(projected, weight, bias, list(linear[:half]), list(linear[half:]), scale)
        ctx.scale, ctx.half = scale, half
        ctx.save_for_backward(projected, weight, bias, *linear, *results[:-1])
        return results[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        projected, weight, bias, *others = ctx.saved_tensors
        matrices, offsets, results = (others[i * ctx.half : (i + 1) * ctx.half] for i in range(3))
        return None, *_backward(dy, projected, weight, bias, matrices, offsets, results, ctx.scale)


# Closed to torch.compile, which would read the code of these long kernels anew for every launch, minutes for a HorNet.
@torch.library.custom_op("vision_gates::recursive_gating", mutates_args=())
def _operator(
    projected: Tensor, weight: Tensor, bias: Tensor, matrices: list[Tensor], offsets: list[Tensor], scale: float
) -> list[Tensor]:
    return _forward(projected, weight, bias, matrices, offsets, scale)


@torch.library.custom_op("vision_gates::recursive_gating_backward", mutates_args=())
def _backward_operator(
    dy: Tensor,
    projected: Tensor,
    weight: Tensor,
    bias: Tensor,
    matrices: list[Tensor],
    offsets: list[Tensor],
    results: list[Tensor],
    scale: float,
) -> list[Tensor]:
    return _backward(dy, projected, weight, bias, matrices, offsets, results, scale)


@_operator.register_fake
def _(
    projected: Tensor, weight: Tensor, bias: Tensor, matrices: list[Tensor], offsets: list[Tensor], scale: float
) -> list[Tensor]:
    widths = (projected.shape[-1] - weight.shape[0], *(matrix.shape[0] for matrix in matrices))
    return [projected.new_empty((*projected.shape[:-1], width)) for width in widths]


@_backward_operator.register_fake
def _(
    dy: Tensor,
    projected: Tensor,
    weight: Tensor,
    bias: Tensor,
    matrices: list[Tensor],
    offsets: list[Tensor],
    results: list[Tensor],
    scale: float,
) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (projected, weight, bias, *matrices, *offsets)]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    projected, weight, bias, matrices, offsets, ctx.scale = inputs
    ctx.half = len(matrices)
    ctx.set_materialize_grads(False)  # only the last result has a gradient
    ctx.save_for_backward(projected, weight, bias, *matrices, *offsets, *output[:-1])


def _gradients(ctx: Any, gradients: list[Tensor | None]) -> tuple[Any, ...]:
    projected, weight, bias, *others = ctx.saved_tensors
    matrices, offsets, results = (list(others[i * ctx.half : (i + 1) * ctx.half]) for i in range(3))
    dy = gradients[-1]
    assert dy is not None
    d_projected, d_weight, d_bias, *d_linear = _backward_operator(
        dy, projected, weight, bias, matrices, offsets, results, ctx.scale
    )
    return d_projected, d_weight, d_bias, d_linear[: ctx.half], d_linear[ctx.half :], None


_operator.register_autograd(_gradients, setup_context=_save)


def recursive_gating_triton(
    projected: Tensor, weight: Tensor, bias: Tensor, matrices: Tensors, offsets: Tensors, scale: float
) -> Tensor:
    """The kernels behind :func:`recursive_gating`, for arguments that it has checked."""
    tensors = (projected, weight, bias, *matrices, *offsets)
    if torch.compiler.is_compiling():
        return _operator(projected, weight, bias, matrices, offsets, scale)[-1]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _RecursiveGating.apply(scale, *tensors)
    return _forward(projected, weight, bias, matrices, offsets, scale)[-1]
