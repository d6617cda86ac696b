"""positional_attention in Triton: one pass over memory forward, one or two backward. Specification: reference.py.

A block of an image is a matrix in either of two ways: rows of the grid down and (column, channel) across, which a table
of rows multiplies from the left; or columns down and (row, channel) across, for a table of columns. Memory is read and
written in both, always with channels next to each other; between the two products of a chain the block is turned in
shared memory, in the dtype of the tensors. Sums are float32.

Grids of up to _BLOCK tokens a side are one block, which the backward pass reads once for all gradients. Larger grids
loop over blocks and make the first product of a chain again for each block of the second: beside their attention by
content, whose cost is N^2, that is little.

Suffixes: B batch, N tokens, h heads, D channels of a head; Y X rows and columns of queries, P W those of keys (P and W
also of a table's second axis), and two letters as one axis of a matrix: YD is (row, channel).
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from vision_gates.kernels.launching import on_device, operator, traceable

__all__ = ["positional_attention_triton"]

# Tokens a side of a block, at most: what fits into registers together with its sums.
_BLOCK = 32
# Programs that sum a table's gradient, about. Fixed, so that the sums have the same order on every GPU. Those that make
# all gradients of an image, by their warps: not more than an H200 runs at once.
_TABLE_PROGRAMS = 1024
_IMAGE_PROGRAMS = {4: 512, 8: 132}

# Sizes change from call to call: without specialisation a kernel compiles once for all that take the same blocks.
_SIZES = ("B", "H", "W", "n_heads", "n_groups", "n_i", "n_j", "n_k")


# --------------------------------------------------------------------------------------------------- building blocks


@triton.jit
def _load_table(table, i, j, n_i, n_j, stride_i, stride_j, dtype: tl.constexpr):
    mask = (i < n_i)[:, None] & (j < n_j)[None, :]
    return tl.load(table + i[:, None] * stride_i + j[None, :] * stride_j, mask=mask, other=0.0).to(dtype)


@triton.jit
def _axes(first_j, first_d, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """Index of the token and of the channel along an axis of both."""
    jd = tl.arange(0, BLOCK_J * BLOCK_D)
    return first_j + jd // BLOCK_D, first_d + jd % BLOCK_D


@triton.jit
def _offsets(i, j, d, stride_i, stride_j):
    """Of the matrix x[i, (j, d)]; as wide as the strides."""
    return (i * stride_i)[:, None] + (j * stride_j + d)[None, :]


@triton.jit
def _inside(i, j, d, n_i, n_j, D: tl.constexpr):
    return (i < n_i)[:, None] & ((j < n_j) & (d < D))[None, :]


@triton.jit
def _load(x, i, j, d, n_i, n_j, stride_i, stride_j, D: tl.constexpr):
    return tl.load(x + _offsets(i, j, d, stride_i, stride_j), mask=_inside(i, j, d, n_i, n_j, D), other=0.0)


@triton.jit
def _turn(x, I: tl.constexpr, J: tl.constexpr, D: tl.constexpr):  # noqa: E741
    """The matrix x[i, (j, d)] as x[j, (i, d)]."""
    return x.reshape(I, J, D).permute(1, 0, 2).reshape(J, I * D)


@triton.jit
def _add_products(sums_SIJ, a_IK, b_JK, N: tl.constexpr, K: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr):
    """Add a b^T, in parts along K: a small matrix of long sums keeps every warp busy only if each makes its own."""
    a_SIK = a_IK.reshape(N, SPLIT, K // SPLIT).permute(1, 0, 2)
    b_SKJ = b_JK.reshape(N, SPLIT, K // SPLIT).permute(1, 2, 0)
    return tl.dot(a_SIK, b_SKJ, sums_SIJ, input_precision=PRECISION)


@triton.jit
def _apply(
    x, rows, columns, first_y, first_x, first_d, H, W, stride,
    TRANSPOSED: tl.constexpr, D: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Both tables (or both transposed) applied to x, for one block of queries: [x, (y, d)] in float32."""
    dtype: tl.constexpr = x.dtype.element_ty
    y, x_X = first_y + tl.arange(0, BLOCK_Y), first_x + tl.arange(0, BLOCK_X)
    rows_query, rows_key = (1, H) if TRANSPOSED else (H, 1)
    columns_query, columns_key = (1, W) if TRANSPOSED else (W, 1)
    sums_X_YD = tl.zeros((BLOCK_X, BLOCK_Y * BLOCK_D), tl.float32)
    for first_w in range(0, BLOCK_X if ONE_BLOCK else W, BLOCK_X):
        w, d = _axes(first_w, first_d, BLOCK_X, BLOCK_D)
        half_Y_WD = tl.zeros((BLOCK_Y, BLOCK_X * BLOCK_D), tl.float32)
        for first_p in range(0, BLOCK_P if ONE_BLOCK else H, BLOCK_P):
            p = first_p + tl.arange(0, BLOCK_P)
            rows_YP = _load_table(rows, y, p, H, H, rows_query, rows_key, dtype)
            x_P_WD = _load(x, p, w, d, H, W, W * stride, stride, D)
            half_Y_WD = tl.dot(rows_YP, x_P_WD, half_Y_WD, input_precision=PRECISION)
        half_W_YD = _turn(half_Y_WD.to(dtype), BLOCK_Y, BLOCK_X, BLOCK_D)
        w_W = first_w + tl.arange(0, BLOCK_X)
        columns_XW = _load_table(columns, x_X, w_W, W, W, columns_query, columns_key, dtype)
        sums_X_YD = tl.dot(columns_XW, half_W_YD, sums_X_YD, input_precision=PRECISION)
    return sums_X_YD


