"""Training losses: Dice with cross-entropy for segmentation, cross-entropy on hard or mixed labels for classification.

All compute in float32 (segmentation: float64 logits in float64), under autocast too, return a scalar, and are
deterministic on CPU and GPU (no scatter-add and no ``nll_loss2d`` in the backward pass), which exact resume needs. What
may take the place of Dice is in ``vision_gates.region_losses``.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_gates.region_losses import SoftDice

__all__ = ["ClassificationLoss", "DeepSupervisionLoss", "SegmentationLoss"]


def _weight_tensor(class_weights: Tensor | None, num_classes: int | None) -> Tensor | None:
    """Check class weights and copy them as float32, so that a later change of the argument cannot reach the loss."""
    if class_weights is None:
        return None
    weights = torch.as_tensor(class_weights, dtype=torch.float32).detach().clone()
    if weights.ndim != 1 or (num_classes is not None and len(weights) != num_classes):
        raise ValueError(f"class_weights: one number per class ({num_classes}) is needed, got {tuple(weights.shape)}")
    if not bool(torch.isfinite(weights).all()) or bool((weights < 0).any()) or not bool(weights.any()):
        raise ValueError(f"class_weights: finite numbers >= 0, not all zero, are needed; got {weights.tolist()}")
    return weights


class SegmentationLoss(nn.Module):
    """``dice_weight * overlap + (1 - dice_weight) * cross-entropy``, for any number of spatial dimensions.

    The cross-entropy is focal where ``focal_gamma`` is above 0: each pixel's term has the factor ``(1 - p)^gamma``, p
    the probability of its true class, so that pixels that are right already count for less. Its mean is weighted by the
    class weights alone. (Lin et al., arXiv 1708.02002, whose sum is divided by the number of objects instead.)

    Args:
        num_classes: Number of classes C, background included, at least 2.
        dice_weight: Share of the overlap term, from 0 (cross-entropy only) to 1 (overlap only).
        class_weights: (C,) weights of the cross-entropy term; its mean is weighted as in ``F.cross_entropy``.
        ignore_index: Label whose pixels take no part in either term; it may lie outside 0..C-1.
        overlap: One of ``vision_gates.region_losses``; None: :class:`~vision_gates.region_losses.SoftDice`.
        focal_gamma: Exponent of the focal cross-entropy; 0: plain.

    Raises:
        ValueError: Arguments out of range.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        num_classes: int,
        dice_weight: float = 0.5,
        class_weights: Tensor | None = None,
        ignore_index: int | None = None,
        overlap: nn.Module | None = None,
        focal_gamma: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes: at least 2 (background and one more) are needed, got {num_classes}")
        if not 0.0 <= dice_weight <= 1.0:
            raise ValueError(f"dice_weight: a number from 0 to 1 is needed, got {dice_weight}")
        if not 0.0 <= focal_gamma < math.inf:
            raise ValueError(f"focal_gamma: a finite number >= 0 is needed, got {focal_gamma}")
        self.num_classes = num_classes
        self.dice_weight = dice_weight
        self.ignore_index = ignore_index
        self.overlap = SoftDice() if overlap is None else overlap
        self.focal_gamma = focal_gamma
        self.register_buffer("class_weights", _weight_tensor(class_weights, num_classes), persistent=False)

    def forward(self, logits_BCS: Tensor, target_BS: Tensor) -> Tensor:
        """Loss of a batch.

        Args:
            logits_BCS: (B, C, *spatial) of any floating dtype, e.g. (B, C, H, W) or (B, C, D, H, W).
            target_BS: (B, *spatial) integer labels in 0..C-1, or ``ignore_index``.

        Returns:
            Scalar float32 (of float64 logits: float64) tensor. With every pixel ignored it is 0, its gradient too.

        Raises:
            ValueError: Shapes that do not fit, or (on the CPU) a label that is no class. On a GPU such a label fails
                as a device-side assertion, because reading it back would stall every step.
        """
        expected = (logits_BCS.shape[0], *logits_BCS.shape[2:])
        if logits_BCS.ndim < 3 or logits_BCS.shape[1] != self.num_classes or tuple(target_BS.shape) != expected:
            raise ValueError(
                f"logits (B, {self.num_classes}, *spatial) with target (B, *spatial) are needed, "
                f"got {tuple(logits_BCS.shape)} with {tuple(target_BS.shape)}"
            )
        target_BS = target_BS.long()
        if self.ignore_index is None:
            valid_BS = torch.ones_like(target_BS, dtype=torch.bool)
        else:
            valid_BS = target_BS != self.ignore_index
            target_BS = torch.where(valid_BS, target_BS, 0)
        if target_BS.device.type == "cpu" and target_BS.numel():
            low, high = (int(v) for v in target_BS.aminmax())
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"label {low if low < 0 else high} is not in 0..{self.num_classes - 1}")

        log_p_BCS = logits_BCS.to(torch.promote_types(logits_BCS.dtype, torch.float32)).log_softmax(dim=1)
        # scatter_, unlike a comparison with arange, stops at a label out of range instead of dropping its pixel.
        one_hot_BCS = torch.zeros_like(log_p_BCS, requires_grad=False).scatter_(1, target_BS.unsqueeze(1), 1.0)
        one_hot_BCS = one_hot_BCS * valid_BS.unsqueeze(1)
        loss = log_p_BCS.new_zeros(())
        if self.dice_weight < 1.0:
            weighted = one_hot_BCS
            if self.class_weights is not None:
                shape = (1, self.num_classes) + (1,) * (logits_BCS.ndim - 2)
                weighted = one_hot_BCS * self.class_weights.view(shape)
            terms_BCS = weighted * log_p_BCS
            if self.focal_gamma > 0.0:
                # 1 - p to full precision near p = 1; the floor keeps the power's gradient finite there.
                wrong_BS = -(one_hot_BCS * log_p_BCS).sum(dim=1, keepdim=True).expm1()
                terms_BCS = terms_BCS * wrong_BS.clamp_min(torch.finfo(torch.float32).tiny) ** self.focal_gamma
            # The tiny floor only matters when no pixel counts: then 0 / tiny = 0.
            cross_entropy = -terms_BCS.sum() / weighted.sum().clamp_min(torch.finfo(torch.float32).tiny)
            loss = loss + (1.0 - self.dice_weight) * cross_entropy
        if self.dice_weight > 0.0:
            p_BCS = log_p_BCS.exp() * valid_BS.unsqueeze(1)
            loss = loss + self.dice_weight * self.overlap(p_BCS, one_hot_BCS)
        return loss


