"""Bidirectional gated linear attention for exported graphs: few operators, and any number of tokens in one graph.

It computes what `reference.py` specifies, on its safe path: every factor is the exponential of a sum of decays, never
of a difference, so nothing overflows and a decay of -inf is as good as any. But the reference halves chunks, and merges
pairs of them, in loops that an exporter unrolls into hundreds of nodes a layer, the second one for a fixed number of
tokens. Here one product with a constant matrix of zeros and ones makes all exponents of a chunk, and the states between
chunks are two products: within blocks of S chunks by a constant pattern, and between blocks by the matrix of all pairs
of blocks. A block is S * T = 256 tokens; up to 65,536 tokens the pairs take no more memory than the decays.

Suffixes: B batch, N tokens, H heads, K key size, V value size, C chunks, T tokens of a chunk, D directions (2),
L levels of the reference's halving and the diagonal, R rows of exponents, P blocks, S chunks of a block.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vision_gates.kernels.launching import surely_equal

__all__ = ["bidirectional_gla_graph"]

_T = 16
_S = 16
_LEVELS = 5  # log2(T) of the halving, and the diagonal
_NOTHING_LEFT = -1e4  # exp of this is 0 in float64, too; -inf times a zero of the matrices would be NaN


def bidirectional_gla_graph(
    q_BNHK: Tensor, k_BNHK: Tensor, v_BNHV: Tensor, gf_BNHK: Tensor, gb_BNHK: Tensor, *, scale: float
) -> Tensor:
    """Arguments as checked by `bidirectional_gla`, result (B, N, H, V) in v's dtype."""
    n_tokens = q_BNHK.shape[1]
    dtype = torch.float64 if q_BNHK.dtype == torch.float64 else torch.float32
    q, k, v, gf, gb = (_to_chunks(x.to(dtype)) for x in (q_BNHK, k_BNHK, v_BNHV, gf_BNHK, gb_BNHK))
    g_BCHDTK = torch.stack((gf, gb), dim=3).clamp_min(_NOTHING_LEFT)

    sums_RDT, mask_LTT = (table.to(q) for table in _TOKEN_TABLES)
    factors_BCHRK = (sums_RDT @ g_BCHDTK.flatten(3, 4)).exp()
    q_within, k_within, q_border, k_border = (
        part.unflatten(3, (-1, _T)) for part in factors_BCHRK.split((_LEVELS * _T,) * 2 + (2 * _T,) * 2, dim=3)
    )
    q, k = q.unsqueeze(3), k.unsqueeze(3)
    scores_BCHTT = ((q * q_within) @ (k * k_within).mT * mask_LTT).sum(3)

    update_BCHDKV = (k * k_border).mT @ v.unsqueeze(3)
    state_BCHDKV = _incoming_states(update_BCHDKV, g_BCHDTK.sum(4))
    o_BCHTV = scores_BCHTT @ v + ((q * q_border) @ state_BCHDKV).sum(3)
    return (0.5 * scale * o_BCHTV.transpose(2, 3).flatten(1, 2)[:, :n_tokens]).to(v_BNHV.dtype)


def _to_chunks(x_BNHX: Tensor) -> Tensor:
    """(B, N, H, X) -> (B, C, H, T, X). Zero tokens at the end add nothing: k = 0, and a decay of 0 keeps all."""
    n_tokens = x_BNHX.shape[1]
    n_chunks = (n_tokens + _T - 1) // _T
    x_BNHX = F.pad(x_BNHX, (0, 0, 0, 0, 0, n_chunks * _T - n_tokens))
    return x_BNHX.unflatten(1, (n_chunks, _T)).transpose(2, 3)


def _incoming_states(update_BCHDKV: Tensor, decay_BCHDK: Tensor) -> Tensor:
    """States entering each chunk, (B, C, H, D, K, V): X_next = exp(decay) X + update, from X = 0 in each direction."""
    n_chunks = update_BCHDKV.shape[1]
    n_blocks = (n_chunks + _S - 1) // _S
    padding = (0, n_blocks * _S - n_chunks)
    update = F.pad(update_BCHDKV, (0, 0) * 4 + padding).unflatten(1, (n_blocks, _S)).permute(0, 1, 3, 4, 5, 2, 6)
    decay = F.pad(decay_BCHDK, (0, 0) * 3 + padding).unflatten(1, (n_blocks, _S)).permute(0, 1, 3, 4, 2, 5)

    sums_DRS, mask_DRS1, since_border_DSS = (table.to(decay) for table in _CHUNK_TABLES)
    weight_BPHDRK = (sums_DRS @ decay).exp() * mask_DRS1
    weight_BPHDKRS = weight_BPHDRK.unflatten(4, (_S + 1, _S)).permute(0, 1, 2, 3, 6, 4, 5)
    state_BPHDKRV = weight_BPHDKRS @ update  # the last row is what leaves the block
    state, leaving_BPHDKV = state_BPHDKRV[..., :_S, :], state_BPHDKRV[..., _S, :]
    if not surely_equal((n_blocks,), (1,)):
        between_BHDKPP = _block_weights(decay.sum(4).permute(0, 2, 3, 4, 1))
        entering = (between_BHDKPP @ leaving_BPHDKV.permute(0, 2, 3, 4, 1, 5)).permute(0, 4, 1, 2, 3, 5)
        state = state + (since_border_DSS @ decay).exp().mT.unsqueeze(-1) * entering.unsqueeze(-2)
    return state.permute(0, 1, 5, 2, 3, 4, 6).flatten(1, 2)[:, :n_chunks]


