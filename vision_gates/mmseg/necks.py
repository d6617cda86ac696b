"""HorFPN as a neck of mmsegmentation: a feature pyramid whose output convolutions are recursive gated convolutions."""

from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmseg.registry import MODELS
from torch import Tensor

from vision_gates.decoders.fpn import FPNDecoder
from vision_gates.errors import ConfigError

__all__ = ["GnConvFPN"]


@MODELS.register_module()
class GnConvFPN(BaseModule):
    """Laterals to one width, added top down, one gnConv a level (HorNet, arXiv 2207.14284, section 3.3).

    It is the pyramid of ``vision_gates.decoders.fpn``, whose parameters have the same names.

    Args:
        in_channels: channels of each level, finest first.
        out_channels: of every level that comes out, a multiple of 2^(order-1).
        order: of the gnConvs.
        kernel_size: of their depthwise convolutions.

    Raises:
        ConfigError: numbers that do not fit together.
    """

    def __init__(
        self, in_channels: Sequence[int], *, out_channels: int = 256, order: int = 2, kernel_size: int = 7
    ) -> None:
        super().__init__()
        try:
            pyramid = FPNDecoder(
                encoder_channels=in_channels,
                encoder_reductions=range(len(in_channels)),
                in_chans=3,
                num_classes=1,
                channels=out_channels,
                gnconv="levels",
                order=order,
                kernel_size=kernel_size,
            )
        except ValueError as error:
            raise ConfigError(f"GnConvFPN: {error}") from error
        self.laterals, self.outputs = pyramid.laterals, pyramid.outputs

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Map levels (B, in_channels[i], H_i, W_i) to (B, out_channels, H_i, W_i)."""
        levels = [lateral(level) for lateral, level in zip(self.laterals, inputs, strict=True)]
        for i in reversed(range(len(levels) - 1)):
            size = levels[i].shape[-2:]
            levels[i] = levels[i] + F.interpolate(levels[i + 1], size=size, mode="bilinear", align_corners=False)
        return tuple(output(level) for output, level in zip(self.outputs, levels, strict=True))
