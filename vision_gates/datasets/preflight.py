"""Reads every sample once before training, finds all faults, and measures what the training needs to know.

A run must not fail after an hour on the one damaged file, nor train on masks whose foreground is 255. All faults end in
one message of one line.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vision_gates.datasets.base import (
    ChannelError,
    DataSplits,
    ImageDataConfig,
    LabelError,
    Sample,
    Split,
    check_labels,
    few,
    how_many,
)
from vision_gates.errors import DataError

__all__ = ["Statistics", "preflight"]

_FAST_SAMPLES = 1000
_SHOWN = 3
_SHOWN_VALUES = 8


@dataclass(frozen=True)
class Statistics:
    """What the preflight measured.

    mean, std: per channel, over all pixels of to_float(training images). counts: split -> images (classification) or
    pixels (segmentation, without ignore_index) per class. images: split -> number of samples. warnings: one sentence
    each. With ``preflight: fast`` mean, std and pixel counts come from the decoded samples.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    counts: dict[str, list[int]]
    images: dict[str, int]
    warnings: list[str]


@dataclass
class _Reading:
    """What one sample showed; small, because a large data set has many."""

    error: DataError | None = None
    channels: int | None = None
    digest: bytes | None = None
    counts: NDArray[np.int64] | None = None
    # Pixels, mean and sum of squared deviations from it, per channel.
    moments: tuple[int, NDArray[np.float64], NDArray[np.float64]] | None = None


@dataclass
class _Faults:
    """Everything found wrong so far, by kind."""

    files: list[str] = field(default_factory=list)
    label_files: list[str] = field(default_factory=list)
    label_histogram: Counter[int] = field(default_factory=Counter)
    channels: dict[int, list[str]] = field(default_factory=dict)
    sets: list[str] = field(default_factory=list)


def _moments(image_HWC: NDArray[Any]) -> tuple[int, NDArray[np.float64], NDArray[np.float64]]:
    """Pixels, mean and summed squared deviation of to_float(image) per channel, in float64."""
    pixels_CN = image_HWC.reshape(-1, image_HWC.shape[2]).T
    if image_HWC.dtype.kind == "u":
        # A histogram is exact and needs no float64 copy of the image.
        top = int(np.iinfo(image_HWC.dtype).max)
        values = np.arange(top + 1) / top
        counts_CV = np.stack([np.bincount(channel, minlength=top + 1) for channel in pixels_CN]).astype(np.float64)
        mean_C = counts_CV @ values / pixels_CN.shape[1]
        return pixels_CN.shape[1], mean_C, (counts_CV * (values - mean_C[:, None]) ** 2).sum(axis=1)
    mean_C = pixels_CN.mean(axis=1, dtype=np.float64)
    squares = [
        np.square(channel - mean, dtype=np.float64).sum() for channel, mean in zip(pixels_CN, mean_C, strict=True)
    ]
    return pixels_CN.shape[1], mean_C, np.array(squares)


def _check_sample(sample: Sample, splits: DataSplits, config: ImageDataConfig) -> None:
    """What every data set must hold to, whatever its own reader has checked."""
    image, target, num_classes = sample.image, sample.target, len(splits.class_names)
    if image.ndim != 3 or image.dtype not in (np.uint8, np.uint16, np.float32):
        raise DataError(f"{sample.name}: {image.shape} {image.dtype}; an image is (H, W, C) uint8, uint16 or float32")
    if image.dtype == np.float32:
        num_bad = image.size - int(np.isfinite(image).sum())
        if num_bad:
            raise DataError(f"{sample.name}: {num_bad:,} of {image.size:,} values are NaN or infinite")
    if splits.task == "segmentation":
        if np.shape(target) != image.shape[:2]:
            raise DataError(f"{sample.name}: the mask is {np.shape(target)} but the image {image.shape[:2]}")
        check_labels(
            np.asarray(target), num_classes=num_classes, ignore_index=config.ignore_index, name=f"mask of {sample.name}"
        )
    else:
        check_labels(np.array([target], dtype=np.int64), num_classes=num_classes, name=f"class of {sample.name}")


def _inspect(index: int, split: Split, splits: DataSplits, config: ImageDataConfig, measure: bool) -> _Reading:
    """Reads one sample; its faults come back rather than being raised, so that all can be reported."""
    try:
        sample = split.read(index)
        _check_sample(sample, splits, config)
    except ChannelError as error:
        return _Reading(error=error, channels=error.channels)
    except DataError as error:
        return _Reading(error=error)
    num_classes = len(splits.class_names)
    labels = np.asarray(sample.target, dtype=np.int64).ravel()
    scored = labels[(labels >= 0) & (labels < num_classes)]
    if splits.task == "segmentation" and config.ignore_index is not None:
        scored = scored[scored != config.ignore_index]
    image = np.ascontiguousarray(sample.image)
    # Blank images are alike without being copies of each other.
    blank = bool((image == image.flat[0]).all())
    digest = hashlib.blake2b(f"{image.shape}{image.dtype}".encode(), digest_size=16)
    digest.update(image.data)
    return _Reading(
        channels=image.shape[2],
        digest=None if blank else digest.digest(),
        counts=np.bincount(scored, minlength=num_classes).astype(np.int64),
        moments=_moments(image) if measure else None,
    )


