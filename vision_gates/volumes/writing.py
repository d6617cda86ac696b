"""Writing volumes: NIfTI, NRRD and MetaImage files. A crash leaves the old file or the new one, never half."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from vision_gates.errors import ConfigError, DataError
from vision_gates.volumes.dicom import needs
from vision_gates.volumes.geometry import Geometry

__all__ = ["write_labels", "write_volume"]

_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")


def write_labels(path: str | Path, labels: NDArray[Any], geometry: Geometry, *, names: Sequence[str]) -> None:
    """Writes a label map, compressed where the format can; uint8, or uint16 where a label is above 255.

    Args:
        path: of the file, which is replaced; its suffix chooses the format: .nii.gz, .nii, .nrrd, .mha.
        labels: (I, J, K) integers, on the grid of ``geometry``.
        geometry: of the file.
        names: of the labels 0, 1, ...; NIfTI keeps them as JSON in a header comment, NRRD as 3D Slicer's segments.

    Raises:
        ConfigError: the suffix is not one of these, or SimpleITK is needed but not installed.
        DataError: the file cannot be written.
        ValueError: the labels' shape is not the geometry's, or they are not integers from 0 to 65535.
    """
    low, high = (int(labels.min()), int(labels.max())) if labels.size else (0, 0)
    if labels.dtype.kind not in "iub" or low < 0 or high > 65535:
        raise ValueError(f"labels must be integers from 0 to 65535, not {labels.dtype} from {low} to {high}")
    _write(path, labels.astype(np.uint8 if high < 256 else np.uint16), geometry, names)


def write_volume(path: str | Path, array: NDArray[Any], geometry: Geometry) -> None:
    """Writes (I, J, K) intensities as float32; otherwise as :func:`write_labels`."""
    _write(path, array.astype(np.float32), geometry, ())


def _write(path: str | Path, array: NDArray[Any], geometry: Geometry, names: Sequence[str]) -> None:
    path = Path(path)
    suffix = next((suffix for suffix in _SUFFIXES if path.name.lower().endswith(suffix)), None)
    if suffix is None:
        raise ConfigError(f"{path}: volumes are written as {', '.join(_SUFFIXES)}; give the file one of these suffixes")
    if array.shape != geometry.shape:
        raise ValueError(f"an array of {array.shape} does not lie on a grid of {geometry.shape}")
    save = _save_nifti if suffix.startswith(".nii") else _save_itk
    writing = path.with_name(f".{path.name[: -len(suffix)]}.writing{suffix}")
    try:
        try:
            save(writing, array, geometry, names)
            _sync(writing)
            os.replace(writing, path)
        finally:
            writing.unlink(missing_ok=True)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:  # SimpleITK raises RuntimeError
        lines = str(error).strip().splitlines() or [type(error).__name__]
        free = f" ({shutil.disk_usage(path.parent).free / 2**20:,.1f} MiB)" if path.parent.is_dir() else ""
        reason = f"cannot be written ({lines[-1]}); check the folder and the free space{free}"
        raise DataError(f"{path}: {reason}") from error


def _sync(path: Path) -> None:
    """Makes what was written durable (folders cannot be opened on Windows, where this does nothing for them)."""
    try:
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _save_nifti(path: Path, array: NDArray[Any], geometry: Geometry, names: Sequence[str]) -> None:
    kind = nibabel.Nifti1Image if max(geometry.shape) < 2**15 else nibabel.Nifti2Image
    image = kind(array, geometry.affine)
    image.header.set_xyzt_units("mm")
    # A quaternion holds a rotation alone: where the axes are not at right angles only the sform tells the truth.
    upright = np.allclose(geometry.direction.T @ geometry.direction, np.eye(3), atol=1e-4)
    image.set_sform(geometry.affine, code=1)
    image.set_qform(geometry.affine, code=1 if upright else 0)
    if names:
        comment = json.dumps({"labels": dict(enumerate(names))}).encode()
        image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", comment))
    nibabel.save(image, path)


def _save_itk(path: Path, array: NDArray[Any], geometry: Geometry, names: Sequence[str]) -> None:
    sitk = needs("SimpleITK")
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose()))  # ITK's arrays are [k, j, i]
    place = geometry.to_itk()
    image.SetSpacing(place["spacing"])
    image.SetOrigin(place["origin"])
    image.SetDirection(place["direction"])
    if path.name.endswith(".nrrd"):
        for number, name in enumerate(names[1:]):  # the background is no segment
            image.SetMetaData(f"Segment{number}_ID", f"Segment_{number + 1}")
            image.SetMetaData(f"Segment{number}_Name", str(name))
            image.SetMetaData(f"Segment{number}_LabelValue", str(number + 1))
            image.SetMetaData(f"Segment{number}_Layer", "0")
    sitk.WriteImage(image, str(path), useCompression=True)
