"""swiglu_linear in Triton: h = SiLU(a) * b with a = x W_a^T, b = x W_b^T, as one matrix product that writes only h.

A program makes one tile of a and b at once: its weight tile takes rows of W_a and W_b in turn, so that a_ij and b_ij
end up in neighbouring columns of one accumulator, in registers of one thread. The backward kernel computes the same
tile again and turns it with dh into da and db; dx and dW are then plain matrix products of the two. Sums are float32.
Suffixes: M rows, C input channels, D hidden channels.
"""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vision_gates.kernels.launching import operator, traceable

__all__ = ["swiglu_linear_triton"]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _products(
    x_ptr,
    weight_ptr,
    M,
    C,
    D,
    x_stride,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """This program's rows and columns, which of the tile exist, and its tiles of a and b."""
    # Tiles along D are neighbours in time: the rows of x are read from memory once, and the weight stays in L2.
    tiles_D = tl.cdiv(D, BLOCK_D)
    first_row = (tl.program_id(0) // tiles_D) * BLOCK_M
    first_col = (tl.program_id(0) % tiles_D) * BLOCK_D
    rows = first_row + tl.arange(0, BLOCK_M)
    cols = first_col + tl.arange(0, BLOCK_D)
    pairs = tl.arange(0, 2 * BLOCK_D)
    weight_rows = tl.minimum(first_col + pairs // 2, D - 1) + (pairs % 2) * D

    # Rows outside are clamped, not masked: what they give is not stored.
    channels = tl.arange(0, BLOCK_C)
    x_ptrs = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * x_stride + channels[None, :]
    weight_ptrs = weight_ptr + weight_rows.to(tl.int64)[:, None] * weight_stride + channels[None, :]
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_D), dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        if EVEN_C:
            x_MC, weight_DC = tl.load(x_ptrs), tl.load(weight_ptrs)
        else:
            inside = (channels < C - c)[None, :]
            x_MC, weight_DC = tl.load(x_ptrs, mask=inside, other=0.0), tl.load(weight_ptrs, mask=inside, other=0.0)
        acc = tl.dot(x_MC, weight_DC.T, acc, input_precision=PRECISION)
        x_ptrs += BLOCK_C
        weight_ptrs += BLOCK_C
    a, b = tl.split(acc.reshape(BLOCK_M, BLOCK_D, 2))
    return rows.to(tl.int64)[:, None], cols[None, :], (rows < M)[:, None] & (cols < D)[None, :], a, b


@triton.jit
def _swiglu_linear_forward_kernel(
    x_ptr,
    weight_ptr,
    h_ptr,
    M,
    C,
    D,
    x_stride,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, cols, inside, a, b = _products(
        x_ptr, weight_ptr, M, C, D, x_stride, weight_stride, BLOCK_M, BLOCK_D, BLOCK_C, EVEN_C, PRECISION
    )
    h = a * tl.sigmoid(a) * b
    tl.store(h_ptr + rows * D + cols, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_linear_backward_kernel(
    dh_ptr,
    x_ptr,
    weight_ptr,
    dab_ptr,
    M,
    C,
    D,
    dh_stride,
    x_stride,
    weight_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN_C: tl.constexpr,
    PRECISION: tl.constexpr,
):
    rows, cols, inside, a, b = _products(
        x_ptr, weight_ptr, M, C, D, x_stride, weight_stride, BLOCK_M, BLOCK_D, BLOCK_C, EVEN_C, PRECISION
    )
    s = tl.sigmoid(a)
    silu = a * s
    silu_slope_b = b * (s + silu * (1 - s))
    # Only now is dh read: beside a and b it would not fit into the registers.
    dh = tl.load(dh_ptr + rows * dh_stride + cols, mask=inside, other=0.0).to(tl.float32)
    da_ptrs = dab_ptr + rows * (2 * D) + cols
    tl.store(da_ptrs, (dh * silu_slope_b).to(dab_ptr.dtype.element_ty), mask=inside)
    tl.store(da_ptrs + D, (dh * silu).to(dab_ptr.dtype.element_ty), mask=inside)


@cache
def _launch_options(C: int, D: int, dtype: torch.dtype, tf32: bool, device: torch.device) -> dict[str, Any]:
    """Tile sizes by channels and dtype alone: any number of rows runs the same kernel."""
    if C >= 512 and dtype.itemsize == 2 and _has_large_shared_memory(device):
        # A long sum: the largest tile, one program on a multiprocessor.
        tile = dict(BLOCK_M=128, BLOCK_D=128, BLOCK_C=64, num_warps=8, num_stages=4)
    elif dtype.itemsize == 2 or tf32:
        # A short sum: two programs on a multiprocessor, one multiplies while the other stores.
        tile = dict(BLOCK_M=128, BLOCK_D=64, BLOCK_C=128 // dtype.itemsize, num_warps=8, num_stages=3)
    else:  # no tensor cores
        tile = dict(BLOCK_M=64, BLOCK_D=32, BLOCK_C=32, num_warps=4, num_stages=3)
    if C % tile["BLOCK_C"]:
        tile["BLOCK_C"] = 32
    tile["BLOCK_D"] = min(tile["BLOCK_D"], max(16, triton.next_power_of_2(D)))
    return tile | dict(EVEN_C=C % tile["BLOCK_C"] == 0, PRECISION="tf32" if tf32 else "ieee")


def _has_large_shared_memory(device: torch.device) -> bool:
    return not _INTERPRETED and torch.cuda.get_device_properties(device).shared_memory_per_block_optin > 200 * 1024


def _launch(kernel: Any, tensors: tuple[Tensor, ...], strides: tuple[int, ...], M: int, C: int, D: int) -> None:
    x = tensors[0]
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    options = _launch_options(int(C), int(D), x.dtype, tf32, x.device)
    grid = (triton.cdiv(M, options["BLOCK_M"]) * triton.cdiv(D, options["BLOCK_D"]),)
    with _on(x.device):
        traceable(kernel, x)[grid](*tensors, M, C, D, *strides, **options)


def _on(device: torch.device) -> AbstractContextManager:
    """Entering a device costs microseconds: only where it is another than the present one."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def _rows(x: Tensor) -> Tensor:
    """(..., C) as (M, C) with channels next to each other, copied only where strides ask for it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    x_MC, weight = _rows(x), _rows(weight)
    (M, C), D = x_MC.shape, weight.shape[0] // 2
    h = torch.empty((*x.shape[:-1], D), dtype=x.dtype, device=x.device)
    _launch(_swiglu_linear_forward_kernel, (x_MC, weight, h), (x_MC.stride(0), weight.stride(0)), M, C, D)
    return h


def _backward(dh: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x W^T, (M, 2D): that of a in its first half, that of b in its second."""
    dh_MD, x_MC, weight = _rows(dh), _rows(x), _rows(weight)
    (M, C), D = x_MC.shape, weight.shape[0] // 2
    dab = torch.empty((M, 2 * D), dtype=x.dtype, device=x.device)
    strides = (dh_MD.stride(0), x_MC.stride(0), weight.stride(0))
    _launch(_swiglu_linear_backward_kernel, (dh_MD, x_MC, weight, dab), strides, M, C, D)
    return dab


def _gradients(
    backward: Callable[[Tensor, Tensor, Tensor], Tensor], ctx: Any, dh: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    dab = backward(dh, x, weight)
    dx = (dab @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
    dweight = dab.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
    return dx, dweight


class _SwiGLULinear(torch.autograd.Function):
    """Eager mode: a Python function costs fewer microseconds a call than a registered operator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, Tensor | None]:
        return _gradients(_backward, ctx, dh)


def _fake_h(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


def _fake_dab(dh: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((x.numel() // x.shape[-1], weight.shape[0]))


@operator("vision_gates::swiglu_linear", fake=_fake_h)
def _operator(x: Tensor, weight: Tensor) -> Tensor:
    return _forward(x, weight)


@operator("vision_gates::swiglu_linear_backward", fake=_fake_dab)
def _backward_operator(dh: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return _backward(dh, x, weight)


_operator.register_autograd(
    lambda ctx, dh: _gradients(_backward_operator, ctx, dh),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def swiglu_linear_triton(x: Tensor, weight: Tensor) -> Tensor:
    """The kernel behind :func:`swiglu_linear`, for arguments of one dtype that it has checked."""
    if torch.compiler.is_compiling():
        return _operator(x, weight)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _SwiGLULinear.apply(x, weight)
    return _forward(x, weight)
