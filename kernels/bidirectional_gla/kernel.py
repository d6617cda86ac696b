"""Bidirectional gated linear attention in Triton: forward and backward, both directions in the same launches.

README.md has the mathematics ("The kernel"). In short: chunks of T tokens, inside a chunk a T x T matrix, between
chunks states of V x K. Forward, a program owns a segment of a sequence and one head. A sequence of one segment takes
one launch, which visits the chunks twice: last to first, to leave the states that come from the right in a scratch
buffer; then first to last, with the states from the left in registers, to finish each chunk. In longer sequences
`_gla_states_kernel` fills that buffer and sums up each segment, `_gla_scan_kernel` carries the sums over the segments,
and the second visit is all that is left. Backward, `_gla_states_kernel` stores the states and their gradients at every
chunk, and a program finishes one chunk.

All states and sums are float32. Three forms of a decay appear:
* towards the border of a chunk: exponents are plain sums of decays, <= 0, always safe; the states use only these.
* centred, exp(F_t - F_T / 2) and its inverse: two exponentials a token serve everything in a chunk. "Mild": while no
  chunk can decay by more than e^-70 in all (e^-8 in float32, which rounds less).
* by halves: the safe hierarchy of reference.py, for what decays more ("harsh").

Suffixes: B batch, N tokens, H heads, K key size, V value size, T tokens of a chunk.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vision_gates.kernels.launching import operator, traceable

__all__ = ["bidirectional_gla_triton"]

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2_HIGH, _LN_2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)


# ------------------------------------------------------------------------------------------------------ building blocks
#
# A tensor core takes its operands in the dtype of the arguments where they enter as they are, or where rounding is of
# no consequence (_like), and in PRECISION elsewhere: "tf32" for bfloat16 arguments, "tf32x3" for others.


@triton.jit
def _mm(a, b, PRECISION: tl.constexpr):
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)


@triton.jit
def _mm_like(a, b, like, PRECISION: tl.constexpr):
    if PRECISION == "tf32":
        c = tl.dot(a.to(like.dtype), b.to(like.dtype))
    else:
        c = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision=PRECISION)
    return c


@triton.jit
def _load(base, start, stop, row_stride, D, T: tl.constexpr, BD: tl.constexpr):
    """Rows start..start+T of a (N, D) matrix with unit column stride; zeros outside of rows < stop and columns < D."""
    rows = start + tl.arange(0, T)
    cols = tl.arange(0, BD)
    mask = (rows < stop)[:, None] & (cols < D)[None, :]
    return tl.load(base + rows[:, None] * row_stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, x, start, stop, row_stride, D, T: tl.constexpr, BD: tl.constexpr):
    rows = start + tl.arange(0, T)
    cols = tl.arange(0, BD)
    mask = (rows < stop)[:, None] & (cols < D)[None, :]
    tl.store(base + rows[:, None] * row_stride + cols[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _finite(g):
    """-inf becomes finite: its exp is still 0, but 0 * it is no NaN."""
    return tl.maximum(g, -16384.0, propagate_nan=tl.PropagateNan.ALL).to(g.dtype)


@triton.jit
def _sums(weights, g, GATE: tl.constexpr):
    """Sums of decays over tokens with weights 0, 1 or +-1/2: on tensor cores, where they are exact for half gates."""
    return tl.dot(weights.to(g.dtype), g, input_precision=GATE)


@triton.jit
def _exp(x, PRECISION: tl.constexpr):
    """exp(x). The exact form keeps its relative accuracy however small the result is."""
    if PRECISION == "tf32":
        y = tl.exp2(x * _LOG2_E)
    else:
        power = tl.floor(x * _LOG2_E)
        y = tl.exp2(power) * tl.exp2(((x - power * _LN_2_HIGH) - power * _LN_2_LOW) * _LOG2_E)
    return y


@triton.jit
def _exp_both_ways(x, PRECISION: tl.constexpr):
    """exp(x), exp(-x)."""
    if PRECISION == "tf32":
        x *= _LOG2_E
        y, z = tl.exp2(x), tl.exp2(-x)
    else:
        y, z = _exp(x, PRECISION), _exp(-x, PRECISION)
    return y, z


@triton.jit
def _state_offsets(BK: tl.constexpr, BV: tl.constexpr):
    """States are kept as (V, K): a row of a product with ones is then the decay of each key channel."""
    return tl.arange(0, BV)[:, None] * BK + tl.arange(0, BK)[None, :]


@triton.jit
def _level(level, t, s):
    """Level m = 2^level of the hierarchy: masks for the exponents of q and of k (row t), and the pairs it owns."""
    half_t, half_s = t >> level, s >> level
    same = half_t == half_s
    right = (half_t & 1) == 1
    q_forward = same & right & (s <= t)
    q_backward = same & (right == 0) & (s >= t)
    k_forward = same & (right == 0) & (s > t)
    k_backward = same & right & (s < t)
    owned = ((half_t >> 1) == (half_s >> 1)) & (half_t != half_s)
    return q_forward, q_backward, k_forward, k_backward, owned


@triton.jit
def _harsh_scores(q, k, gf, gb, T: tl.constexpr, LEVELS: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr):
    """The T x T matrix A of a chunk with any decays: every exponent is a sum over part of a half, so <= 0."""
    t, s = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    a = tl.where(t == s, 2.0 * _mm(q, tl.trans(k), PRECISION), 0.0)
    for level in range(LEVELS):
        q_forward, q_backward, k_forward, k_backward, owned = _level(level, t, s)
        q_decay = _exp(_sums(q_forward, gf, GATE) + _sums(q_backward, gb, GATE), PRECISION)
        k_decay = _exp(_sums(k_forward, gf, GATE) + _sums(k_backward, gb, GATE), PRECISION)
        a = tl.where(owned, _mm(q * q_decay, tl.trans(k * k_decay), PRECISION), a)
    return a


@triton.jit
def _enter(
    entering_ptr, carried_ptr, reach_ptr, kind, slot, program, chunk, n_states, n_programs, segment_chunks,
    BK: tl.constexpr, BV: tl.constexpr, CARRIED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A state as it enters a chunk: what the segment made of it so far, and what entered the segment."""
    state = _state_offsets(BK, BV)
    at = (kind * n_states + slot) * segment_chunks + chunk
    x = tl.load(entering_ptr + at * (BK * BV) + state).to(tl.float32)
    if CARRIED:
        reach = tl.load(reach_ptr + ((kind * n_programs + program) * segment_chunks + chunk) * BK + tl.arange(0, BK))
        x += _exp(reach, PRECISION)[None, :] * tl.load(carried_ptr + (kind * n_states + slot) * (BK * BV) + state)
    return x


