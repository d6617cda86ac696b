"""MedMNIST: standard biomedical image classification sets of 28 x 28 pixels (also 64, 128, 224), from their npz files.

Source: Yang et al., MedMNIST v2 (Scientific Data 2023), https://medmnist.com; CC BY 4.0, dermamnist CC BY-NC 4.0.
Size: 0.6 MB (breastmnist) to 206 MB (pathmnist) at 28 pixels. Nothing is downloaded unless ``data.download=true``,
which needs the ``medmnist`` package and a network.

Supported are the 2-D sets with one label an image: pathmnist, dermamnist, octmnist, pneumoniamnist, retinamnist,
breastmnist, bloodmnist, tissuemnist, organamnist, organcmnist, organsmnist. Their grades or classes are learnt as plain
classes. chestmnist (several labels an image) and the 3-D sets end in an error that says so.

A file of your own works as well if it holds {train,val,test}_images, (N, H, W) or (N, H, W, C) of uint8, uint16 or
floats, and {train,val,test}_labels, (N,) or (N, 1) integers from 0.
"""

import importlib
import importlib.util
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vision_gates.datasets.base import DataSplits, ImageDataConfig, Sample, Split, resolve_root
from vision_gates.datasets.npz import npz_names, read_npz
from vision_gates.errors import ConfigError, DataError

__all__ = ["Config", "load"]

FLAGS = (
    "pathmnist",
    "dermamnist",
    "octmnist",
    "pneumoniamnist",
    "retinamnist",
    "breastmnist",
    "bloodmnist",
    "tissuemnist",
    "organamnist",
    "organcmnist",
    "organsmnist",
)


class Config(ImageDataConfig):
    """Where the npz file is: ``root`` is the file itself, or a folder that holds ``<flag>.npz``."""

    type: Literal["medmnist"] = "medmnist"
    root: str = Field(description="npz file, or the folder with <flag>.npz (<flag>_<size>.npz for a size above 28)")
    flag: str | None = Field(None, description="name of the set, e.g. pneumoniamnist; needed when root is a folder")
    size: Literal[28, 64, 128, 224] = Field(28, description="which of the released sizes the file name means")
    download: bool = Field(False, description="fetch a missing file with the medmnist package")


@lru_cache(maxsize=6)
def _array(path: str, key: str, mtime_ns: int) -> NDArray[Any]:
    """One array of the file, kept for the life of the process; ``mtime_ns`` makes a replaced file a new entry."""
    return read_npz(path, [key])[key]


class _Arrays(Split):
    """Reads from the arrays of the file, which each process loads once; pickled it is only the path."""

    def __init__(self, path: Path, split: str) -> None:
        self._path, self._split, self._mtime_ns = str(path), split, path.stat().st_mtime_ns
        images, labels = self._images(), self._labels()
        if images.ndim == 5 or (images.ndim == 4 and len(set(images.shape[1:])) == 1):
            raise DataError(f"{path}: {split}_images is {images.shape}; 3-D images are not supported yet")
        if images.ndim not in (3, 4) or images.dtype not in (np.uint8, np.uint16, np.float32, np.float64):
            raise DataError(
                f"{path}: {split}_images is {images.shape} {images.dtype}; it must be (N, H, W) or (N, H, W, C) of "
                f"uint8, uint16 or floats"
            )
        if len(images) != len(labels):
            raise DataError(f"{path}: {len(images):,} {split}_images but {len(labels):,} {split}_labels")
        self.names = [f"{split}_{index:06d}" for index in range(len(labels))]

    def _images(self) -> NDArray[Any]:
        return _array(self._path, f"{self._split}_images", self._mtime_ns)

    def _labels(self) -> NDArray[Any]:
        """(N,) labels."""
        labels = _array(self._path, f"{self._split}_labels", self._mtime_ns)
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise DataError(
                f"{self._path}: {self._split}_labels is {labels.shape} {labels.dtype}; only one integer label an image "
                f"is supported, sets with several (chestmnist) not yet"
            )
        return labels

    @property
    def channels(self) -> int:
        images = self._images()
        return images.shape[3] if images.ndim == 4 else 1

    @property
    def largest_label(self) -> int:
        return int(self._labels().max()) if len(self) else -1

    def read(self, index: int) -> Sample:
        """(H, W, C) in the file's type (floats as float32) and the class."""
        image = self._images()[index].copy()  # the caller may change it; the cached array must stay as it is
        if image.ndim == 2:
            image = image[:, :, None]
        if image.dtype.kind == "f":
            image = image.astype(np.float32)
            bad = int(image.size - np.isfinite(image).sum())
            if bad:
                raise DataError(f"{self._path}: image {self.names[index]} holds {bad:,} NaN or infinite values")
        return Sample(image, self.label(index), self.names[index])

    def label(self, index: int) -> int:
        return int(self._labels()[index])


