"""Times positional_attention against its peers. What fails its check is not timed.

An error is the norm of the difference to the float64 reference, relative to the norm of the reference, of the output
and of each gradient. PyTorch may have 1e-5 plus eight times the error of rounding the exact result to the dtype (it
rounds every step), the kernel 1e-6 plus twice the error of PyTorch, a peer 5 %.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vision_gates.kernels import positional_attention as operator
from vision_gates.kernels.checking import relative_error, result_and_gradients
from vision_gates.kernels.positional_attention.reference import positional_attention_reference
from vision_gates.kernels.timing import machine_facts, measure

__all__ = ["CPU_SHAPES", "CUDA_SHAPES", "example", "rows"]

# (B, H, W, h, D): ConViT-tiny and -small on 224 and 512 pixels, -tiny on 1024.
CPU_SHAPES = ((8, 14, 14, 4, 48), (1, 32, 32, 4, 48))
CUDA_SHAPES = ((128, 14, 14, 4, 48), (128, 14, 14, 9, 48), (24, 32, 32, 4, 48), (24, 32, 32, 9, 48), (8, 64, 64, 4, 48))
_NAMES = ("the output", "dcontent", "dv", "drows", "dcolumns", "dgate")
_DENSE_TOKENS = 1024  # beyond, a matrix of all pairs for each head is too large to compare with
_PEER_LIMIT = 0.05


def rows(
    device: str | torch.device = "cpu",
    *,
    shapes: Sequence[tuple[int, int, int, int, int]] | None = None,
    dtype: torch.dtype | None = None,
    min_seconds: float = 0.2,
    peers: bool = True,
) -> list[dict[str, Any]]:
    """Check and time each backend, then the peers, on each shape (B, H, W, h, D); columns as in ``timing.measure``.

    Defaults: CPU_SHAPES in float32, or CUDA_SHAPES in bfloat16. The peers: on a GPU the reference in torch.compile, and
    for up to 1,024 tokens the product with the matrix of all pairs. Each number is measured for about ``min_seconds``.
    ``worst_error`` is the largest error of the output and of the gradients. A peer that fails has the reason under
    ``problem``. Raises RuntimeError when a backend misses its error limit.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
    about = {"dtype": str(dtype).removeprefix("torch."), **machine_facts(device)}
    backends = ("reference", "triton") if on_cuda and operator._HAS_TRITON else ("reference",)
    result: list[dict[str, Any]] = []
    for shape in shapes or (CUDA_SHAPES if on_cuda else CPU_SHAPES):
        inputs, upstream = _inputs(shape, device, dtype)
        doubles = [x.detach().double().requires_grad_() for x in inputs]
        exact = result_and_gradients(_call("reference"), doubles, upstream.double())
        half = upstream.dtype  # of content and values; tables and their gradients are float32
        limits = [1e-5 + 8 * relative_error(x.to(half), x) for x in exact]
        for backend in backends:
            errors = _errors(_call(backend), inputs, upstream, exact)
            for name, error, limit in zip(_NAMES, errors, limits, strict=True):
                if not error <= limit:  # also when NaN
                    raise RuntimeError(
                        f"{backend} backend, shape {tuple(shape)}, {dtype}: error of {name} is {error:.1e}, "
                        f"above its limit {limit:.1e}; nothing was timed"
                    )
            if backend == "reference":
                # dgate is one number a head, whose error may be nothing by luck; dcolumns sums the same products.
                limits = [1e-6 + 2 * error for error in (*errors[:-1], max(errors[-2:]))]
            columns = measure(_call(backend), inputs, upstream, min_seconds=min_seconds)
            row = {"op": "positional_attention", "backend": backend, "shape": shape}
            result.append({**row, **columns, "worst_error": max(errors), **about})
        for name, function in _peers(on_cuda, shape) if peers else ():
            row = {"op": name, "backend": "torch", "shape": shape}
            result.append({**row, **_peer_columns(function, inputs, upstream, exact, min_seconds), **about})
    return result


def example(device: torch.device) -> tuple[Callable[..., Tensor], list[Tensor], Tensor]:
    """The operator, arguments of the first shape and a gradient of the output: what a cold process runs once."""
    shape, dtype = (CUDA_SHAPES[0], torch.bfloat16) if device.type == "cuda" else (CPU_SHAPES[0], torch.float32)
    return operator.positional_attention, *_inputs(shape, device, dtype)


def _call(backend: str) -> Callable[..., Tensor]:
    return partial(operator.positional_attention, backend=backend)


def _inputs(shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Content, values, tables of a neighbourhood as sharp as ConViT's, gates, and a gradient of the output."""
    B, H, W, h, D = shape
    generator = torch.Generator().manual_seed(0)
    content, v, dout = (torch.randn(B, H * W, h, D, generator=generator).to(device, dtype) for _ in range(3))
    content = content.transpose(1, 2).contiguous().transpose(1, 2)  # as an attention leaves it
    offset = torch.randn(2, h, 1, 1, generator=generator)
    tables = [_table(size, x).to(device) for size, x in zip((H, W), offset, strict=True)]
    gate = torch.rand(h, generator=generator).to(device)
    return [x.requires_grad_() for x in (content, v, *tables, gate)], dout


def _table(size: int, offset_h11: Tensor) -> Tensor:
    position = torch.arange(size, dtype=torch.float32)
    return (-(position - position[:, None] - offset_h11).square()).softmax(dim=-1)


def _errors(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], dout: Tensor, exact: Sequence[Tensor]
) -> list[float]:
    return [relative_error(got, x) for got, x in zip(result_and_gradients(function, tensors, dout), exact, strict=True)]


# ---------------------------------------------------------------------------------------------------------------- peers


def _peers(on_cuda: bool, shape: Sequence[int]) -> list[tuple[str, Callable[..., Tensor]]]:
    """Each by name."""
    _, H, W, _, _ = shape
    peers = [("reference, torch.compile", torch.compile(positional_attention_reference, dynamic=False))]
    dense = [("dense matrix of pairs", _dense)]
    return peers * on_cuda + dense * (H * W <= _DENSE_TOKENS)


def _dense(content_BNhD: Tensor, v_BNhD: Tensor, rows_hHH: Tensor, columns_hWW: Tensor, gate_h: Tensor) -> Tensor:
    """With the attention of all pairs of tokens, as ConViT's own code makes it."""
    pairs_hNN = torch.einsum("hyp,hxw->hyxpw", rows_hHH, columns_hWW).flatten(3).flatten(1, 2)
    position_BhND = pairs_hNN.to(v_BNhD.dtype) @ v_BNhD.transpose(1, 2)
    return torch.lerp(content_BNhD, position_BhND.transpose(1, 2), gate_h.to(content_BNhD.dtype)[:, None])


def _peer_columns(
    function: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    upstream: Tensor,
    exact: Sequence[Tensor],
    min_seconds: float,
) -> dict[str, Any]:
    try:
        error = max(_errors(function, inputs, upstream, exact))
        if not error <= _PEER_LIMIT:
            return {"worst_error": error, "problem": f"error {error:.1e}, above {_PEER_LIMIT}: not timed"}
        return {**measure(function, inputs, upstream, min_seconds=min_seconds), "worst_error": error}
    except Exception as error:  # a peer must not stop the measurement of ours
        return {"problem": f"{type(error).__name__}: {error}".splitlines()[0]}