def _check_exists(index: int, split: Split) -> DataError | None:
    try:
        split.check_exists(index)
    except DataError as error:
        return error
    return None


def _decoded(count: int, config: ImageDataConfig) -> list[int]:
    """Indices of the samples to decode."""
    if config.preflight == "full" or count <= _FAST_SAMPLES:
        return list(range(count))
    return sorted(set(np.linspace(0, count - 1, _FAST_SAMPLES).round().astype(int).tolist()))


def _label_remedy(histogram: Counter[int], num_classes: int, config: ImageDataConfig) -> str:
    """The configuration line that makes these label values usable."""
    values = sorted(histogram)
    fields = type(config).model_fields
    inside = set(range(num_classes))
    if "label_map" not in fields:
        return f"labels must be 0..{num_classes - 1}"
    if getattr(config, "label_map", None) is not None:
        return (
            "add the missing values to data.label_map, or -- for pixels that are not scored -- map them to ignore_index"
        )
    if values == [0, 255] and num_classes == 2:
        return "these are 0/255 masks: set data.label_map='{0: 0, 255: 1}'"
    if 255 in values and set(values) - {255} <= inside and len(values) > 2:
        return "255 often marks pixels without a label: set data.ignore_index=255"
    if len(values) <= num_classes:
        mapping = ", ".join(f"{value}: {i}" for i, value in enumerate(values))
        return f"set data.label_map='{{{mapping}}}' (check which value is which class)"
    if num_classes == 2 and len(values) > 4:
        return "that many values are a grey or JPEG-blurred mask: set data.mask_threshold=127"
    if min(values) >= 0 and max(values) < 256 and len(values) == max(values) + 1:
        return f"there are {len(values)} classes: set data.num_classes={len(values)} or name them all in data.classes"
    return f"map the values to 0..{num_classes - 1} with data.label_map, or correct data.num_classes or data.classes"


def _file_faults(faults: _Faults, splits: DataSplits, config: ImageDataConfig) -> list[str]:
    """The faults of single files as sentences."""
    messages = []
    if faults.files:
        others = f"; and {len(faults.files) - _SHOWN:,} further files" if len(faults.files) > _SHOWN else ""
        messages.append("; ".join(faults.files[:_SHOWN]) + others)
    if faults.label_files:
        histogram = faults.label_histogram
        item, unit = ("mask", "pixel") if splits.task == "segmentation" else ("image", "image")
        common = sorted(value for value, _ in histogram.most_common(_SHOWN_VALUES))
        shown = [f"{value}: {how_many(histogram[value], unit)}" for value in common]
        rest = f" and {len(histogram) - len(common):,} rarer values" if len(histogram) > len(common) else ""
        messages.append(
            f"labels outside 0..{len(splits.class_names) - 1} in {how_many(len(faults.label_files), item)}: "
            f"{few(faults.label_files)}; values found: {', '.join(shown)}{rest}; "
            f"{_label_remedy(histogram, len(splits.class_names), config)}"
        )
    if len(faults.channels) > 1:
        by_count = sorted(faults.channels, key=lambda channels: (-len(faults.channels[channels]), channels))
        odd = [f"{few(faults.channels[channels])} with {channels}" for channels in by_count[1:]]
        convertible = "channels" in type(config).model_fields and set(faults.channels) <= {1, 3}
        remedy = "set data.channels=3 or data.channels=1 to convert" if convertible else "make all images alike"
        majority = by_count[0]
        messages.append(
            f"images differ in channels: {len(faults.channels[majority]):,} have {majority}, but {' and '.join(odd)}; "
            f"{remedy}"
        )
    elif faults.channels and splits.in_chans not in faults.channels:
        channels = next(iter(faults.channels))
        messages.append(f"the images have {how_many(channels, 'channel')} but the data set declares {splits.in_chans}")
    return messages


def _missing_classes(
    counts: dict[str, list[int]], splits: DataSplits, config: ImageDataConfig, complete: bool
) -> tuple[list[str], list[str]]:
    """(faults, warnings) about classes without data."""
    faults, warnings = [], []
    for part, remedy in (
        ("train", "add training data for it or remove the class"),
        ("val", "move some of its images to the validation split or draw a larger one"),
        ("test", ""),
    ):
        if part not in counts:
            continue
        missing = [name for name, count in zip(splits.class_names, counts[part], strict=True) if count == 0]
        if not missing:
            continue
        text = f"no {part} sample of class {few(missing, limit=6)}"
        if part == "test" or config.allow_missing_classes:
            warnings.append(text)
        elif not complete:
            warnings.append(f"{text} among those that preflight=fast decoded")
        else:
            faults.append(f"{text}; {remedy}, or set data.allow_missing_classes=true")
    return faults, warnings


