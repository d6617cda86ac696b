"""Labels of a whole volume from windows of it, in bounded memory, by a network of PyTorch's on any device.

Where the windows lie is in ``windows``, how their probabilities turn into labels in ``blending``, without PyTorch.
Suffixes: B windows, C channels, K classes.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from torch import Tensor

from vision_gates.volumes.blending import Blend, is_out_of_memory, logits_error, not_finite_error, too_large_error
from vision_gates.volumes.windows import (
    InferencePlan,
    Start,
    check,
    fill_windows,
    gaussian,
    neighbour_slices,
    plan_windows,
    views,
    windows,
)

__all__ = ["InferencePlan", "neighbour_slices", "plan_inference", "predict_labels"]

_FREE_SHARE = 0.6  # of the device's free memory that sums and windows may take; the network needs the rest


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
    check(accumulate_on in ("auto", "device", "host"), "accumulate_on", accumulate_on, '"auto", "device" or "host"')
    check(blend_dtype in (torch.float32, torch.float16), "blend_dtype", blend_dtype, "torch.float32 or torch.float16")
    plan = plan_windows(
        shape,
        num_classes=num_classes,
        patch_size=patch_size,
        spatial_dims=spatial_dims,
        neighbours=neighbours,
        slice_axis=slice_axis,
        overlap=overlap,
        mirror=mirror,
        batch_size=batch_size,
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
    blend = _blend(plan)
    weight = torch.from_numpy(gaussian(plan.window)).to(plan.device)
    places = windows(plan)
    done, batch_size = 0, plan.batch_size
    while done < len(places):
        group = places[done : done + batch_size]
        try:
            mean_BK = _mirrored(plan, network, _cut(plan, image, group), autocast)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            mean_BK = None  # and out of the handler, as its traceback holds what was allocated
        if mean_BK is None:
            if len(group) == 1:
                raise too_large_error(plan)
            batch_size = len(group) // 2
            if plan.device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        if not mean_BK.sum().isfinite():
            raise not_finite_error(group)
        blend.add(group, mean_BK.mul_(weight))
        del mean_BK  # before the next windows need its memory
        done += len(group)
        if progress is not None:
            progress(done, len(places))
    return blend.finish().numpy()


def _blend(plan: InferencePlan) -> Blend:
    sums = torch.zeros(plan.slab_shape, dtype=plan.blend_dtype, device=plan.blend_device)
    labels = torch.empty(plan.shape[1:], dtype=getattr(torch, plan.label_dtype.name))
    return Blend(
        plan,
        sums,
        labels,
        bring=lambda sums_K: sums_K.to(sums),
        # The first of equal classes. max is three times as fast as argmax on a CPU.
        first_largest=lambda sums_K: sums_K.max(dim=0).indices.to(labels.dtype),
    )


def _cut(plan: InferencePlan, image: NDArray[Any] | Tensor, group: Sequence[Start]) -> Tensor:
    """(B, in_channels, *window) float32 on the compute device, zero outside the volume."""
    home = image.device if isinstance(image, Tensor) else None
    batch = torch.zeros((len(group), plan.in_channels, *plan.window), device=home)
    # An array may be read-only, on disk or run backwards, which a tensor cannot: it is copied by NumPy.
    fill_windows(plan, image, group, batch if isinstance(image, Tensor) else batch.numpy())
    return batch.to(plan.device)


def _mirrored(
    plan: InferencePlan,
    network: Callable[[Tensor], Tensor],
    x_BC: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
) -> Tensor:
    """(B, K, *window) float32: the mean over the mirrored views of the class probabilities."""

    def view(axes: Sequence[int], order: list[int] | None) -> Tensor:
        flips = [2 + axis for axis in axes]
        seen = x_BC.flip(flips) if flips else x_BC
        if order is not None:
            seen = seen[:, order]
        logits = _logits(plan, network, seen, autocast)
        del seen
        probabilities = torch.softmax(logits, dim=1, dtype=torch.float32)
        del logits
        return probabilities.flip(flips) if flips else probabilities

    first, *others = views(plan)
    mean = view(*first)
    for axes, order in others:
        mean.add_(view(axes, order))
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
    if not isinstance(logits_BK, Tensor) or logits_BK.shape != (x_BC.shape[0], plan.num_classes, *x_BC.shape[2:]):
        found = tuple(logits_BK.shape) if isinstance(logits_BK, Tensor) else f"a {type(logits_BK).__name__}"
        raise logits_error(plan, x_BC.shape, found)
    return logits_BK if across is None else logits_BK.unsqueeze(across)


def _free_bytes(device: torch.device) -> int:
    """Memory that can still be allocated; none where PyTorch cannot tell."""
    if device.type != "cuda":
        return 0
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached
