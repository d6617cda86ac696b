"""Model families, one file each; importing this package registers them with timm."""

from vision_gates.models.agunet import AGUNet, DAUNet
from vision_gates.models.attention_unet import AttentionUNet
from vision_gates.models.convit import ConViT
from vision_gates.models.hornet import HorNet
from vision_gates.models.hornet_unet import HorNetUNet
from vision_gates.models.vig import HierarchicalViG, ViG

__all__ = ["AGUNet", "AttentionUNet", "ConViT", "DAUNet", "HierarchicalViG", "HorNet", "HorNetUNet", "ViG"]
