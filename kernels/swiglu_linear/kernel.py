"""swiglu_linear in Triton: h = SiLU(a) * b with a = x W_a^T, b = x W_b^T, as one matrix product that writes only h.

A tile of a and b is made at once: its part of the weight takes rows of W_a and W_b in turn, so that a_ij and b_ij end
up in neighbouring columns of one accumulator, in registers of one thread. As many programs as the GPU can hold take the
tiles in turn, and their loops over tiles and channels are one pipeline: the next tile's loads run during this one's
gate. The backward kernel computes the same tile again and turns it with dh into da and db; dx and dW are then plain
matrix products of the two. Sums are float32.
Suffixes: M rows, C input channels, D hidden channels.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vision_gates.kernels.launching import as_rows, on_device, operator, traceable

__all__ = ["swiglu_linear_triton"]

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def _sigmoid(x):
    """The sigmoid from instructions without care for tiny or huge numbers, which it does not need."""
    root = tl.rsqrt(1.0 + tl.exp2(-1.4426950408889634 * x))
    return root * root


@triton.jit
def _products(
    x_ptr, weight_ptr, first_row, first_col, M, x_stride, weight_stride,
    C: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The tiles of a and b that start at a row and a column."""
    # Rows and columns outside are clamped, not masked: what they give is not stored.
    rows = tl.minimum(tl.arange(0, BLOCK_M), M - first_row - 1)
    pairs, channels = tl.arange(0, 2 * BLOCK_D), tl.arange(0, BLOCK_C)
    cols = pairs // 2
    if D % BLOCK_D:
        cols = tl.minimum(cols, D - first_col - 1)
    x_ptrs = x_ptr + tl.cast(first_row, tl.int64) * x_stride + (rows[:, None] * x_stride + channels[None, :])
    weight_rows = cols + (pairs % 2) * D
    weight_ptrs = weight_ptr + first_col * weight_stride + (weight_rows[:, None] * weight_stride + channels[None, :])
    acc = tl.zeros((BLOCK_M, 2 * BLOCK_D), dtype=tl.float32)
    for c in tl.range(0, C, BLOCK_C):
        if C % BLOCK_C == 0:
            x_MC, weight_DC = tl.load(x_ptrs + c), tl.load(weight_ptrs + c)
        else:
            inside = (channels < C - c)[None, :]
            x_MC = tl.load(x_ptrs + c, mask=inside, other=0.0)
            weight_DC = tl.load(weight_ptrs + c, mask=inside, other=0.0)
        acc = tl.dot(x_MC, weight_DC.T, acc, input_precision=PRECISION)
    return tl.split(acc.reshape(BLOCK_M, BLOCK_D, 2))


@triton.jit
def _tile(pointer, first_row, first_col, M, stride, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers of a tile, and which of its elements exist."""
    rows, cols = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    inside = (rows < M - first_row)[:, None] & (cols < D - first_col)[None, :]
    pointer += tl.cast(first_row, tl.int64) * stride + first_col
    return pointer + (rows[:, None] * stride + cols[None, :]), inside


@triton.jit
def _swiglu_linear_forward_kernel(
    x_ptr, weight_ptr, h_ptr, M, n_tiles, x_stride, weight_stride,
    C: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # Tiles along D are neighbours in time: the rows of x are read from memory once, and the weight stays in L2.
    TILES_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
        first_row, first_col = (tile // TILES_D) * BLOCK_M, (tile % TILES_D) * BLOCK_D
        a, b = _products(
            x_ptr, weight_ptr, first_row, first_col, M, x_stride, weight_stride,
            C, D, BLOCK_M, BLOCK_D, BLOCK_C, PRECISION,
        )  # fmt: skip
        h_ptrs, inside = _tile(h_ptr, first_row, first_col, M, D, D, BLOCK_M, BLOCK_D)
        tl.store(h_ptrs, (a * _sigmoid(a) * b).to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_linear_backward_kernel(
    dh_ptr, x_ptr, weight_ptr, dab_ptr, M, n_tiles, dh_stride, x_stride, weight_stride,
    C: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    TILES_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=True):
        first_row, first_col = (tile // TILES_D) * BLOCK_M, (tile % TILES_D) * BLOCK_D
        a, b = _products(
            x_ptr, weight_ptr, first_row, first_col, M, x_stride, weight_stride,
            C, D, BLOCK_M, BLOCK_D, BLOCK_C, PRECISION,
        )  # fmt: skip
        s = _sigmoid(a)
        silu = a * s
        silu_slope_b = b * (s + silu * (1 - s))
        # Only now is dh read: beside a and b it would not fit into the registers.
        dh_ptrs, inside = _tile(dh_ptr, first_row, first_col, M, dh_stride, D, BLOCK_M, BLOCK_D)
        dh = tl.load(dh_ptrs, mask=inside, other=0.0).to(tl.float32)
        da_ptrs, inside = _tile(dab_ptr, first_row, first_col, M, 2 * D, D, BLOCK_M, BLOCK_D)
        tl.store(da_ptrs, (dh * silu_slope_b).to(dab_ptr.dtype.element_ty), mask=inside)
        tl.store(da_ptrs + D, (dh * silu).to(dab_ptr.dtype.element_ty), mask=inside)


@cache
def _launch_options(C: int, D: int, dtype: torch.dtype, tf32: bool, device: torch.device) -> tuple[int, dict[str, Any]]:
    """Number of programs and tile sizes, by channels, dtype and GPU alone: any number of rows runs the same kernel."""
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
    n_programs = 2 if _INTERPRETED else 2 * torch.cuda.get_device_properties(device).multi_processor_count
    return n_programs, tile | dict(C=C, D=D, PRECISION="tf32" if tf32 else "ieee")


def _has_large_shared_memory(device: torch.device) -> bool:
    return not _INTERPRETED and torch.cuda.get_device_properties(device).shared_memory_per_block_optin > 200 * 1024


def _launch(kernel: Any, tensors: tuple[Tensor, ...], strides: tuple[int, ...], M: int, C: int, D: int) -> None:
    x = tensors[0]
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    n_programs, options = _launch_options(int(C), int(D), x.dtype, tf32, x.device)
    n_tiles = triton.cdiv(M, options["BLOCK_M"]) * triton.cdiv(int(D), options["BLOCK_D"])
    with on_device(x.device):
        traceable(kernel, x)[(n_programs,)](*tensors, M, n_tiles, *strides, **options)


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    x_MC, weight = as_rows(x), as_rows(weight)
    (M, C), D = x_MC.shape, weight.shape[0] // 2
    h = torch.empty((*x.shape[:-1], D), dtype=x.dtype, device=x.device)
    _launch(_swiglu_linear_forward_kernel, (x_MC, weight, h), (x_MC.stride(0), weight.stride(0)), M, C, D)
    return h


def _backward(dh: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of x W^T, (M, 2D): that of a in its first half, that of b in its second."""
    dh_MD, x_MC, weight = as_rows(dh), as_rows(x), as_rows(weight)
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
