"""Recursive gated convolution (gnConv): HorNet's token mixer, in 2-D and 3-D.

Paper: HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions, arXiv 2207.14284, section
3.1; written from the paper.
Suffixes: B batch, S one or more spatial axes (H, W or D, H, W), C channels.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from vision_gates.gates.layer_scale import scaled_linear
from vision_gates.kernels.gated_depthwise import recursive_gating
from vision_gates.kernels.launching import is_exporting

__all__ = ["DepthwiseConv2d", "DepthwiseConv3d", "GnConv"]

_COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mul": torch.mul, "add": torch.add}


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution of channels-last maps (B, H, W, C), zero-padded to keep H and W.

    Args:
        dim: channels.
        kernel_size: odd.
        bias: whether a bias is added.

    Raises:
        ValueError: an even kernel.
    """

    def __init__(self, dim: int, kernel_size: int = 7, *, bias: bool = True) -> None:
        _check_kernel(kernel_size)
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C) to (B, H, W, C)."""
        return super().forward(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DepthwiseConv3d(nn.Conv3d):
    """:class:`DepthwiseConv2d` of volumes (B, D, H, W, C)."""

    def __init__(self, dim: int, kernel_size: int = 7, *, bias: bool = True) -> None:
        _check_kernel(kernel_size)
        super().__init__(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim, bias=bias)

    def forward(self, x_BDHWC: Tensor) -> Tensor:
        """Map (B, D, H, W, C) to (B, D, H, W, C)."""
        return super().forward(x_BDHWC.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)


def _check_kernel(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd and positive, to keep the map's size, got {kernel_size}")


class GnConv(nn.Module):
    """Interactions of ``order`` neighbourhoods by recursive gating, on channels-last maps.

    With widths c_i = C / 2^(n-1-i), i = 0 .. n-1, for order n::

        p, q = split(W_in x, c_0, c_0 + ... + c_(n-1))
        d_0, ..., d_(n-1) = split(scale * filter(q), c_0, ..., c_(n-1))
        y_0 = p * d_0
        y_i = (W_i y_(i-1)) * d_i          W_i: c_(i-1) -> c_i
        out = W_out y_(n-1)

    The layout is channels last, so that every product with a matrix is a plain Linear; the convolution sees the same
    memory as a channels_last tensor.

    Args:
        dim: channels in and out, C.
        order: n, the number of gates; 2^(n-1) must divide ``dim``.
        kernel_size: of the depthwise convolution, odd. Ignored where ``spatial_filter`` is given.
        scale: of the filter's result; 1/3 in HorNet's backbones, 1.0 in its decoders.
        combine: "mul" (a gate, as in the paper) or "add" (a variant without gates, as MambaClinix's code has it).
        spatial_dims: 2 for (B, H, W, C) or 3 for (B, D, H, W, C).
        spatial_filter: makes another filter from the number of its channels, 2 C - c_0: a module that maps
            (B, *S, 2 C - c_0) to the same shape, for instance
            :class:`~vision_gates.gates.global_local_filter.GlobalLocalFilter`.

    Raises:
        ValueError: ``dim`` is no multiple of 2^(order-1), ``order`` is less than 1, the kernel is even, or another
            ``combine`` or ``spatial_dims``; at run time an input of another number of axes.
    """

    gate_kind = "gated convolution"
    gate_unit = "order"
    gate_meaning = "1 is where this order's factor is largest, 0 where it blocks"
    gate_relative = True

    def __init__(
        self,
        dim: int,
        *,
        order: int = 5,
        kernel_size: int = 7,
        scale: float = 1 / 3,
        combine: str = "mul",
        spatial_dims: int = 2,
        spatial_filter: Callable[[int], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if order < 1:
            raise ValueError(f"order must be at least 1, got {order}")
        if dim < 1 or dim % 2 ** (order - 1):
            raise ValueError(f"dim must be a multiple of 2^(order-1) = {2 ** (order - 1)} for order {order}, got {dim}")
        if combine not in _COMBINE:
            raise ValueError(f"combine must be 'mul' or 'add', got {combine!r}")
        if spatial_dims not in (2, 3):
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims}")
        self.widths = [dim // 2 ** (order - 1 - i) for i in range(order)]
        self.scale = scale
        self.combine = combine
        self.spatial_dims = spatial_dims
        filtered = sum(self.widths)
        self.proj_in = nn.Linear(dim, self.widths[0] + filtered)
        self.spatial_filter: nn.Module
        if spatial_filter is not None:
            self.spatial_filter = spatial_filter(filtered)
        else:
            self.spatial_filter = (DepthwiseConv2d if spatial_dims == 2 else DepthwiseConv3d)(filtered, kernel_size)
        self.widen = nn.ModuleList(nn.Linear(self.widths[i], self.widths[i + 1]) for i in range(order - 1))
        self.proj_out = nn.Linear(dim, dim)

    def forward(self, x_BSC: Tensor, layer_scale_C: Tensor | None = None) -> Tensor:
        """Map (B, H, W, C), in 3-D (B, D, H, W, C), to the same shape, times ``layer_scale_C`` (C,) if given."""
        if x_BSC.ndim != self.spatial_dims + 2:
            axes = "(B, H, W, C)" if self.spatial_dims == 2 else "(B, D, H, W, C)"
            raise ValueError(f"input must have the axes {axes}, got the shape {tuple(x_BSC.shape)}")
        projected = self.proj_in(x_BSC)
        on_kernel = projected.is_cuda and self.combine == "mul" and isinstance(self.spatial_filter, DepthwiseConv2d)
        y = self._gate_by_kernel(projected) if on_kernel and not is_exporting() else self._gate(projected)
        return scaled_linear(y, self.proj_out, layer_scale_C)

    def _gate(self, projected: Tensor) -> Tensor:
        combine = _COMBINE[self.combine]
        y, q = projected.split((self.widths[0], sum(self.widths)), dim=-1)
        filtered = self.spatial_filter(q)
        if self.scale != 1.0:
            filtered = filtered * self.scale
        first, *others = filtered.split(self.widths, dim=-1)
        y = combine(y, first)
        for widen, gate in zip(self.widen, others, strict=True):
            y = combine(widen(y), gate)
        return y

    def _gate_by_kernel(self, projected: Tensor) -> Tensor:
        """The same with each convolution and its product in one pass: no d_i is ever stored."""
        conv = cast(DepthwiseConv2d, self.spatial_filter)
        assert conv.bias is not None
        matrices, offsets = [layer.weight for layer in self.widen], [layer.bias for layer in self.widen]
        return recursive_gating(projected, conv.weight, conv.bias, matrices, offsets, scale=self.scale)

    def gate_map(self, x_BSC: Tensor, layer_scale_C: Tensor | None = None) -> Tensor:
        """Return the strength of each d_i: its mean absolute value over channels, relative to the map's maximum.

        The gate of this convolution is a factor of any sign and size, so that only its relative strength is a map:
        (B, order, *S) in [0, 1]; a map of zeros stays so. With ``combine="add"`` it is the strength of what is added.
        """
        _, q = self.proj_in(x_BSC).split((self.widths[0], sum(self.widths)), dim=-1)
        parts = self.spatial_filter(q).split(self.widths, dim=-1)  # their common scale would cancel
        strength_BnS = torch.stack([d_BSC.abs().mean(dim=-1) for d_BSC in parts], dim=1)
        strength_BnS = strength_BnS.to(torch.promote_types(strength_BnS.dtype, torch.float32))
        largest = strength_BnS.amax(dim=tuple(range(2, strength_BnS.ndim)), keepdim=True)
        return strength_BnS / largest.clamp_min(torch.finfo(largest.dtype).tiny)
