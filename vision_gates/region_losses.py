"""Region losses of segmentation: how far probabilities and labels fail to overlap, over a batch or region by region.

Each is a module from probabilities and one-hot labels, (B, C, *spatial) and 0 where a pixel is ignored, to a scalar
from 0 to 1, in the dtype of its input. Deterministic on CPU and GPU: no adaptive pooling, whose backward pass is not.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["RegionTversky", "SoftDice", "Tversky"]


class SoftDice(nn.Module):
    """1 - soft Dice of each class, averaged.

    The soft Dice of a class is ``(2 sum(p y) + s) / (sum(p) + sum(y) + s)`` with the sums over all pixels of the batch
    and ``s = 1`` pixel; its mean runs over all classes, background included. A class that neither the batch nor the
    prediction holds scores about 1, so an absent class neither gives NaN nor dominates. (Milletari et al.,
    arXiv 1606.04797, with plain instead of squared sums; batch-wise as in nnU-Net, arXiv 1904.08128.)
    """

    def forward(self, p_BCS: Tensor, y_BCS: Tensor) -> Tensor:
        """Map probabilities and one-hot labels, (B, C, *spatial) each, to a scalar from 0 to 1."""
        dims = (0, *range(2, p_BCS.ndim))
        overlap_C = (p_BCS * y_BCS).sum(dims)
        size_C = p_BCS.sum(dims) + y_BCS.sum(dims)
        dice_C = (2.0 * overlap_C + 1.0) / (size_C + 1.0)
        return 1.0 - dice_C.mean()


class Tversky(nn.Module):
    """1 - Tversky index of each class, averaged.

    The index of a class is ``(TP + s) / (TP + alpha FP + beta FN + s)`` with soft counts over all pixels of the batch,
    ``TP = sum(p y)``, ``FP = sum(p (1 - y))``, ``FN = sum((1 - p) y)``, and ``s = 1/2`` pixel; its mean runs over all
    classes, background included. ``alpha = beta = 1/2`` is :class:`SoftDice`. (Salehi et al., arXiv 1706.05721, where
    alpha = 0.3, beta = 0.7 did best for lesions of multiple sclerosis.)

    Args:
        alpha: Weight of false positives.
        beta: Weight of false negatives; above alpha, recall counts for more than precision.

    Raises:
        ValueError: Weights that are not finite numbers >= 0, or both zero.
    """

    def __init__(self, *, alpha: float = 0.3, beta: float = 0.7) -> None:
        super().__init__()
        if not (0 <= alpha < math.inf and 0 <= beta < math.inf and alpha + beta > 0):
            raise ValueError(f"alpha, beta: finite numbers >= 0, not both zero, are needed; got {alpha}, {beta}")
        self.alpha = alpha
        self.beta = beta

    def forward(self, p_BCS: Tensor, y_BCS: Tensor) -> Tensor:
        """Map probabilities and one-hot labels, (B, C, *spatial) each, to a scalar from 0 to 1."""
        dims = (0, *range(2, p_BCS.ndim))
        hit_C = (p_BCS * y_BCS).sum(dims)
        extra_C, missed_C = p_BCS.sum(dims) - hit_C, y_BCS.sum(dims) - hit_C
        index_C = (hit_C + 0.5) / (hit_C + self.alpha * extra_C + self.beta * missed_C + 0.5)
        return 1.0 - index_C.mean()


class RegionTversky(nn.Module):
    """1 - mean Tversky index of the cells of a grid, each with the weights that its own errors ask for.

    The space is divided into cells. In each, TP, FP and FN are the soft counts of :class:`Tversky` averaged over the
    cell and summed over the batch, and with ``s = 1e-5``::

        alpha = 0.3 + 0.4 (FP + s) / (FP + FN + s)
        beta  = 0.3 + 0.4 (FN + s) / (FP + FN + s)
        index = (TP + s) / (TP + alpha FP + beta FN + s)

    Its mean runs over cells and over classes without the background. The gradient flows through alpha and beta, too.
    (Chen et al., Adaptive Region-Specific Loss for Improved Medical Image Segmentation, IEEE TPAMI 45(11), 2023; with
    the constants, and the background left out, as in MambaClinix, arXiv 2409.12533.) Where the cells do not divide an
    axis evenly they differ by one position here; adaptive pooling, usual elsewhere, lets them overlap.

    Args:
        grid: Cells along every axis, or one number an axis; an axis shorter than that has one cell a position.

    Raises:
        ValueError: Numbers below 1; at run time another number of axes.
    """

    def __init__(self, *, grid: int | Sequence[int] = 8) -> None:
        super().__init__()
        self.grid = grid if isinstance(grid, int) else tuple(grid)
        if not self.grid or min((self.grid,) if isinstance(self.grid, int) else self.grid) < 1:
            raise ValueError(f"grid: cells along an axis, at least 1, are needed; got {grid}")

    def forward(self, p_BCS: Tensor, y_BCS: Tensor) -> Tensor:
        """Map probabilities and one-hot labels, (B, C, *spatial) each, to a scalar from 0 to 1."""
        p_BCS, y_BCS = p_BCS[:, 1:], y_BCS[:, 1:]
        hit_CG, p_CG, y_CG = (self._cell_means(x_BCS.sum(dim=0)) for x_BCS in (p_BCS * y_BCS, p_BCS, y_BCS))
        extra_CG, missed_CG, smooth = p_CG - hit_CG, y_CG - hit_CG, 1e-5
        errors_CG = extra_CG + missed_CG + smooth
        alpha_CG = 0.3 + 0.4 * (extra_CG + smooth) / errors_CG
        beta_CG = 0.3 + 0.4 * (missed_CG + smooth) / errors_CG
        index_CG = (hit_CG + smooth) / (hit_CG + alpha_CG * extra_CG + beta_CG * missed_CG + smooth)
        return 1.0 - index_CG.mean()

    def _cell_means(self, x_CS: Tensor) -> Tensor:
        """Average (C, *spatial) over the cells: (C, *cells)."""
        axes = x_CS.ndim - 1
        grid = (self.grid,) * axes if isinstance(self.grid, int) else self.grid
        if len(grid) != axes:
            raise ValueError(f"grid: {len(grid)} numbers for {axes} spatial axes; give one each, or one for all")
        for axis, wanted in enumerate(grid, start=1):
            length = x_CS.shape[axis]
            cells = min(wanted, length)
            sizes = [length // cells + (i < length % cells) for i in range(cells)]
            x_CS = torch.stack([part.mean(axis) for part in x_CS.split(sizes, axis)], dim=axis)
        return x_CS
