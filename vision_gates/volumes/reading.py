"""Reading volumes: NIfTI, NRRD and MetaImage files and folders that hold a DICOM series.

Arrays are indexed [i, j, k] as in ``geometry``, whatever a library calls its axes. Files are not trusted: what a header
claims is checked against the file's size before memory is taken for it, and whatever is wrong ends in one `DataError`.
"""

import gzip
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from numpy.typing import NDArray

from vision_gates.errors import DataError
from vision_gates.volumes.dicom import Series, find_series, is_dicom, needs, open_file, open_series
from vision_gates.volumes.geometry import Geometry

__all__ = [
    "VOLUME_SUFFIXES",
    "Series",
    "Volume",
    "find_series",
    "is_volume",
    "read_geometry",
    "read_labels",
    "read_volume",
    "stem",
]

VOLUME_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")

# Deflate shrinks by at most 1032:1, so a file that claims more than this is damaged or means harm.
_MOST_COMPRESSION = 1100
_MOST_BEHIND = 2**26  # bytes after the voxels; more is no padding
_LONGEST_HEADER = 2**16
_ONCE = ("elementdatafile", "datafile", "ndims")  # fields of a header that readers must agree on
_PATTERN = re.compile(r"[^%]*%\d{0,2}d[^%\s]*\s+\d{1,6}\s+\d{1,6}(?:\s+[1-9]\d{0,5}(?:\s+\d)?)?")
_MM = {"meter": 1000.0, "micron": 0.001}


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume as it lies in its file.

    Attributes:
        array: (I, J, K); intensities float32 after the file's slope and intercept, labels uint8, int16 or int32.
        geometry: of the array, RAS+ mm.
        source: the file or DICOM folder.
        modality: "CT", "MR", ... from DICOM; None where the format does not say.
    """

    array: NDArray[Any]
    geometry: Geometry
    source: Path
    modality: str | None = None


@dataclass(frozen=True)
class _Opened:
    """A file whose header has been read and checked; ``load`` reads the voxels, after slope and intercept."""

    geometry: Geometry
    load: Callable[[], NDArray[Any]]
    modality: str | None = None


def read_volume(path: str | Path, *, series: str | None = None) -> Volume:
    """Reads the intensities of a file or of a folder that holds one DICOM series.

    Args:
        path: a file with one of :data:`VOLUME_SUFFIXES`, a multi-frame DICOM file or a folder of DICOM slices.
        series: SeriesInstanceUID, for a folder that holds several; see :func:`find_series`.

    Returns:
        The volume; float32.

    Raises:
        DataError: the path is missing or of another kind; the file is cut short or damaged, or holds no volume of real
            numbers (2-D, 4-D, colour, complex), no usable affine, NaN or infinite voxels; DICOM slices are missing,
            doubled or do not make one stack; a folder holds several series.
        ConfigError: SimpleITK or pydicom is needed but not installed.
    """
    path = Path(path)
    opened = _open(path, series)
    with np.errstate(over="ignore"):  # beyond float32: infinite, which is reported
        array = opened.load().astype(np.float32, copy=False)
    _check_finite(array, path)
    return Volume(array, opened.geometry, path, opened.modality)


def read_labels(path: str | Path) -> Volume:
    """Reads a label map, in the smallest of uint8, int16 and int32 that holds it; see :func:`read_volume`.

    Raises:
        DataError: as in ``read_volume``, or a value is no integer or beyond int32.
    """
    path = Path(path)
    opened = _open(path, None)
    array = opened.load()
    _check_finite(array, path)
    if array.dtype.kind == "f":
        broken = array[array != np.rint(array)]
        if broken.size:
            shown = ", ".join(f"{value:g}" for value in np.unique(broken)[:4])
            raise DataError(
                f"{path}: {broken.size:,} of {array.size:,} voxels are no integers ({shown} ...), so these are no "
                f"labels; give the label map, not an image or probabilities, or resample it with nearest neighbours"
            )
    low, high = array.min(), array.max()
    for dtype in (np.uint8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return Volume(array.astype(dtype, copy=False), opened.geometry, path, opened.modality)
    raise DataError(f"{path}: labels from {low} to {high} do not fit in 32 bits; renumber them")


def read_geometry(path: str | Path, *, series: str | None = None) -> Geometry:
    """Reads the headers alone; arguments and errors as :func:`read_volume`, as far as headers show them."""
    return _open(Path(path), series).geometry


def is_volume(path: str | Path) -> bool:
    """Whether the name is that of a volume file: one of :data:`VOLUME_SUFFIXES`, and not hidden (.x, ._x)."""
    name = Path(path).name
    return bool(_suffix(name)) and not name.startswith(".")


def stem(path: str | Path) -> str:
    """Name without folder and suffix: "a/b/case.nii.gz" -> "case"; a DICOM folder's name as it is."""
    name = Path(path).name
    return name[: len(name) - len(_suffix(name))]


