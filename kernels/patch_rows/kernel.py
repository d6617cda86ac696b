"""patch_rows in Triton: one pass, each pixel read as often as windows hold it, rows stored 16 bytes at a time.

A program makes BLOCK_K columns of BLOCK_P neighbouring rows, for several output rows of an image one after the other.
The threads of a warp read the same column of neighbouring positions: pixels `stride` apart in one line of the image, a
few cache lines. (Along the columns every kernel_size pixels another line would begin, some thirty of them for a warp.)
A thread gathers groups of eight columns, which travel through shared memory as 16 bytes and leave in the order of the
rows. What depends on the column alone, offset and mask, stays in registers from one output row to the next.

Suffixes: B batch, C channels, H W height and width, P positions along an output row, K columns.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vision_gates.kernels.launching import on_device, operator, traceable

__all__ = ["patch_rows_triton"]

_BLOCK_P, _BLOCK_K = 32, 128
# Output rows of a program, at most: more share the arithmetic of the columns, fewer are more programs.
_ROWS = 8

# Sizes change from call to call: without specialisation a kernel compiles once for all of them.
_SIZES = ("x_B", "x_C", "x_H", "x_W", "H", "W", "out_H", "out_W", "rows")


@triton.jit
def _within(i, size):
    """Whether 0 <= i < size, in one comparison."""
    return i.to(tl.uint32, bitcast=True) < size.to(tl.uint32)


@triton.jit
def _interleave(tiles):
    """Eight tiles (N,) as one of (N, 2, 2, 2), whose last axes count the tiles."""
    even = tl.join(tl.join(tiles[0], tiles[4]), tl.join(tiles[2], tiles[6]))
    odd = tl.join(tl.join(tiles[1], tiles[5]), tl.join(tiles[3], tiles[7]))
    return tl.join(even, odd)


@triton.jit(do_not_specialize=_SIZES)
def _patch_rows_kernel(
    x, y, x_B, x_C, x_H, x_W, H, W, out_H, out_W, rows,
    C: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    USED: tl.constexpr = C * KERNEL * KERNEL
    K: tl.constexpr = (USED + 7) // 8 * 8
    BLOCKS_K: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32  # within a window
    # Inductor may pass sizes as 64 bits and a 1 as a constant.
    H, W, rows = tl.cast(H, tl.int32), tl.cast(W, tl.int32), tl.cast(rows, tl.int32)
    out_H, out_W = tl.cast(out_H, tl.int32), tl.cast(out_W, tl.int32)
    step_C, step_H, step_W = tl.cast(x_C, OFFSET), tl.cast(x_H, OFFSET), tl.cast(x_W, OFFSET)
    program, blocks_P, blocks_H = tl.program_id(0), tl.cdiv(out_W, BLOCK_P), tl.cdiv(out_H, rows)
    first_k = program % BLOCKS_K * BLOCK_K
    first_j = program // BLOCKS_K % blocks_P * BLOCK_P
    first_i = program // BLOCKS_K // blocks_P % blocks_H * rows
    b = (program // BLOCKS_K // blocks_P // blocks_H).to(tl.int64)

    # One axis, so that Triton cannot but lay the threads of a warp along positions. Unsigned: divisions cost less.
    lane = tl.arange(0, BLOCK_K // 8 * BLOCK_P)
    left = (first_j + lane % BLOCK_P) * STRIDE - PADDING
    group = first_k.to(tl.uint32) + (lane // BLOCK_P).to(tl.uint32) * 8
    offsets, lines = (), ()
    for e in tl.static_range(8):
        k = group + e
        line = k // KERNEL
        c = line // KERNEL
        ky, kx = (line - c * KERNEL).to(tl.int32), (k - line * KERNEL).to(tl.int32)
        offset = c.to(OFFSET) * step_C + ky * step_H + kx * step_W
        # To know that the sign is 0 spares the upper half of every offset its register.
        offsets += (offset if WIDE else offset & 0x7FFFFFFF,)
        lines += (tl.where((k < USED) & _within(left + kx, W), ky, 2**30),)  # a line outside of any image: zero

    x += b * x_B + left.to(tl.int64) * x_W
    j = first_j + tl.arange(0, BLOCK_P)
    k = first_k + tl.arange(0, BLOCK_K)
    inside = (j < out_W)[:, None] & (k < K)[None, :]
    for i in range(first_i, tl.minimum(first_i + rows, out_H)):
        top = i * STRIDE - PADDING
        x_line = x + top.to(tl.int64) * x_H
        tiles = ()
        for e in tl.static_range(8):
            tiles += (tl.load(x_line + offsets[e], mask=_within(top + lines[e], H), other=0.0),)
        y_KP8 = _interleave(tiles).reshape(BLOCK_K // 8, BLOCK_P, 8)
        y_PK = y_KP8.permute(1, 0, 2).reshape(BLOCK_P, BLOCK_K)
        row = (b * out_H + i) * out_W + j
        tl.store(y + row[:, None] * K + k[None, :], y_PK, mask=inside)


def _forward(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    B, C, H, W = x.shape
    out_H, out_W = ((size + 2 * padding - kernel_size) // stride + 1 for size in (H, W))
    K = triton.cdiv(C * kernel_size**2, 8) * 8
    y = torch.empty((B, out_H, out_W, K), dtype=x.dtype, device=x.device)
    rows = triton.cdiv(out_H, triton.cdiv(out_H, _ROWS))  # about equal parts
    block_K = min(_BLOCK_K, triton.next_power_of_2(int(K)))
    x_B, x_C, x_H, x_W = x.stride()
    grid = (triton.cdiv(K, block_K) * triton.cdiv(out_W, _BLOCK_P) * triton.cdiv(out_H, rows) * B,)
    with on_device(x.device):
        traceable(_patch_rows_kernel, x)[grid](
            x, y, x_B, x_C, x_H, x_W, H, W, out_H, out_W, rows,
            C=int(C), KERNEL=kernel_size, STRIDE=stride, PADDING=padding,
            WIDE=bool((C - 1) * x_C + (kernel_size - 1) * (x_H + x_W) >= 2**31),
            BLOCK_P=_BLOCK_P, BLOCK_K=block_K, num_warps=max(1, block_K // 16),
        )  # fmt: skip
    return y


def _backward(dy: Tensor, C: int, H: int, W: int, kernel_size: int, stride: int, padding: int) -> Tensor:
    """The gradient of x: each pixel sums, in float32, what it gets from the windows that hold it."""
    dy_BKP = dy[..., : C * kernel_size**2].flatten(1, 2).transpose(1, 2)
    return F.fold(dy_BKP, (H, W), kernel_size=kernel_size, stride=stride, padding=padding)


class _PatchRows(torch.autograd.Function):
    """Eager mode: a Python function costs fewer microseconds a call than a registered operator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *sizes: int) -> Tensor:
        ctx.sizes = (*x.shape[1:], *sizes)
        return _forward(x, *sizes)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _backward(dy, *ctx.sizes), None, None, None