def _check_flag(flag: str) -> None:
    if flag in FLAGS:
        return
    if flag == "chestmnist":
        raise ConfigError("data.flag: chestmnist has several labels an image, which is not supported yet")
    if flag.endswith("3d"):
        raise ConfigError(f"data.flag: {flag} holds 3-D images, which are not supported yet")
    raise ConfigError(f"data.flag: there is no set {flag!r}; (available: {', '.join(FLAGS)})")


def _download(flag: str, size: int, folder: Path) -> None:
    if importlib.util.find_spec("medmnist") is None:
        raise ConfigError("data.download=true needs the medmnist package: pip install 'vision-gates[train]'")
    medmnist: Any = importlib.import_module("medmnist")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        dataset = getattr(medmnist, medmnist.INFO[flag]["python_class"])
        dataset(split="train", download=True, root=str(folder), size=size)
    except Exception as error:  # the package wraps whatever goes wrong on the network in a bare RuntimeError
        raise DataError(
            f"{flag} could not be downloaded to {folder} (no network?); fetch {_file_name(flag, size)} from "
            f"https://zenodo.org/records/10519652 and put it there"
        ) from error


def _file_name(flag: str, size: int) -> str:
    return f"{flag}.npz" if size == 28 else f"{flag}_{size}.npz"


def _find(config: Config) -> tuple[Path, str | None]:
    """The npz file, and the flag as far as it is known."""
    given = Path(config.root).expanduser()
    if given.suffix == ".npz":
        stem = given.stem.split("_")[0]
        flag = config.flag or (stem if stem in FLAGS or stem == "chestmnist" or stem.endswith("mnist3d") else None)
        if flag is not None:
            _check_flag(flag)
        if config.download and not given.exists():
            if flag is None or given.name != _file_name(flag, config.size):
                raise ConfigError(f"data.download=true: give data.root={str(given.parent)!r} and data.flag")
            _download(flag, config.size, given.parent.resolve())
        return resolve_root(config.root, kind="any"), flag
    if config.flag is None:
        resolve_root(config.root)
        raise ConfigError("data.flag: name the set, e.g. data.flag=pneumoniamnist, or set data.root to the npz file")
    _check_flag(config.flag)
    name = _file_name(config.flag, config.size)
    if config.download and not (given / name).exists():
        _download(config.flag, config.size, given.resolve())
    path = resolve_root(config.root) / name
    if not path.is_file():
        there = sorted(file.name for file in path.parent.glob("*.npz"))
        found = f"npz files there: {', '.join(there[:6])}" if there else "no npz file there"
        raise DataError(f"{path} does not exist ({found}); put it there or set data.download=true")
    return path, config.flag


def _class_names(flag: str | None, num_classes: int) -> tuple[str, ...]:
    """Names from the medmnist package where it is installed and knows the set, else class_0, class_1 ..."""
    if flag is not None and importlib.util.find_spec("medmnist") is not None:
        from medmnist.info import INFO

        names = tuple(INFO[flag]["label"][str(i)] for i in range(len(INFO[flag]["label"])))
        if len(names) >= num_classes:
            return names
    return tuple(f"class_{i}" for i in range(num_classes))


def load(config: Config) -> DataSplits:
    """The three splits of one file."""
    path, flag = _find(config)
    keys = set(npz_names(path))
    needed = [f"{split}_{part}" for split in ("train", "val") for part in ("images", "labels")]
    missing = [key for key in needed if key not in keys]
    if missing:
        raise DataError(
            f"{path}: no array {', '.join(missing)}; a MedMNIST file has {{train,val,test}}_images and _labels"
        )
    train, val = _Arrays(path, "train"), _Arrays(path, "val")
    test = _Arrays(path, "test") if {"test_images", "test_labels"} <= keys else None
    splits = [train, val] + ([test] if test is not None else [])
    num_classes = max(2, 1 + max(split.largest_label for split in splits))
    return DataSplits("classification", _class_names(flag, num_classes), train.channels, train, val, test)