def _suffix(name: str) -> str:
    return next((suffix for suffix in VOLUME_SUFFIXES if name.lower().endswith(suffix)), "")


def _open(path: Path, series: str | None) -> _Opened:
    try:
        return _open_any(path, series)
    except OSError as error:
        raise DataError(f"{path}: cannot be opened ({error}); check its permissions and the disk") from error


def _open_any(path: Path, series: str | None) -> _Opened:
    if path.is_dir():
        return _Opened(*open_series(path, series))
    if not path.is_file():
        raise DataError(f"{path}: there is no such file or folder")
    suffix = _suffix(path.name)
    if suffix.startswith(".nii"):
        return _open_nifti(path, compressed=suffix.endswith(".gz"))
    if suffix:
        return _open_itk(path)
    if is_dicom(path):
        return _Opened(*open_file(path))
    known = ", ".join(VOLUME_SUFFIXES)
    raise DataError(f"{path}: not a volume file; known are {known} and folders that hold a DICOM series")


def _damaged(path: Path, part: str, error: Exception) -> DataError:
    # Libraries wrap the reason in their own file names and line numbers; the last line says it.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = re.sub(r"^\S*(?:ERROR|Reason|\[nrrd\]):?\s*", "", lines[-1])[:200] if lines else type(error).__name__
    return DataError(f"{path}: the {part} cannot be read, the file is cut short or damaged; copy it again ({reason})")


def _check_size(path: Path, stored: Path, claimed: int, *, compressed: bool) -> None:
    """That ``stored`` can hold the ``claimed`` bytes of voxels."""
    held = stored.stat().st_size
    if claimed > (_MOST_COMPRESSION * held + 2**20 if compressed else held):
        form = " compressed" if compressed else ""
        raise DataError(
            f"{path}: the header claims {claimed:,} bytes of voxels but {stored.name} holds only {held:,}{form}; it is "
            f"cut short or damaged, copy it again"
        )


