"""Data sets made of image files in folders: finding the files, the layout of the splits, and dividing by patient."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from vision_gates.datasets.base import ImageDataConfig, few, group_names
from vision_gates.datasets.images import IMAGE_SUFFIXES
from vision_gates.errors import DataError

__all__ = ["FolderConfig", "check_groups", "content_note", "find_files", "has_files", "split_folders", "sub_folders"]

SPLITS = ("train", "val", "test")
_LOOKALIKES = {"valid": "val", "validation": "val", "dev": "val", "eval": "val", "training": "train", "testing": "test"}


class FolderConfig(ImageDataConfig):
    """Options that ``image_folder`` and ``image_mask_folder`` share."""

    root: str = Field(description="folder of the data set; ~ is expanded")
    channels: Literal[1, 3] | None = Field(
        None, description="1 or 3: convert colour to grey or grey to colour; null: all images must already be alike"
    )
    val_fraction: float = Field(0.15, gt=0, lt=1, description="share held out for validation where root has no val/")
    test_fraction: float = Field(0.15, ge=0, lt=1, description="share held out for test where root has no train/")
    split_seed: int = Field(0, description="another seed draws another split")
    groups: str | None = Field(
        None, description="regular expression whose first group, found in a file's path, is the patient: never split"
    )

    @field_validator("groups")
    @classmethod
    def _one_group(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                count = re.compile(value).groups
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(f"{value!r} is not a regular expression ({error})") from error
            if count < 1:
                raise ValueError(f"{value!r} needs a group (...) around the part that names the patient")
        return value

    @model_validator(mode="after")
    def _leave_some_for_training(self) -> "FolderConfig":
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction must stay below 1, or nothing is left to train on")
        return self


def _hidden(name: str) -> bool:
    # Archives made on macOS hold "._x.png" files that are no images.
    return name.startswith((".", "__MACOSX"))


def sub_folders(folder: Path) -> list[Path]:
    """The folders directly in a folder, sorted; hidden ones are left out."""
    return sorted(path for path in folder.iterdir() if path.is_dir() and not _hidden(path.name))


def _walk(folder: Path, suffixes: tuple[str, ...]) -> Iterator[Path]:
    for path in folder.rglob("*"):
        if path.suffix.lower() in suffixes and not any(_hidden(part) for part in path.relative_to(folder).parts):
            if path.is_file():
                yield path


def find_files(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[Path]:
    """All files with one of the suffixes in a folder and below, sorted; hidden files and folders are left out."""
    return sorted(_walk(folder, suffixes))


def has_files(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> bool:
    """Whether `find_files` would find any, without going through all of them."""
    return any(True for _ in _walk(folder, suffixes))


def content_note(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> str:
    """What a folder in which no image was found holds, for an error message."""
    others = sorted({path.suffix.lower() or "no suffix" for path in folder.rglob("*") if path.is_file()})
    return f"{f'it holds files with {few(others)}' if others else 'it is empty'}; read are {', '.join(suffixes)}"


def split_folders(folder: Path) -> dict[str, Path] | None:
    """The folders train, val and test in ``folder`` as far as they exist, or None if there is no such division.

    Raises `DataError` for a division without ``train``, and for names such as ``valid`` that would be overlooked.
    """
    there = {path.name: path for path in sub_folders(folder)}
    splits = {name: there[name] for name in SPLITS if name in there}
    if not splits:
        return None
    if "train" not in splits:
        raise DataError(f"{folder}: has {' and '.join(splits)} but no train; add the folder train")
    for name, meant in _LOOKALIKES.items():
        if name in there and meant not in splits:
            raise DataError(f"{there[name]}: rename it to {meant!r}; the splits are called train, val and test")
    return splits


def check_groups(names: Mapping[str, Sequence[str]], pattern: str | None) -> None:
    """Raises `DataError` if a group (patient) has samples in two splits. names: split -> names of its samples."""
    if pattern is None:
        return
    owner: dict[str, str] = {}
    shared: dict[str, str] = {}
    for split, members in names.items():
        for group in group_names(members, pattern):
            first = owner.setdefault(group, split)
            if first != split:
                shared[group] = f"{group} ({first} and {split})"
    if shared:
        raise DataError(
            f"data.groups: {len(shared)} of {len(owner)} groups have images in more than one split: "
            f"{few(list(shared.values()))}; move each to one split"
        )
