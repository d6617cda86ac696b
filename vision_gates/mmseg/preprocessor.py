"""Normalisation of images with any number of channels."""

from collections.abc import Sequence
from typing import Any

import torch
from mmseg.models.data_preprocessor import SegDataPreProcessor
from mmseg.registry import MODELS

from vision_gates.errors import ConfigError

__all__ = ["MultiChannelPreProcessor"]


@MODELS.register_module()
class MultiChannelPreProcessor(SegDataPreProcessor):
    """mmseg's preprocessor for images of 1, 2, 4 ... channels; its own knows one or three.

    Args:
        mean, std: one number a channel, in the units of the image, which ``LoadSampleImage`` brings to 0..1; None: not
            normalised.
        kwargs: of ``SegDataPreProcessor``: ``size``, ``size_divisor``, ``pad_val``, ``seg_pad_val``, ``test_cfg`` ...

    Raises:
        ConfigError: unequal numbers of means and deviations, or a deviation that is not positive.
    """

    def __init__(
        self, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(mean=None, std=None, **kwargs)
        if mean is None and std is None:
            return
        if mean is None or std is None or len(mean) != len(std) or min(std) <= 0:
            raise ConfigError(
                f"data_preprocessor: one mean and one std above 0 a channel are needed, got {mean}, {std}"
            )
        self._enable_normalize = True
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1), persistent=False)
