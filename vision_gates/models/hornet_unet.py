"""HorNet U-Net: HorNet's blocks of recursive gated convolutions as the encoder of a U-Net, in 2-D and 3-D.

Paper of the blocks: HorNet: Efficient High-Order Spatial Interactions with Recursive Gated Convolutions,
arXiv 2207.14284. The U-Net around them is ours: HorNet starts at a quarter of the image's size, too coarse for the
borders that a segmentation is measured by.
Suffixes: B batch, C channels, S the two or three spatial axes.
"""

import math
from collections.abc import Callable, Sequence
from itertools import islice

from torch import Tensor, nn

from vision_gates.gates.attention_gate import Norm, conv_layer, init_conv_and_norm
from vision_gates.gates.padding import pad_to_multiple
from vision_gates.kernels.upsample_concat import upsample_concat
from vision_gates.models._layered import drop_path_rates
from vision_gates.models._unet import DeepSupervision, UNet, double_conv
from vision_gates.models.hornet import HorNetBlock

__all__ = ["HorNetUNet"]

_EPS = 1e-6
_LAYER_SCALE = 0.1  # CaiT's (arXiv 2103.17239) for networks of up to 18 layers; HorNet's 1e-6 is for deeper ones


class HorNetUNet(UNet):
    """Logits at input size from a U-Net whose encoder mixes positions by recursive gated convolutions (gnConv).

    Levels count from 1, the finest, at the image's size, to ``len(widths)``, the centre. In the encoder, a 3x3
    convolution makes the channels of level 1; each level is a row of HorNet's blocks, x + gamma gnConv(norm(x)) and
    x + gamma MLP(norm(x)), and a normalisation over channels, whose result is the skip connection; a convolution whose
    kernel is its stride leads to the next level. In the decoder, the coarser level is interpolated linearly,
    concatenated behind the skip connection, and goes through two 3x3 convolutions, each with normalisation and ReLU.

    The defaults have 13,887,112 parameters in 3-D (7,777,896 in 2-D).

    Any input size works: inputs are padded at the far ends (edge values repeated) to a multiple of ``divisors``, the
    products of an axis' strides, and the logits are cropped back. Only an image of a single position is refused with
    "instance", which has no second value there.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        num_classes: channels of the logits.
        widths: channels of each level, finest first; two or more, multiples of 2^(order-1).
        depths: HorNet blocks of each level, or of all. None: one at the finest, whose maps are the largest by far, and
            two at the others.
        orders: orders of the levels' gated convolutions. None: 2, 3, 4, 5, as HorNet's stages, then 5.
        kernel_size: of the gated convolutions, odd. None: 7 in 2-D, as in HorNet, but 5 in 3-D, where a kernel of 7
            takes 343 products a voxel and channel, more than all other layers of a block with 32 channels together.
        strides: from each level to the next: a number, or one an axis, such as ``(1, 2, 2)`` while the slices of a
            volume lie further apart than its pixels. None: 2 everywhere.
        norm: of the decoder: "batch", "instance" or "group".
        deep_supervision: "none" classifies the finest decoder level. "separate" classifies every one: in training mode
            forward returns the list of all levels' logits at input size, finest first, each for a loss of its own; in
            eval mode the finest level's tensor alone. "fused" mixes them with a 1x1 convolution.
        drop_path_rate: stochastic depth of the encoder's last block, growing linearly from 0.

    Raises:
        ValueError: an argument outside these; at run time an input of another rank or of other channels.
    """

    def __init__(
        self,
        *,
        spatial_dims: int = 3,
        in_channels: int = 1,
        num_classes: int = 2,
        widths: Sequence[int] = (32, 64, 128, 256, 320),
        depths: int | Sequence[int] | None = None,
        orders: Sequence[int] | None = None,
        kernel_size: int | None = None,
        strides: Sequence[int | Sequence[int]] | None = None,
        norm: Norm = "instance",
        deep_supervision: DeepSupervision = "separate",
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            num_classes=num_classes,
            widths=widths,
            norm=norm,
            deep_supervision=deep_supervision,
        )
        levels = len(widths)
        if depths is None:
            depths = (1, *(2,) * (levels - 1))
        depths = (depths,) * levels if isinstance(depths, int) else tuple(depths)
        orders = tuple(min(level + 2, 5) for level in range(levels)) if orders is None else tuple(orders)
        for name, values in (("depths", depths), ("orders", orders)):
            if len(values) != levels or min(values) < 1:
                raise ValueError(f"{name} must be one positive number for each of {levels} levels, got {list(values)}")
        steps = _steps(strides, levels=levels, spatial_dims=spatial_dims)
        if kernel_size is None:
            kernel_size = 7 if spatial_dims == 2 else 5
        self.divisors = tuple(math.prod(step[axis] for step in steps) for axis in range(spatial_dims))
        self.divisor = 1  # the base class checks the input; how it is padded depends on the axis, see padded()

        rates = iter(drop_path_rates(drop_path_rate, sum(depths)))
        self.stem = conv_layer(in_channels, widths[0], spatial_dims=spatial_dims, kernel_size=3)
        self.encoder, self.down, self.decoder = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        conv: Callable[..., nn.Module] = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        for level, (width, depth, order) in enumerate(zip(widths, depths, orders, strict=True), start=1):
            blocks = (
                _block(width, order=order, kernel_size=kernel_size, spatial_dims=spatial_dims, drop_path=rate)
                for rate in islice(rates, depth)
            )
            self.encoder[str(level)] = nn.Sequential(*blocks, nn.LayerNorm(width, eps=_EPS))
            if level < levels:
                step, coarser = steps[level - 1], widths[level]
                self.down[str(level)] = conv(width, coarser, kernel_size=step, stride=step)
                self.decoder[str(level)] = double_conv(width + coarser, width, spatial_dims=spatial_dims, norm=norm)
        self.make_heads()
        for part in (self.stem, self.down, self.decoder, self.heads, self.fuse):
            if part is not None:
                init_conv_and_norm(part)

    def forward_features(self, x_BCS: Tensor) -> list[Tensor]:
        """Map images (B, in_channels, *size) to the decoder's outputs, finest first, at the levels' padded sizes."""
        x_BCS = self.stem(self.padded(x_BCS))
        skips: dict[str, Tensor] = {}
        for level, blocks in self.encoder.items():
            x_BCS = self.run(blocks, x_BCS.movedim(1, -1)).movedim(-1, 1)
            if level in self.down:
                skips[level] = x_BCS
                x_BCS = self.down[level](x_BCS)
        decoded: list[Tensor] = []
        for level, skip_BCS in reversed(skips.items()):
            x_BCS = self.run(self.decoder[level], upsample_concat(skip_BCS, x_BCS.to(skip_BCS.dtype)))
            decoded.insert(0, x_BCS)
        return decoded

    def padded(self, x_BCS: Tensor) -> Tensor:
        """Check the input and pad each axis to a multiple of its divisor."""
        return pad_to_multiple(super().padded(x_BCS), self.divisors)


def _block(dim: int, *, order: int, kernel_size: int, spatial_dims: int, drop_path: float) -> HorNetBlock:
    """HorNet's block on channels-last maps, (B, H, W, C) or (B, D, H, W, C)."""
    return HorNetBlock(
        dim,
        order=order,
        kernel_size=kernel_size,
        spatial_dims=spatial_dims,
        layer_scale=_LAYER_SCALE,
        drop_path=drop_path,
    )


def _steps(strides: Sequence[int | Sequence[int]] | None, *, levels: int, spatial_dims: int) -> list[tuple[int, ...]]:
    """The stride along each axis from each level to the next."""
    given = (2,) * (levels - 1) if strides is None else tuple(strides)
    steps = [(step,) * spatial_dims if isinstance(step, int) else tuple(step) for step in given]
    if len(steps) != levels - 1 or any(len(s) != spatial_dims or min(s) < 1 or max(s) < 2 for s in steps):
        raise ValueError(
            f"strides must be {levels - 1}, one from each of {levels} levels to the next: a number of at least 2, or "
            f"{spatial_dims} numbers of at least 1 that are not all 1; got {list(given)}"
        )
    return steps
