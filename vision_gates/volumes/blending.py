"""From the probabilities of windows to the labels of a volume, in bounded memory. Without PyTorch.

Every window's class probabilities (the softmax of the logits, averaged over the mirrored views) are added up with a
Gaussian weight that favours the window's centre, where the network sees most context; a voxel's label is the class with
the largest sum. The windows go along one axis, and only the slab of voxels that can still receive a window is kept:
what is finished turns into labels at once. The probabilities of the volume as a whole, 20 classes of 512 x 512 x 600
voxels being 11.7 GiB, never exist. In two dimensions the windows are tiles of a slice, and the slab is one slice.

``inference`` runs a network of PyTorch's over the windows, `label_windows` any function on NumPy arrays, such as a
network in ONNX Runtime. `Blend`, which both share, works on arrays and tensors alike, by indexing alone.

Gaussian windows: Isensee et al., nnU-Net, Nature Methods 18 (2021). Suffixes: B windows, C channels, K classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax

from vision_gates.errors import UserError
from vision_gates.volumes.windows import InferencePlan, Start, covered, fill_windows, gaussian, views, windows

__all__ = ["Blend", "is_out_of_memory", "label_windows", "logits_error", "not_finite_error", "too_large_error"]

_OUT_OF_MEMORY = ("out of memory", "allocate memory")  # in the messages of GPUs and of the host


def label_windows(
    network: Callable[[NDArray[np.float32]], NDArray[Any]],
    image: NDArray[Any],
    plan: InferencePlan,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> NDArray[Any]:
    """The most probable class of every voxel, as ``inference.predict_labels`` finds it.

    Args:
        network: from (B, in_channels, x, y, z), in two dimensions (B, in_channels, height, width), to logits
            (B, num_classes, ...), float32.
        image: (C, X, Y, Z), preprocessed as for training.
        plan: from `plan_windows` for the image's shape; its windows at a time are halved where memory is short.
        progress: called with the number of windows done and of all.

    Returns:
        (X, Y, Z) uint8; int16 with more than 255 classes.

    Raises:
        UserError: the network returns something else than such logits, or values that are not finite, or memory does
            not suffice for a single window.
    """
    sums, labels = np.zeros(plan.slab_shape, plan.blend_dtype), np.empty(plan.shape[1:], plan.label_dtype)
    blend = Blend(plan, sums, labels, bring=lambda sums_K: sums_K, first_largest=lambda sums_K: sums_K.argmax(axis=0))
    weight, places = gaussian(plan.window), windows(plan)
    across = None if plan.slice_axis is None else 2 + plan.slice_axis

    def probabilities(x_BC: NDArray[np.float32]) -> NDArray[np.float32]:
        x_BC = x_BC if across is None else x_BC.squeeze(across)
        logits_BK = network(np.ascontiguousarray(x_BC))
        if logits_BK.shape != (len(x_BC), plan.num_classes, *x_BC.shape[2:]):
            raise logits_error(plan, x_BC.shape, tuple(logits_BK.shape))
        probabilities_BK = softmax(logits_BK.astype(np.float32, copy=False), axis=1)
        return probabilities_BK if across is None else np.expand_dims(probabilities_BK, across)

    def mean(group: Sequence[Start]) -> NDArray[np.float32]:
        x_BC = np.zeros((len(group), plan.in_channels, *plan.window), dtype=np.float32)
        fill_windows(plan, image, group, x_BC)
        mean_BK = np.zeros((), dtype=np.float32)
        for axes, order in views(plan):
            seen_BC = x_BC if order is None else x_BC[:, order]
            flips = tuple(2 + axis for axis in axes)
            mean_BK = mean_BK + np.flip(probabilities(np.flip(seen_BC, flips)), flips)
        return mean_BK / np.float32(plan.views)

    done, batch_size = 0, plan.batch_size
    while done < len(places):
        group = places[done : done + batch_size]
        try:
            mean_BK = mean(group)
        except Exception as error:  # ONNX Runtime has types of its own
            if not is_out_of_memory(error):
                raise
            if len(group) == 1:
                raise too_large_error(plan) from error
            batch_size = len(group) // 2
            continue
        if not np.isfinite(mean_BK.sum()):
            raise not_finite_error(group)
        blend.add(group, mean_BK * weight)
        done += len(group)
        if progress is not None:
            progress(done, len(places))
    return blend.finish()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of a GPU or of the host, does not suffice."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OUT_OF_MEMORY)


class Blend:
    """Weighted sums of probabilities in a slab that moves along one axis, and the labels that it leaves behind.

    Slice z of the volume has its sums at z modulo the slab's thickness, so that nothing is moved.

    Args:
        plan: of the windows.
        sums: zeros of ``plan.slab_shape``, where the sums stand; an array or a tensor.
        bring: makes what is added one like it.
        labels: of ``plan.shape[1:]``, where the labels go.
        first_largest: (K, ...) -> the first class of the largest sum, in the labels' kind of array.
    """

    def __init__(
        self,
        plan: InferencePlan,
        sums: Any,
        labels: Any,
        *,
        bring: Callable[[Any], Any],
        first_largest: Callable[[Any], Any],
    ) -> None:
        self._plan, self._sums, self._labels = plan, sums, labels
        self._bring, self._first_largest = bring, first_largest
        self._axis = plan.slab_axis
        self._thickness = plan.slab_shape[1 + self._axis]
        self._finished = 0

    def add(self, group: Sequence[Start], sums_BK: Any) -> None:
        """Adds windows; along the slab's axis none may start before one that was added earlier."""
        for start, sums_K in zip(group, sums_BK, strict=True):
            inside, place = covered(self._plan, start)
            first = inside[self._axis].start
            self._label_until(first)
            sums_K = self._bring(sums_K[(slice(None), *place)])
            for z, count in self._runs(first, inside[self._axis].stop, self._thickness):
                target = list(inside)
                target[self._axis] = slice(z % self._thickness, z % self._thickness + count)
                slab_K = self._sums[(slice(None), *target)]
                slab_K += sums_K[(slice(None), *self._along(z - first, count))]

    def finish(self) -> Any:
        """The labels, all of them."""
        self._label_until(self._plan.shape[1 + self._axis])
        return self._labels

    def _label_until(self, end: int) -> None:
        for z, count in self._runs(self._finished, end, self._plan.chunk):
            sums_K = self._sums[(slice(None), *self._along(z % self._thickness, count))]
            self._labels[self._along(z, count)] = self._first_largest(sums_K)
            sums_K[...] = 0
        self._finished = end

    def _along(self, begin: int, count: int) -> tuple[slice, ...]:
        """Index of a run of slices along the slab's axis."""
        return tuple(slice(begin, begin + count) if axis == self._axis else slice(None) for axis in range(3))

    def _runs(self, begin: int, end: int, longest: int) -> list[tuple[int, int]]:
        """(start, length) of the pieces of begin...end that are contiguous in the slab."""
        runs = []
        while begin < end:
            count = min(end - begin, longest, self._thickness - begin % self._thickness)
            runs.append((begin, count))
            begin += count
        return runs


def logits_error(plan: InferencePlan, shape: Sequence[int], found: object) -> UserError:
    """That a network returned ``found`` for an input of this shape."""
    expected = (shape[0], plan.num_classes, *shape[2:])
    return UserError(
        f"for an input {tuple(shape)} the network returns {found}, not logits {expected}: is it in evaluation "
        f"mode, made for {plan.num_classes} classes?"
    )


def too_large_error(plan: InferencePlan) -> UserError:
    """That memory does not suffice for one window."""
    remedy = "lower patch_size"
    if plan.device.type != "cpu":
        elsewhere = "" if plan.blend_device.type == "cpu" else "accumulate_on=host, "
        remedy += f" or use {elsewhere}half precision or the CPU"
    return UserError(f"{plan.device.type} has too little memory for one window of {plan.sides}: {remedy}")


def not_finite_error(group: Sequence[Start]) -> UserError:
    """That a network returned no numbers for these windows."""
    return UserError(
        f"the network's outputs are not finite in the windows at {', '.join(map(str, group))}: look for nan in "
        "the image and in the weights, or predict without mixed precision"
    )