class DeepSupervisionLoss(nn.Module):
    """Weighted mean of one loss over the outputs of a network that gives several logits in training, finest first.

    Args:
        loss: (logits, target) to a scalar.
        weights: One number an output, of which only the ratios count; None: 1, 1/2, 1/4, ... as in nnU-Net
            (arXiv 1904.08128).

    Raises:
        ValueError: Weights that are not finite numbers >= 0, or all zero.
    """

    def __init__(self, loss: nn.Module, *, weights: Sequence[float] | None = None) -> None:
        super().__init__()
        if weights is not None and (not all(0 <= w < math.inf for w in weights) or not any(weights)):
            raise ValueError(f"weights: finite numbers >= 0, not all zero, are needed; got {list(weights)}")
        self.loss = loss
        self.weights = None if weights is None else tuple(weights)

    def forward(self, logits: Tensor | Sequence[Tensor], target: Tensor) -> Tensor:
        """Loss of a batch: of a tensor that of ``loss``, as in evaluation; of a sequence of tensors the weighted mean.

        Raises:
            ValueError: An empty sequence, or another number of outputs than of weights.
        """
        if isinstance(logits, Tensor):
            return self.loss(logits, target)
        weights = self.weights or tuple(0.5**level for level in range(len(logits)))
        if not logits or len(weights) != len(logits):
            raise ValueError(
                f"{len(logits)} outputs for {len(weights)} weights of deep supervision; one each is needed"
            )
        terms = [w * self.loss(output, target) for w, output in zip(weights, logits, strict=True)]
        return torch.stack(terms).sum() / sum(weights)


class ClassificationLoss(nn.Module):
    """Cross-entropy with label smoothing and class weights, for class indices and for mixed (soft) labels alike.

    Args:
        label_smoothing: Share of the label mass spread over all classes, in [0, 1).
        class_weights: (C,) weights. The mean is weighted by them for soft labels too (``F.cross_entropy`` divides by
            the batch size there), so one-hot labels give exactly the loss of the class indices.

    Raises:
        ValueError: Arguments out of range.
    """

    class_weights: Tensor | None

    def __init__(self, *, label_smoothing: float = 0.0, class_weights: Tensor | None = None) -> None:
        super().__init__()
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(
                f"label_smoothing: a number from 0 up to, not including, 1 is needed; got {label_smoothing}"
            )
        self.label_smoothing = label_smoothing
        self.register_buffer("class_weights", _weight_tensor(class_weights, None), persistent=False)

    def forward(self, logits_BC: Tensor, target: Tensor) -> Tensor:
        """Mean loss of a batch.

        Args:
            logits_BC: (B, C) of any floating dtype.
            target: (B,) class indices, or (B, C) label probabilities as mixup and cutmix make them.

        Returns:
            Scalar float32 tensor.

        Raises:
            ValueError: Shapes that do not fit.
        """
        logits_BC = logits_BC.float()
        if target.shape == logits_BC.shape[:1] and not target.is_floating_point():
            return F.cross_entropy(
                logits_BC, target.long(), weight=self.class_weights, label_smoothing=self.label_smoothing
            )
        if target.shape != logits_BC.shape:
            raise ValueError(
                f"logits (B, C) with target (B,) or (B, C) are needed, "
                f"got {tuple(logits_BC.shape)} with {tuple(target.shape)}"
            )
        target = target.float()
        if self.class_weights is None:
            return F.cross_entropy(logits_BC, target, label_smoothing=self.label_smoothing)
        total = F.cross_entropy(
            logits_BC, target, weight=self.class_weights, label_smoothing=self.label_smoothing, reduction="sum"
        )
        return total / (target * self.class_weights).sum()
