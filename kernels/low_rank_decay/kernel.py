"""low_rank_decay in Triton: g = logsigmoid(z) / temperature with z = x W^T + b, as one product that writes only g.

A program makes one tile of z. The rank is so small that the sum over it is a single step: what counts is to write g
once, in wide stores. The backward kernel computes the same tile again and turns it with dg into dz; the gradients of
the arguments are then plain products and a sum. Sums are float32.
Suffixes: M rows, R channels of low rank, K channels of the decays.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vision_gates.kernels.launching import as_rows, on_device, operator, traceable

__all__ = ["low_rank_decay_triton"]

_LOG2_E = tl.constexpr(1.4426950408889634)
# log(1 + e) / e for e in [0, 1] as a polynomial, highest power first: relative error 3e-8, a fit that is exact at 0.
_LOG1P = tl.constexpr(
    (0.00536481896, -0.0300657731, 0.0792045072, -0.137538001, 0.191536546, -0.248571634, 0.33321324, -0.499996483, 1.0)
)


@triton.jit
def _place(K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr):
    """This program's rows and columns."""
    # Tiles along K are neighbours in time: the rows of x are read from memory once, and the weight stays in L2.
    tiles_K = tl.cdiv(K, BLOCK_K)
    rows = (tl.program_id(0) // tiles_K) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % tiles_K) * BLOCK_K + tl.arange(0, BLOCK_K)
    return rows, cols


@triton.jit
def _logits(
    x_ptr,
    weight_ptr,
    bias_ptr,
    M,
    K,
    x_stride,
    weight_stride,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """This program's tile of z. Its place is left to `_place`: torch.compile takes every pointer that a function was
    given for written if a store's address comes out of that function, and copies the tensor first."""
    rows, cols = _place(K, BLOCK_M, BLOCK_K)
    # Rows outside are clamped, not masked: what they give is not stored.
    channels = tl.arange(0, BLOCK_R)
    x_ptrs = x_ptr + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * x_stride + channels[None, :]
    weight_ptrs = weight_ptr + tl.minimum(cols, K - 1).to(tl.int64)[:, None] * weight_stride + channels[None, :]
    z = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for r in range(0, R, BLOCK_R):
        if R % BLOCK_R == 0:
            x_MR, weight_KR = tl.load(x_ptrs), tl.load(weight_ptrs)
        else:
            exist = (channels < R - r)[None, :]
            x_MR, weight_KR = tl.load(x_ptrs, mask=exist, other=0.0), tl.load(weight_ptrs, mask=exist, other=0.0)
        z = tl.dot(x_MR, weight_KR.T, z, input_precision=PRECISION)
        x_ptrs += BLOCK_R
        weight_ptrs += BLOCK_R
    return z + tl.load(bias_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _log_sigmoid(z):
    """min(z, 0) - log(1 + e) with e = exp(-|z|), accurate relative to its size; NaN gives NaN."""
    # The polynomial costs 9 instructions; tl.log2 is several times that, and log(1 + e) alone loses a tiny e.
    e = tl.exp2(tl.abs(z) * -_LOG2_E)
    log1p = e * _LOG1P[0] + _LOG1P[1]
    for i in tl.static_range(2, 9):
        log1p = log1p * e + _LOG1P[i]
    return tl.minimum(z, 0.0) - log1p * e


@triton.jit(do_not_specialize=["M"])
def _low_rank_decay_forward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    g_ptr,
    M,
    K,
    x_stride,
    weight_stride,
    inverse_temperature,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    z = _logits(x_ptr, weight_ptr, bias_ptr, M, K, x_stride, weight_stride, R, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION)
    rows, cols = _place(K, BLOCK_M, BLOCK_K)
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    rows, cols = rows.to(tl.int64)[:, None], cols[None, :]
    # Inductor passes Python's floats as float64.
    g = _log_sigmoid(z) * tl.cast(inverse_temperature, tl.float32)
    tl.store(g_ptr + rows * K + cols, g.to(g_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _low_rank_decay_backward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    dg_ptr,
    dz_ptr,
    M,
    K,
    x_stride,
    weight_stride,
    dg_stride,
    inverse_temperature,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    z = _logits(x_ptr, weight_ptr, bias_ptr, M, K, x_stride, weight_stride, R, BLOCK_M, BLOCK_K, BLOCK_R, PRECISION)
    rows, cols = _place(K, BLOCK_M, BLOCK_K)
    inside = (rows < M)[:, None] & (cols < K)[None, :]
    rows, cols = rows.to(tl.int64)[:, None], cols[None, :]
    dg = tl.load(dg_ptr + rows * dg_stride + cols, mask=inside, other=0.0).to(tl.float32)
    # sigmoid(-z) = 1 / (1 + exp(z)); a square costs less than the care that a division takes of huge numbers.
    root = tl.rsqrt(1.0 + tl.exp2(z * _LOG2_E))
    dz = dg * tl.cast(inverse_temperature, tl.float32) * (root * root)
    tl.store(dz_ptr + rows * K + cols, dz.to(dz_ptr.dtype.element_ty), mask=inside)


@cache
def _launch_options(R: int, K: int, dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    """Tile sizes by channels and dtype alone: any number of rows runs the same kernel."""
    return dict(
        R=R,
        BLOCK_M=64,
        BLOCK_K=min(64, max(16, triton.next_power_of_2(K))),
        BLOCK_R=min(128 // dtype.itemsize, max(16, triton.next_power_of_2(R))),
        PRECISION="tf32" if tf32 else "ieee",
        num_warps=4,
    )


def _launch(kernel: Any, tensors: tuple[Tensor, ...], strides: tuple[int, ...], temperature: float) -> None:
    x_MR, weight = tensors[:2]
    (M, R), K = x_MR.shape, weight.shape[0]
    tf32 = x_MR.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    options = _launch_options(int(R), int(K), x_MR.dtype, tf32)
    grid = (triton.cdiv(M, options["BLOCK_M"]) * triton.cdiv(K, options["BLOCK_K"]),)
    with on_device(x_MR.device):
        traceable(kernel, x_MR)[grid](*tensors, M, K, *strides, 1 / temperature, **options)


def _forward(low_rank: Tensor, weight: Tensor, bias: Tensor, temperature: float) -> Tensor:
    x_MR, weight, bias = as_rows(low_rank), as_rows(weight), bias.contiguous()
    g = torch.empty((*low_rank.shape[:-1], weight.shape[0]), dtype=low_rank.dtype, device=low_rank.device)
    strides = (x_MR.stride(0), weight.stride(0))
    _launch(_low_rank_decay_forward_kernel, (x_MR, weight, bias, g), strides, temperature)
    return g


def _backward(dg: Tensor, low_rank: Tensor, weight: Tensor, bias: Tensor, temperature: float) -> Tensor:
    """The gradient of z, (M, K)."""
    dg_MK, x_MR, weight, bias = as_rows(dg), as_rows(low_rank), as_rows(weight), bias.contiguous()
    dz = torch.empty((x_MR.shape[0], weight.shape[0]), dtype=low_rank.dtype, device=low_rank.device)
    strides = (x_MR.stride(0), weight.stride(0), dg_MK.stride(0))
    _launch(_low_rank_decay_backward_kernel, (x_MR, weight, bias, dg_MK, dz), strides, temperature)
    return dz


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors)


def _gradients(backward: Callable[..., Tensor], ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
    low_rank, weight, bias = ctx.saved_tensors
    dz = backward(dg, low_rank, weight, bias, ctx.temperature)
    dlow_rank = (dz @ weight).view(low_rank.shape) if ctx.needs_input_grad[0] else None
    dweight = dz.T @ low_rank.reshape(-1, low_rank.shape[-1]) if ctx.needs_input_grad[1] else None
    dbias = dz.sum(0, dtype=torch.float32).to(bias.dtype) if ctx.needs_input_grad[2] else None
    return dlow_rank, dweight, dbias, None


class _LowRankDecay(torch.autograd.Function):
    """Eager mode: a Python function costs fewer microseconds a call than a registered operator."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        g = _forward(*inputs)
        _setup_context(ctx, inputs, g)
        return g

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dg: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(_backward, ctx, dg)


def _fake_g(low_rank: Tensor, weight: Tensor, bias: Tensor, temperature: float) -> Tensor:
    return low_rank.new_empty((*low_rank.shape[:-1], weight.shape[0]))


def _fake_dz(dg: Tensor, low_rank: Tensor, weight: Tensor, bias: Tensor, temperature: float) -> Tensor:
    return low_rank.new_empty((low_rank.numel() // low_rank.shape[-1], weight.shape[0]))


@operator("vision_gates::low_rank_decay", fake=_fake_g)
def _operator(low_rank: Tensor, weight: Tensor, bias: Tensor, temperature: float) -> Tensor:
    return _forward(low_rank, weight, bias, temperature)


@operator("vision_gates::low_rank_decay_backward", fake=_fake_dz)
def _backward_operator(dg: Tensor, low_rank: Tensor, weight: Tensor, bias: Tensor, temperature: float) -> Tensor:
    return _backward(dg, low_rank, weight, bias, temperature)


_operator.register_autograd(lambda ctx, dg: _gradients(_backward_operator, ctx, dg), setup_context=_setup_context)


def low_rank_decay_triton(low_rank: Tensor, weight: Tensor, bias: Tensor, *, temperature: float) -> Tensor:
    """The kernel behind :func:`low_rank_decay`, for arguments of one dtype that it has checked."""
    arguments = (low_rank, weight, bias, temperature)
    if torch.compiler.is_compiling():
        return _operator(*arguments)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (low_rank, weight, bias)):
        return _LowRankDecay.apply(*arguments)
    return _forward(*arguments)
