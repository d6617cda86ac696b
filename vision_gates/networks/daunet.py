"""DAUNet: a U-Net with a multi-scale input and dual attention at its centre, which guides the decoder, in 2-D or 3-D.

Paper: arXiv 2101.07715; see :mod:`vision_gates.models.agunet`.
"""

from typing import Any

from vision_gates.models import DAUNet

__all__ = ["build"]


def build(*, in_channels: int, num_classes: int, spatial_dims: int = 2, **options: Any) -> DAUNet:
    """Build :class:`DAUNet`, whose further arguments are ``options``; for volumes with ``spatial_dims=3``."""
    return DAUNet(in_channels=in_channels, num_classes=num_classes, spatial_dims=spatial_dims, **options)
