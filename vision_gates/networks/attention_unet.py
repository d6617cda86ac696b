"""Attention U-Net: a U-Net with attention gates on its skip connections but the finest, in 2-D or 3-D.

Paper: arXiv 1804.03999; see :mod:`vision_gates.models.attention_unet`.
"""

from typing import Any

from vision_gates.models import AttentionUNet

__all__ = ["build"]


def build(*, in_channels: int, num_classes: int, spatial_dims: int = 2, **options: Any) -> AttentionUNet:
    """Build :class:`AttentionUNet`, whose further arguments are ``options``; for volumes with ``spatial_dims=3``."""
    return AttentionUNet(in_channels=in_channels, num_classes=num_classes, spatial_dims=spatial_dims, **options)
