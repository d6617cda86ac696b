"""The locality gate in Triton: one pass over memory forward, one backward. Specification: reference.py.

Rows of V channels are independent. A program takes tiles of R rows, reads each tensor once in 16-byte pieces, computes
in float32 and writes in the dtype of the arguments. The backward pass normalises again instead of keeping what the
forward pass had, so only the arguments are saved.

Row axes fold into (A, T, H) wherever all tensors can walk two axes as one: all of them for dense tensors, tokens and
heads for slices of a wider projection. A tile is R steps along T at one index of A and of H. With a bias of the gate H
is the heads and nothing else, so a tile needs one row of the bias.

Suffixes: X any leading axes, A T H folded row axes, R rows of a tile, V channels of a head, P programs, K sums.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vision_gates.kernels.launching import on_device, operator, traceable

__all__ = ["locality_gate_triton"]

_NUM_WARPS = 4
# Elements of a tile: enough bytes in flight to fill the memory's pipeline, few enough for registers.
_FORWARD_TILE = 2048
_BACKWARD_TILE = 1024
# Programs of the backward pass, about. Fixed, so that the sums over rows have the same order on every GPU.
_BACKWARD_PROGRAMS = 1024

# Sizes and strides change from call to call: without specialisation a kernel compiles once for all of them.
_SIZES = ["n_tiles", "n_T", "tiles_T"]
_STRIDES = [f"{name}_{axis}" for name in ("dy", "o", "l", "g") for axis in "ATH"]


# --------------------------------------------------------------------------------------------------------- kernels


@triton.jit
def _locate(tile, tiles_T, R: tl.constexpr, H: tl.constexpr, FLAT: tl.constexpr):
    """Index of A, first index of T and index of H of a tile; int64, since offsets may pass 2**31.

    Neighbouring programs take neighbouring heads. The number of heads is compiled in, and so is whether there is an A
    at all: two divisions would delay the first load.
    """
    h = tile % H
    tile = tile // H
    a = tile * 0 if FLAT else tile // tiles_T
    return a.to(tl.int64), (tile - a * tiles_T).to(tl.int64) * R, h.to(tl.int64)


@triton.jit
def _load(x, a, t, h, x_A, x_T, x_H, r_R, v_V, inside_RV, UNIT: tl.constexpr):
    """A tile in float32. Strides come in units of UNIT, which tells the compiler how wide its loads may be."""
    x += UNIT * (a * x_A + t * x_T + h * x_H)
    return tl.load(x + UNIT * (r_R * x_T)[:, None] + v_V[None, :], mask=inside_RV, other=0.0).to(tl.float32)


@triton.jit
def _inverse_rms(x_RV, inside_R, eps, V: tl.constexpr):
    # Rows outside are zeros: where eps is 0 as well, their root would spread NaN into the sums over rows.
    # Inductor passes Python's floats as float64.
    return tl.where(inside_R, tl.rsqrt(tl.sum(x_RV * x_RV, axis=1) / V + tl.cast(eps, tl.float32)), 0.0)[:, None]


@triton.jit
def _sigmoids(x):
    """sigmoid(x) and sigmoid(-x) = 1 - sigmoid(x), both accurate relative to their size."""
    # From instructions that need no care for tiny or huge numbers: the exponential and the division of tl.sigmoid
    # would be a quarter of all that the kernel executes. The limit keeps infinity, hence NaN, out of the product.
    e = tl.exp2(tl.minimum(-1.4426950408889634 * x, 126.0, propagate_nan=tl.PropagateNan.ALL))
    root = tl.rsqrt(1.0 + e)
    s = root * root
    return s, e * s


@triton.jit
def _load_channels(x, v_V, inside_V):
    return tl.load(x + v_V, mask=inside_V, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def _locality_gate_forward_kernel(
    o, l, g, w_o, w_l, b, y,  # noqa: E741
    o_A, o_T, o_H, l_A, l_T, l_H, g_A, g_T, g_H,
    n_T, tiles_T, eps,
    V: tl.constexpr, H: tl.constexpr, R: tl.constexpr, BLOCK_V: tl.constexpr, UNIT: tl.constexpr,
    FLAT: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    a, t, h = _locate(tl.program_id(0), tiles_T, R, H, FLAT)
    r_R, v_V = tl.arange(0, R).to(tl.int64), tl.arange(0, BLOCK_V)
    inside_R, inside_V = r_R < n_T - t, v_V < V
    inside_RV = inside_R[:, None] & inside_V[None, :]
    o_RV = _load(o, a, t, h, o_A, o_T, o_H, r_R, v_V, inside_RV, UNIT)
    l_RV = _load(l, a, t, h, l_A, l_T, l_H, r_R, v_V, inside_RV, UNIT)
    g_RV = _load(g, a, t, h, g_A, g_T, g_H, r_R, v_V, inside_RV, UNIT)
    w_o_V, w_l_V = _load_channels(w_o, v_V, inside_V), _load_channels(w_l, v_V, inside_V)
    if BIASED:
        g_RV += _load_channels(b + h * V, v_V, inside_V)[None, :]
    s_RV, rest_RV = _sigmoids(g_RV)

    global_RV = o_RV * _inverse_rms(o_RV, inside_R, eps, V) * w_o_V[None, :]
    local_RV = l_RV * _inverse_rms(l_RV, inside_R, eps, V) * w_l_V[None, :]
    y_RV = global_RV * s_RV + local_RV * rest_RV
    if ACTIVATION:
        y_RV *= _sigmoids(y_RV)[0]
    offset_RV = ((a * n_T + t) * H + h) * V + (r_R * (H * V))[:, None] + v_V[None, :]
    tl.store(y + offset_RV, y_RV.to(y.dtype.element_ty), mask=inside_RV)


@triton.jit(do_not_specialize=_SIZES + _STRIDES)
def _locality_gate_backward_kernel(
    dy, o, l, g, w_o, w_l, b, do, dl, dg, sums_PKV,  # noqa: E741
    dy_A, dy_T, dy_H, o_A, o_T, o_H, l_A, l_T, l_H, g_A, g_T, g_H,
    n_tiles, n_T, tiles_T, eps,
    V: tl.constexpr, H: tl.constexpr, R: tl.constexpr, BLOCK_V: tl.constexpr, UNIT: tl.constexpr,
    FLAT: tl.constexpr, BIASED: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    r_R, v_V = tl.arange(0, R).to(tl.int64), tl.arange(0, BLOCK_V)
    inside_V = v_V < V
    w_o_V, w_l_V = _load_channels(w_o, v_V, inside_V), _load_channels(w_l, v_V, inside_V)
    dw_o_RV = tl.zeros((R, BLOCK_V), dtype=tl.float32)
    dw_l_RV = tl.zeros((R, BLOCK_V), dtype=tl.float32)
    if BIASED:  # the launcher sees to it that all tiles of a program have the same h
        b_V = _load_channels(b + tl.program_id(0) % H * V, v_V, inside_V)
        db_RV = tl.zeros((R, BLOCK_V), dtype=tl.float32)
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        a, t, h = _locate(tile, tiles_T, R, H, FLAT)
        inside_R = r_R < n_T - t
        inside_RV = inside_R[:, None] & inside_V[None, :]
        dy_RV = _load(dy, a, t, h, dy_A, dy_T, dy_H, r_R, v_V, inside_RV, UNIT)
        o_RV = _load(o, a, t, h, o_A, o_T, o_H, r_R, v_V, inside_RV, UNIT)
        l_RV = _load(l, a, t, h, l_A, l_T, l_H, r_R, v_V, inside_RV, UNIT)
        g_RV = _load(g, a, t, h, g_A, g_T, g_H, r_R, v_V, inside_RV, UNIT)
        if BIASED:
            g_RV += b_V[None, :]
        s_RV, rest_RV = _sigmoids(g_RV)

        # The forward pass again; o and l without their weights from here on.
        scale_o_R1, scale_l_R1 = _inverse_rms(o_RV, inside_R, eps, V), _inverse_rms(l_RV, inside_R, eps, V)
        o_RV *= scale_o_R1
        l_RV *= scale_l_R1
        global_RV, local_RV = o_RV * w_o_V[None, :], l_RV * w_l_V[None, :]
        if ACTIVATION:
            y_RV = global_RV * s_RV + local_RV * rest_RV
            sigmoid_RV, complement_RV = _sigmoids(y_RV)
            dy_RV *= sigmoid_RV * (1.0 + y_RV * complement_RV)

        do_RV, dl_RV = dy_RV * s_RV, dy_RV * rest_RV
        dg_RV = dl_RV * s_RV * (global_RV - local_RV)
        dw_o_RV += do_RV * o_RV
        dw_l_RV += dl_RV * l_RV
        if BIASED:
            db_RV += dg_RV
        # Through the normalisation: what points along the row cannot change it.
        do_RV *= w_o_V[None, :]
        dl_RV *= w_l_V[None, :]
        do_RV = scale_o_R1 * (do_RV - o_RV * (tl.sum(do_RV * o_RV, axis=1) / V)[:, None])
        dl_RV = scale_l_R1 * (dl_RV - l_RV * (tl.sum(dl_RV * l_RV, axis=1) / V)[:, None])

        offset_RV = ((a * n_T + t) * H + h) * V + (r_R * (H * V))[:, None] + v_V[None, :]
        tl.store(do + offset_RV, do_RV.to(do.dtype.element_ty), mask=inside_RV)
        tl.store(dl + offset_RV, dl_RV.to(dl.dtype.element_ty), mask=inside_RV)
        tl.store(dg + offset_RV, dg_RV.to(dg.dtype.element_ty), mask=inside_RV)
    sums_KV = sums_PKV + tl.program_id(0) * (3 if BIASED else 2) * V
    tl.store(sums_KV + v_V, tl.sum(dw_o_RV, axis=0), mask=inside_V)
    tl.store(sums_KV + V + v_V, tl.sum(dw_l_RV, axis=0), mask=inside_V)
    if BIASED:
        tl.store(sums_KV + 2 * V + v_V, tl.sum(db_RV, axis=0), mask=inside_V)


# ------------------------------------------------------------------------------------------------------- launchers


class _Walk(NamedTuple):
    """How kernels step through the rows of their tensors."""

    n_A: int
    n_T: int
    n_H: int
    unit: int  # divides every stride; up to 16 elements
    strides: tuple[int, ...]  # along A, T, H of the first tensor, then of the next; in units


def _forward(
    o_XV: Tensor,
    l_XV: Tensor,
    g_XV: Tensor,
    w_o_V: Tensor,
    w_l_V: Tensor,
    b_HV: Tensor | None,
    eps: float,
    activation: bool,
) -> Tensor:
    inputs, walk = _plan(o_XV, l_XV, g_XV, keep_heads=b_HV is not None)
    y_XV = torch.empty(o_XV.shape, dtype=o_XV.dtype, device=o_XV.device)
    constants, tiles_T = _uncached_in_traces(_tile, o_XV)(walk, int(o_XV.shape[-1]), _FORWARD_TILE)
    with on_device(o_XV.device):
        traceable(_locality_gate_forward_kernel, o_XV)[(walk.n_A * tiles_T * walk.n_H,)](
            *inputs, *_parameters(w_o_V, w_l_V, b_HV), y_XV, *walk.strides, walk.n_T, tiles_T, eps,
            BIASED=b_HV is not None, ACTIVATION=activation, num_warps=_NUM_WARPS, **constants,
        )  # fmt: skip
    return y_XV


def _backward(
    dy_XV: Tensor,
    o_XV: Tensor,
    l_XV: Tensor,
    g_XV: Tensor,
    w_o_V: Tensor,
    w_l_V: Tensor,
    b_HV: Tensor | None,
    eps: float,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of o, l and g, of both weights as one (2, V) and of the bias, (H, V) or empty; the last two float32."""
    inputs, walk = _plan(dy_XV, o_XV, l_XV, g_XV, keep_heads=b_HV is not None)
    do_XV, dl_XV, dg_XV = (torch.empty(o_XV.shape, dtype=o_XV.dtype, device=o_XV.device) for _ in range(3))
    constants, tiles_T = _uncached_in_traces(_tile, o_XV)(walk, int(o_XV.shape[-1]), _BACKWARD_TILE)
    n_tiles = walk.n_A * tiles_T * walk.n_H
    # With a bias a multiple of the number of heads: then no program meets two of them, and it sums its head's gradient.
    n_heads = 1 if b_HV is None else b_HV.shape[0]
    n_programs = min(n_tiles, max(1, _BACKWARD_PROGRAMS // n_heads) * n_heads)
    n_sums = 2 if b_HV is None else 3
    sums_PKV = torch.empty((n_programs, n_sums, o_XV.shape[-1]), dtype=torch.float32, device=o_XV.device)
    with on_device(o_XV.device):
        traceable(_locality_gate_backward_kernel, o_XV)[(n_programs,)](
            *inputs, *_parameters(w_o_V, w_l_V, b_HV), do_XV, dl_XV, dg_XV, sums_PKV,
            *walk.strides, n_tiles, walk.n_T, tiles_T, eps,
            BIASED=b_HV is not None, ACTIVATION=activation, num_warps=_NUM_WARPS, **constants,
        )  # fmt: skip
    if b_HV is None:
        return do_XV, dl_XV, dg_XV, sums_PKV.sum(0), sums_PKV.new_empty(0)
    db_PV = sums_PKV[:, 2]
    return do_XV, dl_XV, dg_XV, sums_PKV[:, :2].sum(0), db_PV.unflatten(0, (-1, n_heads)).sum(0)


def _parameters(w_o_V: Tensor, w_l_V: Tensor, b_HV: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Contiguous; where there is no bias, any tensor stands for it."""
    return w_o_V.contiguous(), w_l_V.contiguous(), w_o_V if b_HV is None else b_HV.contiguous()


def _plan(*tensors: Tensor, keep_heads: bool = False) -> tuple[tuple[Tensor, ...], _Walk]:
    """The tensors, copied where a kernel cannot read them, and how to walk them."""
    shape = tensors[0].shape
    if shape[-1] > 1:
        tensors = tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)
    fold = _uncached_in_traces(_fold, tensors[0])
    walk = fold(shape, keep_heads, *(x.stride() for x in tensors))
    if walk is None:
        tensors = tuple(x.contiguous() for x in tensors)
        walk = fold(shape, keep_heads, *(x.stride() for x in tensors))
    return tensors, walk


def _uncached_in_traces(function: Any, x: Tensor) -> Callable[..., Any]:
    """A trace may have symbolic sizes, which no cache takes."""
    return function if type(x) is Tensor else function.__wrapped__


@lru_cache(maxsize=1024)
def _fold(shape: tuple[int, ...], keep_heads: bool, *strides: tuple[int, ...]) -> _Walk | None:
    """Merge neighbouring row axes that every tensor walks with one stride; None if more than three are left.

    With `keep_heads` the last row axis is H, whatever its size and strides.
    """
    one = (1, (0,) * len(strides))  # an axis of one row may have any stride: it must not count
    rows = [
        one if size == 1 else (size, tuple(steps))
        for size, *steps in zip(shape[:-1], *(x[:-1] for x in strides), strict=True)
    ]
    heads = [rows.pop()] if keep_heads else []
    axes: list[tuple[int, tuple[int, ...]]] = []
    for size, steps in rows:
        if size == 1:
            continue
        if axes and axes[-1][1] == tuple(size * step for step in steps):
            axes[-1] = (axes[-1][0] * size, steps)
        else:
            axes.append((size, steps))
    if len(axes) + len(heads) > 3:
        return None
    if heads:
        axes = [one] * (2 - len(axes)) + axes + heads
    elif len(axes) == 2:  # tiles run along the longer one
        axes = [one, *axes] if axes[0][0] >= axes[1][0] else [*axes, one]
    elif len(axes) < 2:
        axes = [one, *(axes or [one]), one]
    sizes, steps_of_axes = zip(*axes, strict=True)
    flat = [step for steps in zip(*steps_of_axes, strict=True) for step in steps]
    unit = math.gcd(16, *flat)
    return _Walk(*sizes, unit, tuple(step // unit for step in flat))


@lru_cache(maxsize=1024)
def _tile(walk: _Walk, n_channels: int, elements: int) -> tuple[dict[str, int], int]:
    """What a kernel is compiled for, and the number of tiles along T."""
    block = triton.next_power_of_2(n_channels)
    n_rows = max(1, elements // block)
    constants = {
        "V": n_channels, "H": int(walk.n_H), "R": n_rows, "BLOCK_V": block, "UNIT": walk.unit, "FLAT": walk.n_A == 1,
    }  # fmt: skip
    return constants, triton.cdiv(walk.n_T, n_rows)


# -------------------------------------------------------------------------------------------------------- autograd
#
# Eager mode takes the autograd function, which costs a launch less time than a custom operator does; torch.compile
# sees the operator, one node each way. Both call the same launchers.


def locality_gate_triton(
    o_XV: Tensor,
    l_XV: Tensor,
    g_XV: Tensor,
    w_o_V: Tensor,
    w_l_V: Tensor,
    gate_bias_HV: Tensor | None,
    *,
    eps: float,
    activation: bool,
) -> Tensor:
    """The kernel's `locality_gate`; arguments as checked there."""
    arguments = (o_XV, l_XV, g_XV, w_o_V, w_l_V, gate_bias_HV, eps, activation)
    if torch.compiler.is_compiling():
        return _operator(*arguments)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in arguments[:6]):
        return _LocalityGate.apply(*arguments)
    return _forward(*arguments)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, dy_XV: Tensor, backward: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor | None, ...]:
    *_, w_o_V, w_l_V, b_HV = tensors = ctx.saved_tensors
    do_XV, dl_XV, dg_XV, dw_2V, db_HV = backward(dy_XV, *tensors, ctx.eps, ctx.activation)
    dw_o_V, dw_l_V = dw_2V.unbind()
    db_HV = None if b_HV is None else db_HV.to(b_HV.dtype)
    return do_XV, dl_XV, dg_XV, dw_o_V.to(w_o_V.dtype), dw_l_V.to(w_l_V.dtype), db_HV, None, None


class _LocalityGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y_XV = _forward(*inputs)
        _save(ctx, inputs, y_XV)
        return y_XV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_XV: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, dy_XV, _backward)


