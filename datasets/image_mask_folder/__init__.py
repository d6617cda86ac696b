"""Segmentation of your own images: a folder of images and a folder of masks with the same names. Nothing is downloaded.

Layouts: ``root/{train,val,test}/{images,masks}``, ``root/{images,masks}/{train,val,test}`` or ``root/{images,masks}``.
An image and its mask have the same path and stem, the mask's followed by ``mask_suffix``: images/p1/a.jpg and
masks/p1/a_mask.png with ``mask_suffix: _mask`` (which may then lie in one folder: ``images: data``, ``masks: data``).
Images: png, jpg, jpeg, tif, tiff, bmp, webp; masks also npy.

A mask holds one class number 0..n-1 a pixel (a palette image: the index). ``label_map`` translates other numbers, such
as ``{0: 0, 255: 1}``; ``mask_threshold`` makes two classes of a mask that JPEG has blurred; ``ignore_index`` is a
number that is not scored.

Splits that have no folder are made by the configuration, as in image_folder; ``groups`` keeps a patient in one split.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from vision_gates.datasets.base import (
    ChannelError,
    DataSplits,
    LabelError,
    Sample,
    Split,
    check_labels,
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
    split_folders,
    sub_folders,
)
from vision_gates.datasets.images import MASK_SUFFIXES, read_image, read_mask, set_channels
from vision_gates.errors import DataError

__all__ = ["Config", "load"]


class Config(FolderConfig):
    """Names of the folders and the meaning of the mask's values."""

    type: Literal["image_mask_folder"] = "image_mask_folder"
    images: str = Field("images", description="name of the folder with the images")
    masks: str = Field("masks", description="name of the folder with the masks")
    mask_suffix: str = Field("", description="what follows the image's stem in the mask's name, e.g. _mask")
    classes: tuple[str, ...] | None = Field(None, description="names of the classes 0, 1 ...; 0 is the background")
    num_classes: int | None = Field(None, ge=2, description="number of classes where they have no names")
    label_map: dict[int, int] | None = Field(None, description="mask value -> class; every value must be listed")
    mask_threshold: int | None = Field(None, description="mask values above it are class 1, all others class 0")

    @model_validator(mode="after")
    def _consistent(self) -> "Config":
        if self.classes is None and self.num_classes is None:
            raise ValueError("name the classes (data.classes=[background, lesion]) or give data.num_classes")
        if self.classes is not None:
            if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
                raise ValueError(f"classes needs at least two different names, not {list(self.classes)}")
            if self.num_classes not in (None, len(self.classes)):
                raise ValueError(f"num_classes is {self.num_classes} but classes has {len(self.classes)} names")
        if self.mask_threshold is not None:
            if self.label_map is not None:
                raise ValueError("mask_threshold already makes classes 0 and 1; remove label_map or mask_threshold")
            if len(self.class_names) != 2:
                raise ValueError(f"mask_threshold makes two classes, but there are {len(self.class_names)}")
        allowed = {*range(len(self.class_names)), self.ignore_index}
        wrong = {key: value for key, value in (self.label_map or {}).items() if value not in allowed}
        if wrong:
            raise ValueError(f"label_map maps to {wrong}; classes are 0..{len(self.class_names) - 1}")
        return self

    @property
    def class_names(self) -> tuple[str, ...]:
        """The given names, or background, class_1, class_2 ..."""
        return self.classes or ("background", *(f"class_{i}" for i in range(1, self.num_classes or 2)))


def _map_labels(mask: NDArray[np.int64], label_map: Mapping[int, int], name: str) -> NDArray[np.int64]:
    """Translates the values of a mask; `LabelError` if one is not listed."""
    values, inverse, counts = np.unique(mask, return_inverse=True, return_counts=True)
    missing = [value for value in values.tolist() if value not in label_map]
    if missing:
        histogram = dict(zip(values.tolist(), counts.tolist(), strict=True))
        raise LabelError(f"{name}: mask values {few(missing, limit=6)} are not in data.label_map", histogram)
    return np.array([label_map[value] for value in values.tolist()], dtype=np.int64)[inverse].reshape(mask.shape)


class _Pairs(Split):
    def __init__(self, root: Path, pairs: Sequence[tuple[str, str]], config: Config) -> None:
        self.names = [image for image, _ in pairs]
        self._masks = [mask for _, mask in pairs]
        self._root, self._config = root, config
        self.in_chans: int | None = None

    def read_image(self, index: int) -> NDArray[Any]:
        """(H, W, C) pixels without the mask."""
        path = self._root / self.names[index]
        return set_channels(read_image(path), self._config.channels, path)

    def read(self, index: int) -> Sample:
        config, path, mask_path = self._config, self._root / self.names[index], self._root / self._masks[index]
        image = self.read_image(index)
        if self.in_chans not in (None, image.shape[2]):
            raise ChannelError(f"{path}: {image.shape[2]} channels, others have {self.in_chans}", image.shape[2])
        mask = read_mask(mask_path, threshold=config.mask_threshold)
        if mask.shape != image.shape[:2]:
            raise DataError(
                f"{mask_path}: the mask is {mask.shape[0]} x {mask.shape[1]} pixels (height x width) but the image "
                f"{self.names[index]} is {image.shape[0]} x {image.shape[1]}"
            )
        if config.label_map is not None:
            mask = _map_labels(mask, config.label_map, str(mask_path))
        num_classes = len(config.class_names)
        check_labels(mask, num_classes=num_classes, ignore_index=config.ignore_index, name=str(mask_path))
        return Sample(image, mask, self.names[index])

    def check_exists(self, index: int) -> None:
        for path in (self._root / self.names[index], self._root / self._masks[index]):
            if not path.is_file() or path.stat().st_size == 0:
                raise DataError(f"{path}: the file is missing or empty")


