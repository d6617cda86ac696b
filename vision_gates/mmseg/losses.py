"""vision_gates' segmentation losses as a loss of mmsegmentation."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from vision_gates.errors import ConfigError
from vision_gates.losses import SegmentationLoss
from vision_gates.region_losses import RegionTversky, SoftDice, Tversky

__all__ = ["OverlapCrossEntropyLoss"]


@MODELS.register_module()
class OverlapCrossEntropyLoss(nn.Module):
    """``overlap_weight * overlap + (1 - overlap_weight) * cross-entropy``; see ``vision_gates.losses``.

    Deterministic on CPU and GPU. The head's ``ignore_index`` applies.

    Args:
        num_classes: of the head.
        overlap: "dice", "tversky" or "region_tversky".
        overlap_weight: from 0 (cross-entropy only) to 1 (overlap only).
        focal_gamma: exponent of a focal cross-entropy; 0: plain.
        class_weight: one number a class, of the cross-entropy.
        overlap_options: arguments of the overlap: ``alpha``, ``beta`` of "tversky", ``grid`` of "region_tversky".
        loss_weight: factor on the whole.
        loss_name: under which mmseg logs it; what does not begin with ``loss_`` is not trained on.

    Raises:
        ConfigError: an unknown overlap, or arguments out of range.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        overlap: Literal["dice", "tversky", "region_tversky"] = "dice",
        overlap_weight: float = 0.5,
        focal_gamma: float = 0.0,
        class_weight: Sequence[float] | None = None,
        overlap_options: dict[str, Any] | None = None,
        loss_weight: float = 1.0,
        loss_name: str = "loss_overlap_ce",
    ) -> None:
        super().__init__()
        overlaps: dict[str, type[nn.Module]] = {
            "dice": SoftDice,
            "tversky": Tversky,
            "region_tversky": RegionTversky,
        }
        if overlap not in overlaps:
            raise ConfigError(f"OverlapCrossEntropyLoss.overlap={overlap!r}: one of {', '.join(overlaps)} is needed")
        try:
            self.loss = SegmentationLoss(
                num_classes=num_classes,
                dice_weight=overlap_weight,
                class_weights=None if class_weight is None else torch.tensor(class_weight),
                overlap=overlaps[overlap](**(overlap_options or {})),
                focal_gamma=focal_gamma,
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"OverlapCrossEntropyLoss: {error}") from error
        self.loss_weight, self.loss_name = loss_weight, loss_name

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        ignore_index: int | None = 255,
        **kwargs: Any,
    ) -> Tensor:
        """Loss of logits (B, C, H, W) and labels (B, H, W), a scalar.

        Raises:
            ConfigError: weights of pixels, which a head's ``sampler`` makes.
        """
        if weight is not None:
            raise ConfigError("OverlapCrossEntropyLoss: pixels have no weights in a loss of regions; remove sampler")
        self.loss.ignore_index = ignore_index
        return self.loss_weight * self.loss(cls_score, label)
