"""Times bidirectional_gla against scaled_dot_product_attention. A backend that fails its check is not timed.

An error is the norm of the difference to the float64 definition, relative to the norm of the definition, of the output
and of each gradient. The reference may have 1e-5 plus twice the error of rounding the exact result to the dtype, a
kernel 1e-6 plus twice the error of the reference.
"""

import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.benchmark import Timer

from vision_gates.kernels import bidirectional_gla as operator
from vision_gates.kernels.bidirectional_gla.reference import bidirectional_gla_definition

__all__ = ["CPU_SHAPES", "CUDA_SHAPES", "rows"]

# (B, N, H, K, V): ViG-T at 224 x 224 and at 1024 x 1024 and beyond.
CPU_SHAPES = ((8, 196, 3, 32, 64), (1, 4096, 3, 32, 64))
CUDA_SHAPES = ((128, 196, 12, 32, 64), (8, 4096, 3, 32, 64), (2, 16384, 3, 32, 64))
_NAMES = ("the output", "dq", "dk", "dv", "dg_forward", "dg_backward")


def rows(
    device: str | torch.device = "cpu",
    *,
    shapes: Sequence[tuple[int, int, int, int, int]] | None = None,
    dtype: torch.dtype | None = None,
    min_seconds: float = 0.5,
) -> list[dict[str, object]]:
    """Check and time each backend, then the peer, on each shape (B, N, H, K, V); medians in milliseconds.

    Defaults: CPU_SHAPES in float32, or CUDA_SHAPES in bfloat16. Each measurement runs for about `min_seconds`.
    Raises RuntimeError when a backend misses its error limit.
    """
    device = torch.device(device)
    on_cuda = device.type == "cuda"
    shapes = shapes or (CUDA_SHAPES if on_cuda else CPU_SHAPES)
    dtype = dtype or (torch.bfloat16 if on_cuda else torch.float32)
    backends = ["reference", "triton"] if on_cuda and operator._HAS_KERNEL else ["reference"]
    about = {
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(device) if on_cuda else f"CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
    }
    result: list[dict[str, object]] = []
    for shape in shapes:
        _check(backends, shape, device, dtype)
        tensors, do = _inputs(shape, device, dtype)
        for backend in backends:
            milliseconds = _time(_call(backend), tensors, do, min_seconds)
            result.append({"op": "bidirectional_gla", "backend": backend, "shape": shape, **milliseconds, **about})
        n_batch, n_tokens, n_heads, _, value_size = shape
        peer_shape = (n_batch, n_heads, n_tokens, value_size)
        qkv = [torch.randn(peer_shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        milliseconds = _time(F.scaled_dot_product_attention, qkv, torch.randn_like(qkv[0]), min_seconds)
        peer = {"op": "scaled_dot_product_attention", "backend": "torch", "shape": peer_shape}
        result.append({**peer, **milliseconds, **about})
    return result


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


def _run(function: Callable[..., Tensor], tensors: Sequence[Tensor], do: Tensor) -> list[Tensor]:
    o = function(*tensors)
    return [o.detach(), *torch.autograd.grad(o, tensors, do)]


def _check(backends: Sequence[str], shape: Sequence[int], device: torch.device, dtype: torch.dtype) -> None:
    # Two images are enough to see a mixed-up batch, and keep the definition's states in memory.
    tensors, do = _inputs((min(shape[0], 2), *shape[1:]), device, dtype)
    exact = _run(bidirectional_gla_definition, [x.detach().double().requires_grad_() for x in tensors], do.double())
    limits = [1e-5 + 2 * _error(x.to(dtype), x) for x in exact]
    for backend in backends:
        errors = [_error(got, x) for got, x in zip(_run(_call(backend), tensors, do), exact, strict=True)]
        for name, error, limit in zip(_NAMES, errors, limits, strict=True):
            if not error <= limit:  # also when NaN
                raise RuntimeError(
                    f"{backend} backend, shape {tuple(shape)}, {dtype}: error of {name} is {error:.1e}, "
                    f"above its limit {limit:.1e}; nothing was timed"
                )
        if backend == "reference":
            limits = [1e-6 + 2 * error for error in errors]


def _error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def _time(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], do: Tensor, min_seconds: float
) -> dict[str, float]:
    def forward() -> None:
        with torch.no_grad():
            function(*tensors)

    def forward_backward() -> None:
        _run(function, tensors, do)

    def median_ms(stmt: Callable[[], None]) -> float:
        timer = Timer("stmt()", globals={"stmt": stmt}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=min_seconds).median * 1e3

    return {"ms_forward": median_ms(forward), "ms_forward_backward": median_ms(forward_backward)}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
