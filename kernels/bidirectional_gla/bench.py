"""Times bidirectional_gla against its peers. What fails its check is not timed.

An error is the norm of the difference to the exact result (float64), relative to the norm of the exact result, of the
output and of each gradient. The reference may have 1e-5 plus twice the error of rounding the exact result to the dtype,
a kernel 1e-6 plus twice the error of the reference, a peer that computes the same 5 %.
"""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_gates.kernels import bidirectional_gla as operator
from vision_gates.kernels.bidirectional_gla.reference import bidirectional_gla_definition, bidirectional_gla_reference
from vision_gates.kernels.checking import relative_error, result_and_gradients
from vision_gates.kernels.timing import machine_facts, measure

__all__ = ["CPU_SHAPES", "CUDA_SHAPES", "example", "rows"]

# (B, N, H, K, V): ViG-T at 224 x 224 and at 1024 x 1024 and beyond.
CPU_SHAPES = ((8, 196, 3, 32, 64), (1, 4096, 3, 32, 64))
CUDA_SHAPES = ((128, 196, 12, 32, 64), (8, 4096, 3, 32, 64), (2, 16384, 3, 32, 64))
_NAMES = ("the output", "dq", "dk", "dv", "dg_forward", "dg_backward")
_DEFINITION_TOKENS = 256  # beyond, the definition's loop over tokens would take longer than all the timing
_PEER_LIMIT = 0.05


def rows(
    device: str | torch.device = "cpu",
    *,
    shapes: Sequence[tuple[int, int, int, int, int]] | None = None,
    dtype: torch.dtype | None = None,
    min_seconds: float = 0.2,
    peers: bool = True,
) -> list[dict[str, Any]]:
    """Check and time each backend, then the peers, on each shape (B, N, H, K, V); columns as in ``timing.measure``.

    Defaults: CPU_SHAPES in float32, or CUDA_SHAPES in bfloat16. The peers: ``scaled_dot_product_attention`` on as many
    tokens and heads of size V, and on a GPU fla's ``chunk_gla`` if it is installed, run on x and the reversed x with
    what it takes to reverse and to add. Each number is measured for about ``min_seconds``. ``worst_error`` is the
    largest error of the output and of the gradients. A peer that fails has the reason under ``problem``.
    Raises RuntimeError when a backend misses its error limit.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
    backends = ["reference", "triton"] if on_cuda and operator._HAS_TRITON else ["reference"]
    about = {"dtype": str(dtype).removeprefix("torch."), **machine_facts(device)}
    chunk_gla = _fla_chunk_gla() if on_cuda and peers else None
    result: list[dict[str, Any]] = []
    for shape in shapes or (CUDA_SHAPES if on_cuda else CPU_SHAPES):
        inputs, upstream = _inputs(shape, device, dtype)
        # Two images are enough to see a mixed-up batch, and keep the states of the exact result in memory.
        small = _inputs((min(shape[0], 2), *shape[1:]), device, dtype)
        exact = _exact(*small)
        limits = [1e-5 + 2 * relative_error(x.to(dtype), x) for x in exact]
        for backend in backends:
            errors = _errors(_call(backend), *small, exact)
            for name, error, limit in zip(_NAMES, errors, limits, strict=True):
                if not error <= limit:  # also when NaN
                    raise RuntimeError(
                        f"{backend} backend, shape {tuple(shape)}, {dtype}: error of {name} is {error:.1e}, "
                        f"above its limit {limit:.1e}; nothing was timed"
                    )
            if backend == "reference":
                limits = [1e-6 + 2 * error for error in errors]
            row = {"op": "bidirectional_gla", "backend": backend, "shape": shape}
            columns = measure(_call(backend), inputs, upstream, min_seconds=min_seconds)
            result.append({**row, **columns, "worst_error": max(errors), **about})
        if chunk_gla is not None:
            row = {"op": "chunk_gla", "backend": "fla", "shape": shape}
            result.append({**row, **_fla_columns(chunk_gla, small, exact, inputs, upstream, min_seconds), **about})
        if peers:
            n_batch, n_tokens, n_heads, _, value_size = shape
            peer_shape = (n_batch, n_heads, n_tokens, value_size)
            qkv = [torch.randn(peer_shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
            columns = measure(F.scaled_dot_product_attention, qkv, torch.randn_like(qkv[0]), min_seconds=min_seconds)
            result.append(
                {"op": "scaled_dot_product_attention", "backend": "torch", "shape": peer_shape, **columns, **about}
            )
    return result


def example(device: torch.device) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """The operator, arguments of the first shape and a gradient of the output: what a cold process runs once."""
    shape, dtype = (CUDA_SHAPES[0], torch.bfloat16) if device.type == "cuda" else (CPU_SHAPES[0], torch.float32)
    return operator.bidirectional_gla, *_inputs(shape, device, dtype)


def _call(backend: str) -> Callable[..., Tensor]:
    return lambda *tensors: operator.bidirectional_gla(*tensors, backend=backend)


def _inputs(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """q, k, v, decays as ViG makes them, and a gradient of the output."""
    n_batch, n_tokens, n_heads, key_size, value_size = shape
    generator = torch.Generator().manual_seed(0)
    q, k, gf, gb = (torch.randn(n_batch, n_tokens, n_heads, key_size, generator=generator) for _ in range(4))
    v, do = (torch.randn(n_batch, n_tokens, n_heads, value_size, generator=generator) for _ in range(2))
    tensors = [q, k, v, F.logsigmoid(gf) / 16, F.logsigmoid(gb) / 16]
    return [x.to(device, dtype).requires_grad_() for x in tensors], do.to(device, dtype)


def _exact(tensors: Sequence[Tensor], do: Tensor) -> list[Tensor]:
    """Output and gradients in float64: of the definition, or of the safe reference after that has been held to it."""

    def part(n_tokens: int) -> tuple[list[Tensor], Tensor]:
        return [x.detach()[:, :n_tokens].double().requires_grad_() for x in tensors], do[:, :n_tokens].double()

    definition = result_and_gradients(bidirectional_gla_definition, *part(_DEFINITION_TOKENS))
    if do.shape[1] <= _DEFINITION_TOKENS:
        return definition

    def safe(*tensors: Tensor) -> Tensor:
        return bidirectional_gla_reference(*tensors, path="safe")

    if not max(_errors(safe, *part(_DEFINITION_TOKENS), definition)) <= 1e-10:
        raise RuntimeError(f"the safe reference in float64 misses the definition on {do.device}; nothing was timed")
    return result_and_gradients(safe, *part(do.shape[1]))


def _errors(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], do: Tensor, exact: Sequence[Tensor]
) -> list[float]:
    return [relative_error(got, x) for got, x in zip(result_and_gradients(function, tensors, do), exact, strict=True)]


# ------------------------------------------------------------------------------------------------------------------ fla


def _fla_chunk_gla() -> Callable[..., Any] | None:
    """fla's causal operator (github.com/fla-org/flash-linear-attention), if it is installed."""
    try:
        return importlib.import_module("fla.ops.gla").chunk_gla
    except ImportError:
        return None


