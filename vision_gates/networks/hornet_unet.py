"""HorNet U-Net: an encoder of recursive gated convolutions under a convolutional decoder, in 2-D or 3-D.

Paper of the encoder's blocks: HorNet, arXiv 2207.14284; see :mod:`vision_gates.models.hornet_unet`.
"""

from typing import Any

from vision_gates.models import HorNetUNet

__all__ = ["build"]


def build(*, in_channels: int, num_classes: int, spatial_dims: int = 2, **options: Any) -> HorNetUNet:
    """Build :class:`HorNetUNet`, whose further arguments are ``options``; for volumes with ``spatial_dims=3``."""
    return HorNetUNet(in_channels=in_channels, num_classes=num_classes, spatial_dims=spatial_dims, **options)
