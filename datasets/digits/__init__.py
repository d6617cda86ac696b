"""Handwritten digits: 1,797 grey images of 8 x 8 pixels in 10 classes, for demos and tests of classification.

Source: ``sklearn.datasets.load_digits``, a copy of the test set of the UCI ML hand-written digits data set
(https://archive.ics.uci.edu/dataset/80), CC BY 4.0. It is part of scikit-learn: nothing is downloaded.

Split, always the same: 30 images of each class are the test set and 30 the validation set, which leaves 1,197 for
training. The images are 8 x 8 as read; the pipeline enlarges them to ``data.image_size``.
"""

from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vision_gates.datasets.base import DataSplits, ImageDataConfig, Sample, Split, split_by_hash
from vision_gates.errors import ConfigError

__all__ = ["Config", "load"]


class Config(ImageDataConfig):
    """No options beyond the shared ones."""

    type: Literal["digits"] = "digits"


class _Digits(Split):
    def __init__(self, images_NHW: NDArray[np.uint8], labels_N: NDArray[np.int64], indices: list[int]) -> None:
        self.names = [f"digit_{index:04d}" for index in indices]
        self._images_NHW, self._labels_N = images_NHW[indices], labels_N[indices]

    def read(self, index: int) -> Sample:
        """(8, 8, 1) uint8 in 0..255."""
        return Sample(self._images_NHW[index, :, :, None].copy(), int(self._labels_N[index]), self.names[index])

    def label(self, index: int) -> int:
        return int(self._labels_N[index])


@lru_cache(maxsize=1)
def _arrays() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError("data.type=digits needs scikit-learn: pip install 'vision-gates[train]'") from error
    digits: Any = load_digits()
    # The source counts 0..16 dark pixels in each 4 x 4 block; 8 bits hold that without loss.
    return np.round(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def load(config: Config) -> DataSplits:
    """The three splits; grey, so ``in_chans`` is 1."""
    images_NHW, labels_N = _arrays()
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for digit in range(10):
        members = np.flatnonzero(labels_N == digit).tolist()
        fraction = 30 / len(members)
        names = [str(index) for index in members]
        for part, chosen in zip(
            parts, split_by_hash(names, val_fraction=fraction, test_fraction=fraction, seed=0), strict=True
        ):
            parts[part].extend(members[i] for i in chosen)
    train, val, test = (_Digits(images_NHW, labels_N, sorted(part)) for part in parts.values())
    return DataSplits("classification", tuple(str(digit) for digit in range(10)), 1, train, val, test)
