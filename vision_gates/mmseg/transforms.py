"""Loading that keeps precision and channels: 16-bit, float and multi-channel images, slices of volumes.

mmseg's own loading makes 8-bit images of three channels of everything.
"""

from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmseg.registry import TRANSFORMS
from numpy.typing import NDArray

from vision_gates.errors import DataError

__all__ = ["LoadMedicalImage", "LoadMedicalLabels", "LoadSampleImage", "LoadSampleLabels"]


class _LoadImage(BaseTransform):
    """Put an image under mmseg's keys.

    Args:
        unit_range: make float32 of it: 8-bit / 255, 16-bit / 65535, floats as they are. False keeps the type.
    """

    def __init__(self, *, unit_range: bool = True) -> None:
        self.unit_range = unit_range

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add ``img`` (H, W, C), ``img_shape`` and ``ori_shape``."""
        image = self._read(results)
        if self.unit_range:
            from vision_gates.datasets.images import to_float

            image = to_float(image)
        results["img"] = image
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results

    def _read(self, results: dict[str, Any]) -> NDArray[Any]:
        raise NotImplementedError


@TRANSFORMS.register_module()
class LoadSampleImage(_LoadImage):
    """The image of a sample of ``VisionGatesDataset``."""

    def _read(self, results: dict[str, Any]) -> NDArray[Any]:
        return results["sample"].image


@TRANSFORMS.register_module()
class LoadSampleLabels(BaseTransform):
    """The labels of a sample of ``VisionGatesDataset``; as in mmseg, after ``Resize`` where that is for the test."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add ``gt_seg_map``, (H, W) uint8."""
        labels = results["sample"].target
        ignored = results["source_ignore_index"]
        if ignored is not None:
            labels = np.where(labels == ignored, results["ignore_index"], labels)
        return _with_labels(results, labels)


@TRANSFORMS.register_module()
class LoadMedicalImage(_LoadImage):
    """``img_path`` as it is on the disk: PNG, JPEG, TIFF, BMP, WebP of any depth and number of channels, in RGB order.

    For mmseg's own data sets, instead of ``LoadImageFromFile``.

    Raises:
        DataError: a file that is missing, damaged or truncated, or holds NaN.
    """

    def _read(self, results: dict[str, Any]) -> NDArray[Any]:
        from vision_gates.datasets.images import read_image

        return read_image(Path(results["img_path"]))


@TRANSFORMS.register_module()
class LoadMedicalLabels(BaseTransform):
    """``seg_map_path`` from PNG, TIFF, BMP or ``.npy``; for mmseg's own data sets, instead of ``LoadAnnotations``.

    ``metainfo.classes`` and ``reduce_zero_label`` of the data set act as usual.

    Args:
        threshold: values above it are class 1 and all others class 0, for masks that JPEG has blurred.

    Raises:
        DataError: a file that cannot be read, or labels above 255 or below 0.
    """

    def __init__(self, *, threshold: int | None = None) -> None:
        self.threshold = threshold

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Add ``gt_seg_map``, (H, W) uint8."""
        from vision_gates.datasets.images import read_mask

        path = Path(results["seg_map_path"])
        labels = read_mask(path, threshold=self.threshold)
        if labels.size and (labels.min() < 0 or labels.max() > 255):
            raise DataError(f"{path}: label values {labels.min()} to {labels.max()}; mmseg knows 0 to 255")
        if results.get("reduce_zero_label"):
            labels = np.where((labels == 0) | (labels == 255), 255, labels - 1)
        mapping = results.get("label_map")
        if mapping:
            table = np.arange(256)
            table[list(mapping)] = list(mapping.values())
            labels = table[labels]
        return _with_labels(results, labels)


def _with_labels(results: dict[str, Any], labels: NDArray[Any]) -> dict[str, Any]:
    results["gt_seg_map"] = labels.astype(np.uint8)
    results.setdefault("seg_fields", []).append("gt_seg_map")
    return results
