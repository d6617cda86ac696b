"""Where the voxels of a volume lie in the patient, and turning volumes to a common orientation.

Arrays are indexed [i, j, k]; world coordinates are mm, RAS+ (to the patient's right, front and head), as in NIfTI.
DICOM and ITK count left and back as positive (LPS+): ``to_itk`` and ``from_itk`` translate.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import nibabel
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

__all__ = ["Geometry", "reorient", "reorient_like"]

_SPACING = (1e-6, 1e5)  # mm, a nanometre to 100 m: beyond, a grid resampled to millimetres would have no end
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, eq=False)
class Geometry:
    """The grid of a volume.

    Attributes:
        shape: voxels along i, j and k.
        affine: (4, 4) float64, from the indices of a voxel to its centre in mm, RAS+.

    Raises:
        ValueError: the shape has not three axes, or the affine is not (4, 4), not finite or not invertible, or its
            voxels are smaller than a nanometre or larger than 100 m.
    """

    shape: tuple[int, int, int]
    affine: NDArray[np.float64]

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        shape = tuple(int(size) for size in self.shape)
        if len(shape) != 3:
            raise ValueError(f"a volume has three axes, not {len(shape)}")
        if affine.shape != (4, 4) or not np.isfinite(affine).all():
            raise ValueError(f"the affine must be a finite 4 x 4 matrix, got {affine.tolist()}")
        with np.errstate(over="ignore"):
            columns = np.linalg.norm(affine[:3, :3], axis=0)
        low, high = _SPACING
        if columns.min() > 0 and not low <= columns.min() <= columns.max() <= high:
            raise ValueError(f"voxels of {_by(columns)} mm are not plausible ({low:g} to {high:g} mm are)")
        if columns.min() <= 0 or abs(np.linalg.det(affine[:3, :3] / columns)) < 1e-4:
            raise ValueError(f"the affine's axes do not span space: {affine[:3, :3].tolist()}")
        affine.flags.writeable = False
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "shape", shape)

    @cached_property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between neighbouring voxels along i, j and k."""
        i, j, k = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @cached_property
    def direction(self) -> NDArray[np.float64]:
        """(3, 3): its columns are the unit vectors of i, j and k, RAS+."""
        return self.affine[:3, :3] / np.asarray(self.spacing)

    @property
    def origin(self) -> tuple[float, float, float]:
        """Centre of the first voxel, mm, RAS+."""
        x, y, z = self.affine[:3, 3]
        return float(x), float(y), float(z)

    @property
    def orientation(self) -> str:
        """Where i, j and k run to, three of R, L, A, P, S, I: "RAS", "LPS", ..."""
        return "".join(nibabel.aff2axcodes(self.affine))

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in millilitres."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000

    def differences(self, other: "Geometry", *, tolerance: float = 1e-3) -> list[str]:
        """What differs, as "spacing 1 x 1 x 2 mm, not 1 x 1 x 1 mm" (other's value first); empty: the same grid.

        Args:
            other: the grid to compare with.
            tolerance: of spacing and direction; of the origin in voxels, ten times as much.
        """
        found = []
        if other.shape != self.shape:
            found.append(f"size {_by(other.shape)}, not {_by(self.shape)}")
        if not np.allclose(other.spacing, self.spacing, rtol=tolerance, atol=0):
            found.append(f"spacing {_by(other.spacing)} mm, not {_by(self.spacing)} mm")
        if not np.allclose(other.direction, self.direction, rtol=0, atol=tolerance):
            same = other.orientation == self.orientation
            found.append("the axes are tilted" if same else f"orientation {other.orientation}, not {self.orientation}")
        if not np.allclose(other.origin, self.origin, rtol=0, atol=10 * tolerance * min(self.spacing)):
            found.append(f"origin {_at(other.origin)}, not {_at(self.origin)}")
        return found

    def to_itk(self) -> dict[str, Any]:
        """``spacing``, ``origin`` and ``direction`` (nine numbers, row by row) as SimpleITK sets them, LPS+."""
        lps = _LPS_TO_RAS @ self.affine
        direction = lps[:3, :3] / np.asarray(self.spacing)
        return dict(
            spacing=self.spacing, origin=tuple(lps[:3, 3].tolist()), direction=tuple(direction.ravel().tolist())
        )

    @classmethod
    def from_itk(cls, shape: Any, spacing: Any, origin: Any, direction: Any) -> "Geometry":
        """The inverse of ``to_itk``; ``shape`` is (i, j, k), as SimpleITK's GetSize."""
        affine = np.eye(4)
        affine[:3, :3] = np.reshape(direction, (3, 3)) * np.asarray(spacing)
        affine[:3, 3] = origin
        return cls(tuple(shape), _LPS_TO_RAS @ affine)


def _by(values: Any) -> str:
    return " x ".join(f"{value:g}" for value in values)


def _at(values: Any) -> str:
    return "(" + ", ".join(f"{value:.2f}" for value in values) + ")"


def reorient(array: NDArray[Any], geometry: Geometry, codes: str = "RAS") -> tuple[NDArray[Any], Geometry]:
    """Swap and flip axes so that they run as near as possible to ``codes``; no voxel is interpolated.

    Args:
        array: (*leading, i, j, k).
        geometry: of its last three axes.
        codes: see :attr:`Geometry.orientation`.

    Returns:
        A view of the array, and its geometry: every voxel keeps its place in the patient.
    """
    change = orientations.ornt_transform(
        orientations.io_orientation(geometry.affine), orientations.axcodes2ornt(tuple(codes))
    )
    affine = geometry.affine @ orientations.inv_ornt_aff(change, geometry.shape)
    order = np.argsort(change[:, 0]).astype(int)
    leading = array.ndim - 3
    turned = array.transpose(*range(leading), *(leading + order))
    i, j, k = (slice(None, None, int(change[axis, 1])) for axis in order)
    turned = turned[..., i, j, k]
    return turned, Geometry((turned.shape[-3], turned.shape[-2], turned.shape[-1]), affine)


def reorient_like(array: NDArray[Any], geometry: Geometry, target: Geometry) -> NDArray[Any]:
    """The inverse of :func:`reorient`: a view of the array with the axes of ``target``, on whose grid it lies.

    Raises:
        ValueError: it does not lie on that grid.
    """
    turned, own = reorient(array, geometry, target.orientation)
    differences = target.differences(own)
    if differences:
        raise ValueError(f"the array is not on the target's grid: {'; '.join(differences)}")
    return turned