def _both_ways(chunk_gla: Callable[..., Any]) -> Callable[..., Tensor]:
    """bidirectional_gla from a causal operator: x and the reversed x side by side in the batch, then the mean."""

    def function(q: Tensor, k: Tensor, v: Tensor, g_forward: Tensor, g_backward: Tensor) -> Tensor:
        q, k, v = (torch.cat((x, x.flip(1))) for x in (q, k, v))
        o, _ = chunk_gla(q, k, v, torch.cat((g_forward, g_backward.flip(1))), scale=q.shape[-1] ** -0.5)
        rightwards, leftwards = o.chunk(2)
        return (rightwards + leftwards.flip(1)) / 2

    return function


def _fla_columns(
    chunk_gla: Callable[..., Any],
    small: tuple[list[Tensor], Tensor],
    exact: Sequence[Tensor],
    inputs: Sequence[Tensor],
    upstream: Tensor,
    min_seconds: float,
) -> dict[str, Any]:
    function = _both_ways(chunk_gla)
    try:
        error = max(_errors(function, *small, exact))
        if not error <= _PEER_LIMIT:
            return {"worst_error": error, "problem": f"error {error:.1e}, above {_PEER_LIMIT}: not timed"}
        return {**measure(function, inputs, upstream, min_seconds=min_seconds), "worst_error": error}
    except Exception as error:  # another project's code must not stop the measurement of ours
        return {"problem": f"{type(error).__name__}: {error}".splitlines()[0]}
