"""Labels of a whole volume from windows of it, in bounded memory.

Every window's class probabilities (the softmax of the logits, averaged over the mirrored views) are added up with a
Gaussian weight that favours the window's centre, where the network sees most context; a voxel's label is the class with
the largest sum. The windows go along one axis, and only the slab of voxels that can still receive a window is kept:
what is finished turns into labels at once. The probabilities of the volume as a whole, 20 classes of 512 x 512 x 600
voxels being 11.7 GiB, never exist. In two dimensions the windows are tiles of a slice, and the slab is one slice.

Gaussian windows: Isensee et al., nnU-Net, Nature Methods 18 (2021). Suffixes: B windows, C channels, K classes.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from vision_gates.errors import ConfigError, UserError

__all__ = ["InferencePlan", "neighbour_slices", "plan_inference", "predict_labels"]

_SIGMA = 1 / 8  # of the window's size
_LEAST_WEIGHT = 1e-3  # of the Gaussian: its corners would vanish in half precision
_FREE_SHARE = 0.6  # of the device's free memory that sums and windows may take; the network needs the rest
_CHUNK_VOXELS = 2**22  # that turn into labels at a time
_FLOAT = 4  # bytes
_OUT_OF_MEMORY = ("out of memory", "allocate memory")  # in the messages of GPUs and of the host

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
        device: where the network computes.
        blend_device: where the probabilities are added up.
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
    device: torch.device
    blend_device: torch.device
    blend_dtype: torch.dtype

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
    def label_dtype(self) -> torch.dtype:
        return torch.uint8 if self.num_classes <= 255 else torch.int16

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


def plan_inference(
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
    device: torch.device | str = "cpu",
    accumulate_on: Literal["auto", "device", "host"] = "auto",
    blend_dtype: torch.dtype = torch.float32,
) -> InferencePlan:
    """What :func:`predict_labels` does with these arguments, and the memory it takes: to be printed first.

    Args:
        shape: (C, X, Y, Z) of the image.
        others: as of :func:`predict_labels`.

    Raises:
        ConfigError: an argument that cannot be used.
        ValueError: the shape is not that of a volume.
    """
    if len(shape) != 4 or min(shape) < 1:
        raise ValueError(f"an image is (channels, x, y, z), none of them empty; got {tuple(shape)}")
    if spatial_dims not in (2, 3):
        raise ConfigError(f"spatial_dims is {spatial_dims}: use 2 (slice by slice) or 3")
    _check(len(patch_size) == spatial_dims and min(patch_size) >= 1, "patch_size", patch_size, f"{spatial_dims} sizes")
    _check(0 <= overlap < 1, "overlap", overlap, "at least 0 and less than 1, such as 0.5")
    _check(set(mirror) <= {0, 1, 2} and len(set(mirror)) == len(mirror), "mirror", mirror, "axes of 0, 1 and 2")
    _check(batch_size >= 1, "batch_size", batch_size, "at least 1")
    _check(num_classes >= 2, "num_classes", num_classes, "at least 2: background counts")
    _check(slice_axis in (0, 1, 2), "slice_axis", slice_axis, "0, 1 or 2")
    allowed = "at least 0" if spatial_dims == 2 else "0, as windows in three dimensions hold their neighbours"
    _check(neighbours == 0 or (neighbours > 0 and spatial_dims == 2), "neighbours", neighbours, allowed)
    _check(accumulate_on in ("auto", "device", "host"), "accumulate_on", accumulate_on, '"auto", "device" or "host"')
    _check(blend_dtype in (torch.float32, torch.float16), "blend_dtype", blend_dtype, "torch.float32 or torch.float16")

    sides, flipped = [int(side) for side in patch_size], sorted(mirror)
    if spatial_dims == 2:
        sides.insert(slice_axis, 1)
        if neighbours == 0 and slice_axis in flipped:
            flipped.remove(slice_axis)  # a single slice is its own mirror image
    channels, *sizes = (int(size) for size in shape)
    starts = [_starts(size, side, overlap) for size, side in zip(sizes, sides, strict=True)]
    thickness = [min(side, size) / size for side, size in zip(sides, sizes, strict=True)]
    plan = InferencePlan(
        shape=(channels, sizes[0], sizes[1], sizes[2]),
        window=(sides[0], sides[1], sides[2]),
        starts=(starts[0], starts[1], starts[2]),
        slab_axis=slice_axis if spatial_dims == 2 else thickness.index(min(thickness)),
        slice_axis=slice_axis if spatial_dims == 2 else None,
        neighbours=neighbours,
        num_classes=num_classes,
        mirror=tuple(flipped),
        batch_size=min(batch_size, math.prod(map(len, starts))),
        device=torch.device(device),
        blend_device=torch.device("cpu" if accumulate_on == "host" else device),
        blend_dtype=blend_dtype,
    )
    if accumulate_on == "auto" and plan.device_bytes > _FREE_SHARE * _free_bytes(plan.device):
        plan = replace(plan, blend_device=torch.device("cpu"))
    return plan


@torch.no_grad()
def predict_labels(
    network: Callable[[Tensor], Tensor],
    image: NDArray[Any] | Tensor,
    *,
    num_classes: int,
    patch_size: Sequence[int],
    spatial_dims: Literal[2, 3],
    neighbours: int = 0,
    slice_axis: int = 2,
    overlap: float = 0.5,
    mirror: Sequence[int] = (),
    batch_size: int = 1,
    device: torch.device | str = "cpu",
    accumulate_on: Literal["auto", "device", "host"] = "auto",
    blend_dtype: torch.dtype = torch.float32,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[Any]:
    """The most probable class of every voxel.

    Args:
        network: in evaluation mode, on ``device``. In three dimensions from (B, C, x, y, z) to logits
            (B, num_classes, x, y, z). In two, from (B, (2 neighbours + 1) C, height, width) to
            (B, num_classes, height, width); the channels of each slice stand together (see :func:`neighbour_slices`).
        image: (C, X, Y, Z), preprocessed as for training.
        num_classes: with the background.
        patch_size: of the windows: three sizes, or those of the two axes within a slice. Where the volume is smaller,
            it lies in the middle of the window, between zeros.
        spatial_dims: of the network; 2 predicts slice by slice.
        neighbours: in two dimensions, the slices on either side that the network sees as further channels.
        slice_axis: in two dimensions, the axis across the slices; the other two, in their order, are height and width.
        overlap: the share of a window that the next one covers again; the last window is moved inside the volume.
        mirror: axes of the volume; all combinations of their mirror images are averaged.
        batch_size: windows at a time; halved, down to one, where the device's memory does not suffice.
        accumulate_on: where probabilities are added up; "auto": on ``device`` if that takes at most 60 % of its free
            memory (CUDA), else on the host.
        blend_dtype: torch.float16 halves the sums' memory.
        autocast: makes the context in which the network computes, for mixed precision.
        progress: called with the number of windows done and of all.

    Returns:
        (X, Y, Z) uint8; int16 with more than 255 classes.

    Raises:
        ConfigError: an argument that cannot be used.
        UserError: the network returns something else than such logits or values that are not finite, or the device's
            memory does not suffice for a single window.
        ValueError: the image is not (C, X, Y, Z).
    """
    plan = plan_inference(
        image.shape,
        num_classes=num_classes,
        patch_size=patch_size,
        spatial_dims=spatial_dims,
        neighbours=neighbours,
        slice_axis=slice_axis,
        overlap=overlap,
        mirror=mirror,
        batch_size=batch_size,
        device=device,
        accumulate_on=accumulate_on,
        blend_dtype=blend_dtype,
    )
    blend = _Blend(plan)
    weight = _gaussian(plan.window).to(plan.device)
    windows = _windows(plan)
    done, batch_size = 0, plan.batch_size
    while done < len(windows):
        group = windows[done : done + batch_size]
        try:
            mean_BK = _mirrored(plan, network, _cut(plan, image, group), autocast)
        except RuntimeError as error:
            if not any(words in str(error) for words in _OUT_OF_MEMORY):
                raise
            mean_BK = None  # and out of the handler, as its traceback holds what was allocated
        if mean_BK is None:
            if len(group) == 1:
                raise UserError(_too_large(plan))
            batch_size = len(group) // 2
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        if not mean_BK.sum().isfinite():
            raise UserError(
                f"the network's outputs are not finite in the windows at {', '.join(map(str, group))}: look for nan in "
                "the image and in the weights, or predict without mixed precision"
            )
        blend.add(group, mean_BK.mul_(weight))
        del mean_BK  # before the next windows need its memory
        done += len(group)
        if progress is not None:
            progress(done, len(windows))
    return blend.finish()


def neighbour_slices(index: int, *, neighbours: int, size: int) -> list[int]:
    """The slices that a two-dimensional network sees for the slice ``index``, in the order of its channels.

    Beyond the first and the last of the ``size`` slices, these repeat.
    """
    return [min(max(index + offset, 0), size - 1) for offset in range(-neighbours, neighbours + 1)]


class _Blend:
    """Weighted sums of probabilities in a slab that moves along one axis, and the labels that it leaves behind.

    Slice z of the volume has its sums at z modulo the slab's thickness, so that nothing is moved.
    """

    def __init__(self, plan: InferencePlan) -> None:
        self._plan = plan
        self._axis = plan.slab_axis
        self._thickness = plan.slab_shape[1 + self._axis]
        self._sums = torch.zeros(plan.slab_shape, dtype=plan.blend_dtype, device=plan.blend_device)
        self._labels = torch.empty(plan.shape[1:], dtype=plan.label_dtype)
        self._finished = 0

    def add(self, group: Sequence[Start], sums_BK: Tensor) -> None:
        """Adds windows; along the slab's axis none may start before one that was added earlier."""
        for start, sums_K in zip(group, sums_BK, strict=True):
            inside, place = _overlap(self._plan, start)
            self._label_until(inside[self._axis].start)
            sums_K = sums_K[(slice(None), *place)].to(self._plan.blend_device, self._plan.blend_dtype)
            first = inside[self._axis].start
            for z, count in self._runs(first, inside[self._axis].stop, self._thickness):
                target = list(inside)
                target[self._axis] = slice(z % self._thickness, z % self._thickness + count)
                self._sums[(slice(None), *target)].add_(sums_K.narrow(1 + self._axis, z - first, count))

    def finish(self) -> NDArray[Any]:
        self._label_until(self._plan.shape[1 + self._axis])
        return self._labels.numpy()

    def _label_until(self, end: int) -> None:
        for z, count in self._runs(self._finished, end, self._plan.chunk):
            sums_K = self._sums.narrow(1 + self._axis, z % self._thickness, count)
            # The first of equal classes. max is three times as fast as argmax on a CPU.
            labels = sums_K.max(dim=0).indices.to(self._plan.label_dtype)
            self._labels.narrow(self._axis, z, count).copy_(labels)
            sums_K.zero_()
        self._finished = end

    def _runs(self, begin: int, end: int, longest: int) -> list[tuple[int, int]]:
        """(start, length) of the pieces of begin...end that are contiguous in the slab."""
        runs = []
        while begin < end:
            count = min(end - begin, longest, self._thickness - begin % self._thickness)
            runs.append((begin, count))
            begin += count
        return runs


