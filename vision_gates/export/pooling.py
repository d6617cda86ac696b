"""Adaptive average pooling for graphs of open size: ONNX has it to one value an axis alone."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["PoolingAsProducts", "adaptive_avg_pool"]


def adaptive_avg_pool(x: Tensor, output_size: Sequence[int]) -> Tensor:
    """The last axes of a tensor, each averaged to a number of bins as ``F.adaptive_avg_pool2d`` does.

    Bin i of k on an axis of n averages positions floor(i n / k) to ceil((i + 1) n / k): a product with a (n, k) matrix,
    which takes any n, where PyTorch's own decomposition indexes with the size that it was traced with.

    Args:
        x: (..., *sizes).
        output_size: bins of each of the last ``len(output_size)`` axes.
    """
    for axis, bins in enumerate(output_size, start=-len(output_size)):
        size = x.shape[axis]
        index = torch.arange(bins, device=x.device)
        first, end = index * size // bins, ((index + 1) * size + bins - 1) // bins
        position = torch.arange(size, device=x.device)[:, None]
        averaging = ((position >= first) & (position < end)).to(x.dtype) / (end - first).to(x.dtype)
        x = (x.transpose(axis, -1) @ averaging).transpose(axis, -1)
    return x


class PoolingAsProducts(TorchFunctionMode):
    """Within this context every adaptive average pooling to more than one value is ``adaptive_avg_pool``."""

    _SPATIAL: Mapping[Any, int] = {F.adaptive_avg_pool1d: 1, F.adaptive_avg_pool2d: 2, F.adaptive_avg_pool3d: 3}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func not in self._SPATIAL:
            return func(*args, **(kwargs or {}))
        x, output_size = _arguments(*args, **(kwargs or {}))
        if isinstance(output_size, int):
            output_size = (output_size,) * self._SPATIAL[func]
        sizes = x.shape[-self._SPATIAL[func] :]
        bins = [size if bins is None else bins for size, bins in zip(sizes, output_size, strict=True)]
        if all(isinstance(count, int) and count == 1 for count in bins):
            return func(x, output_size)
        return adaptive_avg_pool(x, bins)


def _arguments(input: Tensor, output_size: Any) -> tuple[Tensor, Any]:  # noqa: A002 (their names in torch)
    return input, output_size