def _fake_gradients(
    dy: Tensor, o: Tensor, local: Tensor, g_logits: Tensor, w_o: Tensor, w_l: Tensor, gate_bias: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    dw, db = ((2, *w_o.shape), 0 if gate_bias is None else gate_bias.shape)
    return *(o.new_empty(o.shape) for _ in range(3)), *(o.new_empty(x, dtype=torch.float32) for x in (dw, db))


@operator("vision_gates::locality_gate", fake=lambda o, *_: o.new_empty(o.shape))
def _operator(
    o: Tensor,
    local: Tensor,
    g_logits: Tensor,
    w_o: Tensor,
    w_l: Tensor,
    gate_bias: Tensor | None,
    eps: float,
    activation: bool,
) -> Tensor:
    return _forward(o, local, g_logits, w_o, w_l, gate_bias, eps, activation)


@operator("vision_gates::locality_gate_backward", fake=_fake_gradients)
def _backward_operator(
    dy: Tensor,
    o: Tensor,
    local: Tensor,
    g_logits: Tensor,
    w_o: Tensor,
    w_l: Tensor,
    gate_bias: Tensor | None,
    eps: float,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backward(dy, o, local, g_logits, w_o, w_l, gate_bias, eps, activation)


_operator.register_autograd(lambda ctx, dy: _gradients(ctx, dy, _backward_operator), setup_context=_save)
