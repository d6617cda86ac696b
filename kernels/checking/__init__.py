"""What the operators' bench.py share: errors against float64, and a refusal to time what is wrong."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["relative_error", "result_and_gradients", "worst_errors"]


def relative_error(got: Tensor, exact: Tensor) -> float:
    """The norm of the difference to ``exact``, in float64, relative to its norm."""
    return float((got.double() - exact).norm() / exact.norm())


def result_and_gradients(function: Callable[..., Tensor], tensors: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    """What ``function`` makes of ``tensors``, and the gradient of each of them."""
    result = function(*tensors)
    return [result.detach(), *torch.autograd.grad(result, tensors, upstream)]


def worst_errors(
    backends: Sequence[str],
    run: Callable[[str], Sequence[Tensor]],
    exact: Sequence[Tensor],
    *,
    names: Sequence[str],
    dtype: torch.dtype,
    about: str,
) -> list[float]:
    """The largest error of each backend's tensors, all of which must keep their limits.

    The reference may have 1e-5 plus four times the error of rounding the exact tensor to the dtype (it rounds every
    step), those after it 1e-6 plus twice the reference's error.

    Args:
        backends: the reference first.
        run: gives the tensors of a backend.
        exact: the tensors in float64.
        names: of the tensors.
        dtype: of the computation.
        about: what was computed, for the message.

    Raises:
        RuntimeError: an error above its limit, also if it is NaN.
    """
    limits = [1e-5 + 4 * relative_error(x.to(dtype), x) for x in exact]
    worst = []
    for backend in backends:
        errors = [relative_error(got, x) for got, x in zip(run(backend), exact, strict=True)]
        for name, error, limit in zip(names, errors, limits, strict=True):
            if not error <= limit:
                raise RuntimeError(
                    f"{backend} backend, {about}, {dtype}: error of {name} is {error:.1e}, "
                    f"above its limit {limit:.1e}; nothing was timed"
                )
        if backend == "reference":
            limits = [1e-6 + 2 * error for error in errors]
        worst.append(max(errors))
    return worst
