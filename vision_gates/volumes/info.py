"""How a network looks at volumes: what is done to them, and the windows that it sees."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from vision_gates.volumes.geometry import Geometry, reorient, reorient_like
from vision_gates.volumes.preprocessing import Preprocessing

__all__ = ["VolumeInfo"]


class VolumeInfo(BaseModel):
    """How a run looks at volumes; part of run.json, and of the description in an exported network.

    Attributes:
        preprocessing: from files to what the network sees.
        spatial_dims: 2: slices; 3: patches.
        patch_size: voxels of a window; rows and columns, or x, y and z.
        slice_axis: with slices, the axis they are counted along.
        neighbours: with slices, how many on each side are further channels.
        channel_names: of the modalities.
        overlap: of neighbouring windows.
        mirror: whether the predictions of mirror images are averaged.
        view: axes of the grid that ``slice_axis`` and ``patch_size`` speak of, as `Geometry.orientation`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    preprocessing: Preprocessing
    spatial_dims: Literal[2, 3]
    patch_size: tuple[int, ...]
    slice_axis: Literal[0, 1, 2] = 2
    neighbours: int = 0
    channel_names: tuple[str, ...]
    overlap: float = 0.5
    mirror: bool = False
    view: str = "RAS"

    def describe(self) -> str:
        """What the network sees: "48 x 64 x 48 voxels of 1 x 1 x 1 mm"."""
        what = "voxels" if self.spatial_dims == 3 else f"pixels of slices across {'xyz'[self.slice_axis]},"
        spacing = self.preprocessing.spacing
        voxel = "" if spacing is None else f" of {' x '.join(f'{mm:.3g}' for mm in spacing)} mm"
        return f"{' x '.join(map(str, self.patch_size))} {what}{voxel}"

    @property
    def in_chans(self) -> int:
        """Channels of the network's input."""
        return len(self.channel_names) * (2 * self.neighbours + 1)

    def windows(self, *, num_classes: int, batch_size: int) -> dict[str, Any]:
        """Arguments of ``inference.plan_inference`` and ``windows.plan_windows``."""
        axes = [axis for axis in range(3) if self.spatial_dims == 3 or axis != self.slice_axis]
        return dict(
            num_classes=num_classes,
            patch_size=self.patch_size,
            spatial_dims=self.spatial_dims,
            neighbours=self.neighbours,
            slice_axis=self.slice_axis,
            overlap=self.overlap,
            mirror=axes if self.mirror else (),
            batch_size=batch_size,
        )

    def viewed(self, image_CXYZ: NDArray[Any]) -> tuple[NDArray[Any], Callable[[NDArray[Any]], NDArray[Any]]]:
        """An image (C, X, Y, Z), its axes in RAS order, with those of ``view``, and what turns its labels back."""
        x, y, z = image_CXYZ.shape[-3:]
        grid = Geometry((x, y, z), np.eye(4))
        viewed, view = reorient(image_CXYZ, grid, self.view)
        return viewed, lambda labels_XYZ: reorient_like(labels_XYZ, view, grid)
