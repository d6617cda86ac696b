"""Model families, one file each; importing this package registers them with timm."""

from vision_gates.models.vig import HierarchicalViG, ViG

__all__ = ["HierarchicalViG", "ViG"]