def _fake_rows(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    B, C, *image = x.shape
    positions = ((size + 2 * padding - kernel_size) // stride + 1 for size in image)
    return x.new_empty((B, *positions, (C * kernel_size**2 + 7) // 8 * 8))


@operator("vision_gates::patch_rows", fake=_fake_rows)
def _operator(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    return _forward(x, kernel_size, stride, padding)


# Closed to torch.compile, which would take F.fold apart into atomic additions, in a new order every time.
@torch.library.custom_op("vision_gates::patch_rows_backward", mutates_args=())
def _backward_operator(dy: Tensor, C: int, H: int, W: int, kernel_size: int, stride: int, padding: int) -> Tensor:
    return _backward(dy, C, H, W, kernel_size, stride, padding)


_backward_operator.register_fake(lambda dy, C, H, W, *_: dy.new_empty((dy.shape[0], C, H, W)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *sizes = inputs
    ctx.sizes = (*x.shape[1:], *sizes)


_operator.register_autograd(
    lambda ctx, dy: (_backward_operator(dy, *ctx.sizes), None, None, None), setup_context=_setup_context
)


def patch_rows_triton(x: Tensor, kernel_size: int, stride: int, padding: int) -> Tensor:
    """The kernel behind :func:`patch_rows`, for arguments that it has checked."""
    if torch.compiler.is_compiling():
        return _operator(x, kernel_size, stride, padding)
    if torch.is_grad_enabled() and x.requires_grad:
        return _PatchRows.apply(x, kernel_size, stride, padding)
    return _forward(x, kernel_size, stride, padding)
