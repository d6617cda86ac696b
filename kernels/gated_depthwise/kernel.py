"""gated_depthwise in Triton: every element is read, convolved in float32 and multiplied by its gate in one pass.

49 products an element (K = 7) take longer than the memory does: the kernels are made for few other instructions.

`_conv_kernel`: a thread owns 8 channels (16 bytes) of one column of a strip of ROWS rows and keeps the strip's sums in
registers. It takes the taps one column at a time, K of them in registers, and reads the column of x that they meet:
each element is widened once and goes into up to K sums. Columns are numbered across images, so that no width leaves
threads idle; a strip has the same rows for all of a program, so that a branch skips the rows above and below the image.
The last strip ends with the image and may overlap the one before, so that its own rows need no mask.

`_tap_kernel` sums the taps' gradients in the mirrored way: a thread owns 2 channels of COLUMNS columns, keeps the K * K
sums in registers and meets each element of x with the K * K gradients around it.

Backward, nothing but the arguments was saved: dgate is the forward kernel with dy as the gate, which also writes
dd = dy * gate; dx is the convolution of dd with the taps turned by half a turn.

Suffixes: B batch, H W height and width, C channels, T taps (K * K), G programs for each block of channels.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vision_gates.kernels.launching import on_device

__all__ = ["gated_depthwise_triton"]

_CONV_TILE = {"BLOCK_P": 16, "BLOCK_C": 32, "num_warps": 4}
# Rows of a strip of the convolution, whichever leaves fewer over; lower images are one strip. Without a gate there is
# less to hold beside the sums, and higher images may have longer strips.
_CONV_ROWS, _LONG_ROWS, _LONG_FROM = (7, 8), (14, 16), 28
_TAP_TILE = {"COLUMNS": 2, "BLOCK_P": 2, "BLOCK_C": 32, "num_warps": 1}
_TAP_ROWS = 16  # at most
# Programs of the taps' gradient, at most. Fixed, so that the sums over positions have the same order on every GPU.
_TAP_PROGRAMS = 1056
_SUM_TILE = {"BLOCK_G": 128, "BLOCK_N": 32}

# Sizes change from call to call: without specialisation a kernel compiles once for all of them.
_SIZES = ("B", "H", "W", "rows", "n_blocks", "G")
_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")  # no assembly there


# --------------------------------------------------------------------------------------------------- building blocks


@triton.jit
def _widen(x):
    """x in float32. Triton takes three instructions for two bfloat16 numbers, which these two do as well."""
    if x.dtype == tl.bfloat16 and not _INTERPRETED:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [x], dtype=tl.float32, is_pure=True, pack=2
        )
    return x.to(tl.float32)


@triton.jit
def _offsets(position, c, stride):
    return (position.to(tl.int64) * stride)[:, None] + c[None, :]


@triton.jit
def _in_image(h, H, w, W):
    """Whether row h, the same for the program, and each of the columns w lie in the image; [P, 1]."""
    # As unsigned numbers, so that one comparison does for both ends.
    h = (h + tl.zeros_like(w)).to(tl.uint32, bitcast=True)
    return ((h < H.to(tl.uint32)) & (w.to(tl.uint32, bitcast=True) < W.to(tl.uint32)))[:, None]


@triton.jit
def _load_taps(weight, stride, inside, FLIP: tl.constexpr, K: tl.constexpr):
    """One column of the taps, K rows; weight points at its first row."""
    taps = ()
    for i in tl.static_range(K):
        tap = tl.load(weight + (K - 1 - i if FLIP else i) * stride, mask=inside, other=0.0)
        taps += (tap.to(tl.float32),)
    return taps


@triton.jit
def _add_row(sums, row, taps, ROW: tl.constexpr, K: tl.constexpr):
    """Add row number ROW of x, counted from the first row of the strip, to the sums of the rows that it touches."""
    row, result = _widen(row), ()
    for r in tl.static_range(len(sums)):
        total = sums[r]
        if ROW - r >= -(K // 2) and ROW - r <= K // 2:
            total = tl.fma(row, taps[ROW - r + K // 2], total)
        result += (total,)
    return result


@triton.jit
def _add_halo(sums, x, x_H, h, H, w, W, ok_PC, taps, FIRST: tl.constexpr, K: tl.constexpr):
    """Add the K // 2 rows of x from row number FIRST on, those within the image."""
    rows = ()
    for r in tl.static_range(K // 2):
        inside = ok_PC & _in_image(h + FIRST + r, H, w, W)
        rows += (tl.load(x + (FIRST + r) * x_H, mask=inside, other=0.0),)
    for r in tl.static_range(K // 2):
        sums = _add_row(sums, rows[r], taps, FIRST + r, K)
    return sums


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=_SIZES)
def _conv_kernel(
    x, weight, bias, gate, partner, y, product,
    x_W, weight_I, weight_J, gate_W, partner_W, y_W, product_W, B, H, W, C, scale,
    K: tl.constexpr, FLIP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_PARTNER: tl.constexpr,
    WIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One strip and block of columns and channels of y = gate * scale * (conv(x) + bias), product = gate * partner."""
    HALF: tl.constexpr = K // 2
    # Inductor may pass sizes as 64 bits and a 1 as a constant.
    H, W, C = tl.cast(H, tl.int32), tl.cast(W, tl.int32), tl.cast(C, tl.int32)
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32  # within an image
    x_W = tl.cast(x_W, OFFSET)
    x_H, y_H, product_H = W * x_W, W * tl.cast(y_W, OFFSET), W * tl.cast(product_W, OFFSET)
    gate_H, partner_H = W * tl.cast(gate_W, OFFSET), W * tl.cast(partner_W, OFFSET)
    program, blocks_c, strips = tl.program_id(0), tl.cdiv(C, BLOCK_C), tl.cdiv(H, ROWS)
    c = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    h = tl.minimum(program // blocks_c % strips * ROWS, H - ROWS)
    p = program // blocks_c // strips * BLOCK_P + tl.arange(0, BLOCK_P)
    b, w = p // W, p % W
    ok_PC = (b < B)[:, None] & (c < C)[None, :]
    position = (b * H + h) * W + w

    x += _offsets(position, c, x_W)
    gate += _offsets(position, c, gate_W)
    factors = ()
    if HAS_GATE:  # read ahead of the arithmetic
        for r in tl.static_range(ROWS):
            factors += (tl.load(gate + r * gate_H, mask=ok_PC, other=0.0),)
    # Broadcast to the shape of x, so that Triton gives each thread the taps of its own channels.
    c_PC = tl.zeros((BLOCK_P, 1), tl.int32) + c[None, :]
    weight += c_PC
    first = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if HAS_BIAS:
        first += tl.load(bias + c_PC, mask=ok_PC).to(tl.float32)
    sums = (first,) * ROWS
    for j in range(K):
        taps = _load_taps(weight + (K - 1 - j if FLIP else j) * weight_J, weight_I, c_PC < C, FLIP, K)
        w_j = w + (j - HALF)
        inside = ok_PC & _in_image(h, H, w_j, W)
        x_j = x + (j - HALF) * x_W
        rows = ()
        for r in tl.static_range(ROWS):
            rows += (tl.load(x_j + r * x_H, mask=inside, other=0.0),)
        if h > 0:
            sums = _add_halo(sums, x_j, x_H, h, H, w_j, W, ok_PC, taps, -HALF, K)
        if h + ROWS < H:
            sums = _add_halo(sums, x_j, x_H, h, H, w_j, W, ok_PC, taps, ROWS, K)
        for r in tl.static_range(ROWS):
            sums = _add_row(sums, rows[r], taps, r, K)

    y += _offsets(position, c, y_W)
    product += _offsets(position, c, product_W)
    partner += _offsets(position, c, partner_W)
    for r in tl.static_range(ROWS):
        result = scale * sums[r]
        if HAS_GATE:
            factor = _widen(factors[r])
            result *= factor
            if HAS_PARTNER:
                other = tl.load(partner + r * partner_H, mask=ok_PC).to(tl.float32)
                tl.store(product + r * product_H, (factor * other).to(product.dtype.element_ty), mask=ok_PC)
        tl.store(y + r * y_H, result.to(y.dtype.element_ty), mask=ok_PC)


@triton.jit
def _load_columns(x, h, H, w, W, ok_PC, x_W, FIRST: tl.constexpr, NUMBER: tl.constexpr):
    """NUMBER columns of row h from w + FIRST on; zeros outside of the image. x points at row h, column w."""
    columns = ()
    for j in tl.static_range(FIRST, FIRST + NUMBER):
        columns += (tl.load(x + j * x_W, mask=ok_PC & _in_image(h, H, w + j, W), other=0.0),)
    return columns


@triton.jit
def _widen_all(tiles):
    result = ()
    for i in tl.static_range(len(tiles)):
        result += (_widen(tiles[i]),)
    return result


@triton.jit
def _join(tiles):
    """2**n tiles as one, whose last axis counts them."""
    shape: tl.constexpr = [tiles[0].shape[0], tiles[0].shape[1], len(tiles)]
    for _ in tl.static_range(10):
        if len(tiles) > 1:
            pairs = ()
            for i in tl.static_range(len(tiles) // 2):
                pairs += (tl.join(tiles[i], tiles[i + len(tiles) // 2]),)
            tiles = pairs
    return tl.reshape(tiles[0], shape)


@triton.jit(do_not_specialize=_SIZES)
def _tap_kernel(
    dd, x, sums_GCT, dd_W, x_W, B, H, W, rows, n_blocks, C,
    K: tl.constexpr, SLOTS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Gradients of the K * K taps, then of the bias, over every G-th block of strips of x; zeros fill SLOTS."""
    HALF: tl.constexpr = K // 2
    AROUND: tl.constexpr = COLUMNS + K - 1
    H, W, C = tl.cast(H, tl.int32), tl.cast(W, tl.int32), tl.cast(C, tl.int32)
    rows, n_blocks = tl.cast(rows, tl.int32), tl.cast(n_blocks, tl.int32)
    dd_W, x_W = tl.cast(dd_W, tl.int64), tl.cast(x_W, tl.int64)
    dd_H, x_H = W * dd_W, W * x_W
    program, blocks_c = tl.program_id(0), tl.cdiv(C, BLOCK_C)
    strips, n_columns = tl.cdiv(H, rows), tl.cdiv(W, COLUMNS)
    g, G = program // blocks_c, tl.num_programs(0) // blocks_c
    c = program % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    zeros = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    sums = (zeros,) * (K * K + 1)
    for block in range(g, n_blocks, G):
        h = block % strips * rows
        p = block // strips * BLOCK_P + tl.arange(0, BLOCK_P)
        b, w = p // n_columns, p % n_columns * COLUMNS
        ok_PC = (b < B)[:, None] & (c < C)[None, :]
        position = (b * H + h) * W + w
        x_row, dd_row = x + _offsets(position, c, x_W), dd + _offsets(position, c, dd_W)
        # The rows of dd around a row of x; the lowest, like the next row of x, is read ahead of the arithmetic.
        window = ()
        for r in tl.static_range(-HALF, HALF):
            window += (_widen_all(_load_columns(dd_row + r * dd_H, h + r, H, w, W, ok_PC, dd_W, 0, COLUMNS)),)
        dd_row += HALF * dd_H
        dd_ahead = _load_columns(dd_row, h + HALF, H, w, W, ok_PC, dd_W, 0, COLUMNS)
        x_ahead = _load_columns(x_row, h, H, w, W, ok_PC, x_W, -HALF, AROUND)
        end = tl.minimum(h + rows, H)
        for r in range(h, end):
            window += (_widen_all(dd_ahead),)
            row = _widen_all(x_ahead)
            dd_row += dd_H
            x_row += x_H
            dd_ahead = _load_columns(dd_row, r + 1 + HALF, H, w, W, ok_PC, dd_W, 0, COLUMNS)
            x_ahead = _load_columns(x_row, r + 1, end, w, W, ok_PC, x_W, -HALF, AROUND)
            before, sums = sums, ()
            for t in tl.static_range(K * K + 1):
                total = before[t]
                for q in tl.static_range(COLUMNS):
                    if t < K * K:
                        total = tl.fma(window[K - 1 - t // K][q], row[q + t % K], total)
                    else:
                        total += window[HALF][q]
                sums += (total,)
            window = window[1:]
    total_CT = tl.sum(_join(sums + (zeros,) * (SLOTS - K * K - 1)), axis=0)
    t = tl.arange(0, SLOTS)
    sums_GCT += g.to(tl.int64) * C * SLOTS
    tl.store(sums_GCT + c[:, None] * SLOTS + t[None, :], total_CT, mask=(c < C)[:, None] & (t <= K * K)[None, :])


@triton.jit(do_not_specialize=_SIZES)
def _sum_kernel(
    sums_GCT, dweight_CT, dbias_C, G, C, scale,
    T: tl.constexpr, SLOTS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add up the programs' sums, for one block of taps and channels."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c, t = n // SLOTS, n % SLOTS
    total = tl.zeros((BLOCK_G, BLOCK_N), tl.float32)
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        offset = (g.to(tl.int64) * C * SLOTS)[:, None] + n[None, :]
        total += tl.load(sums_GCT + offset, mask=(g < G)[:, None] & (c < C)[None, :], other=0.0)
    result = scale * tl.sum(total, axis=0)
    tl.store(dweight_CT + c * T + t, result.to(dweight_CT.dtype.element_ty), mask=(c < C) & (t < T))
    tl.store(dbias_C + c, result.to(dbias_C.dtype.element_ty), mask=(c < C) & (t == T))


# ---------------------------------------------------------------------------------------------------------- launchers


def _forward(x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _convolve(x, weight, bias, scale, gate=gate, y=y)
    return y


def _backward(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate, weight and bias; those of an absent gate or bias mean nothing."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if gate is None:
        dgate, dd = dy.new_empty(0), dy
    else:
        dgate, dd = torch.empty_like(dx), torch.empty_like(dx)
        _convolve(x, weight, bias, scale, gate=dy, y=dgate, partner=gate, product=dd)
    _convolve(dd, weight, None, scale, y=dx, flip=True)
    return dx, dgate, *_tap_gradients(dd, x, weight, bias, scale)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    *,
    y: Tensor,
    gate: Tensor | None = None,
    partner: Tensor | None = None,
    product: Tensor | None = None,
    flip: bool = False,
) -> None:
    """y = gate * scale * (conv(x) + bias), and product = gate * partner if there is one; into channel slices, too."""
    B, H, W, C = x.shape
    choice = _LONG_ROWS if gate is None and H >= _LONG_FROM else _CONV_ROWS
    rows = int(H) if H < choice[-1] else min(choice, key=lambda rows: triton.cdiv(H, rows) * rows)
    if weight.stride(0) != 1:
        weight = weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)  # channels next to each other
    # What is absent is never read or written: any tensor stands in for it.
    (x, x_W), (y, y_W) = _as_map(x), (y, y.stride(2))
    gate_map, gate_W = (x, 0) if gate is None else _as_map(gate)
    partner_map, partner_W = (x, 0) if partner is None else _as_map(partner)
    product_map, product_W = (y, 0) if product is None else (product, product.stride(2))
    blocks = triton.cdiv(B * W, _CONV_TILE["BLOCK_P"]) * triton.cdiv(H, rows) * triton.cdiv(C, _CONV_TILE["BLOCK_C"])
    with on_device(x.device):
        _conv_kernel[(blocks,)](
            x, weight, weight if bias is None else bias.contiguous(), gate_map, partner_map, y, product_map,
            x_W, *weight.stride()[2:], gate_W, partner_W, y_W, product_W, B, H, W, C, scale,
            K=int(weight.shape[-1]), FLIP=flip, HAS_BIAS=bias is not None, HAS_GATE=gate is not None,
            HAS_PARTNER=partner is not None, WIDE=H * W * max(x_W, gate_W, partner_W, y_W, product_W) >= 2**31,
            ROWS=rows, **_CONV_TILE,
        )  # fmt: skip


def _tap_gradients(dd: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of the weight and the bias."""
    B, H, W, C = x.shape
    (dd, dd_W), (x, x_W) = _as_map(dd), _as_map(x)
    K = int(weight.shape[-1])
    slots = triton.next_power_of_2(K * K + 1)
    blocks_c = triton.cdiv(C, _TAP_TILE["BLOCK_C"])
    rows = triton.cdiv(H, triton.cdiv(H, _TAP_ROWS))  # about equal strips
    n_blocks = triton.cdiv(B * triton.cdiv(W, _TAP_TILE["COLUMNS"]), _TAP_TILE["BLOCK_P"]) * triton.cdiv(H, rows)
    G = min(n_blocks, max(1, _TAP_PROGRAMS // blocks_c))
    sums_GCT = torch.empty((G, C, slots), dtype=torch.float32, device=x.device)
    dweight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    dbias = torch.empty(C, dtype=weight.dtype if bias is None else bias.dtype, device=x.device)
    with on_device(x.device):
        _tap_kernel[(blocks_c * G,)](
            dd, x, sums_GCT, dd_W, x_W, B, H, W, rows, n_blocks, C,
            K=K, SLOTS=slots, **_TAP_TILE,
        )  # fmt: skip
        _sum_kernel[(triton.cdiv(C * slots, _SUM_TILE["BLOCK_N"]),)](
            sums_GCT, dweight, dbias, G, C, scale, T=K * K, SLOTS=slots, **_SUM_TILE
        )
    return dweight, dbias


def _as_map(x: Tensor) -> tuple[Tensor, int]:
    """The map, copied unless it is a slice of the channels of a dense one, and the step from position to position."""
    _, H, W, C = x.shape
    step = x.stride(2)
    if x.stride() == (H * W * step, W * step, step, 1):
        return x, step
    return x.contiguous(), C


# ----------------------------------------------------------------------------------------------------------- autograd
#
# Eager mode takes the autograd function, which costs a launch less time than a custom operator does; torch.compile
# sees the operator, one node each way. Both call the same launchers.


def gated_depthwise_triton(x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """The kernel's `gated_depthwise`; arguments as checked there."""
    inputs = (x, gate, weight, bias, scale)
    if torch.compiler.is_compiling():
        return _operator(*inputs)
    if torch.is_grad_enabled() and any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in inputs):
        return _GatedDepthwise.apply(*inputs)
    return _forward(*inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy: Tensor, backward: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    gradients = backward(dy, *tensors, ctx.scale)
    return *(None if x is None else dx for x, dx in zip(tensors, gradients, strict=True)), None


class _GatedDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _forward(*inputs)
        _save(ctx, inputs, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy, _backward)


def _fake_gradients(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgate = x.new_empty(0 if gate is None else x.shape)
    return (
        x.new_empty(x.shape),
        dgate,
        weight.new_empty(weight.shape),
        (weight if bias is None else bias).new_empty(x.shape[-1]),
    )


# Closed to torch.compile, which would read the code of these long kernels anew for every call: HorNet-T has 95.
@torch.library.custom_op("vision_gates::gated_depthwise", mutates_args=())
def _operator(x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return _forward(x, gate, weight, bias, scale)


@torch.library.custom_op("vision_gates::gated_depthwise_backward", mutates_args=())
def _backward_operator(
    dy: Tensor, x: Tensor, gate: Tensor | None, weight: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward(dy, x, gate, weight, bias, scale)


_operator.register_fake(lambda x, *_: x.new_empty(x.shape))
_backward_operator.register_fake(_fake_gradients)
_operator.register_autograd(lambda ctx, dy: _gradients(ctx, dy, _backward_operator), setup_context=_save)
