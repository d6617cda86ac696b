"""A small feature-pyramid decoder that works on every encoder; the baseline that gated decoders are measured against.

Top-down fusion follows Feature Pyramid Networks, arXiv 1612.03144; two convolutional levels on the image itself bring
back the detail that encoders with a stride-4 or stride-16 stem drop.
Suffixes: B batch, C channels, H W height and width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vision_gates.decoders._layers import check_levels, conv_norm_act, resize

__all__ = ["PyramidDecoder"]


class PyramidDecoder(nn.Module):
    """Lateral 1x1 convolutions, top-down addition, then two fusions with convolutions of the image at 1/2 and 1/1.

    Args:
        encoder_channels: channels of each encoder level, finest first.
        encoder_reductions: stride of each level; levels may repeat a stride (plain ViG).
        in_chans: channels of the image.
        num_classes: channels of the logits.
        channels: width of the pyramid.
        detail_channels: width of the two image levels; 0 leaves them out and upsamples the logits instead.

    Raises:
        ValueError: no encoder level, levels that are not ordered from fine to coarse, or a width below 4.
    """

    def __init__(
        self,
        *,
        encoder_channels: Sequence[int],
        encoder_reductions: Sequence[int],
        in_chans: int,
        num_classes: int,
        channels: int = 64,
        detail_channels: int = 16,
    ) -> None:
        super().__init__()
        check_levels(encoder_reductions, fewest=1)
        if channels < 4 or 0 < detail_channels < 4 or detail_channels < 0:
            raise ValueError(
                f"channels must be at least 4 and detail_channels 0 or at least 4, got {channels} and {detail_channels}"
            )
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, kernel_size=1) for c in encoder_channels)
        self.fuse = nn.ModuleList(conv_norm_act(channels, channels) for _ in encoder_channels)
        self.details: nn.ModuleList | None = None
        if detail_channels:
            half, full = 2 * detail_channels, detail_channels
            self.details = nn.ModuleList([conv_norm_act(in_chans, half, stride=2), conv_norm_act(in_chans, full)])
            self.merge = nn.ModuleList([conv_norm_act(channels + half, half), conv_norm_act(half + full, full)])
        self.classifier = nn.Conv2d(detail_channels or channels, num_classes, kernel_size=1)

    def forward(self, features: list[Tensor], image: Tensor) -> Tensor:
        """Map features, finest first, and the image (B, in_chans, H, W) to logits (B, num_classes, H, W)."""
        x: Tensor | None = None
        for feature, lateral, fuse in zip(
            reversed(features), reversed(self.laterals), reversed(self.fuse), strict=True
        ):
            level = lateral(feature)
            x = fuse(level if x is None else level + resize(x, level))
        assert x is not None  # __init__ refuses an empty pyramid
        if self.details is not None:
            for detail, merge in zip(self.details, self.merge, strict=True):
                level = detail(image)
                x = merge(torch.cat([resize(x, level), level], dim=1))
        return resize(self.classifier(x), image)


Decoder = PyramidDecoder