def _mean_and_std(
    moments: Iterator[tuple[int, NDArray[np.float64], NDArray[np.float64]]], channels: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Merges the moments of all images (Chan et al.), which stays accurate where summed squares would not."""
    total, mean_C, squares_C = 0, np.zeros(channels), np.zeros(channels)
    for count, image_mean_C, image_squares_C in moments:
        delta_C = image_mean_C - mean_C
        squares_C = squares_C + image_squares_C + delta_C**2 * (total * count / (total + count))
        total += count
        mean_C = mean_C + delta_C * (count / total)
    return mean_C, np.sqrt(squares_C / max(total, 1))


def preflight(
    splits: DataSplits, config: ImageDataConfig, *, progress: Callable[[int, int], None] | None = None
) -> Statistics:
    """Checks a data set and measures it.

    progress: called in the calling thread with (samples done, samples in all). Raises one `DataError` of one line that
    tells all faults: files that cannot be read, masks that do not fit, labels outside 0..n-1, differing channels, NaN,
    too few images, classes without training or validation data (see ``allow_missing_classes``). The result does not
    depend on the number of threads.
    """
    faults, warnings = _Faults(), list[str]()
    readings: dict[str, dict[int, _Reading]] = {}
    chosen = {part: _decoded(len(split), config) for part, split in splits.items()}
    total, done = sum(len(indices) for indices in chosen.values()), 0
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        for part, split in splits.items():
            readings[part] = {}
            inspect = partial(_inspect, split=split, splits=splits, config=config, measure=part == "train")
            for index, reading in zip(chosen[part], pool.map(inspect, chosen[part]), strict=True):
                readings[part][index] = reading
                done += 1
                if progress is not None:
                    progress(done, total)
            rest = sorted(set(range(len(split))) - set(chosen[part]))
            missing = [error for error in pool.map(partial(_check_exists, split=split), rest) if error is not None]
            faults.files.extend(str(error) for error in missing)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait until all that is queued has been read
    counts = {part: _collect(part, split, readings[part], splits, faults) for part, split in splits.items()}
    if len(splits.train) < 2:
        faults.sets.append(f"{how_many(len(splits.train), 'training image')}; training needs at least 2")
    if len(splits.val) == 0:
        faults.sets.append("the validation split is empty; add images to it or draw a larger one")
    messages = _file_faults(faults, splits, config) + faults.sets
    if not messages:  # a class whose only file is unreadable is not missing
        complete = config.preflight == "full" or splits.task == "classification"
        messages, notes = _missing_classes(counts, splits, config, complete)
        warnings.extend(notes)
    if messages:
        root = getattr(config, "root", None)
        where = f"data set {config.type}" + (f" at {root}" if root is not None else "")
        raise DataError(" ".join(f"{where}: {'; '.join(messages)}".split()))
    moments = (reading.moments for reading in readings["train"].values() if reading.moments is not None)
    mean_C, std_C = _mean_and_std(moments, splits.in_chans)
    constant_C = std_C <= 1e-12 * np.maximum(np.abs(mean_C), 1)
    if constant_C.any():
        warnings.append(f"channel {few(np.flatnonzero(constant_C).tolist())} of the training images is constant")
    std_C = np.where(constant_C, 1.0, std_C)
    warnings.extend(_duplicates(readings, splits))
    images = {part: len(split) for part, split in splits.items()}
    return Statistics(tuple(mean_C.tolist()), tuple(std_C.tolist()), counts, images, warnings)


def _collect(part: str, split: Split, readings: dict[int, _Reading], splits: DataSplits, faults: _Faults) -> list[int]:
    """Sorts the readings of a split into faults, and adds up its counts per class."""
    counts = np.zeros(len(splits.class_names), dtype=np.int64)
    for index, reading in readings.items():
        name, error = split.names[index], reading.error
        if reading.channels is not None:
            faults.channels.setdefault(reading.channels, []).append(name)
        if isinstance(error, LabelError):
            faults.label_files.append(name)
            faults.label_histogram.update(error.histogram)
        elif error is not None and not isinstance(error, ChannelError):
            faults.files.append(str(error))
        if reading.counts is not None:
            counts += reading.counts
    for index in range(len(split)):  # the fast mode still counts the classes of all images, where names tell them
        label = None if index in readings else split.label(index)
        if label is not None and 0 <= label < len(counts):
            counts[label] += 1
    return [int(count) for count in counts]


def _duplicates(readings: dict[str, dict[int, _Reading]], splits: DataSplits) -> list[str]:
    """Warnings about held-out images whose pixels are those of a training image."""
    trained = {reading.digest for reading in readings["train"].values() if reading.digest is not None}
    warnings = []
    for part, split in splits.items():
        if part == "train":
            continue
        copies = [split.names[index] for index, reading in readings[part].items() if reading.digest in trained]
        if copies:
            warnings.append(
                f"{len(copies):,} of {len(split):,} {part} images are copies of training images: {few(copies)}; "
                f"scores on them are too good"
            )
    return warnings