def _block_weights(decay_BHDKP: Tensor) -> Tensor:
    """(B, H, D, K, to, from): exp of the decays of the blocks between two, 0 against the direction and on itself."""
    forward, backward = decay_BHDKP.unbind(2)
    return torch.stack((_forward_weights(forward), _forward_weights(backward.flip(-1)).flip(-1, -2)), dim=2)


def _forward_weights(decay_XP: Tensor) -> Tensor:
    block_P = torch.arange(decay_XP.shape[-1], device=decay_XP.device)
    before_PP = block_P[:, None] > block_P
    # Row p sums from the column's block on, it and row p itself left out: a running sum of one row earlier.
    sums_XPP = torch.where(before_PP, decay_XP[..., None], 0.0).cumsum(-2)
    sums_XPP = F.pad(sums_XPP, (0, 0, 1, 0))[..., :-1, :]
    return torch.where(before_PP, sums_XPP.exp(), 0.0)


def _token_tables() -> tuple[Tensor, Tensor]:
    """Which decays each exponent of a chunk sums, (R, D * T), and which pairs of tokens belong to a level, (L, T, T).

    Rows: of every level the T queries', then of every level the T keys'; then to the chunk's borders in both directions
    the queries', and the keys'. A level's exponents are those of the reference's safe path.
    """
    t = np.arange(_T)
    row, column = t[:, None], t[None, :]
    nothing = np.zeros((_T, _T), dtype=bool)
    diagonal = np.hstack((nothing, nothing))  # a token is its own source in both directions: exp(0), twice
    q_rows, k_rows, masks = [diagonal], [diagonal], [2.0 * np.eye(_T)]
    for level in range(_LEVELS - 1):
        half = 2**level
        first, right = row // half * half, row // half % 2 == 1
        last = first + half - 1
        q_rows.append(
            np.hstack((right & (first <= column) & (column <= row), ~right & (row <= column) & (column <= last)))
        )
        k_rows.append(
            np.hstack((~right & (row < column) & (column <= last), right & (first <= column) & (column < row)))
        )
        masks.append((row // (2 * half) == column // (2 * half)) & (row // half != column // half))
    q_rows += [np.hstack((column <= row, nothing)), np.hstack((nothing, column >= row))]
    k_rows += [np.hstack((column > row, nothing)), np.hstack((nothing, column < row))]
    rows = (*q_rows[:_LEVELS], *k_rows[:_LEVELS], *q_rows[_LEVELS:], *k_rows[_LEVELS:])
    return torch.from_numpy(np.vstack(rows).astype(float)), torch.from_numpy(np.stack(masks).astype(float))


def _chunk_tables() -> tuple[Tensor, Tensor, Tensor]:
    """For the chunks of a block, in each direction: the decays between a source and where its state enters.

    Returns:
        sums (D, (S + 1) * S, S): to chunk 0 .. S - 1, and to what leaves the block; from each chunk; over which chunks.
        mask (D, (S + 1) * S, 1): whether the source comes before.
        since_border (D, S, S): the chunks between the block's border, where a state enters, and each chunk.
    """
    to, source, between = np.ogrid[: _S + 1, :_S, :_S]
    to_backward = np.where(to == _S, -1, to)  # what leaves goes left
    before = np.stack((source < to, source > to_backward))
    sums = np.stack(((source < between) & (between < to), (to_backward < between) & (between < source)))
    row, column = np.ogrid[:_S, :_S]
    since_border = np.stack((column < row, column > row))
    tables = (sums.reshape(2, -1, _S), before.reshape(2, -1, 1), since_border)
    sums_DRS, mask_DRS1, since_border_DSS = (torch.from_numpy(table.astype(float)) for table in tables)
    return sums_DRS, mask_DRS1, since_border_DSS


# Tensors, since a trace takes these as constants, but would look into how they are made.
_TOKEN_TABLES, _CHUNK_TABLES = _token_tables(), _chunk_tables()
