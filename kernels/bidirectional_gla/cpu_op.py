"""The reference as one opaque operator, for torch.compile on the CPU.

Inductor would take a minute for each shape of the safe path's graph, and could not choose the mild path. As an operator
the reference is one node that runs as in eager mode; its backward pass computes the forward one again.
torch.export and ONNX do not come here: they need a graph of plain operators.
"""

import torch
from torch import Tensor

from vision_gates.kernels.bidirectional_gla.reference import bidirectional_gla_gradients, bidirectional_gla_reference

__all__ = ["bidirectional_gla_cpu"]


@torch.library.custom_op("vision_gates::bidirectional_gla_cpu", mutates_args=())
def bidirectional_gla_cpu(q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float) -> Tensor:
    return bidirectional_gla_reference(q, k, v, gf, gb, scale=scale).contiguous()


@torch.library.custom_op("vision_gates::bidirectional_gla_cpu_backward", mutates_args=())
def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv, dgf, dgb = bidirectional_gla_gradients(do, q, k, v, gf, gb, scale=scale)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), dgf.contiguous(), dgb.contiguous()


@bidirectional_gla_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float) -> Tensor:
    return v.new_empty(v.shape)


@_backward.register_fake
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (q, k, v, gf, gb))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, do: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(do, *ctx.saved_tensors, ctx.scale), None


bidirectional_gla_cpu.register_autograd(_autograd, setup_context=_setup_context)