def _folder(parent: Path, name: str, key: str) -> Path:
    folder = parent / name
    if not folder.is_dir():
        there = few([path.name for path in sub_folders(parent)], limit=6) or "none"
        raise DataError(f"{folder}: no such folder (folders in {parent}: {there}); set data.{key} to its name")
    return folder


def _by_stem(folder: Path, files: Sequence[Path], suffix: str = "") -> dict[str, Path]:
    """Path below folder without extension (and without ``suffix``) -> file."""
    stems: dict[str, Path] = {}
    for path in files:
        stem = path.relative_to(folder).with_suffix("").as_posix()
        stem = stem.removesuffix(suffix) if suffix else stem
        if stem in stems:
            raise DataError(f"{folder}: {stems[stem].name} and {path.name} belong to the same name; keep one of them")
        stems[stem] = path
    return stems


def _pair(images_folder: Path, masks_folder: Path, root: Path, config: Config) -> list[tuple[str, str]]:
    """(image, mask) paths below root; `DataError` naming images without a mask and masks without an image."""
    suffix = config.mask_suffix
    mask_files = find_files(masks_folder, MASK_SUFFIXES)
    stems = {path: path.relative_to(masks_folder).with_suffix("").as_posix() for path in mask_files}
    image_files = find_files(images_folder)
    if images_folder == masks_folder:  # told apart by the suffix alone
        mask_files = [path for path in mask_files if suffix and stems[path].endswith(suffix)]
        image_files = sorted(set(image_files) - set(mask_files))
    if not image_files:
        raise DataError(f"{images_folder}: no images ({content_note(images_folder)})")
    images = _by_stem(images_folder, image_files)
    masks = _by_stem(masks_folder, [path for path in mask_files if stems[path].endswith(suffix)], suffix)
    lonely = [path.name for stem, path in images.items() if stem not in masks]
    if lonely:
        stem = next(stem for stem in images if stem not in masks)
        tails = [other[len(stem) :] for other in stems.values() if other.startswith(stem) and other != stem]
        hint = f"set data.mask_suffix={tails[0]}" if tails else "add the masks or remove the images"
        raise DataError(
            f"{masks_folder}: no mask for {len(lonely):,} of {len(images):,} images: {few(lonely)}; expected "
            f"{stem}{suffix}.png or another of {', '.join(MASK_SUFFIXES)}; {hint}"
        )
    paired = {masks[stem] for stem in images}
    extra = [path.name for path in mask_files if path not in paired]
    if extra:
        raise DataError(
            f"{masks_folder}: {how_many(len(extra), 'mask')} without an image: {few(extra)}; add the images or remove "
            f"the masks"
        )
    return [
        (path.relative_to(root).as_posix(), masks[stem].relative_to(root).as_posix()) for stem, path in images.items()
    ]


def _find_pairs(root: Path, config: Config) -> tuple[dict[str, list[tuple[str, str]]], bool]:
    """Pairs of each split that has a folder of its own, or of all images as "train" (and False)."""
    folders = split_folders(root)
    if folders is not None:
        pairs = {
            part: _pair(_folder(path, config.images, "images"), _folder(path, config.masks, "masks"), root, config)
            for part, path in folders.items()
        }
        return pairs, True
    images, masks = _folder(root, config.images, "images"), _folder(root, config.masks, "masks")
    inner = split_folders(images)
    if inner is None:
        return {"train": _pair(images, masks, root, config)}, False
    return {part: _pair(path, _folder(masks, part, "masks"), root, config) for part, path in inner.items()}, True


def load(config: Config) -> DataSplits:
    """Finds the pairs of all splits and reads one of them for the number of channels."""
    root = resolve_root(config.root)
    parts, divided = _find_pairs(root, config)
    least = 2 if divided else 3
    if len(parts["train"]) < least:
        found = how_many(len(parts["train"]), "image") + " with a mask" + (" in train" if divided else "")
        raise DataError(f"{root}: holds {found}; training and validation need at least {least}")
    if "val" not in parts:
        pairs = parts["train"]
        chosen = split_by_hash(
            group_names([image for image, _ in pairs], config.groups),
            val_fraction=config.val_fraction,
            test_fraction=0.0 if divided else config.test_fraction,
            seed=config.split_seed,
        )
        drawn = {part: [pairs[i] for i in index] for part, index in zip(("train", "val", "test"), chosen, strict=True)}
        parts = parts | {part: members for part, members in drawn.items() if members}
    check_groups({part: [image for image, _ in pairs] for part, pairs in parts.items()}, config.groups)
    splits = {part: _Pairs(root, parts.get(part, []), config) for part in ("train", "val", "test")}
    in_chans = config.channels or probe_channels(splits["train"].read_image, len(splits["train"]))
    for split in splits.values():
        split.in_chans = in_chans
    test = splits["test"] if "test" in parts else None
    return DataSplits("segmentation", config.class_names, in_chans, splits["train"], splits["val"], test)
