"""AGUNet: a U-Net with a multi-scale input and an attention gate on every skip connection, in 2-D or 3-D.

Paper: arXiv 2101.07715; see :mod:`vision_gates.models.agunet`.
"""

from typing import Any

from vision_gates.models import AGUNet

__all__ = ["build"]


def build(*, in_channels: int, num_classes: int, spatial_dims: int = 2, **options: Any) -> AGUNet:
    """Build :class:`AGUNet`, whose further arguments are ``options``; for volumes with ``spatial_dims=3``."""
    return AGUNet(in_channels=in_channels, num_classes=num_classes, spatial_dims=spatial_dims, **options)
