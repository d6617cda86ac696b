"""add_rms_norm in Triton: s = x + residual and y = RMSNorm(s) * weight, one pass over memory each way.

A program holds whole rows. The normalisation sees s as it is stored, so s is all that the backward kernel needs: it
computes the root again, adds the gradient of s, and sums its rows' part of the weight's gradient; the parts of a fixed
number of programs are then added up in a fixed order. Arithmetic is float32. Suffixes: M rows, C channels.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vision_gates.kernels.launching import as_rows, on_device

__all__ = ["add_rms_norm_triton"]

_FORWARD_ELEMENTS, _BACKWARD_ELEMENTS = 4096, 2048  # of a program's tile
_BACKWARD_PROGRAMS = 528  # at most, 4 for each multiprocessor of an H200; on any GPU, so that sums are the same


@triton.jit
def _add_rms_norm_forward_kernel(
    x_ptr,
    residual_ptr,  # None: s is x, and not written
    weight_ptr,
    y_ptr,
    s_ptr,
    M,
    C,
    x_stride,
    residual_stride,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
    channels = tl.arange(0, BLOCK_C)[None, :]
    inside = (rows < M) & (channels < C)
    s = tl.load(x_ptr + rows * x_stride + channels, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        s += tl.load(residual_ptr + rows * residual_stride + channels, mask=inside, other=0.0).to(tl.float32)
        rounded = s.to(s_ptr.dtype.element_ty)
        tl.store(s_ptr + rows * C + channels, rounded, mask=inside)
        s = rounded.to(tl.float32)
    weight = tl.load(weight_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)
    y = s * tl.rsqrt(tl.sum(s * s, axis=1, keep_dims=True) / C + eps) * weight
    tl.store(y_ptr + rows * C + channels, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _add_rms_norm_backward_kernel(
    dy_ptr,
    ds_ptr,  # None: s was not used
    s_ptr,
    weight_ptr,
    dx_ptr,
    dresidual_ptr,  # None: the same as dx
    dweight_ptr,  # (programs, C); None: not needed
    M,
    C,
    dy_stride,
    ds_stride,
    s_stride,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    channels = tl.arange(0, BLOCK_C)[None, :]
    weight = tl.load(weight_ptr + channels, mask=channels < C, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        rows = (block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)[:, None]
        inside = (rows < M) & (channels < C)
        s = tl.load(s_ptr + rows * s_stride + channels, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows * dy_stride + channels, mask=inside, other=0.0).to(tl.float32)
        if ds_ptr is not None:
            ds = tl.load(ds_ptr + rows * ds_stride + channels, mask=inside, other=0.0).to(tl.float32)
        mean_square = tl.sum(s * s, axis=1, keep_dims=True) / C
        # A row that does not exist must give 0, also with eps = 0.
        scale = tl.rsqrt(tl.where(rows < M, mean_square, 1.0) + eps)
        normed = s * scale
        dnormed = dy * weight
        d = scale * (dnormed - normed * (tl.sum(dnormed * normed, axis=1, keep_dims=True) / C))
        if ds_ptr is not None:
            d += ds
        tl.store(dx_ptr + rows * C + channels, d.to(dx_ptr.dtype.element_ty), mask=inside)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + rows * C + channels, d.to(dresidual_ptr.dtype.element_ty), mask=inside)
        dweight += dy * normed
    if dweight_ptr is not None:
        parts = tl.sum(dweight, axis=0, keep_dims=True)
        tl.store(dweight_ptr + tl.program_id(0) * C + channels, parts, mask=channels < C)


@cache
def _tile(C: int, elements: int) -> dict[str, int]:
    block_C = triton.next_power_of_2(C)
    num_warps = min(max(block_C // 512, 4), 16)
    return dict(BLOCK_M=max(elements // block_C, 1), BLOCK_C=block_C, num_warps=num_warps)


def _sum_dtype(x: Tensor, residual: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, residual.dtype)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y and s; an empty s without a residual, because an operator must not return its argument."""
    y = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    x_MC = as_rows(x)
    M, C = x_MC.shape
    residual_MC = None if residual is None else as_rows(residual)
    s_shape, s_dtype = (0, x.dtype) if residual is None else (x.shape, _sum_dtype(x, residual))
    s = torch.empty(s_shape, dtype=s_dtype, device=x.device)
    residual_stride = 0 if residual_MC is None else residual_MC.stride(0)
    tile = _tile(C, _FORWARD_ELEMENTS)
    with on_device(x.device):
        _add_rms_norm_forward_kernel[(triton.cdiv(M, tile["BLOCK_M"]),)](
            x_MC, residual_MC, weight.contiguous(), y, s, M, C, x_MC.stride(0), residual_stride, eps, **tile
        )
    return y, s


