"""What every data set offers: a typed configuration, splits whose samples are read one at a time, and their discovery.

A data set is a folder in ``datasets/`` whose module exports ``Config`` (a `DataConfig` with ``type: Literal[...]``) and
``load(config) -> DataSplits``. Nothing here decides how a batch is made: that is the engine's part.
"""

import difflib
import hashlib
import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from vision_gates.errors import ConfigError, DataError

__all__ = [
    "ChannelError",
    "DataConfig",
    "DataSplits",
    "ImageDataConfig",
    "LabelError",
    "Sample",
    "SliceView",
    "Split",
    "Task",
    "available",
    "check_labels",
    "data_config_type",
    "few",
    "group_names",
    "how_many",
    "load_splits",
    "one_line",
    "probe_channels",
    "resolve_root",
    "split_by_hash",
]

Task = Literal["classification", "segmentation"]
_LONGEST_LINE = 1000  # characters of a message


class DataConfig(BaseModel):
    """Options that all data sets share; each data set's ``Config`` adds its own. An unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    augmented_by: ClassVar[Literal["albumentations", "monai"]] = "albumentations"

    type: str = Field(description="name of the data set, a folder in datasets/; selects the remaining keys")
    batch_size: int = Field(32, ge=1, description="images in a step, per process")
    workers: int = Field(0, ge=0, description="processes that load images; 0 loads in the main process")
    allow_missing_classes: bool = Field(False, description="train although a class has no training or validation data")
    ignore_index: int | None = Field(None, description="segmentation: label value that is not scored, e.g. 255")


class ImageDataConfig(DataConfig):
    """Options of data sets whose samples are two-dimensional images, each resized to what the network sees."""

    image_size: tuple[int, int] = Field(description="(height, width) the network sees; one number means square")
    normalize: Literal["dataset", "image", "imagenet", "none"] = Field(
        "dataset", description="dataset: mean and standard deviation of the training images, per channel"
    )
    preflight: Literal["full", "fast"] = Field(
        "full", description="fast: decode 1,000 evenly spaced samples of a split and check that the others exist"
    )

    @field_validator("image_size", mode="before")
    @classmethod
    def _square(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("image_size")
    @classmethod
    def _positive(cls, value: tuple[int, int]) -> tuple[int, int]:
        if min(value) < 1:
            raise ValueError(f"height and width must be at least 1, not {list(value)}")
        return value


@dataclass(frozen=True)
class Sample:
    """One image with its target.

    image: (H, W, C) uint8, uint16 or float32. target: class index, or (H, W) int64 labels. name: unique in its split.
    """

    image: NDArray[Any]
    target: int | NDArray[np.int64]
    name: str


class Split(ABC):
    """The samples of one split. Picklable, and reading is pure, so that any process may read any sample."""

    names: Sequence[str]

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, index: int) -> Sample:
        """Reads one sample; raises `DataError` naming the file if it cannot be used."""

    def label(self, index: int) -> int | None:
        """Class of a sample where that is known without decoding it, else None."""
        return None

    def check_exists(self, index: int) -> None:
        """Cheap check that a sample is there, without decoding it; raises `DataError` naming the file if not."""
        return None


@dataclass(frozen=True)
class SliceView:
    """How images were cut out of volumes, so that a network trained on them can label a volume.

    orientation: where rows, columns and slices run to, such as "PRS". spacing: mm along x, y and z. low, high: the
    volume's intensities that are 0 and 1 in an image. channel: what is shown. neighbours: further slices on each side.
    """

    orientation: str
    spacing: tuple[float, float, float]
    low: float
    high: float
    channel: str
    neighbours: int = 0


@dataclass(frozen=True)
class DataSplits:
    """A data set ready to be read; ``test`` may be None. ``slices``: how the images were cut out of volumes, if so."""

    task: Task
    class_names: tuple[str, ...]
    in_chans: int
    train: Split
    val: Split
    test: Split | None
    slices: SliceView | None = None

    def items(self) -> list[tuple[str, Split]]:
        """(name, split) of the splits that exist, in the order train, val, test."""
        every: list[tuple[str, Split | None]] = [("train", self.train), ("val", self.val), ("test", self.test)]
        return [(name, split) for name, split in every if split is not None]


class LabelError(DataError):
    """Labels outside ``0 .. num_classes - 1``. ``histogram``: value -> pixels (or samples) in the file."""

    def __init__(self, message: str, histogram: dict[int, int] | None = None) -> None:
        super().__init__(message)
        self.histogram = histogram or {}


class ChannelError(DataError):
    """An image whose number of channels differs from the data set's. ``channels``: what the file holds."""

    def __init__(self, message: str, channels: int = 0) -> None:
        super().__init__(message)
        self.channels = channels


def one_line(text: str) -> str:
    """Text for a terminal, whatever a file holds: control characters as escapes, a long middle left out."""
    if len(text) > _LONGEST_LINE:
        half = _LONGEST_LINE // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def few(items: Sequence[object], *, limit: int = 3) -> str:
    """``a, b, c and 4 more``: the first items and the count of the others."""
    shown = ", ".join(one_line(str(item)) for item in items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit:,} more"


