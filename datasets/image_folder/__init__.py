"""Classification of your own images: one folder a class. Nothing is downloaded.

Layouts: ``root/{train,val,test}/CLASS/*`` or ``root/CLASS/*``, with png, jpg, jpeg, tif, tiff, bmp or webp files, also
in sub-folders of a class. Classes are the folder names of the training split, sorted.

Splits that have no folder are made by the configuration: without ``train`` all three are drawn (``val_fraction``,
``test_fraction``), with ``train`` but no ``val`` the validation images are drawn from ``train``. The draw is stratified
by class and depends on ``split_seed`` and the file names only. Give ``groups`` where one patient has several images.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from vision_gates.datasets.base import (
    ChannelError,
    DataSplits,
    Sample,
    Split,
    few,
    group_names,
    how_many,
    probe_channels,
    resolve_root,
    split_by_hash,
)
from vision_gates.datasets.folders import (
    FolderConfig,
    check_groups,
    content_note,
    find_files,
    has_files,
    split_folders,
    sub_folders,
)
from vision_gates.datasets.images import read_image, set_channels
from vision_gates.errors import DataError

__all__ = ["Config", "load"]


class Config(FolderConfig):
    """No options beyond `FolderConfig`'s."""

    type: Literal["image_folder"] = "image_folder"


class _Images(Split):
    def __init__(self, root: Path, names: Sequence[str], labels: Sequence[int], channels: Literal[1, 3] | None) -> None:
        self.names, self._labels = list(names), list(labels)
        self._root, self._channels = root, channels
        self.in_chans: int | None = None

    def read_image(self, index: int) -> NDArray[Any]:
        """(H, W, C) pixels."""
        path = self._root / self.names[index]
        return set_channels(read_image(path), self._channels, path)

    def read(self, index: int) -> Sample:
        path, image = self._root / self.names[index], self.read_image(index)
        if self.in_chans not in (None, image.shape[2]):
            raise ChannelError(f"{path}: {image.shape[2]} channels, others have {self.in_chans}", image.shape[2])
        return Sample(image, self._labels[index], self.names[index])

    def label(self, index: int) -> int:
        return self._labels[index]

    def check_exists(self, index: int) -> None:
        path = self._root / self.names[index]
        if not path.is_file() or path.stat().st_size == 0:
            raise DataError(f"{path}: the file is missing or empty")


def _classes(folder: Path) -> list[str]:
    """Class folders of the training images, sorted."""
    names = [path.name for path in sub_folders(folder)]
    if not names:
        images = find_files(folder)
        found = f"{how_many(len(images), 'image')} directly in it" if images else content_note(folder)
        raise DataError(f"{folder}: no class folders ({found}); put the images of each class into a folder of its own")
    empty = [name for name in names if not has_files(folder / name)]
    if empty:
        note = content_note(folder / empty[0])
        raise DataError(f"{folder}: no images in the class folder {few(empty)} ({note}); fill or remove it")
    return names


def _scan(folder: Path, root: Path, classes: Sequence[str]) -> tuple[list[str], list[int]]:
    """Names (paths below root) and labels of all images in the class folders."""
    unknown = [path.name for path in sub_folders(folder) if path.name not in classes]
    if unknown:
        raise DataError(f"{folder}: class {few(unknown)} is not in the training split ({few(classes, limit=6)})")
    names, labels = [], []
    for label, name in enumerate(classes):
        for path in find_files(folder / name):
            names.append(path.relative_to(root).as_posix())
            labels.append(label)
    return names, labels


def load(config: Config) -> DataSplits:
    """Finds the images of all splits and reads one of them for the number of channels."""
    root = resolve_root(config.root)
    folders = split_folders(root)
    base = root if folders is None else folders["train"]
    classes = _classes(base)
    names, labels = _scan(base, root, classes)
    least = 3 if folders is None else 2
    if len(names) < least:
        raise DataError(f"{base}: holds {how_many(len(names), 'image')}; training and validation need at least {least}")
    if len(classes) < 2:
        raise DataError(f"{base}: {classes[0]!r} is the only class folder; classification needs at least two classes")
    parts = {"train": (names, labels)}
    if folders is None or "val" not in folders:
        chosen = split_by_hash(
            group_names(names, config.groups),
            labels,
            val_fraction=config.val_fraction,
            test_fraction=config.test_fraction if folders is None else 0.0,
            seed=config.split_seed,
        )
        drawn = zip(("train", "val", "test"), chosen, strict=True)
        parts = {part: ([names[i] for i in index], [labels[i] for i in index]) for part, index in drawn if index}
    for part, folder in (folders or {}).items():
        if part != "train":
            parts[part] = _scan(folder, root, classes)
    check_groups({part: part_names for part, (part_names, _) in parts.items()}, config.groups)
    splits = {part: _Images(root, *parts.get(part, ([], [])), config.channels) for part in ("train", "val", "test")}
    in_chans = config.channels or probe_channels(splits["train"].read_image, len(splits["train"]))
    for split in splits.values():
        split.in_chans = in_chans
    test = splits["test"] if "test" in parts else None
    return DataSplits("classification", tuple(classes), in_chans, splits["train"], splits["val"], test)
