"""DICOM series as volumes: which series a folder holds, where their slices lie, and their values.

Slices are placed by ImagePositionPatient and ImageOrientationPatient alone: file names, InstanceNumber and
SliceThickness are often wrong. The frames of an enhanced multi-frame file are treated as slices.
Source: DICOM PS3.3, C.7.6.2.1.1 (place of a pixel) and C.7.6.16 (functional groups of frames).
"""

import importlib
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vision_gates.errors import ConfigError, DataError
from vision_gates.volumes.geometry import Geometry

__all__ = ["Series", "find_series", "is_dicom", "needs", "open_file", "open_series", "slice_files"]

# What a folder or file opens to: the grid, a function that reads the voxels, the modality.
Opened = tuple[Geometry, Callable[[], NDArray[np.float32]], str | None]

_MACROS = (
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
)
_HEADER = [
    *("SpecificCharacterSet", "StudyInstanceUID", "SeriesInstanceUID", "SeriesDescription", "Modality"),
    *(
        "Rows",
        "Columns",
        "BitsAllocated",
        "SamplesPerPixel",
        "NumberOfFrames",
        "PixelSpacing",
        "SpacingBetweenSlices",
        "SliceThickness",
    ),
    *("ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
_PIXELS = [
    *("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation"),
]
_SAME_PLACE_MM = 1e-3
_UNCOMPRESSED = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")  # transfer syntaxes
# Deflate shrinks by at most 1032:1; of an empty slice JPEG 2000 leaves next to nothing.
_MOST_COMPRESSION, _ALWAYS_BYTES = 1100, 2**23


@dataclass(frozen=True)
class Series:
    """A DICOM series in a folder.

    Attributes:
        uid: SeriesInstanceUID; "no-uid", "no-uid-2", ... for files that have none.
        description: SeriesDescription, or "".
        modality: "CT", "MR", ..., or "".
        files: its images, sorted by name.
    """

    uid: str
    description: str
    modality: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class _Slice:
    path: Path
    frame: int | None  # within an enhanced multi-frame file
    frames: int  # more than one: frames whose places the file does not tell
    uid: str
    study: str
    description: str
    modality: str
    size: tuple[int, int]  # columns, rows: (i, j)
    samples: int
    pixel_spacing: tuple[float, ...] | None  # between rows (along j), between columns (along i)
    orientation: tuple[float, ...] | None  # LPS+ unit vectors of i and j
    position: tuple[float, ...] | None  # LPS+ mm
    thickness: float
    slope: float
    intercept: float

    @property
    def name(self) -> str:
        return self.path.name if self.frame is None else f"{self.path.name} frame {self.frame + 1}"


def needs(module: str) -> Any:
    """Imports a package of the extra ``volumes``; `ConfigError` if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        extra = "dicom-seg" if module.startswith("highdicom") else "volumes"
        raise ConfigError(f"this needs {module}: pip install 'vision-gates[{extra}]'") from error


def find_series(folder: str | Path) -> list[Series]:
    """The DICOM series whose images lie in a folder (not in its sub-folders), sorted by UID.

    Raises:
        DataError: the folder is missing, or holds an empty or damaged DICOM file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder")
    return [
        Series(uid, slices[0].description, slices[0].modality, tuple(sorted({one.path for one in slices})))
        for uid, slices in _scan(folder).items()
    ]


def is_dicom(path: Path) -> bool:
    """Whether a file starts as DICOM does, with or without the preamble that old files lack."""
    with open(path, "rb") as file:
        start = file.read(132)
    return start[128:] == b"DICM" or start[:2] in (b"\x08\x00", b"\x02\x00", b"\x00\x08")


def open_series(folder: Path, uid: str | None) -> Opened:
    """Places the slices of a series; reads no pixels yet. Arguments and errors as `read_volume`."""
    return _open(folder, _chosen(folder, uid))


def slice_files(folder: Path, uid: str | None) -> list[Path]:
    """The files of a series in the order of the volume's last axis; arguments and errors as `read_volume`."""
    _, ordered = _stack(folder, _chosen(folder, uid))
    if any(one.frame is not None for one in ordered):
        raise DataError(f"{folder}: {ordered[0].name} holds several slices; a file a slice is needed here")
    return [one.path for one in ordered]


def _chosen(folder: Path, uid: str | None) -> list[_Slice]:
    """The slices of the series that is meant."""
    found = _scan(folder)
    if not found:
        inner = sorted(path.name for path in folder.iterdir() if path.is_dir())
        hint = f"pass one of its folders: {', '.join(inner[:5])}" if inner else "pass the folder of the slices"
        raise DataError(f"{folder}: the folder holds no DICOM images; {hint}")
    if uid is None and len(found) == 1:
        uid = next(iter(found))
    if uid not in found:
        count = "1 DICOM series" if len(found) == 1 else f"{len(found)} DICOM series"
        listed = [
            f"{key} ({one[0].modality or 'no modality'}, {one[0].description!r}, {len({s.path for s in one})} files)"
            for key, one in found.items()
        ]
        more = f"; and {len(listed) - 10} more" if len(listed) > 10 else ""
        problem = "choose one with series=UID" if uid is None else f"none is series={uid!r}"
        raise DataError(f"{folder}: the folder holds {count}, {problem}: {'; '.join(listed[:10])}{more}")
    return found[uid]


def open_file(path: Path) -> Opened:
    """Places the frames of an enhanced multi-frame file; errors as `read_volume`."""
    slices = _read_header(path)
    if not slices:
        raise DataError(f"{path}: this DICOM file holds no image")
    if len(slices) == 1 and slices[0].frames == 1:
        raise DataError(f"{path}: one slice of a DICOM series; pass the folder of all its slices: {path.parent}")
    return _open(path, slices)


def _open(source: Path, slices: Sequence[_Slice]) -> Opened:
    geometry, ordered = _stack(source, slices)
    places: dict[Path, list[int]] = defaultdict(list)
    for k, one in enumerate(ordered):
        places[one.path].append(k)

    def load() -> NDArray[np.float32]:
        array = np.empty(geometry.shape, dtype=np.float32, order="F")
        for path, indices in places.items():
            stored = _read_pixels(path)
            columns, rows = geometry.shape[:2]
            if stored.shape[1:] != (rows, columns) or len(stored) <= max(ordered[k].frame or 0 for k in indices):
                raise DataError(f"{path}: its header and its pixels differ in size; the file is damaged, copy it again")
            for k in indices:
                one = ordered[k]
                array[:, :, k] = stored[one.frame or 0].T * one.slope + one.intercept
        return array

    return geometry, load, ordered[0].modality or None


def _scan(folder: Path) -> dict[str, list[_Slice]]:
    """The images in a folder by series, sorted by UID and file name."""
    slices: list[_Slice] = []
    for path in sorted(folder.iterdir()):
        if not path.is_file() or path.name.startswith("."):
            continue
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty; copy it again, or remove it if it is no slice")
        if is_dicom(path):
            slices += _read_header(path)
    groups: dict[Any, list[_Slice]] = defaultdict(list)
    for one in slices:
        # Files without a UID belong together where study, size and orientation agree.
        turned = tuple(round(value, 2) + 0.0 for value in one.orientation or ())
        groups[one.uid or (one.study, one.modality, one.size, turned)].append(one)
    named = {key: members for key, members in groups.items() if isinstance(key, str)}
    unnamed = [groups[key] for key in sorted(key for key in groups if not isinstance(key, str))]
    for number, members in enumerate(unnamed, start=1):
        named["no-uid" if number == 1 else f"no-uid-{number}"] = members
    return dict(sorted(named.items()))


def _read_header(path: Path) -> list[_Slice]:
    """The slices in a DICOM file: none (a report, DICOMDIR), one, or one per frame."""
    pydicom = needs("pydicom")
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, force=True, specific_tags=_HEADER)
        if "Rows" not in header or "Columns" not in header:
            return []
        frames = int(header.get("NumberOfFrames") or 1)
        _check_claim(path, header, frames)
        groups = header.get("PerFrameFunctionalGroupsSequence") or []
        if len(groups) < frames:
            return [_slice(path, None, frames, [header], header)]
        shared = header.get("SharedFunctionalGroupsSequence") or []
        slices = []
        for frame, group in enumerate(groups[:frames]):
            macros = [part.get(name) for part in (group, *shared[:1]) for name in _MACROS]
            slices.append(_slice(path, frame, 1, [*(macro[0] for macro in macros if macro), header], header))
        return slices
    except DataError:
        raise
    except Exception as error:  # pydicom parses values when they are asked for: anything can surface here
        raise DataError(f"{path}: the DICOM header cannot be read ({error}); copy the file again") from error


def _check_claim(path: Path, header: Any, frames: int) -> None:
    """That the file can hold the pixels that its header claims, before memory is taken for them."""
    rows, columns, held = int(header.Rows), int(header.Columns), path.stat().st_size
    if min(rows, columns, frames) < 1:
        raise DataError(f"{path}: holds no pixels ({columns} x {rows}, {frames} frames); copy the file again")
    claimed = rows * columns * frames * int(header.get("BitsAllocated") or 8) // 8
    syntax = str(header.file_meta.get("TransferSyntaxUID", "")) if hasattr(header, "file_meta") else ""
    packed = syntax not in ("", *_UNCOMPRESSED)
    if claimed > (_MOST_COMPRESSION * held + _ALWAYS_BYTES if packed else held):
        raise DataError(
            f"{path}: the header claims {claimed:,} bytes of pixels but the file holds only {held:,}; it is cut short "
            f"or damaged, copy it again"
        )


def _slice(path: Path, frame: int | None, frames: int, places: Sequence[Any], header: Any) -> _Slice:
    """``places``: where an attribute is looked for, first found first taken."""

    def numbers(keyword: str, count: int) -> tuple[float, ...] | None:
        value = next((place.get(keyword) for place in places if place.get(keyword) not in (None, "")), None)
        if value is None:
            return None
        values = tuple(float(v) for v in (value if count > 1 else [value]))
        return values if len(values) == count and np.isfinite(values).all() else None

    def number(keyword: str, default: float) -> float:
        found = numbers(keyword, 1)
        return found[0] if found else default

    def text(keyword: str) -> str:
        return str(header.get(keyword) or "").strip()

    return _Slice(
        path=path,
        frame=frame,
        frames=frames,
        uid=text("SeriesInstanceUID"),
        study=text("StudyInstanceUID"),
        description=text("SeriesDescription"),
        modality=text("Modality"),
        size=(int(header.Columns), int(header.Rows)),
        samples=int(header.get("SamplesPerPixel") or 1),
        pixel_spacing=numbers("PixelSpacing", 2),
        orientation=numbers("ImageOrientationPatient", 6),
        position=numbers("ImagePositionPatient", 3),
        thickness=number("SpacingBetweenSlices", 0.0) or number("SliceThickness", 0.0) or 1.0,
        slope=number("RescaleSlope", 1.0),
        intercept=number("RescaleIntercept", 0.0),
    )


def _stack(source: Path, slices: Sequence[_Slice]) -> tuple[Geometry, list[_Slice]]:
    """The grid on which the slices lie, and the slices in its order; `DataError` if they do not make one stack."""
    first = slices[0]
    for one in slices:
        if one.samples != 1:
            raise DataError(f"{source}: {one.name} is a colour image; a volume needs one number a voxel")
        if one.frames > 1:
            raise DataError(
                f"{source}: {one.name} has {one.frames} frames and does not say where each lies; convert it to NIfTI, "
                f"for example with dcm2niix"
            )
        if one.orientation is None or one.position is None or one.pixel_spacing is None:
            keywords = {
                "ImageOrientationPatient": one.orientation,
                "ImagePositionPatient": one.position,
                "PixelSpacing": one.pixel_spacing,
            }
            lacking = next(keyword for keyword, value in keywords.items() if value is None)
            raise DataError(f"{source}: {one.name} has no {lacking}, so its place is unknown; use the original files")
        for what, own, others, tolerance in (
            ("size", one.size, first.size, 0),
            ("pixel spacing", one.pixel_spacing, first.pixel_spacing, 1e-4),
            ("orientation", one.orientation, first.orientation, 1e-3),
        ):
            if not np.allclose(own, others or (), rtol=0, atol=tolerance):
                raise DataError(
                    f"{source}: the slices differ in {what}: {first.name} {_list(others or ())}, {one.name} "
                    f"{_list(own)}; keep the slices of one stack in a folder of their own"
                )
    right, down = np.reshape(np.array(first.orientation), (2, 3))
    normal = np.cross(right, down)
    ordered = sorted(slices, key=lambda one: float(np.dot(normal, one.position or 0)))
    positions = np.array([one.position for one in ordered])
    step = _step(source, ordered, positions, normal, pixel=min(first.pixel_spacing or (1.0,)))
    between_rows, between_columns = first.pixel_spacing or (1.0, 1.0)
    affine = np.eye(4)
    affine[:3] = np.stack([right * between_columns, down * between_rows, step, positions[0]], axis=1)
    affine[:2] *= -1  # LPS+ to RAS+
    try:
        return Geometry((*first.size, len(ordered)), affine), ordered
    except ValueError as error:
        raise DataError(f"{source}: {error}; the DICOM header of {first.name} is damaged") from error


def _step(
    source: Path, ordered: Sequence[_Slice], positions: NDArray[Any], normal: NDArray[Any], *, pixel: float
) -> NDArray[Any]:
    """(3,): from a slice to the next, mm; `DataError` if slices are missing, doubled or off the line."""
    if len(ordered) == 1:
        return normal * ordered[0].thickness
    along = positions @ normal
    gaps = np.diff(along)
    usual = median_low(gaps.tolist())
    if gaps.min() < _SAME_PLACE_MM:
        k = int(gaps.argmin())
        count = int((gaps < _SAME_PLACE_MM).sum())
        raise DataError(
            f"{source}: {ordered[k].name} and {ordered[k + 1].name} lie at the same place ({along[k]:.2f} mm; {count} "
            f"such pairs); keep one copy, or one time point or echo, in a folder of its own"
        )
    if gaps.max() > 1.5 * usual:
        k = int(gaps.argmax())
        raise DataError(
            f"{source}: slices are missing between {ordered[k].name} ({along[k]:.2f} mm) and {ordered[k + 1].name} "
            f"({along[k + 1]:.2f} mm): {gaps[k]:.2f} mm apart, others {usual:.2f} mm; export the whole series again"
        )
    step = (positions[-1] - positions[0]) / (len(ordered) - 1)
    upright = normal * np.dot(step, normal)
    # Rounded positions must not tilt the axes; a tilted gantry does, and its affine says so.
    if np.linalg.norm(step - upright) * (len(ordered) - 1) < 0.1 * pixel:
        step = upright
    off = positions - (positions[0] + np.arange(len(ordered))[:, None] * step)
    ahead = np.abs(off @ normal)
    aside = np.linalg.norm(off - (off @ normal)[:, None] * normal, axis=1)
    if ahead.max() > 0.1 * usual or aside.max() > pixel:
        k = int((ahead / usual + aside / pixel).argmax())
        raise DataError(
            f"{source}: the slices are not evenly stacked: {gaps.min():.2f} to {gaps.max():.2f} mm apart, "
            f"{ordered[k].name} lies {np.linalg.norm(off[k]):.2f} mm from its place; resample the series first"
        )
    return step


def _list(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _read_pixels(path: Path) -> NDArray[Any]:
    """(frames, rows, columns): the stored values, before slope and intercept."""
    pydicom = needs("pydicom")
    try:
        dataset = pydicom.dcmread(path, force=True)
        if "TransferSyntaxUID" not in dataset.file_meta:  # old files say it by their encoding alone
            implicit, little = dataset.original_encoding
            uids = pydicom.uid
            explicit = uids.ExplicitVRLittleEndian if little else uids.ExplicitVRBigEndian
            dataset.file_meta.TransferSyntaxUID = uids.ImplicitVRLittleEndian if implicit else explicit
        try:
            pixels = dataset.pixel_array
        except (NotImplementedError, RuntimeError):  # no decoder for this compression; ITK has more of them
            pixels = _decode_with_itk(dataset)
        return np.asarray(pixels).reshape(-1, dataset.Rows, dataset.Columns)
    except ConfigError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise DataError(
            f"{path}: the pixels cannot be read, the file is cut short or damaged; copy it again ({lines[-1][:200]})"
        ) from error


def _decode_with_itk(dataset: Any) -> NDArray[Any]:
    """(frames, rows, columns) or (rows, columns): stored values of a compressed file.

    ITK gets a new file with nothing but the pixels: slopes, which it applies to some kinds of image and not to others,
    would change the stored values, and for a damaged element it takes all memory that the element claims.
    """
    sitk, pydicom = needs("SimpleITK"), needs("pydicom")
    lean, frames = pydicom.Dataset(), int(dataset.get("NumberOfFrames") or 1)
    lean.file_meta = pydicom.dataset.FileMetaDataset()
    lean.file_meta.TransferSyntaxUID = dataset.file_meta.TransferSyntaxUID
    lean.file_meta.MediaStorageSOPClassUID = lean.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    lean.file_meta.MediaStorageSOPInstanceUID = lean.SOPInstanceUID = "1.2.3"
    for keyword in _PIXELS:
        if keyword in dataset:
            setattr(lean, keyword, dataset[keyword].value)
    if not lean.file_meta.TransferSyntaxUID.is_encapsulated:
        raise ValueError("no decoder knows its transfer syntax")
    fragments = list(pydicom.encaps.generate_frames(dataset.PixelData, number_of_frames=frames))
    lean.PixelData = pydicom.encaps.encapsulate(fragments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.dcm"
        lean.save_as(path, enforce_file_format=True)
        return np.asarray(sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="GDCMImageIO")))
