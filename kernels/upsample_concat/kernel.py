"""upsample_concat in Triton: every value of the result is written once, next to where the convolution reads it.

At the ratio 2 linear interpolation has the weights 1/4 and 3/4 alone: of a position and its two neighbours along an
axis come two results, the even one leaning back and the odd one forward. Beyond an edge the outermost position repeats
itself. A program takes a block of coarse positions, reads the 9 or 27 positions around each and writes its 4 or 8
results; the skip connection's channels are copied by a kernel of their own. The backward pass gathers, for a coarse
position, the 16 or 64 results that it had a part in.

Memory is channels-last throughout: (B, *S, C), one row of C values a position. Images are volumes of depth 1 whose
depth stays. Suffixes: B batch, C channels, S spatial axes, P positions of a block.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vision_gates.kernels.launching import on_device, operator, traceable

__all__ = ["upsample_concat_triton"]

_TILE = 1024  # values of a tile: eight channels a thread, 16 bytes in half precision
_COPY_TILE = 4096
_MAX_BLOCK_C = 128
_NUM_WARPS = 4

# Sizes change from call to call: without specialisation a kernel compiles once for all of them. Numbers of channels
# belong to the model.
_SIZES = ("B", "D", "H", "W", "rows")


@triton.jit
def _positions(block, D, H, W, BLOCK_P: tl.constexpr):
    """Image, plane, line and column of the coarse positions of a block."""
    p = block * BLOCK_P + tl.arange(0, BLOCK_P)
    line = p // W
    plane = line // H
    return (plane // D).to(tl.int64), plane % D, line % H, p % W


@triton.jit
def _load(x, row, c, inside, C: tl.constexpr):
    return tl.load(x + row[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _double(before, middle, after):
    """Both results of each position along one axis, of several tiles: all even ones, then all odd ones."""
    even, odd = (), ()
    for i in tl.static_range(len(middle)):
        part = 0.75 * middle[i]
        even += (part + 0.25 * before[i],)
        odd += (part + 0.25 * after[i],)
    return even + odd


@triton.jit
def _double_line(x, line, w, W, c, inside, C: tl.constexpr):
    before = _load(x, line + tl.maximum(w - 1, 0), c, inside, C)
    middle = _load(x, line + w, c, inside, C)
    after = _load(x, line + tl.minimum(w + 1, W - 1), c, inside, C)
    return _double((before,), (middle,), (after,))


@triton.jit
def _double_plane(x, plane, h, w, H, W, c, inside, C: tl.constexpr):
    before = _double_line(x, (plane + tl.maximum(h - 1, 0)) * W, w, W, c, inside, C)
    middle = _double_line(x, (plane + h) * W, w, W, c, inside, C)
    after = _double_line(x, (plane + tl.minimum(h + 1, H - 1)) * W, w, W, c, inside, C)
    return _double(before, middle, after)


@triton.jit(do_not_specialize=_SIZES)
def _upsample_kernel(
    x, y, B, D, H, W, C: tl.constexpr, SKIP: tl.constexpr, VOLUME: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Inductor may pass sizes as 64 bits and a 1 as a constant.
    B, D, H, W = tl.cast(B, tl.int32), tl.cast(D, tl.int32), tl.cast(H, tl.int32), tl.cast(W, tl.int32)
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    b, d, h, w = _positions(tl.program_id(0) // BLOCKS_C, D, H, W, BLOCK_P)
    c = tl.program_id(0) % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (b < B)[:, None] & (c < C)[None, :]
    image = b * D
    middle = _double_plane(x, (image + d) * H, h, w, H, W, c, inside, C)
    if VOLUME:
        before = _double_plane(x, (image + tl.maximum(d - 1, 0)) * H, h, w, H, W, c, inside, C)
        after = _double_plane(x, (image + tl.minimum(d + 1, D - 1)) * H, h, w, H, W, c, inside, C)
        results = _double(before, middle, after)
        first_plane = image * 2 + 2 * d
    else:
        results = middle
        first_plane = image + d
    for i in tl.static_range(len(results)):
        line = (first_plane + i // 4) * (2 * H) + 2 * h + i // 2 % 2
        row = line * (2 * W) + 2 * w + i % 2
        tl.store(y + row[:, None] * (SKIP + C) + SKIP + c[None, :], results[i].to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _copy_kernel(
    x, y, rows, C: tl.constexpr, STRIDE: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    row = (tl.program_id(0) // BLOCKS_C).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(0) % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (row < rows)[:, None] & (c < C)[None, :]
    tile = tl.load(x + row[:, None] * C + c[None, :], mask=inside)
    tl.store(y + row[:, None] * STRIDE + c[None, :], tile, mask=inside)


@triton.jit
def _join(first, second, third, fourth):
    return 0.25 * (first + fourth) + 0.75 * (second + third)


@triton.jit
def _join_line(dy, line, w, W, c, inside, STRIDE: tl.constexpr):
    """Of results 2 w - 1 to 2 w + 2 of a line; beyond an edge the outermost result gave its whole weight."""
    first = _load(dy, line + tl.maximum(2 * w - 1, 0), c, inside, STRIDE)
    second = _load(dy, line + 2 * w, c, inside, STRIDE)
    third = _load(dy, line + 2 * w + 1, c, inside, STRIDE)
    fourth = _load(dy, line + tl.minimum(2 * w + 2, 2 * W - 1), c, inside, STRIDE)
    return _join(first, second, third, fourth)


@triton.jit
def _join_plane(dy, plane, h, w, H, W, c, inside, STRIDE: tl.constexpr):
    first = _join_line(dy, (plane + tl.maximum(2 * h - 1, 0)) * (2 * W), w, W, c, inside, STRIDE)
    second = _join_line(dy, (plane + 2 * h) * (2 * W), w, W, c, inside, STRIDE)
    third = _join_line(dy, (plane + 2 * h + 1) * (2 * W), w, W, c, inside, STRIDE)
    fourth = _join_line(dy, (plane + tl.minimum(2 * h + 2, 2 * H - 1)) * (2 * W), w, W, c, inside, STRIDE)
    return _join(first, second, third, fourth)


@triton.jit(do_not_specialize=_SIZES)
def _upsample_backward_kernel(
    dy, dx, B, D, H, W, C: tl.constexpr, SKIP: tl.constexpr, VOLUME: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    B, D, H, W = tl.cast(B, tl.int32), tl.cast(D, tl.int32), tl.cast(H, tl.int32), tl.cast(W, tl.int32)
    STRIDE: tl.constexpr = SKIP + C
    BLOCKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    block = tl.program_id(0) // BLOCKS_C
    b, d, h, w = _positions(block, D, H, W, BLOCK_P)
    c = tl.program_id(0) % BLOCKS_C * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (b < B)[:, None] & (c < C)[None, :]
    if VOLUME:
        image = b * (2 * D)
        first = _join_plane(dy, (image + tl.maximum(2 * d - 1, 0)) * (2 * H), h, w, H, W, SKIP + c, inside, STRIDE)
        second = _join_plane(dy, (image + 2 * d) * (2 * H), h, w, H, W, SKIP + c, inside, STRIDE)
        third = _join_plane(dy, (image + 2 * d + 1) * (2 * H), h, w, H, W, SKIP + c, inside, STRIDE)
        last = tl.minimum(2 * d + 2, 2 * D - 1)
        fourth = _join_plane(dy, (image + last) * (2 * H), h, w, H, W, SKIP + c, inside, STRIDE)
        result = _join(first, second, third, fourth)
    else:
        result = _join_plane(dy, (b * D + d) * (2 * H), h, w, H, W, SKIP + c, inside, STRIDE)
    row = block.to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    tl.store(dx + row[:, None] * C + c[None, :], result.to(dx.dtype.element_ty), mask=inside)


def _channels_last(x_BCS: Tensor) -> Tensor:
    """The same values with one row of channels a position, copied only where they are not."""
    rows = x_BCS.movedim(1, -1)
    return x_BCS if rows.is_contiguous() else rows.contiguous().movedim(-1, 1)


def _empty_channels_last(like: Tensor, channels: int, size: tuple[int, ...]) -> Tensor:
    # Not by memory_format: for one channel PyTorch would take another order of strides.
    return torch.empty((like.shape[0], *size, channels), dtype=like.dtype, device=like.device).movedim(-1, 1)


def _tile(channels: int, values: int) -> dict[str, int]:
    block_C = min(triton.next_power_of_2(channels), _MAX_BLOCK_C)
    return {"BLOCK_P": values // block_C, "BLOCK_C": block_C, "num_warps": _NUM_WARPS}


def _sizes(coarse_BCS: Tensor) -> tuple[int, int, int, int]:
    """B, D, H, W."""
    B, _, *size = coarse_BCS.shape
    return (B, 1, *size) if len(size) == 2 else (B, *size)


def _forward(skip_BCS: Tensor, coarse_BCS: Tensor) -> Tensor:
    skip_BCS, coarse_BCS = _channels_last(skip_BCS), _channels_last(coarse_BCS)
    skip_C, C = int(skip_BCS.shape[1]), int(coarse_BCS.shape[1])
    y = _empty_channels_last(skip_BCS, skip_C + C, tuple(skip_BCS.shape[2:]))
    B, D, H, W = _sizes(coarse_BCS)
    rows = skip_BCS.numel() // skip_C
    copy, tile = _tile(skip_C, _COPY_TILE), _tile(C, _TILE)
    with on_device(y.device):
        grid = (triton.cdiv(rows, copy["BLOCK_P"]) * triton.cdiv(skip_C, copy["BLOCK_C"]),)
        traceable(_copy_kernel, skip_BCS)[grid](skip_BCS, y, rows, C=skip_C, STRIDE=skip_C + C, **copy)
        grid = (triton.cdiv(B * D * H * W, tile["BLOCK_P"]) * triton.cdiv(C, tile["BLOCK_C"]),)
        traceable(_upsample_kernel, coarse_BCS)[grid](
            coarse_BCS, y, B, D, H, W, C=C, SKIP=skip_C, VOLUME=coarse_BCS.ndim == 5, **tile
        )
    return y


def _backward(dy_BCS: Tensor, channels: int) -> Tensor:
    """The gradient of the coarse map, whose channels are the last ones of dy."""
    dy_BCS = _channels_last(dy_BCS)
    size = tuple(n // 2 for n in dy_BCS.shape[2:])
    dx_BCS = _empty_channels_last(dy_BCS, channels, size)
    B, D, H, W = _sizes(dx_BCS)
    tile = _tile(channels, _TILE)
    with on_device(dy_BCS.device):
        grid = (triton.cdiv(B * D * H * W, tile["BLOCK_P"]) * triton.cdiv(channels, tile["BLOCK_C"]),)
        traceable(_upsample_backward_kernel, dy_BCS)[grid](
            dy_BCS, dx_BCS, B, D, H, W,
            C=channels, SKIP=int(dy_BCS.shape[1]) - channels, VOLUME=dy_BCS.ndim == 5, **tile,
        )  # fmt: skip
    return dx_BCS


def _gradients(ctx: Any, dy_BCS: Tensor, backward: Callable[[Tensor, int], Tensor]) -> tuple[Tensor | None, ...]:
    of_skip, of_coarse = ctx.needs_input_grad
    d_skip = dy_BCS[:, : dy_BCS.shape[1] - ctx.channels] if of_skip else None
    return d_skip, backward(dy_BCS, ctx.channels) if of_coarse else None


class _UpsampleConcat(torch.autograd.Function):
    """Eager mode: a Python function costs fewer microseconds a call than a registered operator."""

    @staticmethod
    def forward(ctx: Any, skip_BCS: Tensor, coarse_BCS: Tensor) -> Tensor:
        ctx.channels = coarse_BCS.shape[1]
        return _forward(skip_BCS, coarse_BCS)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BCS: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy_BCS, _backward)


def _fake_forward(skip_BCS: Tensor, coarse_BCS: Tensor) -> Tensor:
    channels = skip_BCS.shape[1] + coarse_BCS.shape[1]
    return skip_BCS.new_empty((skip_BCS.shape[0], *skip_BCS.shape[2:], channels)).movedim(-1, 1)


def _fake_backward(dy_BCS: Tensor, channels: int) -> Tensor:
    return dy_BCS.new_empty((dy_BCS.shape[0], *(n // 2 for n in dy_BCS.shape[2:]), channels)).movedim(-1, 1)


@operator("vision_gates::upsample_concat", fake=_fake_forward)
def _operator(skip_BCS: Tensor, coarse_BCS: Tensor) -> Tensor:
    return _forward(skip_BCS, coarse_BCS)


@operator("vision_gates::upsample_concat_backward", fake=_fake_backward)
def _backward_operator(dy_BCS: Tensor, channels: int) -> Tensor:
    return _backward(dy_BCS, channels)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.channels = inputs[1].shape[1]


_operator.register_autograd(
    lambda ctx, dy_BCS: _gradients(ctx, dy_BCS, _backward_operator), setup_context=_setup_context
)


def upsample_concat_triton(skip_BCS: Tensor, coarse_BCS: Tensor) -> Tensor:
    """The kernels behind :func:`upsample_concat`, for arguments that it has checked."""
    if torch.compiler.is_compiling():
        return _operator(skip_BCS, coarse_BCS)
    if torch.is_grad_enabled() and (skip_BCS.requires_grad or coarse_BCS.requires_grad):
        return _UpsampleConcat.apply(skip_BCS, coarse_BCS)
    return _forward(skip_BCS, coarse_BCS)
