"""Volumes of ``vision_gates.datasets.volumes`` as slices, prepared and cached as for vision_gates' own training."""

from functools import lru_cache

import numpy as np

from vision_gates.datasets.base import Sample, Split, check_labels
from vision_gates.datasets.volumes import Config, VolumeSplits, load
from vision_gates.engine.volume_data import VolumeInfo, slice_with_neighbours
from vision_gates.engine.volume_preparation import plan_volumes, prepared_cases

__all__ = ["VolumeSlices", "load_and_plan"]


@lru_cache(maxsize=4)
def load_and_plan(config: Config) -> tuple[VolumeSplits, VolumeInfo]:
    """The cases of each split, and how they are looked at, which the training cases decide: once for all splits."""
    splits = load(config)
    return splits, plan_volumes(splits, config, seed=0)


class VolumeSlices(Split):
    """The slices of every case along its thickest axis, with neighbours as further channels.

    Args:
        cases: one split of volumes.
        config: its options.
        info: spacing, normalisation and axis.
        num_classes: labels are 0 to this number - 1, or the configuration's ``ignore_index``.

    Raises:
        DataError: a file that cannot be read, or a cache that cannot be written.
    """

    def __init__(self, cases: Split, config: Config, info: VolumeInfo, *, num_classes: int) -> None:
        self._cases, self._info = prepared_cases(cases, config, info), info
        self._labels = dict(num_classes=num_classes, ignore_index=config.ignore_index)
        self._places = [
            (number, index)
            for number, case in enumerate(self._cases)
            for index in range(case.facts["shape"][info.slice_axis])
        ]
        self.names = [f"{cases.names[number]}_{index:03d}" for number, index in self._places]

    def read(self, index: int) -> Sample:
        """(H, W, C * (2 * neighbours + 1)) float32, normalised; (H, W) int64 labels.

        Raises `LabelError` for a label that is no class.
        """
        number, place = self._places[index]
        case = self._cases[number]
        image_CHW, labels_HW = slice_with_neighbours(case.image, case.labels, place, self._info)
        image_HWC = np.ascontiguousarray(image_CHW.transpose(1, 2, 0), dtype=np.float32)
        labels_HW = labels_HW.astype(np.int64)
        check_labels(labels_HW, name=self.names[index], **self._labels)
        return Sample(image_HWC, labels_HW, self.names[index])
