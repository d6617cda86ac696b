"""Feature pyramid network with recursive gated convolutions (HorFPN), on any encoder.

Papers: Feature Pyramid Networks, arXiv 1612.03144; HorNet, arXiv 2207.14284; written from the papers and
from facts of HorNet's released code (https://github.com/raoyongming/HorNet, MIT), nothing copied.
Suffixes: B batch, C channels, H W height and width.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from vision_gates.decoders._layers import check_levels, conv_norm_act, norm_act, resize
from vision_gates.gates import GnConv

__all__ = ["FPNDecoder"]


class FPNDecoder(nn.Module):
    """Laterals to one width, added top down; one output convolution a level; all levels at the finest size, fused.

    A gnConv, where it stands, has no scale (1.0) and is followed, like every convolution here, by group normalisation
    and GELU. In the fusion a 1x1 convolution first brings the levels to one width; HorNet's code joins it to gnConv's
    first projection.

    Args:
        encoder_channels: channels of each encoder level, finest first.
        encoder_reductions: stride of each level; levels may repeat a stride (plain ViG).
        in_chans: channels of the image, which this decoder does not use.
        num_classes: channels of the logits, which are interpolated from the finest encoder level.
        channels: width of the pyramid.
        gnconv: what is a gnConv instead of a 3x3 convolution: the outputs of the "levels" (HorFPN), the "fusion" (as in
            HorNet's UPerNet head), "both", or "none" (a plain FPN).
        order: of the gnConvs.
        kernel_size: of the gnConvs' depthwise convolutions.

    Raises:
        ValueError: no encoder level, levels that are not ordered from fine to coarse, ``channels`` below 4, another
            ``gnconv``, and, where there is a gnConv, an order below 1, ``channels`` that are no multiple of
            2^(order-1) or an even kernel.
    """

    def __init__(
        self,
        *,
        encoder_channels: Sequence[int],
        encoder_reductions: Sequence[int],
        in_chans: int,
        num_classes: int,
        channels: int = 64,
        gnconv: Literal["levels", "fusion", "both", "none"] = "levels",
        order: int = 2,
        kernel_size: int = 7,
    ) -> None:
        super().__init__()
        check_levels(encoder_reductions, fewest=1)
        if channels < 4:
            raise ValueError(f"channels must be at least 4, got {channels}")
        if gnconv not in ("levels", "fusion", "both", "none"):
            raise ValueError(f"gnconv must be 'levels', 'fusion', 'both' or 'none', got {gnconv!r}")
        if gnconv != "none" and order > 0 and channels % 2 ** (order - 1):
            raise ValueError(
                f"channels must be a multiple of 2^(order-1) = {2 ** (order - 1)} for order {order}, got {channels}"
            )

        def gnconv_norm_act() -> nn.Sequential:
            conv = _OnMaps(GnConv(channels, order=order, kernel_size=kernel_size, scale=1.0))
            return nn.Sequential(conv, *norm_act(channels))

        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, kernel_size=1) for c in encoder_channels)
        self.outputs = nn.ModuleList(
            gnconv_norm_act() if gnconv in ("levels", "both") else conv_norm_act(channels, channels)
            for _ in encoder_channels
        )
        joined = len(encoder_channels) * channels
        self.fusion = conv_norm_act(joined, channels)
        if gnconv in ("fusion", "both"):
            self.fusion = nn.Sequential(nn.Conv2d(joined, channels, kernel_size=1), *gnconv_norm_act())
        self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, features: list[Tensor], image: Tensor) -> Tensor:
        """Map features, finest first, and the image (B, in_chans, H, W) to logits (B, num_classes, H, W)."""
        levels = [lateral(feature) for lateral, feature in zip(self.laterals, features, strict=True)]
        for i in reversed(range(len(levels) - 1)):
            levels[i] = levels[i] + resize(levels[i + 1], levels[i])
        levels = [output(level) for output, level in zip(self.outputs, levels, strict=True)]
        x_BCHW = self.fusion(torch.cat([resize(level, levels[0]) for level in levels], dim=1))
        return resize(self.classifier(x_BCHW), image)


class _OnMaps(nn.Module):
    """A layer of (B, H, W, C) on (B, C, H, W). Around it rather than of its class: its gate map keeps its own axes."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.layer(x_BCHW.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


Decoder = FPNDecoder