@triton.jit
def _locate(H, W, n_heads, D: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr):
    """Image, head, first row, column and channel of this program: its neighbours read the same lines of memory."""
    program = tl.program_id(0)
    blocks_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    blocks_Y, blocks_X = tl.cdiv(H, BLOCK_Y), tl.cdiv(W, BLOCK_X)
    first_d = program % blocks_D * BLOCK_D
    head = program // blocks_D % n_heads
    block = program // blocks_D // n_heads
    first_x = block % blocks_X * BLOCK_X
    first_y = block // blocks_X % blocks_Y * BLOCK_Y
    return (block // blocks_X // blocks_Y).to(tl.int64), head.to(tl.int64), first_y, first_x, first_d


# ------------------------------------------------------------------------------------------------------------ kernels


@triton.jit(do_not_specialize=_SIZES)
def _forward_kernel(
    content, v, rows, columns, gate, out,
    content_B, content_N, content_h, v_B, v_N, v_h, H, W, n_heads,
    WIDE: tl.constexpr, D: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries and channels."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    # Inductor may pass sizes as 64 bits and a 1 as a constant.
    H, W, n_heads = tl.cast(H, tl.int32), tl.cast(W, tl.int32), tl.cast(n_heads, tl.int32)
    content_N, v_N, out_N = tl.cast(content_N, OFFSET), tl.cast(v_N, OFFSET), tl.cast(n_heads * D, OFFSET)
    b, head, first_y, first_x, first_d = _locate(H, W, n_heads, D, BLOCK_Y, BLOCK_X, BLOCK_D)
    y, d = _axes(first_y, first_d, BLOCK_Y, BLOCK_D)
    x = first_x + tl.arange(0, BLOCK_X)
    content += b * content_B + head * content_h
    content_X_YD = _load(content, x, y, d, W, H, content_N, W * content_N, D)
    share = tl.load(gate + head)

    position_X_YD = _apply(
        v + b * v_B + head * v_h, rows + head * H * H, columns + head * W * W, first_y, first_x, first_d, H, W, v_N,
        False, D, ONE_BLOCK, BLOCK_Y, BLOCK_X, BLOCK_P, BLOCK_D, PRECISION,
    )  # fmt: skip
    out_X_YD = (1.0 - share) * content_X_YD.to(tl.float32) + share * position_X_YD
    out += b * H * W * out_N + head * D
    inside = _inside(x, y, d, W, H, D)
    tl.store(out + _offsets(x, y, d, out_N, W * out_N), out_X_YD.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _backward_kernel(
    dout, content, v, rows, columns, gate, dcontent, dv, sums_GhE,
    dout_B, dout_N, dout_h, content_B, content_N, content_h, v_B, v_N, v_h, B, H, W, n_heads, n_groups,
    WIDE: tl.constexpr, D: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients, of every n_groups-th image, where the grid is one block; parts of those of the tables and gate."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    B, n_groups = tl.cast(B, tl.int32), tl.cast(n_groups, tl.int32)
    H, W, n_heads = tl.cast(H, tl.int32), tl.cast(W, tl.int32), tl.cast(n_heads, tl.int32)
    dout_N, content_N, v_N = tl.cast(dout_N, OFFSET), tl.cast(content_N, OFFSET), tl.cast(v_N, OFFSET)
    out_N = tl.cast(n_heads * D, OFFSET)
    dtype: tl.constexpr = v.dtype.element_ty
    blocks_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    first_d = program % blocks_D * BLOCK_D
    head = (program // blocks_D % n_heads).to(tl.int64)
    group = program // blocks_D // n_heads
    y_Y, x_X = tl.arange(0, BLOCK_Y), tl.arange(0, BLOCK_X)
    y, d_YD = _axes(0, first_d, BLOCK_Y, BLOCK_D)
    x, d_XD = _axes(0, first_d, BLOCK_X, BLOCK_D)
    inside_X_YD, inside_Y_XD = _inside(x_X, y, d_YD, W, H, D), _inside(y_Y, x, d_XD, H, W, D)
    rows, columns = rows + head * H * H, columns + head * W * W
    rows_YP = _load_table(rows, y_Y, y_Y, H, H, H, 1, dtype)
    rows_PY = _load_table(rows, y_Y, y_Y, H, H, 1, H, dtype)
    columns_WX = _load_table(columns, x_X, x_X, W, W, 1, W, dtype)
    share = tl.load(gate + head)

    drows_SYP = tl.zeros((SPLIT, BLOCK_Y, BLOCK_Y), tl.float32)
    dcolumns_SXW = tl.zeros((SPLIT, BLOCK_X, BLOCK_X), tl.float32)
    agreement = 0.0  # of content and dout
    for b in range(group, B, n_groups):
        image = tl.cast(b, tl.int64)
        dout_X_YD = _load(dout + image * dout_B + head * dout_h, x_X, y, d_YD, W, H, dout_N, W * dout_N, D)
        v_P_WD = _load(v + image * v_B + head * v_h, y_Y, x, d_XD, H, W, W * v_N, v_N, D)
        here = content + image * content_B + head * content_h
        content_X_YD = _load(here, x_X, y, d_YD, W, H, content_N, W * content_N, D)
        out_offset = image * H * W * out_N + head * D

        dcontent_X_YD = (1.0 - share) * dout_X_YD.to(tl.float32)
        here = dcontent + out_offset + _offsets(x_X, y, d_YD, out_N, W * out_N)
        tl.store(here, dcontent_X_YD.to(dtype), mask=inside_X_YD)
        agreement += tl.sum(dout_X_YD.to(tl.float32) * content_X_YD.to(tl.float32))

        back_W_YD = tl.dot(columns_WX, dout_X_YD, input_precision=PRECISION)
        back_Y_WD = _turn(back_W_YD.to(dtype), BLOCK_X, BLOCK_Y, BLOCK_D)
        dv_P_WD = share * tl.dot(rows_PY, back_Y_WD, input_precision=PRECISION)
        here = dv + out_offset + _offsets(y_Y, x, d_XD, W * out_N, out_N)
        tl.store(here, dv_P_WD.to(dtype), mask=inside_Y_XD)
        drows_SYP = _add_products(drows_SYP, back_Y_WD, v_P_WD, BLOCK_Y, BLOCK_X * BLOCK_D, SPLIT, PRECISION)

        half_Y_WD = tl.dot(rows_YP, v_P_WD, input_precision=PRECISION)
        half_W_YD = _turn(half_Y_WD.to(dtype), BLOCK_Y, BLOCK_X, BLOCK_D)
        dcolumns_SXW = _add_products(dcolumns_SXW, dout_X_YD, half_W_YD, BLOCK_X, BLOCK_Y * BLOCK_D, SPLIT, PRECISION)

    drows_YP, dcolumns_XW = tl.sum(drows_SYP, axis=0), tl.sum(dcolumns_SXW, axis=0)
    # A part is all of drows, all of dcolumns and dgate, one after the other.
    n_sums = H * H + W * W + 1
    sums = sums_GhE + ((group * blocks_D + program % blocks_D) * tl.cast(n_heads, tl.int64) + head) * n_sums
    mask_YP = (y_Y < H)[:, None] & (y_Y < H)[None, :]
    tl.store(sums + y_Y[:, None] * H + y_Y[None, :], share * drows_YP, mask=mask_YP)
    sums += H * H
    mask_XW = (x_X < W)[:, None] & (x_X < W)[None, :]
    tl.store(sums + x_X[:, None] * W + x_X[None, :], share * dcolumns_XW, mask=mask_XW)
    columns_XW = _load_table(columns, x_X, x_X, W, W, W, 1, tl.float32)
    # What position and dout agree on is what the table of columns and its gradient do.
    tl.store(sums + W * W, tl.sum(columns_XW * dcolumns_XW) - agreement)


@triton.jit(do_not_specialize=_SIZES)
def _token_gradient_kernel(
    dout, content, rows, columns, gate, dcontent, dv, agreement,
    dout_B, dout_N, dout_h, content_B, content_N, content_h, H, W, n_heads,
    WIDE: tl.constexpr, D: tl.constexpr, ONE_BLOCK: tl.constexpr, BLOCK_Y: tl.constexpr, BLOCK_X: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of the gradients of content and values, and how content and dout agree on it: a part of dgate."""
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    H, W, n_heads = tl.cast(H, tl.int32), tl.cast(W, tl.int32), tl.cast(n_heads, tl.int32)
    dout_N, content_N, out_N = tl.cast(dout_N, OFFSET), tl.cast(content_N, OFFSET), tl.cast(n_heads * D, OFFSET)
    b, head, first_y, first_x, first_d = _locate(H, W, n_heads, D, BLOCK_Y, BLOCK_X, BLOCK_D)
    y, d = _axes(first_y, first_d, BLOCK_Y, BLOCK_D)
    x = first_x + tl.arange(0, BLOCK_X)
    dout += b * dout_B + head * dout_h
    content += b * content_B + head * content_h
    share = tl.load(gate + head)
    out_offset = b * H * W * out_N + head * D
    inside = _inside(x, y, d, W, H, D)

    dout_X_YD = _load(dout, x, y, d, W, H, dout_N, W * dout_N, D).to(tl.float32)
    content_X_YD = _load(content, x, y, d, W, H, content_N, W * content_N, D).to(tl.float32)
    tl.store(agreement + tl.program_id(0), tl.sum(dout_X_YD * content_X_YD))
    here = dcontent + out_offset + _offsets(x, y, d, out_N, W * out_N)
    tl.store(here, ((1.0 - share) * dout_X_YD).to(dcontent.dtype.element_ty), mask=inside)
    dv_X_YD = share * _apply(
        dout, rows + head * H * H, columns + head * W * W, first_y, first_x, first_d, H, W, dout_N,
        True, D, ONE_BLOCK, BLOCK_Y, BLOCK_X, BLOCK_P, BLOCK_D, PRECISION,
    )  # fmt: skip
    here = dv + out_offset + _offsets(x, y, d, out_N, W * out_N)
    tl.store(here, dv_X_YD.to(dv.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_SIZES)
def _table_gradient_kernel(
    a, x, table, sums_GhE, a_B, a_h, a_i, a_k, x_B, x_h, x_m, x_j, table_k, table_m, sums_i, sums_j,
    B, n_i, n_k, n_heads, n_groups,
    WIDE: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of sum over b, k, d of a[i, k, d] (sum over m of table[k, m] x[m, j, d]), of a part of all b, k, d.

    i and j go along one axis of the grid, k and m along the other.
    """
    OFFSET: tl.constexpr = tl.int64 if WIDE else tl.int32
    B, n_groups = tl.cast(B, tl.int32), tl.cast(n_groups, tl.int32)
    n_i, n_k, n_heads = tl.cast(n_i, tl.int32), tl.cast(n_k, tl.int32), tl.cast(n_heads, tl.int32)
    a_i, a_k, x_m, x_j = tl.cast(a_i, OFFSET), tl.cast(a_k, OFFSET), tl.cast(x_m, OFFSET), tl.cast(x_j, OFFSET)
    dtype: tl.constexpr = x.dtype.element_ty
    program, blocks, blocks_K = tl.program_id(0), tl.cdiv(n_i, BLOCK), tl.cdiv(n_k, BLOCK)
    blocks_D: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    first_j = program % blocks * BLOCK
    first_i = program // blocks % blocks * BLOCK
    head = (program // blocks // blocks % n_heads).to(tl.int64)
    group = program // blocks // blocks // n_heads
    i_I, one = first_i + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    table += head * n_k * n_k

    sums_IJ = tl.zeros((BLOCK, BLOCK), tl.float32)
    for item in range(group, B * blocks_K * blocks_D, n_groups):
        first_d = item % blocks_D * BLOCK_D
        first_k = item // blocks_D % blocks_K * BLOCK
        b = tl.cast(item // blocks_D // blocks_K, tl.int64)
        j, d = _axes(first_j, first_d, BLOCK, BLOCK_D)
        half_K_JD = tl.zeros((BLOCK, BLOCK * BLOCK_D), tl.float32)
        for first_m in range(0, n_k, BLOCK):
            table_KM = _load_table(table, first_k + one, first_m + one, n_k, n_k, table_k, table_m, dtype)
            x_M_JD = _load(x + b * x_B + head * x_h, first_m + one, j, d, n_k, n_i, x_m, x_j, D)
            half_K_JD = tl.dot(table_KM, x_M_JD, half_K_JD, input_precision=PRECISION)
        half_J_KD = _turn(half_K_JD.to(dtype), BLOCK, BLOCK, BLOCK_D)
        k, d = _axes(first_k, first_d, BLOCK, BLOCK_D)
        a_I_KD = _load(a + b * a_B + head * a_h, i_I, k, d, n_i, n_k, a_i, a_k, D)
        sums_IJ = tl.dot(a_I_KD, half_J_KD.trans(), sums_IJ, input_precision=PRECISION)
    j_J = first_j + one
    sums = sums_GhE + (group * tl.cast(n_heads, tl.int64) + head) * n_i * n_i
    offsets = i_I[:, None] * sums_i + j_J[None, :] * sums_j
    tl.store(sums + offsets, sums_IJ, mask=(i_I < n_i)[:, None] & (j_J < n_i)[None, :])


# ---------------------------------------------------------------------------------------------------------- launchers


def _forward(content: Tensor, v: Tensor, rows: Tensor, columns: Tensor, gate: Tensor) -> Tensor:
    content, v = _dense_channels(content), _dense_channels(v)
    B, N, n_heads, D = content.shape
    H, W = rows.shape[-1], columns.shape[-1]
    out = torch.empty(content.shape, dtype=content.dtype, device=content.device)
    tile = _query_tile(H, W, D, v.dtype)
    with on_device(v.device):
        traceable(_forward_kernel, v)[(_n_queries(B, H, W, n_heads, tile),)](
            content, v, rows.contiguous(), columns.contiguous(), gate.contiguous(), out,
            *content.stride()[:3], *v.stride()[:3], H, W, n_heads, WIDE=_is_wide(N, content, v, out), **tile,
        )  # fmt: skip
    return out


def _backward(
    dout: Tensor, content: Tensor, v: Tensor, rows: Tensor, columns: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of content, of v, and of each head's tables and gate, in a row: (h, H * H + W * W + 1), float32."""
    dout, content, v = (_dense_channels(x) for x in (dout, content, v))
    tables = (rows.contiguous(), columns.contiguous(), gate.contiguous())
    dcontent, dv = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for _ in range(2))
    fits = _fits(rows.shape[-1], columns.shape[-1], v.dtype)
    with on_device(v.device):
        dtables = (_backward_of_a_block if fits else _backward_of_blocks)(dout, content, v, *tables, dcontent, dv)
    return dcontent, dv, dtables


def _backward_of_a_block(
    dout: Tensor,
    content: Tensor,
    v: Tensor,
    rows: Tensor,
    columns: Tensor,
    gate: Tensor,
    dcontent: Tensor,
    dv: Tensor,
) -> Tensor:
    """Writes dcontent and dv, returns the gradients of tables and gate."""
    B, N, n_heads, D = v.shape
    H, W = rows.shape[-1], columns.shape[-1]
    tile = _image_tile(H, W, D, v.dtype)
    blocks_D = triton.cdiv(D, tile["BLOCK_D"])
    n_groups = _n_groups(B, n_heads * blocks_D, _IMAGE_PROGRAMS[tile["num_warps"]])
    sums = torch.empty((n_groups * blocks_D, n_heads, H * H + W * W + 1), dtype=torch.float32, device=v.device)
    traceable(_backward_kernel, v)[(n_groups * n_heads * blocks_D,)](
        dout, content, v, rows, columns, gate, dcontent, dv, sums,
        *dout.stride()[:3], *content.stride()[:3], *v.stride()[:3],
        B, H, W, n_heads, n_groups, WIDE=_is_wide(N, dout, content, v, dv), **tile,
    )  # fmt: skip
    return sums.sum(0)


def _backward_of_blocks(
    dout: Tensor,
    content: Tensor,
    v: Tensor,
    rows: Tensor,
    columns: Tensor,
    gate: Tensor,
    dcontent: Tensor,
    dv: Tensor,
) -> Tensor:
    """As `_backward_of_a_block`."""
    B, N, n_heads, D = v.shape
    H, W = rows.shape[-1], columns.shape[-1]
    tile = _query_tile(H, W, D, v.dtype)
    n_programs = _n_queries(B, H, W, n_heads, tile)
    agreement = torch.empty(n_programs, dtype=torch.float32, device=v.device)
    traceable(_token_gradient_kernel, v)[(n_programs,)](
        dout, content, rows, columns, gate, dcontent, dv, agreement,
        *dout.stride()[:3], *content.stride()[:3],
        H, W, n_heads, WIDE=_is_wide(N, dout, content, dv), **tile,
    )  # fmt: skip
    dout_B, dout_N, dout_h, _ = dout.stride()
    v_B, v_N, v_h, _ = v.stride()
    drows = _table_gradient(
        v, dout, columns, (v_B, v_h, W * v_N, v_N, dout_B, dout_h, dout_N, W * dout_N, 1, W, 1, H), H, W
    )
    dcolumns = _table_gradient(
        dout, v, rows, (dout_B, dout_h, dout_N, W * dout_N, v_B, v_h, W * v_N, v_N, H, 1, W, 1), W, H
    )
    agreement = agreement.view(-1, n_heads, triton.cdiv(D, tile["BLOCK_D"])).sum((0, 2))
    # What position and dout agree on is what the table of columns and its gradient do.
    dgate = (dcolumns * columns.flatten(1)).sum(1) - agreement
    return torch.cat((gate[:, None] * drows, gate[:, None] * dcolumns, dgate[:, None]), dim=1)


def _table_gradient(a: Tensor, x: Tensor, table: Tensor, strides: tuple[int, ...], n_i: int, n_k: int) -> Tensor:
    """Gradient of one table before the gate, (h, n_i * n_i)."""
    B, N, n_heads, D = x.shape
    tile = _gradient_tile(D, x.dtype)
    blocks = triton.cdiv(n_i, tile["BLOCK"]) ** 2 * n_heads
    items = B * triton.cdiv(n_k, tile["BLOCK"]) * triton.cdiv(D, tile["BLOCK_D"])
    n_groups = _n_groups(items, blocks, _TABLE_PROGRAMS)
    sums = torch.empty((n_groups, n_heads, n_i * n_i), dtype=torch.float32, device=x.device)
    traceable(_table_gradient_kernel, x)[(n_groups * blocks,)](
        a, x, table, sums, *strides, B, n_i, n_k, n_heads, n_groups, WIDE=_is_wide(N, a, x), **tile
    )
    return sums.sum(0)


def _query_tile(H: int, W: int, D: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernels are compiled for that make blocks of queries."""
    block_X = _side(W, dtype)
    return {
        **_channels(D, dtype), "ONE_BLOCK": _fits(H, W, dtype), "BLOCK_Y": 16, "BLOCK_X": block_X,
        "BLOCK_P": _side(H, dtype), "num_warps": 8 if block_X > 16 else 4, "num_stages": 1,
    }  # fmt: skip


def _image_tile(H: int, W: int, D: int, dtype: torch.dtype) -> dict[str, Any]:
    """What the kernel is compiled for that makes all gradients of an image."""
    block_Y, block_X = _side(H, dtype), _side(W, dtype)
    warps = 8 if max(block_Y, block_X) > 16 else 4
    tile = {**_channels(D, dtype), "BLOCK_Y": block_Y, "BLOCK_X": block_X}
    tile["BLOCK_D"] = min(tile["BLOCK_D"], 64 // warps)  # half as many channels of a large grid
    return tile | {"SPLIT": warps, "num_warps": warps, "num_stages": 1}


def _gradient_tile(D: int, dtype: torch.dtype) -> dict[str, Any]:
    return {**_channels(D, dtype), "BLOCK": _block(dtype), "num_warps": 8, "num_stages": 1}


def _channels(D: int, dtype: torch.dtype) -> dict[str, Any]:
    # float32: three products in tf32 for one keep what a single one would round off.
    narrow = D <= 8 or dtype == torch.float32
    return {"D": int(D), "BLOCK_D": 8 if narrow else 16, "PRECISION": "tf32x3" if dtype == torch.float32 else "ieee"}


def _block(dtype: torch.dtype) -> int:
    return _BLOCK if dtype.itemsize == 2 else 16


def _side(size: int, dtype: torch.dtype) -> int:
    """Tokens of a block along an axis; tensor cores take 16 at a time."""
    return min(_block(dtype), max(16, triton.next_power_of_2(int(size))))


def _fits(H: int, W: int, dtype: torch.dtype) -> bool:
    return max(H, W) <= _block(dtype)


def _is_wide(n_tokens: int, *tensors: Tensor) -> bool:
    """Whether offsets within an image need 64 bits."""
    return bool(n_tokens * max(x.stride(1) for x in tensors) + tensors[0].shape[-1] > 2**31)


def _n_queries(B: int, H: int, W: int, n_heads: int, tile: dict[str, Any]) -> int:
    blocks = triton.cdiv(H, tile["BLOCK_Y"]) * triton.cdiv(W, tile["BLOCK_X"]) * triton.cdiv(tile["D"], tile["BLOCK_D"])
    return B * n_heads * blocks


def _n_groups(items: int, programs: int, all_programs: int) -> int:
    """Groups of about equally many items, of which each starts `programs`, about `all_programs` in all."""
    most = max(1, all_programs // programs)
    return triton.cdiv(items, max(1, triton.cdiv(items, most)))


def _dense_channels(x_BNhD: Tensor) -> Tensor:
    return x_BNhD if x_BNhD.stride(-1) == 1 else x_BNhD.contiguous()


# ----------------------------------------------------------------------------------------------------------- autograd
#
# Eager mode takes the autograd function, which costs a launch less time than a custom operator does; torch.compile
# sees the operator, one node each way. Both call the same launchers.


def positional_attention_triton(
    content_BNhD: Tensor, v_BNhD: Tensor, rows_hHH: Tensor, columns_hWW: Tensor, gate_h: Tensor
) -> Tensor:
    """The kernel's `positional_attention`; arguments as checked there."""
    tensors = (content_BNhD, v_BNhD, rows_hHH, columns_hWW, gate_h)
    if torch.compiler.is_compiling():
        return _operator(*tensors)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _PositionalAttention.apply(*tensors)
    return _forward(*tensors)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dout: Tensor, backward: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    _, _, rows, columns, _ = tensors = ctx.saved_tensors
    dcontent, dv, dtables = backward(dout, *tensors)
    H, W = rows.shape[-1], columns.shape[-1]
    drows, dcolumns, dgate = dtables.split((H * H, W * W, 1), dim=1)
    return dcontent, dv, drows.unflatten(1, (H, H)), dcolumns.unflatten(1, (W, W)), dgate.squeeze(1)


class _PositionalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out = _forward(*inputs)
        _save(ctx, inputs, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
        return _gradients(ctx, dout, _backward)


def _fake_gradients(
    dout: Tensor, content: Tensor, v: Tensor, rows: Tensor, columns: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dtables = rows.new_empty((rows.shape[0], rows.shape[-1] ** 2 + columns.shape[-1] ** 2 + 1))
    return v.new_empty(v.shape), v.new_empty(v.shape), dtables


@operator("vision_gates::positional_attention", fake=lambda content, *_: content.new_empty(content.shape))
def _operator(content: Tensor, v: Tensor, rows: Tensor, columns: Tensor, gate: Tensor) -> Tensor:
    return _forward(content, v, rows, columns, gate)


@operator("vision_gates::positional_attention_backward", fake=_fake_gradients)
def _backward_operator(
    dout: Tensor, content: Tensor, v: Tensor, rows: Tensor, columns: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _backward(dout, content, v, rows, columns, gate)


_operator.register_autograd(lambda ctx, dout: _gradients(ctx, dout, _backward_operator), setup_context=_save)
