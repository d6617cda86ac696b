"""Slices of volumes as pictures in radiological orientation.

As if one looked from the feet (axial), at the face (coronal) or from the patient's left (sagittal): the patient's right
is on the left of the picture, the front above or on the left, the head above. Pixels are square whatever the spacing.
Volumes (X, Y, Z) have their axes in RAS order. Suffix HW: rows and columns of a picture.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from vision_gates.volumes.geometry import Geometry
from vision_gates.volumes.preprocessing import ChannelPlan

__all__ = [
    "AXIAL",
    "CORONAL",
    "PLANES",
    "SAGITTAL",
    "Plane",
    "SamplePlane",
    "fullest",
    "grey_window",
    "pixel_of",
    "sample_planes",
    "square",
    "turned",
]

_SAMPLE_VOXELS = 2_000_000  # of a volume, for its percentiles
_SAMPLE_SIDE = 256  # pixels of a sample's longest side, about what a view has on the page


class Plane(NamedTuple):
    """A kind of slice: the axis it lies across (x, y or z) and the letters at its left, right, upper and lower side."""

    name: str
    axis: int
    letters: str


AXIAL, CORONAL, SAGITTAL = Plane("axial", 2, "RLAP"), Plane("coronal", 1, "RLHF"), Plane("sagittal", 0, "APHF")
PLANES = {plane.axis: plane for plane in (SAGITTAL, CORONAL, AXIAL)}
"""By the axis they lie across."""


@dataclass(frozen=True, eq=False)
class SamplePlane:
    """A slice of a case that a report shows.

    Attributes:
        caption: such as "axial, slice 14 of 36".
        letters: of its `Plane`.
        image_HW: in 0..1.
        target_HW, prediction_HW: labels, as many rows and columns.
    """

    caption: str
    letters: str
    image_HW: NDArray[np.float32]
    target_HW: NDArray[Any]
    prediction_HW: NDArray[Any]


def sample_planes(
    planes: Iterable[Plane],
    image_XYZ: NDArray[Any],
    target_XYZ: NDArray[Any],
    prediction_XYZ: NDArray[Any],
    *,
    spacing: tuple[float, float, float],
    channel: ChannelPlan,
) -> list[SamplePlane]:
    """Of each plane the slice with most truth; where there is none, with most prediction, else the middle one.

    Args:
        planes: which.
        image_XYZ: normalised by ``channel``.
        target_XYZ, prediction_XYZ: labels.
        spacing: mm between neighbouring voxels.
        channel: how the image was normalised.
    """
    shape = image_XYZ.shape
    grid = Geometry((shape[0], shape[1], shape[2]), np.diag([*spacing, 1.0]))
    low, high = grey_window(image_XYZ, channel, normalised=True)
    found = target_XYZ if target_XYZ.any() else prediction_XYZ
    shown = []
    for plane in planes:
        index, pixel = fullest(found, plane.axis), pixel_of(grid, plane)
        image_HW, target_HW, prediction_HW = (
            turned(array.take(index, axis=plane.axis)) for array in (image_XYZ, target_XYZ, prediction_XYZ)
        )
        shown.append(
            SamplePlane(
                f"{plane.name}, slice {index + 1} of {shape[plane.axis]}",
                plane.letters,
                square(np.clip((image_HW.astype(np.float32) - low) / (high - low), 0.0, 1.0), pixel, _SAMPLE_SIDE),
                square(target_HW, pixel, _SAMPLE_SIDE, nearest=True),
                square(prediction_HW, pixel, _SAMPLE_SIDE, nearest=True),
            )
        )
    return shown


def fullest(labels_XYZ: NDArray[Any], axis: int) -> int:
    """Index of the slice across ``axis`` with most labelled voxels; the middle one where there are none."""
    counts = np.count_nonzero(labels_XYZ, axis=tuple({0, 1, 2} - {axis}))
    return int(counts.argmax()) if counts.any() else len(counts) // 2


def turned(slice_AB: NDArray[Any]) -> NDArray[Any]:
    """Rows and columns in radiological orientation of a slice whose two axes run as in RAS: both run backwards."""
    return slice_AB[::-1, ::-1].T


def pixel_of(grid: Geometry, plane: Plane) -> tuple[float, float]:
    """Height and width in mm of a pixel of a slice of a RAS grid, once it is `turned`."""
    width, height = (grid.spacing[axis] for axis in range(3) if axis != plane.axis)
    return height, width


def square(picture_HW: NDArray[Any], pixel: tuple[float, float], side: int, *, nearest: bool = False) -> NDArray[Any]:
    """The picture with square pixels: as small as the smaller of its own, at most ``side`` along the longest side.

    Args:
        picture_HW: grey values, or labels.
        pixel: height and width of its pixels.
        side: in pixels.
        nearest: for labels.
    """
    lengths = [count * mm for count, mm in zip(picture_HW.shape, pixel, strict=True)]
    size = max(min(pixel), max(lengths) / side)
    shape = [min(side, max(1, round(length / size))) for length in lengths]
    picture_HW = np.ascontiguousarray(picture_HW.astype(np.int16) if nearest else picture_HW)
    for axis in (0, 1):  # one after the other: OpenCV averages areas only where both shrink
        if shape[axis] != picture_HW.shape[axis]:
            smooth = cv2.INTER_AREA if shape[axis] < picture_HW.shape[axis] else cv2.INTER_LINEAR
            size_WH = (shape[1], picture_HW.shape[0]) if axis == 1 else (picture_HW.shape[1], shape[0])
            how = cv2.INTER_NEAREST_EXACT if nearest else smooth
            picture_HW = cv2.resize(picture_HW, size_WH, interpolation=how)
    return picture_HW


def grey_window(image: NDArray[Any], channel: ChannelPlan, *, normalised: bool = False) -> tuple[float, float]:
    """Intensities shown as black and as white: of CT what the network was trained on, else 0.5 % to 99.5 %.

    Args:
        image: (I, J, K) of one channel.
        channel: how it is, or with ``normalised`` was, normalised.
        normalised: whether it has been.
    """
    if channel.kind == "ct":
        low, high, mean, std = channel.low, channel.high, channel.mean, channel.std
        assert low is not None and high is not None and mean is not None and std is not None  # by ChannelPlan
        if normalised:
            low, high = (low - mean) / std, (high - mean) / std
        return low, max(high, low + 1e-6)
    # Evenly spaced along every axis: percentiles need no more, and a large volume would take seconds.
    stride = max(1, int(np.ceil((image.size / _SAMPLE_VOXELS) ** (1 / 3))))
    low, high = np.percentile(image[::stride, ::stride, ::stride], [0.5, 99.5])
    if high <= low:  # nearly constant: the rare other voxels are what there is to see
        low, high = image.min(), image.max()
    return float(low), float(high) if high > low else float(low) + 1.0