def how_many(count: int, noun: str) -> str:
    """``1 image``, ``1,200 images``."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def check_labels(
    labels: NDArray[np.int64], *, num_classes: int, ignore_index: int | None = None, name: str = "mask"
) -> None:
    """Raises `LabelError`, with the histogram of all values, unless all labels are 0..num_classes-1 or ignore_index."""
    if labels.size == 0 or (labels.min() >= 0 and labels.max() < num_classes):
        return
    values, counts = np.unique(labels, return_counts=True)
    if all(0 <= value < num_classes or value == ignore_index for value in values):
        return
    histogram = dict(zip(values.tolist(), counts.tolist(), strict=True))
    bad = [value for value in histogram if not (0 <= value < num_classes or value == ignore_index)]
    raise LabelError(f"{name}: label values {few(bad, limit=6)} are outside 0..{num_classes - 1}", histogram)


def available() -> list[str]:
    """Names of all data sets, sorted."""
    package = importlib.import_module("vision_gates.datasets")
    return sorted(module.name for module in pkgutil.iter_modules(package.__path__) if module.ispkg)


def data_config_type(type_name: str) -> type[DataConfig]:
    """The ``Config`` class of a data set; `ConfigError` with the nearest name and the list if there is no such set."""
    names = available()
    if type_name not in names:
        near = difflib.get_close_matches(str(type_name)[:100], names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"data.type: there is no data set {type_name!r}; {hint}(available: {', '.join(names)})")
    config_type: type[DataConfig] = importlib.import_module(f"vision_gates.datasets.{type_name}").Config
    return config_type


def load_splits(config: DataConfig) -> DataSplits:
    """Finds the samples of a data set (it decodes as little as it can); `DataError` if that fails."""
    splits: DataSplits = importlib.import_module(f"vision_gates.datasets.{config.type}").load(config)
    if config.ignore_index is not None and splits.task == "classification":
        raise ConfigError(f"data.ignore_index={config.ignore_index}: only segmentation has it; remove the key")
    return splits


def resolve_root(root: str, *, key: str = "data.root", kind: Literal["folder", "any"] = "folder") -> Path:
    """Absolute path of a configured folder (or file), ``~`` expanded; `DataError` naming key and path if missing."""
    path = Path(root).expanduser()
    absolute = (path if path.is_absolute() else Path.cwd() / path).resolve()
    if not absolute.exists():
        note = "" if path.is_absolute() else f" ({key}={root!r} is relative to the current folder)"
        raise DataError(f"{key}: {absolute} does not exist{note}; set {key} to the folder that holds the data")
    if kind == "folder" and not absolute.is_dir():
        raise DataError(f"{key}: {absolute} is a file; set {key} to the folder that holds the data")
    return absolute


def _rank(seed: int, name: str) -> bytes:
    # A hash instead of a random generator: the same on every platform and in every NumPy version, and one image more
    # moves few of the others.
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def _held_out(count: int, fraction: float, *, least: int) -> int:
    return max(round(count * fraction), least) if fraction > 0 else 0


def split_by_hash(
    groups: Sequence[str],
    labels: Sequence[int] | None = None,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
) -> tuple[list[int], list[int], list[int]]:
    """Deterministic split into train, val and test indices (each in the given order), stratified by label.

    Samples of one group (a patient, say) stay together; a group is stratified by its commonest label. As long as a
    class has enough groups, each split gets at least one: 2 serve training and validation, 3 also the test split.
    """
    members: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[group].append(index)
    strata: dict[int, list[str]] = defaultdict(list)
    for group, indices in members.items():
        # Counter keeps the first of equally common labels, so the choice does not depend on hashing.
        stratum = 0 if labels is None else Counter(labels[i] for i in indices).most_common(1)[0][0]
        strata[stratum].append(group)
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for stratum in sorted(strata):
        ranked = sorted(strata[stratum], key=lambda group: _rank(seed, group))
        total = len(ranked)
        num_test = _held_out(total, test_fraction, least=1 if total >= 3 else 0)
        num_val = _held_out(total, val_fraction, least=1 if total >= 2 else 0)
        while num_val + num_test >= total and num_val + num_test > 0:  # training keeps at least one group
            num_val, num_test = (num_val, num_test - 1) if num_test > 0 else (num_val - 1, num_test)
        for i, group in enumerate(ranked):
            part = "test" if i < num_test else "val" if i < num_test + num_val else "train"
            parts[part].extend(members[group])
    return sorted(parts["train"]), sorted(parts["val"]), sorted(parts["test"])


def group_names(names: Sequence[str], pattern: str | None) -> list[str]:
    """Group (patient) of each sample: the pattern's first group, found anywhere in the name; the name itself for None.

    Raises `DataError` where the pattern does not match a name.
    """
    if pattern is None:
        return list(names)
    expression = re.compile(pattern)
    matches = [expression.search(name) for name in names]
    missing = [name for name, match in zip(names, matches, strict=True) if match is None or match.group(1) is None]
    if missing:
        raise DataError(f"data.groups: {pattern!r} does not match {few(missing)}; its first group must be the patient")
    return [match.group(1) for match in matches if match is not None]


def probe_channels(read_image: Callable[[int], NDArray[Any]], count: int) -> int:
    """Channels of the first readable image of ``count``. Unreadable ones are left for the preflight to report, all of
    them at once; `DataError` if no image can be read.
    """
    error: DataError | None = None
    for index in range(count):
        try:
            return int(read_image(index).shape[-1])
        except DataError as caught:
            error = error or caught
    raise DataError(f"none of the {count:,} training images can be used; the first: {error}")
