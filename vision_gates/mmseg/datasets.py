"""Every segmentation data set of ``vision_gates.datasets`` as a data set of mmsegmentation."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from mmseg.datasets import BaseSegDataset
from mmseg.registry import DATASETS

from vision_gates.errors import ConfigError

__all__ = ["VisionGatesDataset"]

_SPLITS = ("train", "val", "test")
_KNOWN = {"ignore_index", "indices", "lazy_init", "max_refetch", "serialize_data", "test_mode"}
# What the engine of vision_gates does with a sample is the pipeline's and the data loader's part here.
_ELSEWHERE = dict(
    image_size="a Resize in the pipeline",
    normalize="mean and std of the data_preprocessor",
    batch_size="batch_size of the dataloader",
    workers="num_workers of the dataloader",
)


@DATASETS.register_module()
class VisionGatesDataset(BaseSegDataset):
    """One split of a data set of vision_gates; volumes are seen slice by slice, prepared as for our own training.

    The pipeline begins with ``LoadSampleImage``; ``LoadSampleLabels`` stands where mmseg has ``LoadAnnotations``::

        dict(
            type="VisionGatesDataset",
            data=dict(type="volumes", root="/data/Task04_Hippocampus", neighbours=1),
            split="train",
            pipeline=[dict(type="LoadSampleImage"), dict(type="LoadSampleLabels"), ..., dict(type="PackSegInputs")],
        )

    Classes come from the data set. Pixels of its ``ignore_index`` become mmseg's.

    Args:
        data: its ``type`` and options, those of the ``data`` section of our configurations.
        split: "train", "val" or "test"; where there is no test split, that of "val".
        labelled_only: leave out images and slices that hold background alone; reads every label once.
        pipeline: of mmseg.
        metainfo: ``palette``, for other colours.
        kwargs: of mmseg's ``BaseSegDataset``: ``ignore_index``, ``indices``, ``test_mode``, ``lazy_init``,
            ``serialize_data``, ``max_refetch``.

    Raises:
        ConfigError: an unknown data set, option or split; a data set for classification.
        DataError: data that are missing or cannot be used.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        *,
        split: str = "train",
        labelled_only: bool = False,
        pipeline: Sequence[Any] = (),
        metainfo: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        foreign = sorted(kwargs.keys() - _KNOWN)
        if foreign:
            raise ConfigError(f"VisionGatesDataset.{foreign[0]}: data=dict(type=..., root=...) says it; remove the key")
        if split not in _SPLITS:
            raise ConfigError(f"split={split!r}: one of {', '.join(_SPLITS)} is needed")
        self.config = _config(data)
        self.source, classes = _open(self.config, split)
        if len(classes) > 255:
            raise ConfigError(f"data: {len(classes)} classes; mmseg's labels are 8-bit, so that 255 are the most")
        self.labelled_only = labelled_only
        super().__init__(pipeline=list(pipeline), metainfo=dict(classes=classes) | dict(metainfo or {}), **kwargs)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Names and numbers of the samples; their pixels are read when they are asked for."""
        numbers: Sequence[int] = range(len(self.source))
        if self.labelled_only:
            numbers = [i for i in numbers if np.any(self.source.read(i).target)]
        return [dict(img_path=self.source.names[i], number=i, reduce_zero_label=False) for i in numbers]

    def prepare_data(self, idx: int) -> Any:
        """Read a sample and run the pipeline on it."""
        results = self.get_data_info(idx)
        results["sample"] = self.source.read(results["number"])
        results |= dict(seg_fields=[], source_ignore_index=self.config.ignore_index, ignore_index=self.ignore_index)
        return self.pipeline(results)


def _config(data: Mapping[str, Any]) -> Any:
    """The typed options, complete with what mmseg decides elsewhere."""
    try:
        from pydantic import ValidationError

        from vision_gates.datasets.base import data_config_type
    except ModuleNotFoundError as error:
        raise ConfigError(f"VisionGatesDataset needs {error.name}: pip install 'vision-gates[train]'") from error

    options = dict(data)
    for key, place in _ELSEWHERE.items():
        if key in options:
            raise ConfigError(f"data.{key}: mmseg has {place} for it; remove the key")
    config_type = data_config_type(str(options.get("type")))
    if "image_size" in config_type.model_fields:
        options["image_size"] = 1
    if options["type"] == "volumes" and options.setdefault("mode", "2d") != "2d":
        raise ConfigError("data.mode: mmseg segments slices; remove the key")
    try:
        return config_type(**options)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, ("data", *first["loc"])))
        near = f"; known: {', '.join(config_type.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise ConfigError(f"{key}: {first['msg'].removeprefix('Value error, ')}{near}") from error


def _open(config: Any, split: str) -> tuple[Any, tuple[str, ...]]:
    """A split that reads images or slices, and the names of the classes."""
    from vision_gates.datasets.base import load_splits

    if config.type == "volumes":
        try:
            from vision_gates.mmseg.volume_slices import VolumeSlices, load_and_plan
        except ModuleNotFoundError as error:
            raise ConfigError(f"volumes need {error.name}: pip install 'vision-gates[train,volumes]'") from error
        splits, info = load_and_plan(config)
        classes = splits.class_names
        return VolumeSlices(_choose(splits, split), config, info, num_classes=len(classes)), classes
    splits = load_splits(config)
    if splits.task != "segmentation":
        raise ConfigError(f"data.type={config.type}: holds {splits.task} data; mmseg needs masks")
    return _choose(splits, split), splits.class_names


def _choose(splits: Any, split: str) -> Any:
    return splits.val if split == "test" and splits.test is None else getattr(splits, split)