def _volume_shape(path: Path, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """The first three sizes, if they are all there is."""
    sizes = " x ".join(str(size) for size in shape)
    if len(shape) < 3:
        raise DataError(f"{path}: a 2-D image ({sizes}), not a volume; stack the slices of a patient to a 3-D file")
    if any(size != 1 for size in shape[3:]):
        raise DataError(f"{path}: has {len(shape)} axes ({sizes}); split it into 3-D files, one per channel")
    if min(shape) < 1:
        raise DataError(f"{path}: holds no voxels ({sizes})")
    i, j, k = shape[:3]
    return int(i), int(j), int(k)


def _check_finite(array: NDArray[Any], path: Path) -> None:
    if array.dtype.kind != "f":
        return
    broken = ~np.isfinite(array)
    if broken.any():
        first = tuple(int(index) for index in np.unravel_index(int(broken.argmax()), array.shape))
        raise DataError(
            f"{path}: {int(broken.sum()):,} of {array.size:,} voxels are NaN or infinite, the first at {first}; give "
            f"them the background's value"
        )


def _open_nifti(path: Path, *, compressed: bool) -> _Opened:
    try:
        image: Any = nibabel.load(path)
        shape, stored, affine = image.shape, image.dataobj, image.affine.copy()
        affine[:3] *= _MM.get(image.header.get_xyzt_units()[0], 1.0)
    except Exception as error:  # ImageFileError, HeaderDataError, OSError, zlib.error, ...: where the damage decides
        raise _damaged(path, "header", error) from error
    size = _volume_shape(path, shape)
    if stored.dtype.kind not in "iuf":
        kind = "complex numbers" if stored.dtype.kind == "c" else "colours"
        raise DataError(f"{path}: holds {kind}, not one real number a voxel; convert it to intensities first")
    # Python's integers do not overflow, whatever the header claims.
    claimed = stored.offset + stored.dtype.itemsize * size[0] * size[1] * size[2]
    _check_size(path, path, claimed, compressed=compressed)
    try:
        geometry = Geometry(size, affine)
    except ValueError as error:
        raise DataError(f"{path}: {error}; mend the sform and qform in its header") from error

    def load() -> NDArray[Any]:
        spec = (stored.shape, stored.dtype, stored.offset, stored.slope, stored.inter)
        try:
            with gzip.open(path) if compressed else open(path, "rb") as file:
                array = np.asanyarray(ArrayProxy(file, spec, mmap=False)).reshape(size, order="F")
                behind = 0
                while block := file.read(2**20):  # the checksum follows the last byte; nibabel would not look at it
                    behind += len(block)
                    if behind > _MOST_BEHIND:
                        raise ValueError(f"over {_MOST_BEHIND:,} bytes follow the voxels that its header tells of")
        except Exception as error:
            raise _damaged(path, "voxels", error) from error
        return array

    return _Opened(geometry, load)


def _header_fields(path: Path) -> dict[str, str]:
    """The text fields of a NRRD or MetaImage header; names in lower case and without blanks.

    Raises:
        DataError: it has no end, or says something twice, so that readers might differ.
    """
    fields: dict[str, str] = {}
    with open(path, "rb") as file:
        for line in re.split(r"[\r\n]", file.read(_LONGEST_HEADER).decode("latin-1").replace("\r\n", "\n")):
            match = re.match(r"([^:=#]+?)\s*[:=]=?\s*(.*)", line.strip())
            name = match[1].lower().replace(" ", "") if match else ""
            if match and name in fields and name in _ONCE:
                raise DataError(f"{path}: its header says twice what {match[1]!r} is; keep one of the lines")
            if match:
                fields[name] = match[2]
            if not line.strip() or "elementdatafile" in fields:  # the voxels follow
                return fields
    if path.stat().st_size < _LONGEST_HEADER:
        return fields
    raise DataError(f"{path}: its header has no end in the first {_LONGEST_HEADER:,} bytes; it is damaged")


def _voxel_file(path: Path, fields: dict[str, str]) -> Path | None:
    """The file with the voxels: this one or the one it names; None for a list of files."""
    name = fields.get("elementdatafile", fields.get("datafile", "LOCAL"))
    if name.upper() == "LOCAL":
        return path
    if name.upper().startswith("LIST"):
        # Each line that follows may name a file, of which ITK reads whatever it gets: a device, another's data.
        with open(path, "rb") as file:
            names = file.read(_LONGEST_HEADER).decode("latin-1").splitlines()
        for one in names:
            _below(path, one.strip())
        return None
    stored = _below(path, name)
    if "%" in name:  # goes to printf, and a step of 0 divides
        if not _PATTERN.fullmatch(name.strip()):
            raise DataError(f"{path}: {name[:80]!r} is no pattern of files (such as %03d.raw 1 20 1); it is damaged")
        return None
    if not stored.is_file():
        raise DataError(f"{path}: is only a header; its voxels belong in {stored}, which is missing: copy it there")
    return stored


def _below(path: Path, name: str) -> Path:
    """The file that a header names; `DataError` if it is not beside the header or below, as far as names tell."""
    stored = path.parent / name
    if ".." in Path(name).parts or not stored.is_relative_to(path.parent):
        raise DataError(f"{path}: its voxels would be in {name[:200]!r}, outside of its folder; put both in one folder")
    return stored


def _open_itk(path: Path) -> _Opened:
    sitk = needs("SimpleITK")
    reader = sitk.ImageFileReader()
    # By the name, as the header is checked here: ITK would go by the content, which may be of quite another format.
    is_meta = path.suffix.lower() in (".mha", ".mhd")
    reader.SetImageIO("MetaImageIO" if is_meta else "NrrdImageIO")
    reader.SetFileName(str(path))
    fields = _header_fields(path)
    stored = _voxel_file(path, fields)
    if is_meta and not re.fullmatch(r"[1-9]", fields.get("ndims", "")):  # MetaIO takes any number, and crashes
        raise _damaged(path, "header", ValueError(f"NDims is {fields.get('ndims', 'missing')[:40]!r}"))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _damaged(path, "header", error) from error
    size = _volume_shape(path, reader.GetSize())
    kind = sitk.GetPixelIDValueAsString(reader.GetPixelID())
    bits = re.match(r"(\d+)-bit", kind)
    if bits is None:
        raise DataError(f"{path}: holds a {kind} a voxel, not one real number; split it into files, one per channel")
    if stored is not None:
        compressed = fields.get("encoding", "raw") != "raw" or fields.get("compresseddata", "").lower() == "true"
        _check_size(path, stored, size[0] * size[1] * size[2] * int(bits[1]) // 8, compressed=compressed)
    axes = reader.GetDimension()
    direction = np.reshape(reader.GetDirection(), (axes, axes))[:3, :3]
    try:
        geometry = Geometry.from_itk(size, reader.GetSpacing()[:3], reader.GetOrigin()[:3], direction)
    except ValueError as error:
        raise DataError(f"{path}: {error}; mend the spacing and directions in its header") from error

    def load() -> NDArray[Any]:
        try:
            array = sitk.GetArrayFromImage(reader.Execute())
        except RuntimeError as error:
            raise _damaged(path, "voxels", error) from error
        return array.transpose().reshape(size, order="F")  # ITK's arrays are [k, j, i]

    return _Opened(geometry, load)
