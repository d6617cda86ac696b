"""What the gates of a network for volumes do in one of its windows, as pictures of a slice.

A network sees a volume window by window, so that a map of its gates covers one of them. Maps of a three-dimensional
network are shown where they meet the slice. Suffix HW: rows and columns of a picture.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vision_gates.engine.gate_views import GateView, gate_views
from vision_gates.engine.slices import PLANES, Plane, fullest, grey_window, pixel_of, square, turned
from vision_gates.engine.volume_data import VolumeInfo
from vision_gates.gate_maps import GateMap
from vision_gates.volumes.geometry import Geometry, reorient
from vision_gates.volumes.inference import neighbour_slices

__all__ = ["GateWindow", "gate_window"]

_IMAGE_SIDE = 224  # pixels of the slice's longest side
_MASK_SIDE = 384  # a mask stays sharp where the slice shrinks: it is a small file anyway
_MAP_SIDE = 96  # of a gate's map that is cut; maps are smooth


@dataclass(frozen=True, eq=False)
class GateWindow:
    """A window around what is labelled in a case; made by `gate_window`. It holds no network and can be pickled.

    Attributes:
        input_1C: (1, C, *spatial), what the network sees.
        picture: the part of the slice that is in the window, as an overlay (see overlays.py): ``name``, ``image``,
            ``prediction`` and the ``letters`` at its sides.
        grid: of the case, on the axes that the network knows.
        plane: of the slice.
        axis: of the grid, across the slice.
        slices: whether the network sees slices, not volumes.
        padded: sides of the window once the network has padded it.
        inside: where the volume lies in the window.
        place: of the slice along the padded window, 0 to 1.
    """

    input_1C: Tensor
    picture: dict[str, Any]
    grid: Geometry
    plane: Plane
    axis: int
    slices: bool
    padded: tuple[int, ...]
    inside: tuple[slice, ...]
    place: float

    def views(self, maps: Iterable[GateMap]) -> list[GateView]:
        """Pictures of the gates' maps over ``picture``.

        Args:
            maps: that `collect_gate_maps` gave for ``input_1C``.
        """
        depths: dict[str, str] = {}
        flat = []
        for gate in maps:
            values = gate.values
            if values.ndim != 4 + (not self.slices):  # a gate that is a parameter has no map
                continue
            if not self.slices:
                depth = values.shape[2 + self.axis]
                index = min(int(self.place * depth), depth - 1)
                depths[gate.name] = f", plane {index + 1} of {depth}"
                values = values.select(2 + self.axis, index)
            flat.append(replace(gate, values=values))
        rows, columns = (a for a in range(3) if a != self.axis)
        extent, part = (self.padded[rows], self.padded[columns]), (self.inside[rows], self.inside[columns])
        shown = []
        for view in gate_views(flat, extent):
            shape = self._turned(np.broadcast_to(np.uint8(0), view.grid)).shape
            values_HW, title = self._turned(_cut(view, extent, part)), view.title + depths.get(view.name, "")
            shown.append(replace(view, values=values_HW, grid=(shape[0], shape[1]), title=title))
        return shown

    def _turned(self, slice_HW: NDArray[Any]) -> NDArray[Any]:
        return _turned(slice_HW, self.axis, self.grid, self.plane)


def gate_window(
    network: nn.Module,
    view: VolumeInfo,
    image_CXYZ: NDArray[np.float32],
    geometry: Geometry,
    labels_XYZ: NDArray[Any],
    *,
    name: str,
    around: NDArray[Any] | None = None,
) -> GateWindow:
    """The window in the slice with most label: of the axis that a network for slices counts, else an axial one.

    Args:
        network: says what it pads its input to.
        view: how it looks at volumes.
        image_CXYZ: a prepared case.
        geometry: of its grid.
        labels_XYZ: what was predicted.
        name: of the case.
        around: labels that decide where the window is; None: the prediction.
    """
    # All happens on the axes that the network knows; only what is shown is turned to RAS.
    image_CXYZ, grid = reorient(image_CXYZ, geometry, view.view)
    around_XYZ, _ = reorient(labels_XYZ if around is None else around, geometry, view.view)
    labels_XYZ, _ = reorient(labels_XYZ, geometry, view.view)
    slices = view.spatial_dims == 2
    axis = view.slice_axis if slices else next(a for a in range(3) if view.view[a] in "SI")
    sides, divisors = list(view.patch_size), list(_divisors(network, view.spatial_dims))
    if slices:
        sides.insert(axis, 1)
        divisors.insert(axis, 1)
    centre = _centre(around_XYZ, axis)
    starts = [_start(c, side, size) for c, side, size in zip(centre, sides, grid.shape, strict=True)]
    box = [slice(max(s, 0), min(s + n, size)) for s, n, size in zip(starts, sides, grid.shape, strict=True)]
    inside = tuple(slice(part.start - s, part.stop - s) for part, s in zip(box, starts, strict=True))

    seen_CXYZ = image_CXYZ[(slice(None), *box)]
    if slices:
        near = neighbour_slices(centre[axis], neighbours=view.neighbours, size=grid.shape[axis])
        across = [slice(None), *box]
        across[axis + 1] = slice(None)
        seen_CXYZ = np.concatenate([image_CXYZ[tuple(across)].take([index], axis=axis + 1) for index in near])
    x_CXYZ = np.zeros((len(seen_CXYZ), *sides), dtype=np.float32)
    x_CXYZ[(slice(None), *inside)] = seen_CXYZ

    plane = PLANES[next(a for a, ends in enumerate(("RL", "AP", "SI")) if grid.orientation[axis] in ends)]
    pixel = pixel_of(reorient(image_CXYZ[0], grid)[1], plane)
    here: list[Any] = list(box)
    here[axis] = centre[axis]
    low, high = grey_window(image_CXYZ[0], view.preprocessing.channels[0], normalised=True)
    grey_HW = np.clip((_turned(image_CXYZ[(0, *here)], axis, grid, plane) - low) / (high - low), 0.0, 1.0)
    grey_HW = grey_HW.astype(np.float32)
    size = f"{' x '.join(map(str, view.patch_size))} {'pixels' if slices else 'voxels'}"
    which = "slice with most label" if around_XYZ.any() else "middle slice"
    prediction_HW = _turned(labels_XYZ[tuple(here)], axis, grid, plane)
    padded = tuple(n + -n % divisor for n, divisor in zip(sides, divisors, strict=True))
    return GateWindow(
        input_1C=torch.from_numpy(x_CXYZ.squeeze(axis + 1) if slices else x_CXYZ)[None],
        picture={
            "name": f"{name}, {plane.name} {which}, in a window of {size} as the network sees it",
            "image": (square(grey_HW, pixel, _IMAGE_SIDE) * 255 + 0.5).astype(np.uint8),
            "prediction": square(prediction_HW, pixel, _MASK_SIDE, nearest=True),
            "letters": plane.letters,
        },
        grid=grid,
        plane=plane,
        axis=axis,
        slices=slices,
        padded=padded,
        inside=inside,
        place=(centre[axis] - starts[axis] + 0.5) / padded[axis],
    )


def _turned(slice_HW: NDArray[Any], axis: int, grid: Geometry, plane: Plane) -> NDArray[Any]:
    """As `turned`, of a slice across ``axis`` of the network's grid."""
    thick = np.expand_dims(slice_HW, axis)
    thick, _ = reorient(thick, Geometry((thick.shape[0], thick.shape[1], thick.shape[2]), grid.affine))
    return turned(thick.squeeze(plane.axis))


