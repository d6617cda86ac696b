"""What is done to a volume before the network sees it: decided once from the training cases, stored with the run.

``fingerprint`` takes the facts of one case, ``plan_preprocessing`` decides (:class:`Preprocessing`, which is JSON),
``prepare`` applies the decision and ``restore_labels`` brings a prediction back to the grid of the file.

The decisions follow nnU-Net (Isensee et al., Nature Methods 18, 203-211, 2021). In the order of ``prepare``: axes to
RAS, crop to what is not zero, normalise, resample. Normalising comes before resampling because interpolation blurs the
border between a background of exact zeros and the tissue.

Images are resampled by cubic splines, one axis after the other: each axis is one small matrix, so memory stays at a few
copies of one channel. Labels are resampled by the nearest voxel. Suffix XYZ: the axes of the prepared grid, RAS+.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from nibabel.affines import from_matvec
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator
from scipy import ndimage
from scipy.interpolate import make_interp_spline

from vision_gates.errors import ConfigError, DataError
from vision_gates.volumes.geometry import Geometry, reorient, reorient_like

if TYPE_CHECKING:
    from vision_gates.volumes.reading import Volume

__all__ = [
    "CaseFingerprint",
    "ChannelPlan",
    "Prepared",
    "Preprocessing",
    "fingerprint",
    "plan_preprocessing",
    "prepare",
    "restore_labels",
]

SAMPLES = 10_000  # foreground voxels a case contributes to the intensity statistics
ANISOTROPY = 3.0  # spacings (and sizes) further apart than this make an axis one of low resolution
BACKGROUND = 0.25  # part of the volume that must be empty for it to be cropped, or left out of the statistics
SAME_SPACING = 1e-3  # relative; an axis this near its target is not resampled

Order = Literal[0, 1, 3]
Three = tuple[float, float, float]
Samples = Annotated[
    NDArray[np.float32],
    BeforeValidator(lambda values: np.asarray(values, dtype=np.float32)),
    PlainSerializer(lambda values: values.tolist(), return_type=list[list[float]], when_used="json"),
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)


class CaseFingerprint(_Frozen):
    """Facts of one training case, its axes in RAS order."""

    shape: tuple[int, int, int] = Field(description="voxels along x, y and z")
    spacing: Three = Field(description="mm along x, y and z")
    box: tuple[int, int, int] = Field(description="size of the box around the voxels that are not 0 in every channel")
    modalities: tuple[str | None, ...] = Field(description="of each channel: CT, MR, ... or unknown")
    zeros: tuple[float, ...] = Field(description="of each channel: part of the voxels that are exactly 0")
    intensities: Samples = Field(description="(C, N) a sample of the foreground, N at most 10,000")


class ChannelPlan(_Frozen):
    """How the intensities of one channel are normalised.

    ``ct``: clipped to ``low`` and ``high``, then (value - ``mean``) / ``std``, with the numbers of the training set.
    ``zscore``: the same with each case's own mean and deviation; with ``nonzero`` those of the voxels that are not 0,
    and the others stay 0.
    """

    kind: Literal["ct", "zscore"]
    low: float | None = None
    high: float | None = None
    mean: float | None = None
    std: float | None = Field(default=None, gt=0)
    nonzero: bool = False

    @model_validator(mode="after")
    def _complete(self) -> "ChannelPlan":
        if self.kind == "ct" and None in (self.low, self.high, self.mean, self.std):
            raise ValueError("kind ct needs low, high, mean and std")
        return self


class Preprocessing(_Frozen):
    """The whole decision; ``model_dump_json`` and ``model_validate_json`` store and read it."""

    orientation: Literal["RAS"] = "RAS"
    spacing: Three | None = Field(description="target in mm along x, y and z; none: every case keeps its own")
    channels: tuple[ChannelPlan, ...] = Field(min_length=1)
    crop: bool = Field(default=False, description="cut to the box around the voxels that are not 0 in every channel")
    low_resolution_axis: Literal[0, 1, 2] | None = Field(default=None, description="the axis of thick slices")
    order: Order = Field(default=3, description="interpolation of images: 0 nearest, 1 linear, 3 cubic spline")
    low_resolution_order: Order = Field(default=0, description="the same along low_resolution_axis")

    @model_validator(mode="after")
    def _positive(self) -> "Preprocessing":
        if self.spacing is not None and not all(0 < value < np.inf for value in self.spacing):
            raise ValueError(f"spacing must be three positive numbers of mm, not {list(self.spacing)}")
        return self


@dataclass(frozen=True, eq=False)
class Prepared:
    """A case as the network sees it.

    Attributes:
        image: (C, X, Y, Z) float32, C-contiguous.
        labels: (X, Y, Z) uint8, int16 where a label is above 255 or negative, or None.
        geometry: of that grid.
        source: grid of the file.
    """

    image: NDArray[np.float32]
    labels: NDArray[Any] | None
    geometry: Geometry
    source: Geometry


def fingerprint(images: "Sequence[Volume]", labels: "Volume | None", *, seed: int) -> CaseFingerprint:
    """The facts of one case.

    Args:
        images: its channels.
        labels: the foreground is where they are above 0; None: where any channel is not 0.
        seed: of the sample of intensities.

    Raises:
        DataError: the volumes do not lie on one grid.
    """
    _check_grids(images, labels)
    turned, geometry = reorient(images[0].array, images[0].geometry)
    channels = [turned, *(reorient(image.array, image.geometry)[0] for image in images[1:])]
    occupied = _occupied(channels)
    foreground = occupied if labels is None else reorient(labels.array, labels.geometry)[0] > 0
    where = _sample(foreground, SAMPLES, np.random.default_rng(seed))
    return CaseFingerprint(
        shape=geometry.shape,
        spacing=geometry.spacing,
        box=tuple(part.stop - part.start for part in _box(occupied)),
        modalities=tuple(image.modality for image in images),
        zeros=tuple(1 - np.count_nonzero(channel) / channel.size for channel in channels),
        intensities=np.stack([channel[where] for channel in channels]).astype(np.float32),
    )


def plan_preprocessing(
    fingerprints: Sequence[CaseFingerprint],
    *,
    channel_names: Sequence[str],
    spacing: Literal["auto"] | Three | None = "auto",
    normalize: Literal["auto", "ct", "zscore"] = "auto",
    crop: Literal["auto"] | bool = "auto",
) -> Preprocessing:
    """Decides the preprocessing of all cases, later ones included, from the training cases.

    Args:
        fingerprints: of the training cases.
        channel_names: one a channel; a name with the word CT makes it CT where the files do not say so.
        spacing: mm along x, y and z; "auto": the median, along an axis of thick slices the 10th percentile; None: no
            resampling.
        normalize: of every channel; "auto": by modality and name.
        crop: "auto": where that removes more than a quarter of the volume on average.

    Raises:
        DataError: there is no case, or no foreground to take the intensities of CT from.
        ConfigError: the number of names is not that of the channels.
    """
    if not fingerprints:
        raise DataError("there is no training case to plan the preprocessing from")
    for case in fingerprints:
        if len(case.modalities) != len(channel_names):
            raise ConfigError(f"a case has {len(case.modalities)} channels, but the names are {list(channel_names)}")
    if crop == "auto":
        kept = np.mean([np.prod(case.box) / np.prod(case.shape) for case in fingerprints])
        crop = bool(kept < 1 - BACKGROUND)
    spacings = np.array([case.spacing for case in fingerprints])
    median = np.median(spacings, axis=0)
    shapes = np.array([case.box if crop else case.shape for case in fingerprints])
    target = _target_spacing(spacings, shapes) if spacing == "auto" else spacing
    # An axis is thick where either grid is: nothing lies between slices far apart that interpolation could find.
    thick = _thick_axis(median)
    if thick is None and target is not None:
        thick = _thick_axis(np.array(target))
    return Preprocessing(
        spacing=target,
        channels=tuple(_plan_channel(fingerprints, index, name, normalize) for index, name in enumerate(channel_names)),
        crop=crop,
        low_resolution_axis=thick,
    )


def prepare(plan: Preprocessing, images: "Sequence[Volume]", labels: "Volume | None" = None) -> Prepared:
    """Applies a plan to one case.

    The resampled grid has the centre of the (cropped) source and covers it whole; the nearest voxel of the source
    continues it where it is larger.

    Args:
        plan: the decision.
        images: the channels, in the order of ``plan.channels``.
        labels: their labels, on the same grid.

    Raises:
        DataError: the number of channels is not that of the plan, or the volumes do not lie on one grid.
    """
    if len(images) != len(plan.channels):
        found = f"{len(images)} channel{'s' if len(images) != 1 else ''}"
        where = f"{images[0].source}: " if images else ""
        raise DataError(f"{where}{found} for a model of {len(plan.channels)}: give its channels, in its order")
    _check_grids(images, labels)
    turned = [reorient(image.array, image.geometry, plan.orientation) for image in images]
    channels, geometry = [array for array, _ in turned], turned[0][1]
    box = _box(_occupied(channels)) if plan.crop else (slice(None),) * 3
    channels, geometry = [channel[box] for channel in channels], _cut(geometry, box)
    grid, axes = _resampled_grid(geometry, plan)

    image_CXYZ = np.empty((len(channels), *grid.shape), dtype=np.float32)
    for index, (channel, how) in enumerate(zip(channels, plan.channels, strict=True)):
        image_CXYZ[index] = _resample_image(_normalise(channel, how), axes)
    labels_XYZ = None
    if labels is not None:
        part = reorient(labels.array, labels.geometry, plan.orientation)[0][box]
        labels_XYZ = _take(part.astype(_smallest_dtype(labels), order="C"), [axis.nearest() for axis in axes])
    return Prepared(image_CXYZ, labels_XYZ, grid, images[0].geometry)


def restore_labels(labels: NDArray[Any], geometry: Geometry, source: Geometry) -> NDArray[Any]:
    """Labels of a prepared grid on the grid of the file: of the nearest voxel, 0 outside the prepared grid.

    Args:
        labels: (X, Y, Z) integers.
        geometry: of that grid (``Prepared.geometry``).
        source: grid of the file (``Prepared.source``).

    Returns:
        (I, J, K) of the same dtype, C-contiguous. Where nothing was resampled this undoes ``prepare`` exactly.

    Raises:
        ValueError: the labels have not the shape of their geometry.
    """
    if labels.shape != geometry.shape:
        raise ValueError(f"the labels are {labels.shape}, their grid is {geometry.shape}")
    turned = _turned(source, geometry.orientation)
    between = np.linalg.inv(geometry.affine) @ turned.affine  # indices of the source -> indices of the labels
    scale = np.diag(between)[:3]
    tilt = between[:3, :3] - np.diag(scale)
    if scale.min() <= 0 or (np.abs(tilt) @ turned.shape).max() > 0.01:  # voxels, over the whole volume
        # scipy walks over the output and builds no grid of coordinates.
        restored = ndimage.affine_transform(labels, between, output_shape=turned.shape, order=0, mode="grid-constant")
        return np.ascontiguousarray(reorient_like(restored, turned, source))
    restored = np.zeros(turned.shape, dtype=labels.dtype)
    indices = [_round(np.arange(turned.shape[axis]) * scale[axis] + between[axis, 3]) for axis in range(3)]
    inside = [(index >= 0) & (index < size) for index, size in zip(indices, labels.shape, strict=True)]
    if all(part.any() for part in inside):
        # Indices grow along an axis: those inside are one run.
        region = tuple(slice(int(part.argmax()), int(part.argmax() + part.sum())) for part in inside)
        restored[region] = _take(labels, [index[part] for index, part in zip(indices, inside, strict=True)])
    return np.ascontiguousarray(reorient_like(restored, turned, source))


def _turned(geometry: Geometry, codes: str) -> Geometry:
    nothing = np.broadcast_to(np.uint8(0), geometry.shape)  # takes no memory
    return reorient(nothing, geometry, codes)[1]


def _check_grids(images: "Sequence[Volume]", labels: "Volume | None") -> None:
    """`DataError` unless all volumes lie on the grid of the first image, if need be with other axes."""
    first = images[0]
    for volume in (*images[1:], *([] if labels is None else [labels])):
        differences = first.geometry.differences(_turned(volume.geometry, first.geometry.orientation))
        if differences:
            raise DataError(
                f"{volume.source}: not on the grid of {first.source}: {'; '.join(differences)}; "
                "resample it onto that grid, or correct its header"
            )


def _occupied(channels: Sequence[NDArray[Any]]) -> NDArray[np.bool_]:
    """(X, Y, Z) where any channel is not 0."""
    occupied = channels[0] != 0
    for channel in channels[1:]:
        occupied |= channel != 0
    return occupied


def _box(occupied: NDArray[np.bool_]) -> tuple[slice, slice, slice]:
    """The smallest box around the True voxels; everything where there are none."""
    parts = []
    for axis in range(3):
        along = np.flatnonzero(occupied.any(axis=tuple({0, 1, 2} - {axis})))
        parts.append(slice(int(along[0]), int(along[-1]) + 1) if along.size else slice(0, occupied.shape[axis]))
    return parts[0], parts[1], parts[2]


def _cut(geometry: Geometry, box: tuple[slice, ...]) -> Geometry:
    parts = [range(size)[part] for size, part in zip(geometry.shape, box, strict=True)]
    first = from_matvec(np.eye(3), [part.start for part in parts])
    return Geometry((len(parts[0]), len(parts[1]), len(parts[2])), geometry.affine @ first)


def _sample(mask: NDArray[np.bool_], limit: int, generator: np.random.Generator) -> tuple[NDArray[np.intp], ...]:
    """Indices of at most ``limit`` True voxels, each equally likely, plane by plane to save memory."""
    counts = np.count_nonzero(mask, axis=(1, 2))
    total = int(counts.sum())
    chosen = (
        np.arange(total) if total <= limit else np.sort(generator.choice(total, limit, replace=False, shuffle=False))
    )
    found = []
    for plane, (end, count) in enumerate(zip(np.cumsum(counts), counts, strict=True)):
        ranks = chosen[slice(*np.searchsorted(chosen, (end - count, end)))] - (end - count)
        if ranks.size:
            flat = np.flatnonzero(mask[plane])[ranks]
            found.append(np.stack([np.full_like(flat, plane), *np.unravel_index(flat, mask.shape[1:])]))
    return tuple(np.concatenate(found, axis=1)) if found else (np.empty(0, dtype=np.intp),) * 3


def _thick_axis(spacing: NDArray[np.float64]) -> Literal[0, 1, 2] | None:
    axes: tuple[Literal[0, 1, 2], ...] = (0, 1, 2)
    return axes[int(spacing.argmax())] if spacing.max() > ANISOTROPY * spacing.min() else None


def _target_spacing(spacings: NDArray[np.float64], shapes: NDArray[np.int64]) -> Three:
    """Median spacing; along an axis of few thick slices the 10th percentile, but not finer than in the plane."""
    target, size = np.median(spacings, axis=0), np.median(shapes, axis=0)
    axis = _thick_axis(target)
    if axis is not None:
        others = [other for other in range(3) if other != axis]
        if size[axis] * ANISOTROPY < size[others].min():
            target[axis] = max(np.percentile(spacings[:, axis], 10), target[others].max())
    x, y, z = target.round(6).tolist()
    return x, y, z


def _plan_channel(cases: Sequence[CaseFingerprint], index: int, name: str, normalize: str) -> ChannelPlan:
    if normalize == "auto":
        modalities = {case.modalities[index] for case in cases} - {None}
        named = re.search(r"(?<![a-z0-9])ct(?![a-z0-9])", name.lower())  # also "ct_arterial", unlike \b
        normalize = "ct" if modalities == {"CT"} or named else "zscore"
    if normalize == "zscore":
        return ChannelPlan(kind="zscore", nonzero=bool(np.median([case.zeros[index] for case in cases]) >= BACKGROUND))
    values = np.concatenate([case.intensities[index] for case in cases]).astype(np.float64)
    if not values.size:
        raise DataError(
            f"channel {name!r}: no training case has a labelled voxel, but CT is normalised by the intensities there; "
            "check the labels, or set normalize to zscore"
        )
    low, high = np.percentile(values, (0.5, 99.5)).tolist()
    mean, std = float(values.mean()), float(values.std())
    return ChannelPlan(kind="ct", low=low, high=high, mean=mean, std=_divisor(mean, std))


def _divisor(mean: float, std: float) -> float:
    """The deviation, or 1 where it is no more than rounding: a constant image becomes 0, whatever its unit."""
    return std if std > 1e-6 * abs(mean) else 1.0


def _normalise(array: NDArray[Any], how: ChannelPlan) -> NDArray[np.float32]:
    """A normalised copy, C-contiguous."""
    image = np.array(array, dtype=np.float32, order="C")
    if how.kind == "ct":
        assert how.mean is not None and how.std is not None  # by _complete
        np.clip(image, how.low, how.high, out=image)
        image -= how.mean
        image /= how.std
        return image
    counted: Any = image != 0 if how.nonzero and image.any() else True
    mean = float(image.mean(dtype=np.float64, where=counted))
    image -= mean
    if counted is not True:
        image[~counted] = 0
    std = float(np.sqrt(np.square(image).mean(dtype=np.float64, where=counted)))
    image /= _divisor(mean, std)
    return image


@dataclass(frozen=True)
class _Axis:
    """New voxel n lies at ``start + n * step`` voxels of the old axis."""

    old: int
    new: int
    start: float
    step: float
    order: int

    @property
    def unchanged(self) -> bool:
        return self.old == self.new and self.start == 0 and self.step == 1

    def positions(self) -> NDArray[np.float64]:
        return np.clip(self.start + self.step * np.arange(self.new), 0, self.old - 1)

    def nearest(self) -> NDArray[np.intp]:
        return _round(self.positions()).clip(0, self.old - 1)

    def matrix(self) -> NDArray[np.float32]:
        """(new, old): interpolation is linear in the values, so its columns are the interpolated unit vectors.

        A natural spline reproduces straight lines up to the border. Towards larger voxels a Gaussian keeps what the
        new grid cannot hold from folding back into the image (the deviation is scikit-image's).
        """
        old = np.arange(self.old)
        ends = "natural" if self.order == 3 else None
        matrix = make_interp_spline(old, np.eye(self.old), k=self.order, bc_type=ends)(self.positions())
        if self.step > 1:
            smooth = ndimage.gaussian_filter1d(np.eye(self.old), (self.step - 1) / 2, axis=0, mode="nearest")
            matrix = matrix @ smooth
        matrix[np.abs(matrix) < 1e-9] = 0  # subnormal numbers would be slow
        return matrix.astype(np.float32)


def _resampled_grid(geometry: Geometry, plan: Preprocessing) -> tuple[Geometry, list[_Axis]]:
    axes = []
    for axis, (size, spacing) in enumerate(zip(geometry.shape, geometry.spacing, strict=True)):
        order = plan.low_resolution_order if axis == plan.low_resolution_axis else plan.order
        step = 1.0 if plan.spacing is None else plan.spacing[axis] / spacing
        if abs(step - 1) <= SAME_SPACING:
            axes.append(_Axis(size, size, 0.0, 1.0, order))
            continue
        new = max(1, int(np.ceil(size / step - 0.01)))
        axes.append(_Axis(size, new, (size - 1) / 2 - (new - 1) / 2 * step, step, order))
    change = from_matvec(np.diag([axis.step for axis in axes]), [axis.start for axis in axes])
    return Geometry((axes[0].new, axes[1].new, axes[2].new), geometry.affine @ change), axes


def _resample_image(image_XYZ: NDArray[np.float32], axes: Sequence[_Axis]) -> NDArray[np.float32]:
    """The axes that shrink most come first; an unchanged axis costs nothing."""
    for index in sorted(range(3), key=lambda index: axes[index].new / axes[index].old):
        axis = axes[index]
        if axis.unchanged:
            continue
        if axis.order == 0 or axis.old == 1:
            image_XYZ = image_XYZ.take(axis.nearest(), axis=index)
        elif index == 0:
            flat = axis.matrix() @ image_XYZ.reshape(axis.old, -1)
            image_XYZ = flat.reshape(axis.new, *image_XYZ.shape[1:])
        else:
            image_XYZ = axis.matrix() @ image_XYZ if index == 1 else image_XYZ @ axis.matrix().T
    return image_XYZ


def _take(array: NDArray[Any], indices: Sequence[NDArray[np.intp]]) -> NDArray[Any]:
    """``array[np.ix_(*indices)]``, one axis at a time (faster), the ones that shrink most first."""
    for axis in sorted(range(3), key=lambda axis: len(indices[axis]) / array.shape[axis]):
        if not np.array_equal(indices[axis], np.arange(array.shape[axis])):
            array = array.take(indices[axis], axis=axis)
    return array


def _round(positions: NDArray[np.float64]) -> NDArray[np.intp]:
    """Nearest voxel; halves all go up, also where rounding errors have moved them a little."""
    return np.floor(positions + 0.5 + 1e-6).astype(np.intp)


def _smallest_dtype(labels: "Volume") -> type[np.uint8] | type[np.int16]:
    low, high = int(labels.array.min()), int(labels.array.max())
    if low >= 0 and high <= 255:
        return np.uint8
    if low < -(2**15) or high >= 2**15:
        raise DataError(f"{labels.source}: labels run from {low} to {high}; renumber them to 0 ... 32767 at most")
    return np.int16
