"""Gated-attention vision networks. Importing this package registers its models with timm as ``vg_*``."""

from vision_gates import models as models

__version__ = "0.1.0"
