"""depthwise_conv3x3 in Triton: one pass over memory forward, two backward. Specification: reference.py.

A thread owns a few channels of a patch: some neighbouring columns of a strip of rows. It walks down the strip and reads
each row once, ahead of the arithmetic. In the convolution a row is added to the three rows of the result that it
touches, so that a thread keeps three sums for each column and the nine taps. Patches are numbered across images: small
images fill a program as well as large ones. A column of a patch is a (BLOCK_P, BLOCK_C) tile, a row a tuple of columns.

The backward pass saves nothing but the arguments. `_gradient_kernel` computes the convolution again, writes the
gradient of its result (only if SiLU follows) and sums the taps' gradients; `_conv_kernel` with the taps turned by half
a turn makes the input's gradient of it.

Suffixes: B batch, H W height and width, C channels, G programs for each block of channels.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vision_gates.kernels.launching import on_device, operator, traceable

__all__ = ["depthwise_conv3x3_triton"]

# Four channels a thread; the gradient, which keeps nine more sums and three rows in registers, has two.
_BLOCK_C = 32
_CONV_TILE = {"COLUMNS": 4, "BLOCK_P": 8, "BLOCK_C": _BLOCK_C, "num_warps": 2}
_GRADIENT_TILE = {"COLUMNS": 4, "BLOCK_P": 8, "BLOCK_C": _BLOCK_C, "num_warps": 4}
# Rows of a strip, at most: a longer strip reads less twice, shorter ones are more programs for a small image.
_CONV_ROWS, _GRADIENT_ROWS = 8, 16
# Programs of the gradient, at most. Fixed, so that the sums over positions have the same order on every GPU.
_GRADIENT_PROGRAMS = 512
_SUM_TILE = {"BLOCK_G": 64, "BLOCK_C": _BLOCK_C}

# Sizes change from call to call: without specialisation a kernel compiles once for all of them.
_SIZES = ("B", "H", "W", "rows", "n_blocks", "G")


# --------------------------------------------------------------------------------------------------- building blocks


@triton.jit
def _patches(block, B, H, W, rows, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr):
    """Image, first row, first column and height (0 beyond the last image) of each patch of a block."""
    n_columns, n_strips = tl.cdiv(W, COLUMNS), tl.cdiv(H, rows)
    patch = block * BLOCK_P + tl.arange(0, BLOCK_P)
    b = patch // n_columns // n_strips
    return b.to(tl.int64), patch // n_columns % n_strips * rows, patch % n_columns * COLUMNS, tl.where(b < B, H, 0)


@triton.jit
def _offsets(b, h, w, c, stride_b, stride_h, stride_w):
    return (b * stride_b + h.to(tl.int64) * stride_h + w.to(tl.int64) * stride_w)[:, None] + c[None, :]


@triton.jit
def _load_taps(weight, c, C, FLIP: tl.constexpr):
    taps = ()
    for i in tl.static_range(9):
        tap = tl.load(weight + c * 9 + (8 - i if FLIP else i), mask=c < C, other=0.0)
        taps += (tap.to(tl.float32)[None, :],)
    return taps


@triton.jit
def _load_row(x, h, w, c, height, W, C, stride_w, FIRST: tl.constexpr, LAST: tl.constexpr):
    """Columns w + FIRST to w + LAST of row h; zeros outside of the image. x points at column w."""
    row = ()
    for j in tl.static_range(FIRST, LAST + 1):
        inside = (h >= 0) & (h < height) & (w + j >= 0) & (w + j < W)
        row += (tl.load(x + j * tl.cast(stride_w, tl.int64), mask=inside[:, None] & (c < C)[None, :], other=0.0),)
    return row


@triton.jit
def _widen(row):
    result = ()
    for j in tl.static_range(len(row)):
        result += (row[j].to(tl.float32),)
    return result


@triton.jit
def _store_row(y, row, h, w, c, height, W, C, COLUMNS: tl.constexpr):
    for j in tl.static_range(COLUMNS):
        inside = (h < height) & (w + j < W)
        tl.store(y + j * C, row[j].to(y.dtype.element_ty), mask=inside[:, None] & (c < C)[None, :])


@triton.jit
def _add_row(sums, row, taps, TAP_ROW: tl.constexpr, COLUMNS: tl.constexpr):
    """Add what a row of x gives through one row of the taps to the sums of a row of the result."""
    result = ()
    for j in tl.static_range(COLUMNS):
        total = sums[j]
        for k in tl.static_range(3):
            total = tl.fma(row[j + k], taps[3 * TAP_ROW + k], total)
        result += (total,)
    return result


@triton.jit
def _add_tap_gradients(sums, row, dpre, TAP_ROW: tl.constexpr, COLUMNS: tl.constexpr):
    """Add the gradients of one row of the taps: products of a row of x and a row of the result's gradient."""
    result = ()
    for i in tl.static_range(9):
        total = sums[i]
        if i // 3 == TAP_ROW:
            for j in tl.static_range(COLUMNS):
                total = tl.fma(row[j + i % 3], dpre[j], total)
        result += (total,)
    return result


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)); the division would take five instructions more than to square the inverse root."""
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return root * root


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=_SIZES)
def _conv_kernel(
    x, weight, y, x_B, x_H, x_W, B, H, W, rows, C,
    FLIP: tl.constexpr, ACTIVATION: tl.constexpr,
    COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One block of patches and of channels of y = conv(x), with ACTIVATION of SiLU(conv(x))."""
    program, blocks_c = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    c = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b, h, w, height = _patches(program // blocks_c, B, H, W, rows, COLUMNS, BLOCK_P)
    x_H, y_H = tl.cast(x_H, tl.int64), tl.cast(W, tl.int64) * C
    x += _offsets(b, h, w, c, x_B, x_H, x_W)
    y += _offsets(b, h, w, c, H * y_H, y_H, C)

    first = _widen(_load_row(x - x_H, h - 1, w, c, height, W, C, x_W, -1, COLUMNS))
    second = _widen(_load_row(x, h, w, c, height, W, C, x_W, -1, COLUMNS))
    ahead = _load_row(x + x_H, h + 1, w, c, height, W, C, x_W, -1, COLUMNS)
    taps = _load_taps(weight, c, C, FLIP)
    zeros = (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),) * COLUMNS
    upper = _add_row(_add_row(zeros, first, taps, 0, COLUMNS), second, taps, 1, COLUMNS)
    lower = _add_row(zeros, second, taps, 0, COLUMNS)
    halo_end = tl.minimum(height, h + rows + 1)
    for r in range(rows):
        row = _widen(ahead)
        ahead = _load_row(x + (r + 2) * x_H, h + r + 2, w, c, halo_end, W, C, x_W, -1, COLUMNS)
        done = _add_row(upper, row, taps, 2, COLUMNS)
        upper = _add_row(lower, row, taps, 1, COLUMNS)
        lower = _add_row(zeros, row, taps, 0, COLUMNS)
        if ACTIVATION:
            pre, done = done, ()
            for j in tl.static_range(COLUMNS):
                done += (pre[j] * _sigmoid(pre[j]),)
        _store_row(y + r * y_H, done, h + r, w, c, height, W, C, COLUMNS)


