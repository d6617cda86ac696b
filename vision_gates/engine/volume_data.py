"""Volumes in training: patches and slices drawn from prepared cases, whole cases in validation.

As in data.py, all that is random is a function of (seed, epoch, sample), never of a worker's state.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from vision_gates.engine.data import derive_seed
from vision_gates.engine.slices import AXIAL, CORONAL, PLANES, SAGITTAL, sample_planes
from vision_gates.errors import UserError
from vision_gates.gate_maps import gates_of
from vision_gates.modality_dropout import modality_dropout, ramped
from vision_gates.volumes.augmentation import VolumePipeline
from vision_gates.volumes.cache import CachedCase
from vision_gates.volumes.geometry import Geometry
from vision_gates.volumes.inference import InferencePlan, neighbour_slices, plan_inference, predict_labels
from vision_gates.volumes.info import VolumeInfo

__all__ = ["VolumeCases", "VolumeInfo", "VolumePatches", "VolumePredictor", "choose_patch_size"]

_MARGIN = 1.25  # patches are cut so much wider where a transform turns them
_SIDE_MULTIPLE = 16  # of patches chosen here; networks take any size


def choose_patch_size(shape: Sequence[float], *, voxels: int) -> tuple[int, ...]:
    """A patch of about the shape of a typical case, at most ``voxels`` of them: the longest sides give way first.

    Sides are rounded up to multiples of 16; those of 16 voxels and less stay as they are.
    """
    sides = [float(side) for side in shape]
    while math.prod(sides) > voxels:
        longest = max(range(len(sides)), key=lambda axis: sides[axis])
        sides[longest] *= 0.95
    return tuple(
        int(math.ceil(side / _SIDE_MULTIPLE)) * _SIDE_MULTIPLE if side > _SIDE_MULTIPLE else math.ceil(side)
        for side in sides
    )


class VolumePatches(Dataset[Any]):
    """Training samples: cut around a place of a case, and augmented.

    Each epoch visits the cases evenly. Beyond a volume's border lie zeros, as in inference, and background.

    Args:
        cases: prepared.
        names: of the cases.
        info: what a sample looks like.
        samples: of an epoch.
        foreground: share of the samples centred on a labelled voxel; of the labels in a case each is as likely.
        pipeline: augmentation.
        wide: what samples are cut to where whole batches are transformed later; None: as large as the network sees.
        dropout: probability of a modality to be left out, and the epochs over which it grows.
        seed: the run's.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        names: Sequence[str],
        info: VolumeInfo,
        *,
        samples: int,
        foreground: float,
        pipeline: VolumePipeline,
        wide: Sequence[int] | None = None,
        dropout: tuple[float, int] = (0.0, 0),
        seed: int,
    ) -> None:
        self.cases, self.names, self.info = list(cases), list(names), info
        self.samples, self.foreground, self.pipeline = samples, foreground, pipeline
        self.size = info.patch_size if wide is None else tuple(wide)
        self.dropout, self.seed = dropout, seed

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | UserError:
        """Sample of an (epoch, index); a UserError is returned, so that a worker passes it on as it is."""
        try:
            return self._sample(*key)
        except UserError as error:
            return error

    def _sample(self, epoch: int, index: int) -> dict[str, Any]:
        rng = np.random.default_rng(derive_seed(self.seed, "patch", epoch, index))
        # The offset lets every case be drawn as often even where an epoch has fewer samples than there are cases.
        number = (index + epoch * self.samples) % len(self.cases)
        case, info = self.cases[number], self.info
        centre = self._centre(case, rng)
        image, labels = case.image, case.labels
        if info.spatial_dims == 2:
            image, labels = slice_with_neighbours(image, labels, centre[info.slice_axis], info)
            centre = tuple(c for axis, c in enumerate(centre) if axis != info.slice_axis)
        size = tuple(math.ceil(side * _MARGIN) for side in self.size) if self.pipeline.spatial else self.size
        start = [c - side // 2 for c, side in zip(centre, size, strict=True)]
        patch, target = _cut(image, start, size), _cut(labels[None], start, size)[0]
        patch, target = self.pipeline(patch, target, seed=derive_seed(self.seed, "augment", epoch, index))
        inner = [(have - want) // 2 for have, want in zip(patch.shape[1:], self.size, strict=True)]
        patch, target = _cut(patch, inner, self.size), _cut(target[None], inner, self.size)[0]
        tensor = torch.from_numpy(np.ascontiguousarray(patch, dtype=np.float32))
        probability = ramped(self.dropout[0], epoch, self.dropout[1])
        if probability > 0:
            tensor = modality_dropout(
                tensor, probability=probability, seed=derive_seed(self.seed, "modality", epoch, index)
            )
        return {
            "image": tensor,
            "target": torch.from_numpy(target),  # small integers: a GPU gets an eighth of int64's bytes
            "name": self.names[number],
            "index": index,
        }

    def _centre(self, case: CachedCase, rng: np.random.Generator) -> tuple[int, ...]:
        if rng.random() < self.foreground:
            place = case.labelled_place(rng)
            if place is not None:
                return place
        return tuple(int(rng.integers(side)) for side in case.labels.shape)


def slice_with_neighbours(
    image_CXYZ: NDArray[Any], labels_XYZ: NDArray[Any], index: int, info: VolumeInfo
) -> tuple[NDArray[Any], NDArray[Any]]:
    """One slice, its neighbours before and after it in order as channels; past the end the outermost slice repeats.

    Returns:
        ((2 * neighbours + 1) * C, H, W) and (H, W).
    """
    axis = info.slice_axis
    wanted = neighbour_slices(index, neighbours=info.neighbours, size=labels_XYZ.shape[axis])
    channels = [np.take(image_CXYZ, i, axis=axis + 1) for i in wanted]
    return np.concatenate(channels), np.take(labels_XYZ, index, axis=axis)


def _cut(array: NDArray[Any], start: Sequence[int], size: Sequence[int]) -> NDArray[Any]:
    """(C, *size) from ``start`` on; zero where that lies outside."""
    shape = array.shape[1:]
    result = np.zeros((len(array), *size), dtype=array.dtype)
    inside = [(max(s, 0), min(s + n, limit)) for s, n, limit in zip(start, size, shape, strict=True)]
    if all(low < high for low, high in inside):
        source = tuple(slice(low, high) for low, high in inside)
        target = tuple(slice(low - s, high - s) for (low, high), s in zip(inside, start, strict=True))
        result[(slice(None), *target)] = array[(slice(None), *source)]
    return result


class VolumeCases(Dataset[Any]):
    """Whole prepared cases, one a batch, for validation."""

    def __init__(self, cases: Sequence[CachedCase], names: Sequence[str]) -> None:
        self.cases, self.names = list(cases), list(names)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | UserError:
        _, index = key
        try:
            case = self.cases[index]
            return {
                "image": torch.from_numpy(np.array(case.image)),
                "target": torch.from_numpy(case.labels.astype(np.int64)),
                "name": self.names[index],
                "index": index,
                "spacing": torch.tensor(case.geometry.spacing, dtype=torch.float64),
            }
        except UserError as error:
            return error


class VolumePredictor(nn.Module):
    """A network that labels whole volumes, window by window.

    Args:
        network: logits of windows.
        info: what its windows are.
        num_classes: channels of the logits.
        batch_size: windows at a time.
        device: where the network is.
    """

    def __init__(
        self,
        network: nn.Module,
        info: VolumeInfo,
        *,
        num_classes: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        super().__init__()
        self.network, self.info, self.num_classes = network, info, num_classes
        self.batch_size, self.device = batch_size, device

    def forward(self, image_1CXYZ: Tensor) -> Tensor:
        """Map (1, C, X, Y, Z) to labels (1, X, Y, Z) int64 on the input's device; autocast as around the call."""
        return torch.from_numpy(np.ascontiguousarray(self.predict(image_1CXYZ[0])).astype(np.int64))[None].to(
            image_1CXYZ.device
        )

    def predict(
        self,
        image_CXYZ: Tensor | NDArray[np.float32],
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[Any]:
        """Map (C, X, Y, Z), its axes in RAS order, to labels (X, Y, Z)."""
        viewed, back = self.info.viewed(np.asarray(image_CXYZ))
        labels = predict_labels(
            self.network, viewed, **self._windows(), device=self.device, autocast=autocast, progress=progress
        )
        return back(labels)

    def plan(self, shape: Sequence[int]) -> InferencePlan:
        """What ``predict`` will do with an image (C, X, Y, Z), and the memory that it takes."""
        viewed, _ = self.info.viewed(np.broadcast_to(np.uint8(0), tuple(shape)))
        return plan_inference(viewed.shape, **self._windows(), device=self.device)

    def _windows(self) -> dict[str, Any]:
        return self.info.windows(num_classes=self.num_classes, batch_size=self.batch_size)

    def displayed(self, batch: dict[str, Any], labels_1XYZ: Tensor) -> tuple[dict[str, Any], Tensor]:
        """For pictures of a batch of one case: the slices with most foreground, as `OverlayCollector` takes them.

        Returns:
            The batch with ``planes``, one list of `SamplePlane` (of slices their own plane, else axial, coronal and
            sagittal) and, where the network has gates, ``input``, one `GateWindow`; and the labels as they came.
        """
        from vision_gates.engine.gate_window import gate_window  # which needs VolumeInfo

        info = self.info
        image, target = batch["image"][0].cpu().numpy(), batch["target"][0].cpu().numpy()
        prediction = labels_1XYZ[0].cpu().numpy()
        x, y, z = batch["spacing"][0].tolist() if "spacing" in batch else info.preprocessing.spacing or (1.0, 1.0, 1.0)
        planes = sample_planes(
            (AXIAL, CORONAL, SAGITTAL) if info.spatial_dims == 3 else (PLANES[info.slice_axis],),
            image[0],
            target,
            prediction,
            spacing=(x, y, z),
            channel=info.preprocessing.channels[0],
        )
        shown = dict(batch, planes=[planes])
        if gates_of(self.network):
            grid = Geometry((image.shape[1], image.shape[2], image.shape[3]), np.diag([x, y, z, 1.0]))
            name, around = str(batch["name"][0]), target if target.any() else None
            shown["input"] = [gate_window(self.network, info, image, grid, prediction, name=name, around=around)]
        return shown, labels_1XYZ