def _windows(plan: InferencePlan) -> list[Start]:
    """Starts of all windows, ordered along the slab's axis first."""
    order = [plan.slab_axis, *(axis for axis in range(3) if axis != plan.slab_axis)]
    ordered = itertools.product(*(plan.starts[axis] for axis in order))
    return [tuple(start[order.index(axis)] for axis in range(3)) for start in ordered]


def _starts(size: int, side: int, overlap: float) -> tuple[int, ...]:
    if size <= side:
        return (-((side - size) // 2),)
    step = max(1, int(side * (1 - overlap) + 1e-6))  # 20 * (1 - 0.9) is a little less than 2
    return (*range(0, size - side, step), size - side)


def _overlap(plan: InferencePlan, start: Start) -> tuple[list[slice], list[slice]]:
    """What a window covers of the volume: in the volume's indices, and in its own."""
    inside = [
        slice(max(0, first), min(size, first + side))
        for first, size, side in zip(start, plan.shape[1:], plan.window, strict=True)
    ]
    place = [slice(part.start - first, part.stop - first) for part, first in zip(inside, start, strict=True)]
    return inside, place


def _cut(plan: InferencePlan, image: NDArray[Any] | Tensor, group: Sequence[Start]) -> Tensor:
    """(B, in_channels, *window) float32 on the compute device, zero outside the volume."""
    home = image.device if isinstance(image, Tensor) else None
    batch = torch.zeros((len(group), plan.in_channels, *plan.window), device=home)
    # An array may be read-only, on disk or run backwards, which a tensor cannot: it is copied by NumPy.
    target: Any = batch if isinstance(image, Tensor) else batch.numpy()
    for window, start in zip(target, group, strict=True):
        inside, place = _overlap(plan, start)
        axis, indices = plan.slice_axis, [0]
        if axis is not None:
            indices = neighbour_slices(start[axis], neighbours=plan.neighbours, size=plan.shape[1 + axis])
        for number, index in enumerate(indices):
            if axis is not None:
                inside[axis] = slice(index, index + 1)
            channels = slice(number * plan.shape[0], (number + 1) * plan.shape[0])
            window[(channels, *place)] = image[(slice(None), *inside)]
    return batch.to(plan.device)


def _mirrored(
    plan: InferencePlan,
    network: Callable[[Tensor], Tensor],
    x_BC: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Tensor:
    """(B, K, *window) float32: the mean over the mirrored views of the class probabilities."""

    def view(axes: Sequence[int]) -> Tensor:
        flips = [2 + axis for axis in axes]
        seen = x_BC.flip(flips) if flips else x_BC
        if plan.slice_axis in axes:  # the slices' order is that of the channels
            seen = seen.unflatten(1, (-1, plan.shape[0])).flip(1).flatten(1, 2)
        logits = _logits(plan, network, seen, autocast)
        del seen
        probabilities = torch.softmax(logits, dim=1, dtype=torch.float32)
        del logits
        return probabilities.flip(flips) if flips else probabilities

    mean = view(())
    for count in range(1, len(plan.mirror) + 1):
        for axes in itertools.combinations(plan.mirror, count):
            mean.add_(view(axes))
    return mean.div_(plan.views)


def _logits(
    plan: InferencePlan,
    network: Callable[[Tensor], Tensor],
    x_BC: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Tensor:
    """(B, K, *window)."""
    across = None if plan.slice_axis is None else 2 + plan.slice_axis
    x_BC = x_BC if across is None else x_BC.squeeze(across)
    with autocast():
        logits_BK = network(x_BC)
    expected = (x_BC.shape[0], plan.num_classes, *x_BC.shape[2:])
    if not isinstance(logits_BK, Tensor) or logits_BK.shape != expected:
        found = tuple(logits_BK.shape) if isinstance(logits_BK, Tensor) else f"a {type(logits_BK).__name__}"
        raise UserError(
            f"for an input {tuple(x_BC.shape)} the network returns {found}, not logits {expected}: is it in evaluation "
            f"mode, made for {plan.num_classes} classes?"
        )
    return logits_BK if across is None else logits_BK.unsqueeze(across)


def _gaussian(window: Sequence[int]) -> Tensor:
    """Weights (x, y, z) of a window's voxels, at most 1."""
    weight = torch.ones(())
    for side in window:
        offset = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
        weight = weight[..., None] * torch.exp(-0.5 * (offset / (_SIGMA * side)) ** 2)
    return weight.clamp_(min=_LEAST_WEIGHT)


def _check(usable: bool, key: str, value: object, allowed: str) -> None:
    if not usable:
        raise ConfigError(f"{key} is {value}: it must be {allowed}")


def _free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated; none where PyTorch cannot tell."""
    if device.type != "cuda":
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def _too_large(plan: InferencePlan) -> str:
    remedy = "lower patch_size" if plan.blend_device.type == "cpu" else "lower patch_size or use accumulate_on=host"
    return f"{plan.device} has too little memory for one window of {plan.sides}: {remedy}"


def _readable(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{math.ceil(count / 2**20)} MiB"