@triton.jit(do_not_specialize=_SIZES)
def _gradient_kernel(
    dy, x, weight, dpre, dw_G9C, dy_B, dy_H, dy_W, x_B, x_H, x_W, B, H, W, rows, n_blocks, C,
    ACTIVATION: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradient of the taps over every G-th block of patches; with ACTIVATION also that of the convolution's result."""
    program, blocks_c = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    g, G = program // blocks_c, tl.num_programs(0) // blocks_c
    c = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    dy_H, x_H, dpre_H = tl.cast(dy_H, tl.int64), tl.cast(x_H, tl.int64), tl.cast(W, tl.int64) * C
    taps = _load_taps(weight, c, C, False)
    zeros = (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),) * COLUMNS
    dtaps = (tl.zeros((BLOCK_P, BLOCK_C), tl.float32),) * 9
    for block in range(g, n_blocks, G):
        b, h, w, height = _patches(block, B, H, W, rows, COLUMNS, BLOCK_P)
        strip_end, halo_end = tl.minimum(height, h + rows), tl.minimum(height, h + rows + 1)
        x_here = x + _offsets(b, h, w, c, x_B, x_H, x_W)
        dy_here = dy + _offsets(b, h, w, c, dy_B, dy_H, dy_W)
        dpre_here = dpre + _offsets(b, h, w, c, H * dpre_H, dpre_H, C)
        above = _widen(_load_row(x_here - x_H, h - 1, w, c, height, W, C, x_W, -1, COLUMNS))
        row = _widen(_load_row(x_here, h, w, c, height, W, C, x_W, -1, COLUMNS))
        ahead = _load_row(x_here + x_H, h + 1, w, c, halo_end, W, C, x_W, -1, COLUMNS)
        dy_ahead = _load_row(dy_here, h, w, c, height, W, C, dy_W, 0, COLUMNS - 1)
        for r in range(rows):
            below, dpre_row = _widen(ahead), _widen(dy_ahead)
            dy_ahead = _load_row(dy_here + (r + 1) * dy_H, h + r + 1, w, c, strip_end, W, C, dy_W, 0, COLUMNS - 1)
            ahead = _load_row(x_here + (r + 2) * x_H, h + r + 2, w, c, halo_end, W, C, x_W, -1, COLUMNS)
            if ACTIVATION:
                pre = _add_row(zeros, above, taps, 0, COLUMNS)
                pre = _add_row(_add_row(pre, row, taps, 1, COLUMNS), below, taps, 2, COLUMNS)
                dy_row, dpre_row = dpre_row, ()
                for j in tl.static_range(COLUMNS):
                    s = _sigmoid(pre[j])
                    dpre_row += (dy_row[j] * s * tl.fma(pre[j], 1.0 - s, 1.0),)
                _store_row(dpre_here + r * dpre_H, dpre_row, h + r, w, c, height, W, C, COLUMNS)
            dtaps = _add_tap_gradients(dtaps, above, dpre_row, 0, COLUMNS)
            dtaps = _add_tap_gradients(dtaps, row, dpre_row, 1, COLUMNS)
            dtaps = _add_tap_gradients(dtaps, below, dpre_row, 2, COLUMNS)
            above, row = row, below
    for i in tl.static_range(9):
        tl.store(dw_G9C + (g * 9 + i) * C + c, tl.sum(dtaps[i], axis=0), mask=c < C)


