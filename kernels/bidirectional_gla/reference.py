"""Bidirectional gated linear attention in plain PyTorch: the specification and the CPU, export and ONNX path.

Equations (ViG, arXiv 2405.18425), per head, with the state S of size K x V:

    S_t = Diag(exp(gf_t)) S_{t-1} + k_t v_t^T        R_t = Diag(exp(gb_t)) R_{t+1} + k_t v_t^T
    o_t = scale * (S_t^T q_t + R_t^T q_t) / 2

`bidirectional_gla_definition` is that loop. `bidirectional_gla_reference` computes the same in chunks of T tokens:
inside a chunk as a masked T x T matrix A times v, between chunks through the states. The weight of a source s < t
is exp(gf_{s+1} + ... + gf_t), that of a source s > t is exp(gb_t + ... + gb_{s-1}). A has one entry for both
directions, since only the diagonal belongs to both. Two ways to get A without overflow:

* safe: any decay in [-inf, 0]; plain differentiable operators, no branch on data, so it traces and exports.
* mild: eager CPU, N > 1 and no decay below -2 per token; about three times faster, with a hand-written backward.

Suffixes: B batch, N tokens, H heads, K key size, V value size, C chunks, T tokens of a chunk, D directions (2).
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["bidirectional_gla_definition", "bidirectional_gla_gradients", "bidirectional_gla_reference"]

# Tokens of a chunk. The safe path halves its chunk again and again, so it needs a power of two.
_SAFE_CHUNK = 32
# The mild path takes decays down to -2 per token: it forms their gradients from differences of sums, which costs
# relative accuracy where a token's exp(g) is small. Its chunk is long while the decays in it sum to -40 or more
# (exponents reach +-20 then, and masked entries exp(40)), else short, with a sum of -32 or more in any case.
_MILD_TOKEN = 2.0
_MILD_TOTAL = 40.0
_MILD_CHUNK, _SHORT_MILD_CHUNK = 64, 16


def bidirectional_gla_definition(
    q_BNHK: Tensor, k_BNHK: Tensor, v_BNHV: Tensor, gf_BNHK: Tensor, gb_BNHK: Tensor, *, scale: float | None = None
) -> Tensor:
    """The equations token by token, in the dtype of the arguments; for tests (use float64), slow. (B, N, H, V)."""
    scale = q_BNHK.shape[-1] ** -0.5 if scale is None else scale
    n_tokens = q_BNHK.shape[1]
    outputs = [torch.zeros_like(v_BNHV[:, 0]) for _ in range(n_tokens)]
    for g_BNHK, order in ((gf_BNHK, range(n_tokens)), (gb_BNHK, reversed(range(n_tokens)))):
        state_BHKV = torch.zeros_like(k_BNHK[:, 0, :, :, None] * v_BNHV[:, 0, :, None, :])
        for t in order:
            update_BHKV = k_BNHK[:, t, :, :, None] * v_BNHV[:, t, :, None, :]
            state_BHKV = g_BNHK[:, t, :, :, None].exp() * state_BHKV + update_BHKV
            outputs[t] = outputs[t] + 0.5 * scale * (state_BHKV * q_BNHK[:, t, :, :, None]).sum(-2)
    return torch.stack(outputs, dim=1)


def bidirectional_gla_reference(
    q_BNHK: Tensor,
    k_BNHK: Tensor,
    v_BNHV: Tensor,
    gf_BNHK: Tensor,
    gb_BNHK: Tensor,
    *,
    scale: float | None = None,
    path: str | None = None,
) -> Tensor:
    """Chunked bidirectional GLA; arguments as checked by `bidirectional_gla`, result (B, N, H, V) in v's dtype.

    `path` forces "safe" or "mild" (for tests); None lets the decays decide in eager CPU mode, and is "safe" elsewhere:
    reading the decays would break a traced graph and would make a GPU wait.
    Raises ValueError when "mild" is forced on decays that are not.
    """
    scale = q_BNHK.shape[-1] ** -0.5 if scale is None else scale
    tensors = (q_BNHK, k_BNHK, v_BNHV, gf_BNHK, gb_BNHK)
    with _no_autocast(q_BNHK.device.type):
        if path == "mild" or (path is None and _may_read_data(q_BNHK)):
            factors = _mild_factors(gf_BNHK, gb_BNHK, dtype=_compute_dtype(q_BNHK))
            if factors is not None:
                return _MildGLA.apply(*tensors, factors, scale)
            if path == "mild":
                raise ValueError(f"the mild path needs two tokens or more and decays of at least -{_MILD_TOKEN}")
        return _safe_gla(*tensors, scale)


def bidirectional_gla_gradients(
    do_BNHV: Tensor, q_BNHK: Tensor, k_BNHK: Tensor, v_BNHV: Tensor, gf_BNHK: Tensor, gb_BNHK: Tensor, *, scale: float
) -> list[Tensor]:
    """Gradients of the five tensors without a graph, for use inside an operator, where autograd is off."""
    tensors = (q_BNHK, k_BNHK, v_BNHV, gf_BNHK, gb_BNHK)
    with _no_autocast(q_BNHK.device.type):
        factors = _mild_factors(gf_BNHK, gb_BNHK, dtype=_compute_dtype(q_BNHK)) if _may_read_data(q_BNHK) else None
        if factors is None:
            _, pull_back = torch.func.vjp(lambda *x: _safe_gla(*x, scale), *tensors)
            return list(pull_back(do_BNHV))
        _, saved = _mild_forward(*tensors[:3], factors, scale=scale)
        gradients = _mild_gradients(*saved, do_BNHV, scale=scale, n_tokens=q_BNHK.shape[1])
        return [g.to(x.dtype) for g, x in zip(gradients, tensors, strict=True)]


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _may_read_data(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() > 0 and not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    # Autocast would run the products in half precision. Entered only when needed, to keep exported graphs plain.
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _to_chunks(x_BNHX: Tensor, n_chunks: int, length: int) -> Tensor:
    """(B, N, H, X) -> view (B, C, H, T, X). Zero tokens at the end add nothing: k = 0, and a decay of 0 keeps all."""
    padding = n_chunks * length - x_BNHX.shape[1]
    x_BNHX = F.pad(x_BNHX, (0, 0, 0, 0, 0, padding)) if padding else x_BNHX
    return x_BNHX.unflatten(1, (n_chunks, length)).transpose(2, 3)


def _from_chunks(x_BCHTX: Tensor, n_tokens: int) -> Tensor:
    return x_BCHTX.transpose(2, 3).flatten(1, 2)[:, :n_tokens]


# ------------------------------------------------------------------------------------------------------- safe path
#
# Cut a chunk into blocks of 2m tokens, m = 1, 2, 4, ..., T/2. A pair (s, t), s != t, lies in the two halves of exactly
# one such block, for exactly one m. With b the boundary of the halves and s < b <= t, the pair's decay factorises:
#     exp(gf_{s+1} + ... + gf_t) = exp(gf_{s+1} + ... + gf_{b-1}) * exp(gf_b + ... + gf_t)
# into a factor for k_s and one for q_t. Both exponents are sums over part of a half, so they are <= 0: nothing
# overflows, -inf gives 0, and since no two sums are subtracted, even exp(-50) keeps its relative accuracy, in the
# gradients too. For s > t the backward decays do the same with the halves exchanged, so that at each level one q
# and one k exponent per token serve both directions. The sums for 2m follow from those for m by one addition.


def _safe_gla(q_BNHK: Tensor, k_BNHK: Tensor, v_BNHV: Tensor, gf_BNHK: Tensor, gb_BNHK: Tensor, scale: float) -> Tensor:
    n_tokens = q_BNHK.shape[1]
    # Two tokens at least: one alone would leave the decays out of the graph, with no gradient instead of zero.
    length = min(_SAFE_CHUNK, max(2, 1 << (n_tokens - 1).bit_length()))
    n_chunks = -(-n_tokens // length)
    q, k, v, gf, gb = (
        _to_chunks(x.to(_compute_dtype(q_BNHK)), n_chunks, length) for x in (q_BNHK, k_BNHK, v_BNHV, gf_BNHK, gb_BNHK)
    )
    token_T = torch.arange(length, device=q.device)
    # A token is its own source in both directions: 2 q.k, halved at the end with all the rest.
    a_BCHTT = torch.where(token_T[:, None] == token_T, 2.0 * (q @ k.mT), 0.0)

    # Sums inside the current half blocks: over the tokens from the half's start to t (forward) or from t to its end
    # (backward), with t for q (in), without t for k and from the other side (ex).
    gf_in, gf_ex, gb_in, gb_ex = gf, torch.zeros_like(gf), gb, torch.zeros_like(gb)
    half = 1
    while half < length:
        (gf_in_l, gf_in_r), (gf_ex_l, gf_ex_r), (gb_in_l, gb_in_r), (gb_ex_l, gb_ex_r) = (
            x.unflatten(-2, (length // (2 * half), 2, half)).unbind(-3) for x in (gf_in, gf_ex, gb_in, gb_ex)
        )
        q_exponent, k_exponent = _join(gb_in_l, gf_in_r), _join(gf_ex_l, gb_ex_r)
        scores_BCHTT = (q * q_exponent.exp()) @ (k * k_exponent.exp()).mT
        block_T, pair_T = token_T // half, token_T // (2 * half)
        at_this_level = (pair_T[:, None] == pair_T) & (block_T[:, None] != block_T)
        a_BCHTT = torch.where(at_this_level, scores_BCHTT, a_BCHTT)

        gf_sum_l, gf_sum_r = gf_in_l[..., -1:, :], gf_in_r[..., -1:, :]
        gb_sum_l, gb_sum_r = gb_in_l[..., :1, :], gb_in_r[..., :1, :]
        gf_in, gf_ex = _join(gf_in_l, gf_in_r + gf_sum_l), _join(gf_ex_l + gf_sum_r, gf_ex_r)
        gb_in, gb_ex = _join(gb_in_l + gb_sum_r, gb_in_r), _join(gb_ex_l, gb_ex_r + gb_sum_l)
        half *= 2

    o_BCHTV = a_BCHTT @ v
    if n_chunks > 1:
        # The same sums, now over the whole chunk, carry q and k to the chunk's borders.
        for g_in, g_ex, border, near in ((gf_in, gf_ex, -1, 0), (gb_in, gb_ex, 0, 1)):
            update_BCHKV = (k * g_ex.exp()).mT @ v
            decay_BCHK1 = g_in[..., border, :, None].exp()
            o_BCHTV = o_BCHTV + (q * g_in.exp()) @ _incoming_states(update_BCHKV, decay_BCHK1, near=near)
    return (0.5 * scale * _from_chunks(o_BCHTV, n_tokens)).to(v_BNHV.dtype)


def _join(left: Tensor, right: Tensor) -> Tensor:
    """Two tensors of half blocks (..., blocks, m, K) -> (..., T, K)."""
    return torch.stack((left, right), dim=-3).flatten(-4, -2)


def _incoming_states(update_BCHKV: Tensor, decay_BCHK1: Tensor, *, near: int) -> Tensor:
    """States entering each chunk, X_next = decay * X + update from X = 0; visits chunks upwards (near=0) or down (1).

    Pairs of chunks are merged, solved and split again: log2(C) levels in the graph and linear work.
    """
    n_chunks = update_BCHKV.shape[1]
    if n_chunks == 1:
        return torch.zeros_like(update_BCHKV)
    if n_chunks % 2:  # a chunk that neither decays nor adds anything to a state that matters
        update_BCHKV, decay_BCHK1 = (F.pad(x, (0, 0, 0, 0, 0, 0, 0, 1)) for x in (update_BCHKV, decay_BCHK1))
    updates = update_BCHKV.unflatten(1, (-1, 2)).unbind(2)
    decays = decay_BCHK1.unflatten(1, (-1, 2)).unbind(2)
    far = 1 - near
    x_near = _incoming_states(updates[far] + decays[far] * updates[near], decays[far] * decays[near], near=near)
    x_far = decays[near] * x_near + updates[near]
    return torch.stack((x_far, x_near) if near else (x_near, x_far), dim=2).flatten(1, 2)[:, :n_chunks]


# ------------------------------------------------------------------------------------------------------- mild path
#
# With F_t = gf_1 + ... + gf_t (in the chunk), the pair's decay exp(F_t - F_s) = exp(F_t - F_T/2) * exp(F_T/2 - F_s) is
# a factor for q_t times one for k_s: E_t = exp(F_t - F_T/2) and 1/E_s. Exponents stay within half of the chunk's total
# decay. One masked product per direction gives A. Backward direction: F_t = gb_t + ... + gb_T.
# Measuring from the half F_T/2 makes E at the chunk's last token (first, backwards) h = exp(F_T/2), and with
# X_c = h_c S_c, the state entering chunk c, and Q = q E, K = k / E, U_c = K_c^T V_c:
#     O_c = A_c V_c + Q_c X_c,         X_{c+1} = h_c h_{c+1} (X_c + U_c)
# Both directions sit side by side in the key axis (size 2K), so one product serves both.


def _mild_factors(gf_BNHK: Tensor, gb_BNHK: Tensor, *, dtype: torch.dtype) -> Tensor | None:
    """E_t = exp(F_t - F_T/2) of both directions, (B, C, H, T, D, K); None when the decays are not mild, or NaN."""
    gf_BNHK, gb_BNHK = gf_BNHK.detach(), gb_BNHK.detach()
    if gf_BNHK.shape[1] == 1:  # no decay matters: the safe path's gradients of the decays are exactly 0
        return None
    if not min(float(gf_BNHK.amin()), float(gb_BNHK.amin())) >= -_MILD_TOKEN:
        return None
    f, largest_total = _centred_sums(gf_BNHK, gb_BNHK, target=_MILD_CHUNK, dtype=dtype)
    if largest_total > _MILD_TOTAL:
        f, _ = _centred_sums(gf_BNHK, gb_BNHK, target=_SHORT_MILD_CHUNK, dtype=dtype)
    return f.exp_()


def _centred_sums(gf_BNHK: Tensor, gb_BNHK: Tensor, *, target: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """F_t - F_T/2, (B, C, H, T, D, K), in equal chunks of at most `target` tokens, and the largest |F_T|."""
    n_chunks = -(-gf_BNHK.shape[1] // target)
    length = -(-gf_BNHK.shape[1] // n_chunks)  # 196 tokens: 4 x 49, no padding
    gf, gb = (_to_chunks(g, n_chunks, length) for g in (gf_BNHK, gb_BNHK))
    # gb_t + ... + gb_T = total - (gb_1 + ... + gb_{t-1}), so gb enters negated and one token later.
    f = gf.new_empty((*gf.shape[:-1], 2, gf.shape[-1]), dtype=dtype)
    f[..., 0, :] = gf
    f[..., 0, 1, :] = 0.0
    torch.mul(gb[..., :-1, :], -1.0, out=f[..., 1:, 1, :])
    f.cumsum_(-3)
    total = f[..., -1:, :, :].clone()
    total[..., 1, :] -= gb[..., -1:, :]
    return f.sub_(total, alpha=0.5), float(total.abs().amax())


class _MildGLA(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *tensors, factors, scale = arguments
        o_BNHV, saved = _mild_forward(*tensors[:3], factors, scale=scale)
        ctx.save_for_backward(*saved)
        ctx.scale, ctx.n_tokens, ctx.dtypes = scale, o_BNHV.shape[1], [x.dtype for x in tensors]
        return o_BNHV

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, do_BNHV: Tensor) -> tuple[Tensor | None, ...]:
        with _no_autocast(do_BNHV.device.type):
            gradients = _mild_gradients(*ctx.saved_tensors, do_BNHV, scale=ctx.scale, n_tokens=ctx.n_tokens)
        return *(g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True)), None, None


def _mild_forward(
    q_BNHK: Tensor, k_BNHK: Tensor, v_BNHV: Tensor, e_BCHTDK: Tensor, *, scale: float
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """The result and what `_mild_gradients` needs."""
    n_batch, n_chunks, n_heads, length, _, key_size = e_BCHTDK.shape
    q, k, v = (_to_chunks(x, n_chunks, length) for x in (q_BNHK, k_BNHK, v_BNHV))
    # M = B * C * H: the batched products want one leading axis and dense operands.
    q_MTDK = torch.mul(q.unsqueeze(-2), e_BCHTDK, out=torch.empty_like(e_BCHTDK)).flatten(0, 2)
    k_MTDK = torch.div(k.unsqueeze(-2), e_BCHTDK, out=torch.empty_like(e_BCHTDK)).flatten(0, 2)
    v_MTV = v.to(e_BCHTDK.dtype).flatten(0, 2)

    lower = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    forward_MTT = torch.bmm(q_MTDK[:, :, 0], k_MTDK[:, :, 0].mT)
    backward_MTT = torch.bmm(q_MTDK[:, :, 1], k_MTDK[:, :, 1].mT)
    a_MTT = torch.where(lower, forward_MTT, backward_MTT)
    a_MTT.diagonal(dim1=-2, dim2=-1).mul_(2.0)  # a token is its own source in both directions
    o_MTV = torch.bmm(a_MTT, v_MTV)

    x = None
    if n_chunks > 1:
        u_MLV = torch.bmm(k_MTDK.flatten(2).mT, v_MTV)  # L = D * K
        u = u_MLV.view(n_batch, n_chunks, n_heads, 2, key_size, -1)
        x, step = torch.zeros_like(u), _border_decays(e_BCHTDK)
        for d, c, c_next in _visits(n_chunks):
            u[:, c, :, d] += x[:, c, :, d]
            torch.mul(u[:, c, :, d], step[:, min(c, c_next), :, d], out=x[:, c_next, :, d])
        o_MTV.baddbmm_(q_MTDK.flatten(2), x.view_as(u_MLV))

    o_BNHV = _to_tokens(torch.mul, o_MTV.view(v.shape), 0.5 * scale, n_tokens=q_BNHK.shape[1]).to(v_BNHV.dtype)
    return o_BNHV, (e_BCHTDK, q_MTDK, k_MTDK, v_MTV, a_MTT, x)


def _mild_gradients(
    e_BCHTDK: Tensor,
    q_MTDK: Tensor,
    k_MTDK: Tensor,
    v_MTV: Tensor,
    a_MTT: Tensor,
    x: Tensor | None,
    do_BNHV: Tensor,
    *,
    scale: float,
    n_tokens: int,
) -> tuple[Tensor, ...]:
    n_chunks, length = e_BCHTDK.shape[1], e_BCHTDK.shape[3]
    do = _to_chunks(do_BNHV, n_chunks, length)
    do_MTV = torch.mul(do.to(v_MTV.dtype), 0.5 * scale, out=v_MTV.new_empty(do.shape)).flatten(0, 2)

    dv_MTV = torch.bmm(a_MTT.mT, do_MTV)
    if x is None:
        dq_MTDK, dk_MTDK = torch.zeros_like(q_MTDK), torch.zeros_like(k_MTDK)
    else:
        # dX_c = Q_c^T dO_c + dU_c and dU_c = h_c h_{c+1} dX_{c+1}: the chunks in reverse order.
        dx_MLV = torch.bmm(q_MTDK.flatten(2).mT, do_MTV)
        dx = dx_MLV.view_as(x)
        du, step = torch.zeros_like(dx), _border_decays(e_BCHTDK)
        for d, c, c_next in reversed(_visits(n_chunks)):
            torch.mul(dx[:, c_next, :, d], step[:, min(c, c_next), :, d], out=du[:, c, :, d])
            dx[:, c, :, d] += du[:, c, :, d]
        dq_MTDK = torch.bmm(do_MTV, x.view_as(dx_MLV).mT).view_as(q_MTDK)
        dk_MTDK = torch.bmm(v_MTV, du.view_as(dx_MLV).mT).view_as(k_MTDK)
        dv_MTV.baddbmm_(k_MTDK.flatten(2), du.view_as(dx_MLV))
    da_MTT = torch.bmm(do_MTV, v_MTV.mT)
    for d, da_d_MTT in enumerate((da_MTT.tril(), da_MTT.triu_())):
        dq_MTDK[:, :, d] += torch.bmm(da_d_MTT, k_MTDK[:, :, d])
        dk_MTDK[:, :, d] += torch.bmm(da_d_MTT.mT, q_MTDK[:, :, d])

    # Of the exponents: df_t = q_t dq_t - k_t dk_t. Of g_t: the sum of df from t on (backward direction: up to t), minus
    # half of them all (for F_T/2), plus the effect of the chunk's total decay on the states at its two borders.
    df = torch.mul(q_MTDK, dq_MTDK).addcmul_(k_MTDK, dk_MTDK, value=-1).view_as(e_BCHTDK)
    running = df.cumsum(-3)
    half_total = 0.5 * running[..., -1:, :, :]
    running[..., 0, :] -= df[..., 0, :]
    borders = torch.zeros_like(half_total)
    if x is not None:
        step_BCHDK = 0.5 * dx.mul_(x).sum(-1)  # of the logarithm of the step that led to X_c; X = 0 where none did
        borders[..., 0, :, :] += step_BCHDK
        borders[:, :-1, :, 0, 0] += step_BCHDK[:, 1:, :, 0]
        borders[:, 1:, :, 0, 1] += step_BCHDK[:, :-1, :, 1]

    dq, dk = dq_MTDK.view_as(e_BCHTDK).mul_(e_BCHTDK), dk_MTDK.view_as(e_BCHTDK).div_(e_BCHTDK)
    return (
        _to_tokens(torch.add, dq[..., 0, :], dq[..., 1, :], n_tokens=n_tokens),
        _to_tokens(torch.add, dk[..., 0, :], dk[..., 1, :], n_tokens=n_tokens),
        _from_chunks(dv_MTV.view(do.shape), n_tokens),
        _to_tokens(torch.sub, (borders + half_total)[..., 0, :], running[..., 0, :], n_tokens=n_tokens),
        _to_tokens(torch.add, (borders - half_total)[..., 1, :], running[..., 1, :], n_tokens=n_tokens),
    )


def _border_decays(e_BCHTDK: Tensor) -> Tensor:
    """h_c h_{c+1} of each border between chunks and direction, as a factor of the states: (B, C-1, H, D, K, 1)."""
    h = torch.stack((e_BCHTDK[..., -1, 0, :], e_BCHTDK[..., 0, 1, :]), dim=-2).unsqueeze(-1)
    return h[:, :-1] * h[:, 1:]


def _visits(n_chunks: int) -> list[tuple[int, int, int]]:
    """(direction, chunk, next chunk) in the order of the recurrences."""
    upwards = [(0, c, c + 1) for c in range(n_chunks - 1)]
    return upwards + [(1, c + 1, c) for c in reversed(range(n_chunks - 1))]


def _to_tokens(operator: Callable[..., Tensor], a: Tensor, b: Tensor | float, *, n_tokens: int) -> Tensor:
    """operator(a, b), (B, C, H, T, X), written straight into the layout (B, N, H, X): one pass instead of two."""
    shape = torch.broadcast_shapes(a.shape, b.shape) if isinstance(b, Tensor) else a.shape
    out_BCTHX = a.new_empty([shape[i] for i in (0, 1, 3, 2, 4)])
    operator(a, b, out=out_BCTHX.transpose(2, 3))
    return out_BCTHX.flatten(1, 2)[:, :n_tokens]
