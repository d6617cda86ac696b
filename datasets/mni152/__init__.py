"""T1 brain MRI slices with tissue labels (background, CSF, grey matter, white matter) for segmentation demos and tests.

Source: the ICBM 152 non-linear symmetric template of 2009 (Fonov et al., NeuroImage 2011), skull-stripped, with its
tissue probability maps, as nilearn ships them: nothing is downloaded. Copyright (C) 1993-2009 Louis Collins, McConnell
Brain Imaging Centre, Montreal Neurological Institute, McGill University; free to use, copy, modify and distribute with
that notice. The template is an average of 152 adults, so results on it say nothing about patients.

Labels: 0 outside the brain mask, else 1 + argmax(1 - grey - white, grey, white). "CSF" is therefore all brain that is
neither grey nor white matter.

Slices: one sample is one slice with at least 10 % of the largest slice's brain area. Along the volume they are cut
into seven contiguous blocks, train test train val train test train, so that each part sees low, middle and high slices.
The slices between two blocks are used by neither: ``gap_mm``, by default 6 mm, which is 3 slices at 2 mm and 6 at 1 mm.
With ``neighbours`` the gap counts from the outermost channels, so no slice of a validation or test image, neighbours
included, is within ``gap_mm`` of a slice the training has seen. The template is symmetric: left and right are mirror
images. ``plane: sagittal`` therefore uses one hemisphere only, or the held-out slices would be training slices seen in
a mirror.

Geometry: slices are cut and padded to 96 x 96 pixels (2 mm) or 192 x 192 (1 mm), which holds the whole brain in each
plane. Axial: anterior up; coronal: superior up; sagittal: superior up, anterior to the right. Axial and coronal
slices show the patient's left on the left (neurological view).
"""

import math
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from vision_gates.datasets.base import DataSplits, ImageDataConfig, Sample, SliceView, Split
from vision_gates.errors import ConfigError
from vision_gates.volumes.geometry import Geometry
from vision_gates.volumes.writing import write_labels, write_volume

__all__ = ["Config", "load", "write_volumes"]