@triton.jit(do_not_specialize=_SIZES)
def _sum_kernel(dw_G9C, dw_C9, G, C, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """Add up the programs' sums, one tap and one block of channels each."""
    i, c = tl.program_id(0), tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_G, BLOCK_C), tl.float32)
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        mask = (g < G)[:, None] & (c < C)[None, :]
        total += tl.load(dw_G9C + ((g * 9 + i) * C)[:, None] + c[None, :], mask=mask, other=0.0)
    tl.store(dw_C9 + c * 9 + i, tl.sum(total, axis=0).to(dw_C9.dtype.element_ty), mask=c < C)


# ---------------------------------------------------------------------------------------------------------- launchers


def _forward(x_BHWC: Tensor, weight: Tensor, activation: bool) -> Tensor:
    return _convolve(x_BHWC, weight, activation=activation, flip=False)


def _backward(dy_BHWC: Tensor, x_BHWC: Tensor, weight: Tensor, activation: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight."""
    dy_BHWC, x_BHWC, weight = _dense_channels(dy_BHWC), _dense_channels(x_BHWC), weight.contiguous()
    B, H, W, C = x_BHWC.shape
    blocks_c = triton.cdiv(C, _BLOCK_C)
    rows, n_blocks = _cut(B, H, W, _GRADIENT_ROWS, _GRADIENT_TILE)
    G = min(n_blocks, max(1, _GRADIENT_PROGRAMS // blocks_c))
    dw_G9C = torch.empty((G, 9, C), dtype=torch.float32, device=x_BHWC.device)
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=x_BHWC.device)
    dpre_BHWC = torch.empty(x_BHWC.shape, dtype=x_BHWC.dtype, device=x_BHWC.device) if activation else dy_BHWC
    with on_device(x_BHWC.device):
        traceable(_gradient_kernel, x_BHWC)[(blocks_c * G,)](
            dy_BHWC, x_BHWC, weight, dpre_BHWC, dw_G9C, *dy_BHWC.stride()[:3], *x_BHWC.stride()[:3],
            B, H, W, rows, n_blocks, C, ACTIVATION=activation, **_GRADIENT_TILE,
        )  # fmt: skip
        traceable(_sum_kernel, x_BHWC)[(9, blocks_c)](dw_G9C, dw, G, C, **_SUM_TILE)
    return _convolve(dpre_BHWC, weight, activation=False, flip=True), dw


def _convolve(x_BHWC: Tensor, weight: Tensor, *, activation: bool, flip: bool) -> Tensor:
    x_BHWC, weight = _dense_channels(x_BHWC), weight.contiguous()
    B, H, W, C = x_BHWC.shape
    rows, n_blocks = _cut(B, H, W, _CONV_ROWS, _CONV_TILE)
    y_BHWC = torch.empty(x_BHWC.shape, dtype=x_BHWC.dtype, device=x_BHWC.device)
    with on_device(x_BHWC.device):
        traceable(_conv_kernel, x_BHWC)[(triton.cdiv(C, _BLOCK_C) * n_blocks,)](
            x_BHWC, weight, y_BHWC, *x_BHWC.stride()[:3],
            B, H, W, rows, C, FLIP=flip, ACTIVATION=activation, **_CONV_TILE,
        )  # fmt: skip
    return y_BHWC


def _cut(B: int, H: int, W: int, most_rows: int, tile: dict[str, int]) -> tuple[int, int]:
    """Rows of a strip, so that strips are about equal, and the number of blocks of patches."""
    rows = triton.cdiv(H, triton.cdiv(H, most_rows))
    patches = B * triton.cdiv(H, rows) * triton.cdiv(W, tile["COLUMNS"])
    return rows, triton.cdiv(patches, tile["BLOCK_P"])


def _dense_channels(x_BHWC: Tensor) -> Tensor:
    return x_BHWC if x_BHWC.stride(-1) == 1 else x_BHWC.contiguous()


# ----------------------------------------------------------------------------------------------------------- autograd
#
# Eager mode takes the autograd function, which costs a launch less time than a custom operator does; torch.compile
# sees the operator, one node each way. Both call the same launchers.


def depthwise_conv3x3_triton(x_BHWC: Tensor, weight: Tensor, *, activation: bool) -> Tensor:
    """The kernel's `depthwise_conv3x3`; arguments as checked there."""
    if torch.compiler.is_compiling():
        return _operator(x_BHWC, weight, activation)
    if torch.is_grad_enabled() and (x_BHWC.requires_grad or weight.requires_grad):
        return _DepthwiseConv3x3.apply(x_BHWC, weight, activation)
    return _forward(x_BHWC, weight, activation)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _gradients(
    ctx: Any, dy_BHWC: Tensor, backward: Callable[..., tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, None]:
    return *backward(dy_BHWC, *ctx.saved_tensors, ctx.activation), None


class _DepthwiseConv3x3(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y_BHWC = _forward(*inputs)
        _save(ctx, inputs, y_BHWC)
        return y_BHWC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BHWC: Tensor) -> tuple[Tensor, Tensor, None]:
        return _gradients(ctx, dy_BHWC, _backward)


def _fake_gradients(dy: Tensor, x: Tensor, weight: Tensor, activation: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


@operator("vision_gates::depthwise_conv3x3", fake=lambda x, *_: x.new_empty(x.shape))
def _operator(x: Tensor, weight: Tensor, activation: bool) -> Tensor:
    return _forward(x, weight, activation)


@operator("vision_gates::depthwise_conv3x3_backward", fake=_fake_gradients)
def _backward_operator(dy: Tensor, x: Tensor, weight: Tensor, activation: bool) -> tuple[Tensor, Tensor]:
    return _backward(dy, x, weight, activation)


_operator.register_autograd(lambda ctx, dy: _gradients(ctx, dy, _backward_operator), setup_context=_save)
