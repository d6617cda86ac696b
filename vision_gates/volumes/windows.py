"""The windows of a volume: where they lie, what they weigh, what memory they take. Without PyTorch.

Suffixes: B windows, C channels, K classes.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vision_gates.errors import ConfigError

__all__ = [
    "HOST",
    "InferencePlan",
    "Start",
    "check",
    "covered",
    "fill_windows",
    "gaussian",
    "neighbour_slices",
    "plan_windows",
    "views",
    "windows",
]

HOST: Any = SimpleNamespace(type="cpu")
"""The place of NumPy arrays, where a torch.device would stand."""

_SIGMA = 1 / 8  # of the window's size
_LEAST_WEIGHT = 1e-3  # of the Gaussian: its corners would vanish in half precision
_CHUNK_VOXELS = 2**22  # that turn into labels at a time
_FLOAT = 4  # bytes

Start = tuple[int, ...]  # of a window along the three axes; negative where the volume is smaller than the window


@dataclass(frozen=True)
class InferencePlan:
    """The windows of a volume, and the memory that predicting its labels takes besides the network's own.

    Attributes:
        shape: (C, X, Y, Z) of the image.
        window: voxels of a window along X, Y and Z; one along ``slice_axis``.
        starts: along each axis, the first voxels of the windows.
        slab_axis: the axis along which finished voxels turn into labels.
        slice_axis: None in three dimensions.
        mirror: axes of the volume whose mirror images are averaged.
        device: where the network computes: `HOST`, or a torch.device.
        blend_device: where the probabilities are added up.
        blend_dtype: of the sums; NumPy's or PyTorch's.
    """

    shape: tuple[int, int, int, int]
    window: tuple[int, int, int]
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    slab_axis: int
    slice_axis: int | None
    neighbours: int
    num_classes: int
    mirror: tuple[int, ...]
    batch_size: int
    device: Any
    blend_device: Any
    blend_dtype: Any

    @property
    def num_windows(self) -> int:
        return math.prod(len(starts) for starts in self.starts)

    @property
    def views(self) -> int:
        return 2 ** len(self.mirror)

    @property
    def sides(self) -> str:
        """Of a window, as "128 x 128 x 128"."""
        return " x ".join(str(side) for axis, side in enumerate(self.window) if axis != self.slice_axis)

    @property
    def in_channels(self) -> int:
        """Channels that the network sees: in two dimensions, those of the neighbouring slices too."""
        return self.shape[0] * (2 * self.neighbours + 1)

    @property
    def label_dtype(self) -> np.dtype[Any]:
        return np.dtype(np.uint8 if self.num_classes <= 255 else np.int16)

    @property
    def slab_shape(self) -> tuple[int, int, int, int]:
        """(K, X, Y, Z) of the sums that are kept."""
        x, y, z = (
            min(size, window) if axis == self.slab_axis else size
            for axis, (size, window) in enumerate(zip(self.shape[1:], self.window, strict=True))
        )
        return self.num_classes, x, y, z

    @property
    def chunk(self) -> int:
        """Slices across ``slab_axis`` that turn into labels at a time."""
        thickness = self.slab_shape[1 + self.slab_axis]
        plane = math.prod(self.slab_shape[1:]) // thickness
        return min(thickness, max(1, _CHUNK_VOXELS // plane))

    @property
    def input_bytes(self) -> int:
        return _FLOAT * math.prod(self.shape)

    @property
    def result_bytes(self) -> int:
        return self.label_dtype.itemsize * math.prod(self.shape[1:])

    @property
    def accumulator_bytes(self) -> int:
        return self.blend_dtype.itemsize * math.prod(self.slab_shape)

    @property
    def host_bytes(self) -> int:
        """Main memory beyond the input."""
        return self.result_bytes + self._bytes_on("cpu")

    @property
    def device_bytes(self) -> int:
        """Memory of the compute device; 0 where that is the host."""
        return 0 if self.device.type == "cpu" else self._bytes_on(self.device.type)

    def _bytes_on(self, kind: str) -> int:
        voxels = math.prod(self.window)
        inputs = _FLOAT * self.batch_size * self.in_channels * voxels
        total = 0
        if kind == self.device.type:
            total += inputs * min(self.views, 2) + _FLOAT * voxels  # the weights
            tensors = 2 if self.views == 1 else 3  # logits and probabilities, and the sum over the views
            total += _FLOAT * tensors * self.batch_size * self.num_classes * voxels
        elif kind == "cpu":
            total += inputs
        if kind == self.blend_device.type:
            slab = math.prod(self.slab_shape[1:]) // self.slab_shape[1 + self.slab_axis] * self.chunk
            total += self.accumulator_bytes + slab * (self.blend_dtype.itemsize + 8 + self.label_dtype.itemsize)
            if self.blend_device != self.device:
                total += self.blend_dtype.itemsize * self.num_classes * voxels
        return total

    def describe(self) -> str:
        """One line: "441 windows of 128 x 128 x 128; memory beyond the input: 3.0 GiB on the host, and ..."."""
        views = f", each in {self.views} mirrored views" if self.views > 1 else ""
        on_device = f", {_readable(self.device_bytes)} on {self.device}" if self.device_bytes else ""
        count = f"{self.num_windows} window{'s' if self.num_windows > 1 else ''}"
        return (
            f"{count} of {self.sides}{views}; memory beyond the input: "
            f"{_readable(self.host_bytes)} on the host{on_device}, and what the network takes"
        )


def plan_windows(
    shape: Sequence[int],
    *,
    num_classes: int,
    patch_size: Sequence[int],
    spatial_dims: Literal[2, 3],
    neighbours: int = 0,
    slice_axis: int = 2,
    overlap: float = 0.5,
    mirror: Sequence[int] = (),
    batch_size: int = 1,
    device: Any = HOST,
    blend_device: Any = HOST,
    blend_dtype: Any = np.dtype(np.float32),  # noqa: B008 (immutable)
) -> InferencePlan:
    """The windows of an image (C, X, Y, Z); arguments and errors as of ``inference.plan_inference``."""
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"an image is (channels, x, y, z), none of them empty; got {tuple(shape)}")
    if spatial_dims not in (2, 3):
        raise ConfigError(f"spatial_dims is {spatial_dims}: use 2 (slice by slice) or 3")
    check(len(patch_size) == spatial_dims and min(patch_size) >= 1, "patch_size", patch_size, f"{spatial_dims} sizes")
    check(0 <= overlap < 1, "overlap", overlap, "at least 0 and less than 1, such as 0.5")
    check(set(mirror) <= {0, 1, 2} and len(set(mirror)) == len(mirror), "mirror", mirror, "axes of 0, 1 and 2")
    check(batch_size >= 1, "batch_size", batch_size, "at least 1")
    check(num_classes >= 2, "num_classes", num_classes, "at least 2: background counts")
    check(slice_axis in (0, 1, 2), "slice_axis", slice_axis, "0, 1 or 2")
    allowed = "at least 0" if spatial_dims == 2 else "0, as windows in three dimensions hold their neighbours"
    check(neighbours == 0 or (neighbours > 0 and spatial_dims == 2), "neighbours", neighbours, allowed)

    sides, flipped = [int(side) for side in patch_size], sorted(mirror)
    if spatial_dims == 2:
        sides.insert(slice_axis, 1)
        if neighbours == 0 and slice_axis in flipped:
            flipped.remove(slice_axis)  # a single slice is its own mirror image
    channels, *sizes = (int(size) for size in shape)
    starts = [_starts(size, side, overlap) for size, side in zip(sizes, sides, strict=True)]
    thickness = [min(side, size) / size for side, size in zip(sides, sizes, strict=True)]
    return InferencePlan(
        shape=(channels, sizes[0], sizes[1], sizes[2]),
        window=(sides[0], sides[1], sides[2]),
        starts=(starts[0], starts[1], starts[2]),
        slab_axis=slice_axis if spatial_dims == 2 else thickness.index(min(thickness)),
        slice_axis=slice_axis if spatial_dims == 2 else None,
        neighbours=neighbours,
        num_classes=num_classes,
        mirror=tuple(flipped),
        batch_size=min(batch_size, math.prod(map(len, starts))),
        device=device,
        blend_device=blend_device,
        blend_dtype=blend_dtype,
    )


def neighbour_slices(index: int, *, neighbours: int, size: int) -> list[int]:
    """The slices that a two-dimensional network sees for the slice ``index``, in the order of its channels.

    Beyond the first and the last of the ``size`` slices, these repeat.
    """
    return [min(max(index + offset, 0), size - 1) for offset in range(-neighbours, neighbours + 1)]


def windows(plan: InferencePlan) -> list[Start]:
    """Starts of all windows, ordered along the slab's axis first."""
    order = [plan.slab_axis, *(axis for axis in range(3) if axis != plan.slab_axis)]
    ordered = itertools.product(*(plan.starts[axis] for axis in order))
    return [tuple(start[order.index(axis)] for axis in range(3)) for start in ordered]