def _divisors(network: nn.Module, dims: int) -> tuple[int, ...]:
    """What the network pads each axis to a multiple of, at its far end."""
    same = (int(getattr(network, "divisor", 1)),) * dims
    return tuple(getattr(network, "divisors", same))


def _centre(labels_XYZ: NDArray[Any], axis: int) -> tuple[int, ...]:
    """Middle of the labelled voxels of the slice across ``axis`` that has most; of the volume where there are none."""
    if not labels_XYZ.any():
        return tuple(size // 2 for size in labels_XYZ.shape)
    index = fullest(labels_XYZ, axis)
    centre = [int(round(places.mean())) for places in np.nonzero(labels_XYZ.take([index], axis=axis))]
    centre[axis] = index
    return tuple(centre)


def _start(centre: int, side: int, size: int) -> int:
    """First voxel of a window: inside the volume if that is large enough, else the volume is in its middle."""
    return -((side - size) // 2) if size <= side else min(max(centre - side // 2, 0), size - side)


def _cut(view: GateView, extent: tuple[int, int], part: tuple[slice, slice]) -> NDArray[np.float32]:
    """The part of a map over ``extent`` positions that lies on the image."""
    if all(p.start == 0 and p.stop == n for p, n in zip(part, extent, strict=True)):
        return np.asarray(view.values)
    scale = min(1.0, _MAP_SIDE / max(p.stop - p.start for p in part))
    fine = [max(round(n * scale), 1) for n in extent]
    values = torch.from_numpy(np.ascontiguousarray(view.values))[None, None]
    fine_HW = F.interpolate(values, size=fine, mode="bilinear", antialias=True)[0, 0].clamp(0.0, 1.0).numpy()
    rows, columns = (
        slice(int(p.start * f / n), max(round(p.stop * f / n), int(p.start * f / n) + 1))
        for p, f, n in zip(part, fine, extent, strict=True)
    )
    return fine_HW[rows, columns]