Plane = Literal["axial", "coronal", "sagittal"]
CLASS_NAMES = ("background", "csf", "grey_matter", "white_matter")
_AXIS: dict[str, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
_VIEW: dict[str, str] = {"sagittal": "IAR", "coronal": "IRA", "axial": "PRS"}  # rows, columns, slices: see _stacks
_LAYOUT = ("train", "test", "train", "val", "train", "test", "train")
_HELD_OUT_FRACTION = 0.12  # of the usable slices, for each of the three held-out blocks


class Config(ImageDataConfig):
    """Options of the slices; see the module's text for what a gap is."""

    type: Literal["mni152"] = "mni152"
    resolution: Literal[1, 2] = Field(2, description="mm per pixel and between slices")
    plane: Plane = "axial"
    neighbours: int = Field(0, ge=0, description="slices on each side as further channels: 2 * neighbours + 1 in all")
    gap_mm: float = Field(6.0, gt=0, description="unused space between the blocks of two splits")


class _Slices(Split):
    """Slices of one volume. It carries the volume, 5 MB at 2 mm, so that a spawned worker need not load it again."""

    def __init__(
        self, t1_NHW: NDArray[np.float32], labels_NHW: NDArray[np.uint8], indices: list[int], config: Config
    ) -> None:
        self.names = [f"{config.plane}_{index:03d}" for index in indices]
        self.indices, self._neighbours = indices, config.neighbours
        self._t1_NHW, self._labels_NHW = t1_NHW, labels_NHW

    def read(self, index: int) -> Sample:
        """(H, W, 2 * neighbours + 1) float32 in 0..1, the slice itself in the middle; (H, W) int64 labels."""
        centre, k = self.indices[index], self._neighbours
        # Past the end of the volume the outermost slice repeats.
        channels = np.clip(np.arange(centre - k, centre + k + 1), 0, len(self._t1_NHW) - 1)
        image_HWC = np.ascontiguousarray(self._t1_NHW[channels].transpose(1, 2, 0))
        return Sample(image_HWC, self._labels_NHW[centre].astype(np.int64), self.names[index])


@lru_cache(maxsize=2)
def _volumes(resolution: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """T1 and labels, (X, Y, Z) in RAS order. About 4 s at 2 mm (nilearn resamples its 1 mm files) and 1 s at 1 mm."""
    try:
        from nilearn import datasets
    except ImportError as error:
        raise ConfigError("data.type=mni152 needs nilearn: pip install 'vision-gates[train]'") from error
    t1, grey, white, brain = (
        np.asarray(getattr(datasets, f"load_mni152_{name}")(resolution=resolution).dataobj)
        for name in ("template", "gm_template", "wm_template", "brain_mask")
    )
    tissue = 1 + np.argmax(np.stack([1 - grey - white, grey, white]), axis=0)
    labels = np.where(brain > 0, tissue, 0).astype(np.uint8)
    return np.clip(t1, 0, 1).astype(np.float32), labels


def write_volumes(folder: str | Path, *, resolution: Literal[1, 2] = 2) -> tuple[Path, Path]:
    """Write the whole volume as mni152_t1.nii.gz, its labels as mni152_labels.nii.gz; returns both paths."""
    from nilearn import datasets

    t1, labels = _volumes(resolution)
    affine = datasets.load_mni152_template(resolution=resolution).affine
    geometry = Geometry((t1.shape[0], t1.shape[1], t1.shape[2]), affine)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / "mni152_t1.nii.gz", folder / "mni152_labels.nii.gz"
    write_volume(paths[0], t1, geometry)
    write_labels(paths[1], labels, geometry, names=CLASS_NAMES)
    return paths


def _centred(volume_NHW: NDArray, centre: tuple[int, int], size: int) -> NDArray:
    """Cuts or zero-pads every slice to size x size around ``centre``."""
    padded = np.pad(volume_NHW, ((0, 0), (size, size), (size, size)))
    top, left = (c + size - size // 2 for c in centre)
    return np.ascontiguousarray(padded[:, top : top + size, left : left + size])


@lru_cache(maxsize=4)
def _stacks(resolution: int, plane: Plane) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """(slices, size, size) T1 and labels in viewing orientation."""
    size = 192 // resolution
    t1, labels = (np.moveaxis(volume, _AXIS[plane], 0) for volume in _volumes(resolution))
    # (N, first, second) in RAS: the second axis becomes the rows, flipped so that anterior or superior is on top.
    t1, labels = (volume.transpose(0, 2, 1)[:, ::-1] for volume in (t1, labels))
    spans = [np.flatnonzero((labels > 0).any(axis=axes)) for axes in ((0, 2), (0, 1))]
    centre = (int(spans[0][0] + spans[0][-1] + 1) // 2, int(spans[1][0] + spans[1][-1] + 1) // 2)
    return _centred(t1, centre, size), _centred(labels, centre, size)


def _blocks(usable: list[int], gap: int) -> dict[str, list[int]]:
    """Deals contiguous blocks of slices to the splits as in _LAYOUT, with ``gap`` unused slices in between."""
    room = len(usable) - gap * (len(_LAYOUT) - 1)
    held_out = max(1, round(room * _HELD_OUT_FRACTION))
    num_train_blocks = _LAYOUT.count("train")
    train_room = room - held_out * (len(_LAYOUT) - num_train_blocks)
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    if train_room < num_train_blocks:
        return parts
    position, train_blocks = 0, 0
    for part in _LAYOUT:
        length = held_out
        if part == "train":
            length = train_room // num_train_blocks + (train_blocks < train_room % num_train_blocks)
            train_blocks += 1
        parts[part].extend(usable[position : position + length])
        position += length + gap
    return parts


def load(config: Config) -> DataSplits:
    """The three splits. Raises `ConfigError` when gap and neighbours leave no slices to train on."""
    t1_NHW, labels_NHW = _stacks(config.resolution, config.plane)
    area_N = (labels_NHW > 0).sum(axis=(1, 2))
    usable = np.flatnonzero(area_N >= 0.1 * area_N.max()).tolist()
    if config.plane == "sagittal":
        usable = [index for index in usable if index <= (len(t1_NHW) - 1) // 2]
    # gap_mm counts from the outermost channel of one block to that of the next, hence the neighbours on both sides.
    gap = math.ceil(config.gap_mm / config.resolution) + 2 * config.neighbours
    parts = _blocks(usable, gap)
    if not parts["train"]:
        raise ConfigError(
            f"data.gap_mm={config.gap_mm:g}, data.neighbours={config.neighbours}: {len(usable)} {config.plane} slices "
            f"leave none to train on; lower one of them or set data.resolution=1"
        )
    train, val, test = (_Slices(t1_NHW, labels_NHW, indices, config) for indices in parts.values())
    mm = float(config.resolution)
    view = SliceView(_VIEW[config.plane], (mm, mm, mm), 0.0, 1.0, "T1", config.neighbours)
    return DataSplits("segmentation", CLASS_NAMES, 2 * config.neighbours + 1, train, val, test, view)