def views(plan: InferencePlan) -> Iterator[tuple[tuple[int, ...], list[int] | None]]:
    """The mirrored views: axes of the window to flip, and the order of the channels where slices are flipped in it."""
    channels = plan.shape[0]
    for count in range(len(plan.mirror) + 1):
        for axes in itertools.combinations(plan.mirror, count):
            order = None
            if plan.slice_axis in axes:  # the slices' order is that of the channels
                slices = range(plan.in_channels // channels)
                order = [index * channels + channel for index in reversed(slices) for channel in range(channels)]
            yield axes, order


def fill_windows(plan: InferencePlan, image: Any, group: Sequence[Start], batch_BC: Any) -> None:
    """Copies windows of an image (C, X, Y, Z) into a batch of zeros (B, in_channels, *window)."""
    for window, start in zip(batch_BC, group, strict=True):
        inside, place = covered(plan, start)
        axis, indices = plan.slice_axis, [0]
        if axis is not None:
            indices = neighbour_slices(start[axis], neighbours=plan.neighbours, size=plan.shape[1 + axis])
        for number, index in enumerate(indices):
            if axis is not None:
                inside[axis] = slice(index, index + 1)
            channels = slice(number * plan.shape[0], (number + 1) * plan.shape[0])
            window[(channels, *place)] = image[(slice(None), *inside)]


def gaussian(window: Sequence[int]) -> NDArray[np.float32]:
    """Weights (x, y, z) of a window's voxels, at most 1."""
    weight = np.ones((), dtype=np.float32)
    for side in window:
        offset = np.arange(side, dtype=np.float32) - np.float32((side - 1) / 2)
        weight = weight[..., None] * np.exp(np.float32(-0.5) * (offset / np.float32(_SIGMA * side)) ** 2)
    return np.maximum(weight, np.float32(_LEAST_WEIGHT))


def _starts(size: int, side: int, overlap: float) -> tuple[int, ...]:
    if size <= side:
        return (-((side - size) // 2),)
    step = max(1, int(side * (1 - overlap) + 1e-6))  # 20 * (1 - 0.9) is a little less than 2
    return (*range(0, size - side, step), size - side)


def covered(plan: InferencePlan, start: Start) -> tuple[list[slice], list[slice]]:
    """What a window covers of the volume: in the volume's indices, and in its own."""
    inside = [
        slice(max(0, first), min(size, first + side))
        for first, size, side in zip(start, plan.shape[1:], plan.window, strict=True)
    ]
    place = [slice(part.start - first, part.stop - first) for part, first in zip(inside, start, strict=True)]
    return inside, place


def check(usable: bool, key: str, value: object, allowed: str) -> None:
    """Raises `ConfigError` unless an argument is usable."""
    if not usable:
        raise ConfigError(f"{key} is {value}: it must be {allowed}")


def _readable(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{math.ceil(count / 2**20)} MiB"