def _backward(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dresidual (empty where dx is both) and dweight (empty where it is not needed)."""
    dx = torch.empty(s.shape, dtype=x_dtype, device=s.device)
    shared = residual_dtype == x_dtype
    dresidual = torch.empty(0 if shared else s.shape, dtype=residual_dtype, device=s.device)
    dy_MC, s_MC, ds_MC = as_rows(dy), as_rows(s), None if ds is None else as_rows(ds)
    M, C = s_MC.shape
    tile = _tile(C, _BACKWARD_ELEMENTS)
    programs = min(triton.cdiv(M, tile["BLOCK_M"]), _BACKWARD_PROGRAMS)
    parts = torch.empty((programs if need_dweight else 0, C), dtype=torch.float32, device=s.device)
    with on_device(s.device):
        _add_rms_norm_backward_kernel[(programs,)](
            dy_MC,
            ds_MC,
            s_MC,
            weight.contiguous(),
            dx,
            None if shared else dresidual,
            parts if need_dweight else None,
            M,
            C,
            dy_MC.stride(0),
            0 if ds_MC is None else ds_MC.stride(0),
            s_MC.stride(0),
            eps,
            **tile,
        )
    dweight = parts.sum(dim=0).to(weight.dtype) if need_dweight else torch.empty_like(weight[:0])
    return dx, dresidual, dweight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, residual, weight, ctx.eps, _ = inputs
    ctx.has_residual = residual is not None
    ctx.dtypes = (x.dtype, residual.dtype if ctx.has_residual else x.dtype)
    ctx.save_for_backward(output[1] if ctx.has_residual else x, weight)
    ctx.set_materialize_grads(False)


def _gradients(
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]], ctx: Any, dy: Tensor | None, ds: Tensor | None
) -> tuple[Tensor | None, ...]:
    s, weight = ctx.saved_tensors
    if dy is None:  # only s was used
        dy = torch.zeros_like(s)
    dx, dresidual, dweight = backward(
        dy, ds if ctx.has_residual else None, s, weight, ctx.eps, *ctx.dtypes, ctx.needs_input_grad[2]
    )
    if ctx.dtypes[0] == ctx.dtypes[1]:
        dresidual = dx
    return dx, dresidual if ctx.has_residual else None, dweight if ctx.needs_input_grad[2] else None, None, None


class _AddRMSNorm(torch.autograd.Function):
    """Eager mode: a Python function costs fewer microseconds a call than a registered operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradients(_backward, ctx, dy, ds)


@torch.library.custom_op("vision_gates::add_rms_norm", mutates_args=())
def _operator(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _forward(x, residual, weight, eps, out_dtype)


@torch.library.custom_op("vision_gates::add_rms_norm_backward", mutates_args=())
def _backward_operator(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(dy, ds, s, weight, eps, x_dtype, residual_dtype, need_dweight)


@_operator.register_fake
def _(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    y = x.new_empty(x.shape, dtype=out_dtype)
    return y, x.new_empty(0) if residual is None else x.new_empty(x.shape, dtype=_sum_dtype(x, residual))


@_backward_operator.register_fake
def _(
    dy: Tensor,
    ds: Tensor | None,
    s: Tensor,
    weight: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    need_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dresidual = s.new_empty(0 if residual_dtype == x_dtype else s.shape, dtype=residual_dtype)
    dweight = weight.new_empty(weight.shape if need_dweight else 0)
    return s.new_empty(s.shape, dtype=x_dtype), dresidual, dweight


_operator.register_autograd(
    lambda ctx, dy, ds: _gradients(_backward_operator, ctx, dy, ds), setup_context=_setup_context
)


def add_rms_norm_triton(
    x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The kernel behind :func:`add_rms_norm`, for arguments that it has checked."""
    if out_dtype is None:
        out_dtype = x.dtype if residual is None else _sum_dtype(x, residual)
    function = _forward
    if torch.compiler.is_compiling():
        function = _operator
    elif torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, residual, weight)):
        function = _AddRMSNorm.apply
    y, s = function(x, residual, weight, eps, out_dtype)
    return y, x if residual is None else s