# -------------------------------------------------------------------------------------------------------------- forward


@triton.jit(do_not_specialize=("N", "n_segments", "segment_chunks"))  # one kernel for all numbers of tokens
def _gla_forward_kernel(
    q_ptr, k_ptr, v_ptr, gf_ptr, gb_ptr, o_ptr, scratch_ptr, reach_ptr, carried_ptr, least_ptr,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h, o_b, o_n, o_h,
    N, H, n_segments, segment_chunks, scale,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, T: tl.constexpr, TH: tl.constexpr,
    LEVELS: tl.constexpr, MILD: tl.constexpr, CARRIED: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Outputs of one segment, head and block of value channels."""
    pid, v_block = tl.program_id(0), tl.program_id(1)
    h, segment, b = pid % H, (pid // H) % n_segments, pid // (H * n_segments)
    start = segment * (segment_chunks * T)
    stop = tl.minimum(N - start, segment_chunks * T)  # tokens of this segment
    n_chunks = tl.cdiv(stop, T)
    b, start, h64 = b.to(tl.int64), start.to(tl.int64), h.to(tl.int64)
    q_ptr += b * q_b + start * q_n + h64 * q_h
    k_ptr += b * k_b + start * k_n + h64 * k_h
    v_ptr += b * v_b + start * v_n + h64 * v_h + v_block * BV
    gf_ptr += b * gf_b + start * gf_n + h64 * gf_h
    gb_ptr += b * gb_b + start * gb_n + h64 * gb_h
    o_ptr += b * o_b + start * o_n + h64 * o_h + v_block * BV
    V_left = BV if V % BV == 0 else V - v_block * BV
    slot = pid.to(tl.int64) * tl.num_programs(1) + v_block
    state = _state_offsets(BK, BV)
    chunk_of_state = tl.zeros((BV, BK), tl.int32)  # a mask has to be a tensor
    n_programs = tl.num_programs(0).to(tl.int64)
    n_states = n_programs * tl.num_programs(1)
    right_ptr = carried_ptr + n_states * (BK * BV)
    own_scratch_ptr = scratch_ptr + slot * (segment_chunks - 1) * (BK * BV)

    t, s = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    th, sh = tl.arange(0, TH)[:, None], tl.arange(0, TH)[None, :]
    all_tokens = tl.full((BV, T), 1.0, tl.float32)
    half_scale = tl.cast(0.5 * scale, tl.float32)  # Inductor passes Python's floats as float64
    if CARRIED:
        left = tl.load(carried_ptr + slot * (BK * BV) + state)
        least = tl.minimum(tl.load(least_ptr + pid), tl.load(least_ptr + n_programs + pid))
    else:
        left = tl.zeros((BV, BK), tl.float32)
        right = tl.zeros((BV, BK), tl.float32)
        # First visit, last chunk to first: `right` is the state that enters chunk c from the right.
        lowest = tl.zeros((T, BK), tl.float32)
        for i in range(n_chunks):
            c = n_chunks - 1 - i
            gb = _finite(_load(gb_ptr, c * T, stop, gb_n, K, T, BK))
            gf = _load(gf_ptr, c * T, stop, gf_n, K, T, BK)
            lowest = tl.minimum(lowest, tl.minimum(gb, gf))
            if c > 0:
                k = _load(k_ptr, c * T, stop, k_n, K, T, BK)
                v = _load(v_ptr, c * T, stop, v_n, V_left, T, BV)
                k_out = k * _exp(_sums(s < t, gb, GATE), PRECISION)
                right *= _exp(_sums(all_tokens, gb, GATE), PRECISION)
                right += _mm_like(tl.trans(v), k_out, v, PRECISION)
                tl.store(own_scratch_ptr + (c - 1) * (BK * BV) + state, right.to(scratch_ptr.dtype.element_ty))
        least = tl.min(lowest) * T
        tl.debug_barrier()  # what one thread stored another will load

    if least >= MILD:
        for c in range(n_chunks):
            gf = _load(gf_ptr, c * T, stop, gf_n, K, T, BK)
            gb = _load(gb_ptr, c * T, stop, gb_n, K, T, BK)
            q = _load(q_ptr, c * T, stop, q_n, K, T, BK).to(tl.float32)
            k = _load(k_ptr, c * T, stop, k_n, K, T, BK).to(tl.float32)
            v = _load(v_ptr, c * T, stop, v_n, V_left, T, BV)
            if CARRIED:
                right = _enter(
                    scratch_ptr, right_ptr, reach_ptr, 0, slot, pid, c,
                    n_states, n_programs, segment_chunks, BK, BV, CARRIED, PRECISION,
                )  # fmt: skip
            else:
                inside = chunk_of_state + c < n_chunks - 1
                right = tl.load(own_scratch_ptr + c * (BK * BV) + state, mask=inside, other=0.0).to(tl.float32)
            f_half = _exp(_sums(0.5 * all_tokens, gf, GATE), PRECISION)
            b_half = _exp(_sums(0.5 * all_tokens, gb, GATE), PRECISION)
            q_decay, k_decay = _exp_both_ways(_sums(tl.where(s <= t, 0.5, -0.5), gf, GATE), PRECISION)
            qf, kf = q * q_decay, k * k_decay
            left *= f_half
            a = _mm(qf, tl.trans(kf), PRECISION)
            o = _mm(qf, tl.trans(left), PRECISION)
            left = f_half * (left + _mm_like(tl.trans(v), kf, v, PRECISION))
            q_decay, k_decay = _exp_both_ways(_sums(tl.where(s >= t, 0.5, -0.5), gb, GATE), PRECISION)
            qb, kb = q * q_decay, k * k_decay
            a = tl.where(s <= t, a, 0.0) + tl.where(s >= t, _mm(qb, tl.trans(kb), PRECISION), 0.0)
            o += _mm(qb, tl.trans(right * b_half), PRECISION) + _mm_like(a, v, v, PRECISION)
            _store(o_ptr, o * half_scale, c * T, stop, o_n, V_left, T, BV)
    else:
        # In parts of a chunk that T = 32 is enough for.
        for i in range(n_chunks * (T // TH)):
            c, part = i // (T // TH), i % (T // TH)
            if CARRIED:
                right = _enter(
                    scratch_ptr, right_ptr, reach_ptr, 0, slot, pid, c,
                    n_states, n_programs, segment_chunks, BK, BV, CARRIED, PRECISION,
                )  # fmt: skip
            else:
                inside = chunk_of_state + c < n_chunks - 1
                right = tl.load(own_scratch_ptr + c * (BK * BV) + state, mask=inside, other=0.0).to(tl.float32)
            for j in range(part + 1, T // TH):
                other = (c + 1) * T - (j - part) * TH  # the chunk's parts to the right of this one, last to first
                gb = _finite(_load(gb_ptr, other, stop, gb_n, K, TH, BK))
                k = _load(k_ptr, other, stop, k_n, K, TH, BK)
                v = _load(v_ptr, other, stop, v_n, V_left, TH, BV)
                right *= _exp(_sums(tl.full((BV, TH), 1.0, tl.float32), gb, GATE), PRECISION)
                right += _mm(tl.trans(v), k * _exp(_sums(th > sh, gb, GATE), PRECISION), PRECISION)
            gf = _finite(_load(gf_ptr, i * TH, stop, gf_n, K, TH, BK))
            gb = _finite(_load(gb_ptr, i * TH, stop, gb_n, K, TH, BK))
            q = _load(q_ptr, i * TH, stop, q_n, K, TH, BK)
            k = _load(k_ptr, i * TH, stop, k_n, K, TH, BK)
            v = _load(v_ptr, i * TH, stop, v_n, V_left, TH, BV)
            o = _mm(_harsh_scores(q, k, gf, gb, TH, LEVELS, PRECISION, GATE), v, PRECISION)
            o += _mm(q * _exp(_sums(sh <= th, gf, GATE), PRECISION), tl.trans(left), PRECISION)
            o += _mm(q * _exp(_sums(sh >= th, gb, GATE), PRECISION), tl.trans(right), PRECISION)
            left *= _exp(_sums(tl.full((BV, TH), 1.0, tl.float32), gf, GATE), PRECISION)
            left += _mm(tl.trans(v), k * _exp(_sums(sh > th, gf, GATE), PRECISION), PRECISION)
            _store(o_ptr, o * half_scale, i * TH, stop, o_n, V_left, TH, BV)


# --------------------------------------------------------------------------------------------- states between segments


@triton.jit(do_not_specialize=("N", "n_segments", "segment_chunks"))  # one kernel for all numbers of tokens
def _gla_states_kernel(
    q_ptr, k_ptr, v_ptr, gf_ptr, gb_ptr, do_ptr, entering_ptr, reach_ptr, sums_ptr, totals_ptr, least_ptr,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h, do_b, do_n, do_h,
    N, H, n_segments, segment_chunks,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, T: tl.constexpr,
    SUMS: tl.constexpr, GRADIENTS: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Carry the states of one direction through a segment, from zero.

    The states at each chunk are stored, and how far the chunk is, in decay, from the segment's border; with SUMS what
    leaves the segment, too, and its total decay. States in this order: 0 S from the left, 1 R from the right; with
    GRADIENTS 2 dS, which comes from the right as S leaves there, and 3 dR, from the left. Without GRADIENTS of the
    states at chunks R alone, and the least total decay of a chunk.
    """
    pid, v_block, from_right = tl.program_id(0), tl.program_id(1) // 2, tl.program_id(1) % 2
    n_v_blocks = tl.num_programs(1) // 2
    h, segment, b = pid % H, (pid // H) % n_segments, pid // (H * n_segments)
    start = segment * (segment_chunks * T)
    stop = tl.minimum(N - start, segment_chunks * T)
    n_chunks = tl.cdiv(stop, T)
    b, start, h64 = b.to(tl.int64), start.to(tl.int64), h.to(tl.int64)
    k_ptr += b * k_b + start * k_n + h64 * k_h
    v_ptr += b * v_b + start * v_n + h64 * v_h + v_block * BV
    gf_ptr += b * gf_b + start * gf_n + h64 * gf_h
    gb_ptr += b * gb_b + start * gb_n + h64 * gb_h
    q_ptr += b * q_b + start * q_n + h64 * q_h
    do_ptr += b * do_b + start * do_n + h64 * do_h + v_block * BV
    V_left = BV if V % BV == 0 else V - v_block * BV
    n_programs = tl.num_programs(0).to(tl.int64)
    n_states = n_programs * n_v_blocks
    slot = pid.to(tl.int64) * n_v_blocks + v_block
    state = _state_offsets(BK, BV)
    columns = tl.zeros((BV, BK), tl.int32) + tl.arange(0, BK)[None, :]
    # The direction's own gate decays its state; the gradient that travels with it belongs to the other direction.
    own_ptr, own_n = gf_ptr, gf_n
    other_ptr, other_n = gb_ptr, gb_n
    if from_right == 1:
        own_ptr, own_n = gb_ptr, gb_n
        other_ptr, other_n = gf_ptr, gf_n
    kind = from_right if GRADIENTS else from_right * 0  # without gradients nothing but R is stored
    entering = entering_ptr + (kind * n_states + slot) * (segment_chunks * BK * BV) + state
    d_entering = entering_ptr + ((3 - from_right) * n_states + slot) * (segment_chunks * BK * BV) + state
    reach = reach_ptr + (kind * n_programs + pid) * (segment_chunks * BK) + columns
    d_reach = reach_ptr + ((3 - from_right) * n_programs + pid) * (segment_chunks * BK) + columns

    towards = (tl.arange(0, T)[None, :] - tl.arange(0, T)[:, None]) * (1 - 2 * from_right)
    all_tokens = tl.full((BV, T), 1.0, tl.float32)
    x = tl.zeros((BV, BK), tl.float32)
    dx = tl.zeros((BV, BK), tl.float32)
    own_total = tl.zeros((BV, BK), tl.float32)  # rows are equal
    other_total = tl.zeros((BV, BK), tl.float32)
    lowest = tl.zeros((BV, BK), tl.float32)
    first_row = tl.arange(0, BV)[:, None] == 0
    for i in range(n_chunks):
        c = i + from_right * (n_chunks - 1 - 2 * i)
        if GRADIENTS or from_right == 1:
            tl.store(entering + c * (BK * BV), x.to(entering_ptr.dtype.element_ty))
            if SUMS:
                if v_block == 0:
                    tl.store(reach + c * BK, own_total, mask=first_row)
        if GRADIENTS:
            tl.store(d_entering + c * (BK * BV), dx.to(entering_ptr.dtype.element_ty))
            if SUMS:
                if v_block == 0:
                    tl.store(d_reach + c * BK, other_total, mask=first_row)
        if SUMS or i + 1 < n_chunks:
            own = _finite(_load(own_ptr, c * T, stop, own_n, K, T, BK))
            k = _load(k_ptr, c * T, stop, k_n, K, T, BK)
            v = _load(v_ptr, c * T, stop, v_n, V_left, T, BV)
            total = _sums(all_tokens, own, GATE)
            x *= _exp(total, PRECISION)
            k_out = k * _exp(_sums(towards > 0, own, GATE), PRECISION)
            own_total += total
            if GRADIENTS:
                x += _mm(tl.trans(v), k_out, PRECISION)
                other = _finite(_load(other_ptr, c * T, stop, other_n, K, T, BK))
                q = _load(q_ptr, c * T, stop, q_n, K, T, BK)
                do = _load(do_ptr, c * T, stop, do_n, V_left, T, BV)
                total = _sums(all_tokens, other, GATE)
                dx *= _exp(total, PRECISION)
                dx += _mm(tl.trans(do), q * _exp(_sums(towards >= 0, other, GATE), PRECISION), PRECISION)
                other_total += total
            else:
                x += _mm_like(tl.trans(v), k_out, v, PRECISION)
                lowest = tl.minimum(lowest, total)

    if SUMS:
        tl.store(sums_ptr + (from_right * n_states + slot) * (BK * BV) + state, x)
        if GRADIENTS:
            tl.store(sums_ptr + ((3 - from_right) * n_states + slot) * (BK * BV) + state, dx)
        if v_block == 0:
            tl.store(totals_ptr + (from_right * n_programs + pid) * BK + columns, own_total, mask=first_row)
            if not GRADIENTS:
                tl.store(least_ptr + from_right * n_programs + pid, tl.min(lowest))


@triton.jit
def _then(decay_1, state_1, decay_2, state_2):
    return decay_1 * decay_2, decay_2 * state_1 + state_2


@triton.jit(do_not_specialize=("n_segments",))  # one kernel for all numbers of tokens
def _gla_scan_kernel(
    states_ptr, totals_ptr, H, n_segments, n_v_blocks,
    BK: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Replace what each segment adds by the state that enters it; BS segments and BE elements of a state at a time."""
    sequence, kind = tl.program_id(0), tl.program_id(1)
    n_tiles = BK * BV // BE
    v_block, tile = tl.program_id(2) // n_tiles, tl.program_id(2) % n_tiles
    h, b = sequence % H, sequence // H
    n_programs = tl.num_programs(0).to(tl.int64) * n_segments
    element = tile * BE + tl.arange(0, BE)
    from_left = (kind == 0) | (kind == 3)
    decays_of = tl.where((kind == 0) | (kind == 2), 0, 1)
    carry = tl.zeros((BE,), tl.float32)
    step = tl.arange(0, BS)
    for first in range(0, n_segments, BS):
        visited = first + step
        inside = (visited < n_segments)[:, None]
        segment = tl.where(from_left, visited, n_segments - 1 - visited)
        program = (b * n_segments + segment).to(tl.int64) * H + h
        slot = (kind * n_programs + program) * n_v_blocks + v_block
        at = states_ptr + slot[:, None] * (BK * BV) + element[None, :]
        total = tl.load(
            totals_ptr + (decays_of * n_programs + program)[:, None] * BK + (element % BK)[None, :],
            mask=inside, other=0.0,
        )  # fmt: skip
        state = tl.load(at, mask=inside, other=0.0)
        decay, state = tl.associative_scan((_exp(total, PRECISION), state), 0, _then)
        state += decay * carry[None, :]  # the states that leave the segments
        tl.debug_barrier()  # all are loaded before any is replaced
        shift = tl.where(from_left, 1, -1).to(tl.int64) * H * n_v_blocks * (BK * BV)
        tl.store(at + shift, state, mask=(visited < n_segments - 1)[:, None] & (step < BS - 1)[:, None])
        tl.store(at, carry[None, :] + tl.zeros_like(state), mask=inside & (step == 0)[:, None])
        carry = tl.sum(tl.where((step == BS - 1)[:, None], state, 0.0), 0)


# ------------------------------------------------------------------------------------------------------------- backward


@triton.jit(do_not_specialize=("N", "n_segments", "segment_chunks"))  # one kernel for all numbers of tokens
def _gla_backward_kernel(
    q_ptr, k_ptr, v_ptr, gf_ptr, gb_ptr, do_ptr, dq_ptr, dk_ptr, dv_ptr, dgf_ptr, dgb_ptr,
    entering_ptr, reach_ptr, carried_ptr,
    q_b, q_n, q_h, k_b, k_n, k_h, v_b, v_n, v_h, gf_b, gf_n, gf_h, gb_b, gb_n, gb_h, do_b, do_n, do_h,
    N, H, n_segments, segment_chunks, scale, part_size,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, T: tl.constexpr, LEVELS: tl.constexpr,
    MILD: tl.constexpr, CARRIED: tl.constexpr, PRECISION: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """Gradients of one chunk and head; of q, k and the decays the part that one block of value channels makes.

    The gradients are contiguous (B, N, H, .), dq, dk and the decays' with a leading axis for the parts.
    """
    pid, v_block, n_v_blocks = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    n_chunks = tl.cdiv(N, T)
    h, chunk, b = pid % H, (pid // H) % n_chunks, pid // (H * n_chunks)
    program = ((b * n_segments + chunk // segment_chunks) * H + h).to(tl.int64)  # of _gla_states_kernel
    n_programs = (tl.num_programs(0) // n_chunks).to(tl.int64) * n_segments
    slot, n_states = program * n_v_blocks + v_block, n_programs * n_v_blocks
    start = chunk * T
    stop = tl.minimum(N - start, T)
    b, start, h64 = b.to(tl.int64), start.to(tl.int64), h.to(tl.int64)
    q_ptr += b * q_b + start * q_n + h64 * q_h
    k_ptr += b * k_b + start * k_n + h64 * k_h
    v_ptr += b * v_b + start * v_n + h64 * v_h + v_block * BV
    gf_ptr += b * gf_b + start * gf_n + h64 * gf_h
    gb_ptr += b * gb_b + start * gb_n + h64 * gb_h
    do_ptr += b * do_b + start * do_n + h64 * do_h + v_block * BV
    V_left = BV if V % BV == 0 else V - v_block * BV
    first_row = (b * N + start) * H + h
    key_offset = v_block.to(tl.int64) * part_size + first_row * K
    dv_ptr += first_row * V + v_block * BV

    t, s = tl.arange(0, T)[:, None], tl.arange(0, T)[None, :]
    c = chunk % segment_chunks
    gf = _load(gf_ptr, 0, stop, gf_n, K, T, BK)
    gb = _load(gb_ptr, 0, stop, gb_n, K, T, BK)
    half_scale = tl.cast(0.5 * scale, tl.float32)  # Inductor passes Python's floats as float64
    dq, dk = tl.zeros((T, BK), tl.float32), tl.zeros((T, BK), tl.float32)
    dv = tl.zeros((T, BV), tl.float32)
    if (tl.min(tl.minimum(gf, gb).to(tl.float32)) * T >= MILD) & (N > 1):
        # A loop, and everything loaded in it: registers decide how many chunks a multiprocessor works on.
        for from_right in range(2):
            g_ptr, g_n, dg_ptr = gf_ptr, gf_n, dgf_ptr
            if from_right == 1:
                g_ptr, g_n, dg_ptr = gb_ptr, gb_n, dgb_ptr
            g = _load(g_ptr, 0, stop, g_n, K, T, BK)
            q = _load(q_ptr, 0, stop, q_n, K, T, BK)
            k = _load(k_ptr, 0, stop, k_n, K, T, BK)
            v = _load(v_ptr, 0, stop, v_n, V_left, T, BV)
            do = _load(do_ptr, 0, stop, do_n, V_left, T, BV)
            x = _enter(
                entering_ptr, carried_ptr, reach_ptr, from_right, slot, program, c,
                n_states, n_programs, segment_chunks, BK, BV, CARRIED, PRECISION,
            )  # fmt: skip
            dx = _enter(
                entering_ptr, carried_ptr, reach_ptr, 2 + from_right, slot, program, c,
                n_states, n_programs, segment_chunks, BK, BV, CARRIED, PRECISION,
            )  # fmt: skip
            half = _exp(_sums(tl.full((BV, T), 0.5, tl.float32), g, GATE), PRECISION)
            x *= half
            dx *= half
            before = (t - s) * (1 - 2 * from_right)  # > 0: s comes before t
            dg = _mm(tl.full((T, BV), 1.0, tl.float32), x * dx, PRECISION)
            f = _sums(tl.where(before >= 0, 0.5, -0.5), g, GATE)
            qd, kd = q * _exp(f, PRECISION), k * _exp(-f, PRECISION)
            a = tl.where(before >= 0, _mm(qd, tl.trans(kd), PRECISION), 0.0)
            dv += _mm(tl.trans(a), do, PRECISION)
            dv += _mm(kd, tl.trans(dx), PRECISION)
            # A token as its own source sees no decay. Left out of the differences below, where it would be most of the
            # terms that cancel.
            own = tl.sum(do.to(tl.float32) * v.to(tl.float32), 1)[:, None]
            da = tl.where(before > 0, _mm_like(do, tl.trans(v), v, PRECISION), 0.0)
            dqd = _mm(da, kd, PRECISION) + _mm(do, x, PRECISION)
            # The decay of a token weighs all that passes from before it to it or on: in this chunk, or beyond.
            passing = qd * dqd
            dq += dqd * _exp(f, PRECISION) + own * k
            dkd = _mm(v, dx, PRECISION)
            dg += _mm(tl.full((T, T), 1.0, tl.float32), kd * dkd, PRECISION)
            dkd += _mm(tl.trans(da), qd, PRECISION)
            dk += dkd * _exp(-f, PRECISION) + own * q
            dg += _mm((before <= 0).to(tl.float32), passing - kd * dkd, PRECISION)
            _store(dg_ptr + key_offset, dg * half_scale, 0, stop, H * K, K, T, BK)
    else:
        q = _load(q_ptr, 0, stop, q_n, K, T, BK)
        k = _load(k_ptr, 0, stop, k_n, K, T, BK)
        v = _load(v_ptr, 0, stop, v_n, V_left, T, BV)
        do = _load(do_ptr, 0, stop, do_n, V_left, T, BV)
        gf, gb = _finite(gf), _finite(gb)
        ones, all_tokens = tl.full((T, BV), 1.0, tl.float32), tl.full((BV, T), 1.0, tl.float32)
        # To and from the borders of the chunk; the decays' gradients are sums of terms, never differences.
        left = _enter(
            entering_ptr, carried_ptr, reach_ptr, 0, slot, program, c,
            n_states, n_programs, segment_chunks, BK, BV, CARRIED, PRECISION,
        )  # fmt: skip
        d_left = _enter(
            entering_ptr, carried_ptr, reach_ptr, 2, slot, program, c,
            n_states, n_programs, segment_chunks, BK, BV, CARRIED, PRECISION,
        )  # fmt: skip
        q_decay = _exp(_sums(s <= t, gf, GATE), PRECISION)
        k_decay = _exp(_sums(s > t, gf, GATE), PRECISION)
        dq += _mm(do, left, PRECISION) * q_decay
        dk += _mm(v, d_left, PRECISION) * k_decay
        dv += _mm(k * k_decay, tl.trans(d_left), PRECISION)
        dgf = _mm((s >= t).to(tl.float32), q * dq, PRECISION) + _mm((s < t).to(tl.float32), k * dk, PRECISION)
        dgf += _mm(ones, _exp(_sums(all_tokens, gf, GATE), PRECISION) * left * d_left, PRECISION)

        right = _enter(
            entering_ptr, carried_ptr, reach_ptr, 1, slot, program, c,
            n_states, n_programs, segment_chunks, BK, BV, CARRIED, PRECISION,
        )  # fmt: skip
        d_right = _enter(
            entering_ptr, carried_ptr, reach_ptr, 3, slot, program, c,
            n_states, n_programs, segment_chunks, BK, BV, CARRIED, PRECISION,
        )  # fmt: skip
        q_decay = _exp(_sums(s >= t, gb, GATE), PRECISION)
        k_decay = _exp(_sums(s < t, gb, GATE), PRECISION)
        dq_b, dk_b = _mm(do, right, PRECISION) * q_decay, _mm(v, d_right, PRECISION) * k_decay
        dv += _mm(k * k_decay, tl.trans(d_right), PRECISION)
        dgb = _mm((s <= t).to(tl.float32), q * dq_b, PRECISION) + _mm((s > t).to(tl.float32), k * dk_b, PRECISION)
        dgb += _mm(ones, _exp(_sums(all_tokens, gb, GATE), PRECISION) * right * d_right, PRECISION)
        dq += dq_b
        dk += dk_b

        da = _mm(do, tl.trans(v), PRECISION)
        own = tl.sum(tl.where(s == t, da, 0.0), 1)[:, None]  # a token is its own source in both directions
        dq += 2.0 * own * k
        dk += 2.0 * own * q
        a = tl.where(s == t, 2.0 * _mm(q, tl.trans(k), PRECISION), 0.0)
        for level in range(LEVELS):
            q_forward, q_backward, k_forward, k_backward, owned = _level(level, t, s)
            q_decay = _exp(_sums(q_forward, gf, GATE) + _sums(q_backward, gb, GATE), PRECISION)
            k_decay = _exp(_sums(k_forward, gf, GATE) + _sums(k_backward, gb, GATE), PRECISION)
            qd, kd = q * q_decay, k * k_decay
            a = tl.where(owned, _mm(qd, tl.trans(kd), PRECISION), a)
            d_score = tl.where(owned, da, 0.0)
            dqd, dkd = _mm(d_score, kd, PRECISION), _mm(tl.trans(d_score), qd, PRECISION)
            dq += dqd * q_decay
            dk += dkd * k_decay
            d_q_exponent, d_k_exponent = qd * dqd, kd * dkd
            dgf += _mm(tl.trans(q_forward.to(tl.float32)), d_q_exponent, PRECISION)
            dgf += _mm(tl.trans(k_forward.to(tl.float32)), d_k_exponent, PRECISION)
            dgb += _mm(tl.trans(q_backward.to(tl.float32)), d_q_exponent, PRECISION)
            dgb += _mm(tl.trans(k_backward.to(tl.float32)), d_k_exponent, PRECISION)
        dv += _mm(tl.trans(a), do, PRECISION)
        _store(dgf_ptr + key_offset, dgf * half_scale, 0, stop, H * K, K, T, BK)
        _store(dgb_ptr + key_offset, dgb * half_scale, 0, stop, H * K, K, T, BK)
    _store(dq_ptr + key_offset, dq * half_scale, 0, stop, H * K, K, T, BK)
    _store(dk_ptr + key_offset, dk * half_scale, 0, stop, H * K, K, T, BK)
    _store(dv_ptr, dv * half_scale, 0, stop, H * V, V_left, T, BV)


# ------------------------------------------------------------------------------------------------------------- launches

# Tokens. Sequences longer than the first are cut into segments. Forward these are the length of which the programs of
# ViG's shapes fill an H200 in one go; backward they are longer, because each one costs memory.
_WHOLE, _FORWARD_SEGMENT, _BACKWARD_SEGMENT = 512, 384, 512


def _plan(q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, *, gradients: bool) -> tuple[dict, dict]:
    """Constants of the kernels, and their launch options: what fits into registers. Fixed for head sizes and dtypes.

    bfloat16 results round more than products of tf32 do; those of float16 and float32, also of gates alone, do not, and
    get three of them.
    """
    key_size, value_size = int(q.shape[-1]), int(v.shape[-1])  # never symbolic: each is a kernel of its own
    BK = max(16, triton.next_power_of_2(key_size))
    BV = max(16, min(64, triton.next_power_of_2(value_size), 4096 // BK))
    half = all(x.dtype == torch.bfloat16 for x in (q, gf, gb))
    if BK > 64:
        T, num_warps = 16, 4
    elif BK > 32 or not half:
        T, num_warps = 32, 4
    else:
        T, num_warps = (32, 2) if gradients else (64, 4)
    constants = dict(
        K=key_size, V=value_size, BK=BK, BV=BV, T=T,
        PRECISION="tf32" if half else "tf32x3",
        GATE="tf32x3" if torch.float32 in (gf.dtype, gb.dtype) else "tf32",
    )  # fmt: skip
    return constants, dict(num_warps=num_warps, num_stages=1)


def _per_chunk(constants: dict) -> dict:
    """Constants of the kernels that look into chunks. A chunk is mild while its decays sum to more than this."""
    mild = -70.0 if constants["PRECISION"] == "tf32" else -8.0
    return constants | dict(LEVELS=min(constants["T"], 32).bit_length() - 1, MILD=mild)


def _with_unit_stride(x: Tensor) -> Tensor:
    """The kernels step through tokens in 32 bits and through channels by one; other layouts are copied."""
    dense = x.stride(-1) == 1 or x.shape[-1] == 1
    return x if dense and abs(x.stride(1)) < 2**21 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _segments(n_tokens: int, length: int, T: int) -> tuple[int, int]:
    """Number of segments and chunks of each."""
    if n_tokens <= _WHOLE:
        return 1, triton.cdiv(n_tokens, T)
    return triton.cdiv(n_tokens, length), length // T


def _store_dtype(q: Tensor) -> torch.dtype:
    return torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32


def _scan_segments(sums: Tensor, totals: Tensor, *, n_sequences: int, n_heads: int, precision: str) -> None:
    """What leaves each segment, (kinds, programs, V blocks, BV, BK), becomes what enters it, in place."""
    n_segments, (BV, BK) = totals.shape[1] // n_sequences, sums.shape[-2:]
    elements = 32
    # A symbolic number of segments, in a trace, gets the largest tile.
    tile = min(64, triton.next_power_of_2(n_segments)) if isinstance(n_segments, int) else 64
    traceable(_gla_scan_kernel, sums)[(n_sequences, sums.shape[0], sums.shape[2] * BK * BV // elements)](
        sums, totals, n_heads, n_segments, sums.shape[2],
        BK=BK, BV=BV, BS=tile, BE=elements, PRECISION=precision, num_warps=4,
    )  # fmt: skip


def _forward(q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float) -> Tensor:
    o = torch.empty(v.shape, device=v.device, dtype=v.dtype)
    if o.numel() == 0:
        return o
    tensors = [_with_unit_stride(x) for x in (q, k, v, gf, gb)]
    constants, launch = _plan(*tensors, gradients=False)
    n_batch, n_tokens, n_heads, _ = q.shape
    n_v_blocks = triton.cdiv(constants["V"], constants["BV"])
    n_segments, segment_chunks = _segments(n_tokens, _FORWARD_SEGMENT, constants["T"])
    n_programs = n_batch * n_segments * n_heads
    empty = partial(torch.empty, device=q.device)
    state = (constants["BV"], constants["BK"])
    if n_segments == 1:
        scratch = empty((n_programs, n_v_blocks, segment_chunks - 1, *state), dtype=_store_dtype(q))
        reach = carried = least = scratch  # not used
    else:
        scratch = empty((n_programs, n_v_blocks, segment_chunks, *state), dtype=_store_dtype(q))
        reach = empty((n_programs, segment_chunks, state[1]), dtype=torch.float32)
        carried = empty((2, n_programs, n_v_blocks, *state), dtype=torch.float32)
        totals = empty((2, n_programs, state[1]), dtype=torch.float32)
        least = empty((2, n_programs), dtype=torch.float32)
        traceable(_gla_states_kernel, q)[(n_programs, 2 * n_v_blocks)](
            *tensors, v, scratch, reach, carried, totals, least, *_strides(*tensors, v),
            n_tokens, n_heads, n_segments, segment_chunks, SUMS=True, GRADIENTS=False, **constants,
            **(launch | dict(num_stages=3)),
        )  # fmt: skip
        _scan_segments(
            carried, totals, n_sequences=n_batch * n_heads, n_heads=n_heads, precision=constants["PRECISION"]
        )
    traceable(_gla_forward_kernel, q)[(n_programs, n_v_blocks)](
        *tensors, o, scratch, reach, carried, least, *_strides(*tensors, o),
        n_tokens, n_heads, n_segments, segment_chunks, scale,
        TH=min(constants["T"], 32), CARRIED=n_segments > 1, **_per_chunk(constants), **launch,
    )  # fmt: skip
    return o


def _backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = [_with_unit_stride(x) for x in (q, k, v, gf, gb)]
    constants, launch = _plan(*tensors, gradients=True)
    n_batch, n_tokens, n_heads, _ = q.shape
    n_v_blocks = triton.cdiv(constants["V"], constants["BV"])
    empty = partial(torch.empty, device=q.device)
    dv = empty(v.shape, dtype=v.dtype)
    # Several blocks of value channels: each makes a part of the gradients of q, k and the decays.
    parts = [empty((n_v_blocks, *x.shape), dtype=x.dtype if n_v_blocks == 1 else torch.float32) for x in (q, k, gf, gb)]
    if dv.numel() > 0:
        do = _with_unit_stride(do)
        strides = _strides(*tensors, do)
        n_chunks = triton.cdiv(n_tokens, constants["T"])
        n_segments, segment_chunks = _segments(n_tokens, _BACKWARD_SEGMENT, constants["T"])
        n_programs = n_batch * n_segments * n_heads
        state = (constants["BV"], constants["BK"])
        entering = empty((4, n_programs, n_v_blocks, segment_chunks, *state), dtype=_store_dtype(q))
        reach = sums = totals = entering  # not used in one segment
        if n_segments > 1:
            reach = empty((4, n_programs, segment_chunks, state[1]), dtype=torch.float32)
            sums = empty((4, n_programs, n_v_blocks, *state), dtype=torch.float32)
            totals = empty((2, n_programs, state[1]), dtype=torch.float32)
        traceable(_gla_states_kernel, q)[(n_programs, 2 * n_v_blocks)](
            *tensors, do, entering, reach, sums, totals, totals, *strides, n_tokens, n_heads, n_segments,
            segment_chunks, SUMS=n_segments > 1, GRADIENTS=True, **constants, **(launch | dict(num_stages=2)),
        )  # fmt: skip
        if n_segments > 1:
            _scan_segments(
                sums, totals, n_sequences=n_batch * n_heads, n_heads=n_heads, precision=constants["PRECISION"]
            )
        dq, dk, dgf, dgb = parts
        traceable(_gla_backward_kernel, q)[(n_batch * n_chunks * n_heads, n_v_blocks)](
            *tensors, do, dq, dk, dv, dgf, dgb, entering, reach, sums, *strides, n_tokens, n_heads, n_segments,
            segment_chunks, scale, q.numel(), CARRIED=n_segments > 1, **_per_chunk(constants), **launch,
        )  # fmt: skip
    dq, dk, dgf, dgb = (
        part[0] if n_v_blocks == 1 else part.sum(0).to(x.dtype) for part, x in zip(parts, (q, k, gf, gb), strict=True)
    )
    return dq, dk, dv, dgf, dgb


# ------------------------------------------------------------------------------------------------- autograd and compile
#
# torch.compile traces the operators; eager mode goes around the dispatcher, which takes longer than a short kernel.


def _fake_gradients(do: Tensor, *tensors_and_scale: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in tensors_and_scale[:5])


@operator("vision_gates::bidirectional_gla", fake=lambda q, k, v, *_: v.new_empty(v.shape))
def _operator(q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float) -> Tensor:
    return _forward(q, k, v, gf, gb, scale)


@operator("vision_gates::bidirectional_gla_backward", fake=_fake_gradients)
def _backward_operator(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _backward(do, q, k, v, gf, gb, scale)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, do: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward_operator(do, *ctx.saved_tensors, ctx.scale), None


_operator.register_autograd(_autograd, setup_context=_setup_context)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, gf, gb, scale):
        ctx.save_for_backward(q, k, v, gf, gb)
        ctx.scale = scale
        return _forward(q, k, v, gf, gb, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, do):
        return *_backward(do, *ctx.saved_tensors, ctx.scale), None


def bidirectional_gla_triton(q: Tensor, k: Tensor, v: Tensor, gf: Tensor, gb: Tensor, *, scale: float) -> Tensor:
    """The operator on arguments that `bidirectional_gla` has checked."""
    if torch.compiler.is_compiling():
        return _operator(q, k, v, gf, gb, scale)
    if q.is_cuda and q.device.index != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return _Function.apply(q, k, v, gf, gb, scale)
    return _Function.apply(q, k, v, gf, gb, scale)
