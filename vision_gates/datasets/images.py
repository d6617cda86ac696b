"""Images and masks from files: (H, W, C) arrays in the file's own precision, and errors that name the file.

Pillow reads PNG, JPEG, BMP and WebP, because it notices a truncated file; OpenCV takes over for 16-bit colour PNG,
which Pillow would cut to 8 bits. TIFF: see tiff.py.
"""

import io
import struct
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from vision_gates.datasets.npz import read_npy
from vision_gates.datasets.tiff import read_tiff
from vision_gates.errors import DataError

__all__ = [
    "IMAGE_SUFFIXES",
    "MASK_SUFFIXES",
    "normalise",
    "read_image",
    "read_mask",
    "resize",
    "set_channels",
    "to_float",
]

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
MASK_SUFFIXES = (*IMAGE_SUFFIXES, ".npy")
_TIFF_SUFFIXES = (".tif", ".tiff")
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_FORMATS = ("PNG", "JPEG", "BMP", "WEBP")  # Pillow knows many more, such as PostScript, which it would run

_PNG_SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type

_MOST_COMPRESSION, _ALWAYS_PIXELS = 1100, 2**22  # deflate shrinks by at most 1032:1, JPEG by little more


def _check_png(data: bytes) -> None:
    """Raises ValueError unless every chunk is whole, its checksum right, and the end marker present."""
    position = len(_PNG_MAGIC)
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        end = position + 12 + length
        if end > len(data):
            break
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        if zlib.crc32(data[position + 4 : end - 4]) != checksum:
            raise ValueError(f"damaged: wrong checksum in its {kind.decode('ascii', 'replace')} chunk")
        if kind == b"IEND":
            return
        position = end
    raise ValueError("truncated: its end is missing")


def _pillow_array(image: Image.Image, data: bytes, *, labels: bool) -> NDArray[Any]:
    """Pixels of an opened Pillow image. Labels: stored numbers; image: palette looked up, alpha dropped, turned."""
    # Pillow takes the memory for all pixels before it reads the first. An empty WebP takes next to nothing.
    bits = data[24] * _PNG_SAMPLES.get(data[25], 1) if image.format == "PNG" else 8 * len(image.getbands())
    claimed, held = image.width * image.height * bits // 8, len(data)
    if claimed > _MOST_COMPRESSION * held and image.width * image.height > _ALWAYS_PIXELS:
        raise ValueError(f"its header claims {image.width} x {image.height} pixels, but it holds only {held:,} bytes")
    image.load()  # raises for a truncated file
    # Byte 24 of a PNG is its bit depth; Pillow opens 16-bit colour as 8-bit RGB.
    if image.format == "PNG" and data[24] == 16 and image.mode in ("RGB", "RGBA", "LA"):
        decoded = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if decoded is None:
            raise ValueError("16-bit PNG that OpenCV cannot decode")
        grey_with_alpha = image.mode == "LA"
        return decoded[:, :, :1] if grey_with_alpha else decoded[:, :, 2::-1]
    if not labels:
        image = ImageOps.exif_transpose(image)
    mode = image.mode
    if labels and mode in ("1", "L", "P"):
        return np.asarray(image).astype(np.uint8)
    if mode in ("1", "LA", "La"):
        image = image.convert("L")
    elif mode in ("P", "PA", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"):
        image = image.convert("RGB")
    array = np.asarray(image)
    if image.mode == "I" and image.format == "PNG" or image.mode.startswith("I;16"):
        array = array.astype(np.uint16)  # older Pillow versions open 16-bit PNG as 32-bit integers
    return array


def _decode(path: Path, *, labels: bool) -> NDArray[Any]:
    """(H, W, C) pixels of any supported file; `DataError` naming the file for whatever goes wrong."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not data:
        raise DataError(f"{path}: the file is empty")
    try:
        if data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") or path.suffix.lower() in _TIFF_SUFFIXES:
            array = read_tiff(data, labels=labels)
        else:
            if data.startswith(_PNG_MAGIC):
                _check_png(data)
            with warnings.catch_warnings(), Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                warnings.simplefilter("ignore")  # Pillow's remarks on metadata; what matters raises
                array = _pillow_array(image, data, labels=labels)
    except MemoryError:
        raise
    except (
        Exception
    ) as error:  # decoders raise all sorts: OSError, ValueError, struct.error, SyntaxError, cv2.error ...
        reason = " ".join(str(error).split()) or type(error).__name__
        if reason.startswith("cannot identify image file"):
            reason = "not an image, or its header is damaged"
        raise DataError(f"{path}: cannot be decoded ({reason})") from error
    array = array[:, :, None] if array.ndim == 2 else array
    if array.ndim != 3 or 0 in array.shape:
        raise DataError(f"{path}: its pixels have shape {array.shape}; an image is (height, width, channels)")
    return array


def read_image(path: Path) -> NDArray[Any]:
    """Reads an image of any supported format as a contiguous, writable (H, W, C) array.

    uint8 and uint16 files keep their type, all other numbers become float32 with the values they have. Grey has C = 1;
    a palette becomes RGB; alpha is dropped (but not in TIFF, where every sample and page is a channel); an EXIF
    orientation is applied. Raises `DataError` naming the file if it is missing, damaged or truncated, or holds NaN or
    infinite values.
    """
    array = _decode(path, labels=False)
    if array.dtype.kind == "c":
        raise DataError(f"{path}: holds complex numbers; save magnitude (and phase) as channels")
    if array.dtype not in (np.uint8, np.uint16):
        array = array.astype(np.float32)
        num_bad = array.size - int(np.isfinite(array).sum())
        if num_bad:
            num_nan = int(np.isnan(array).sum())
            raise DataError(
                f"{path}: {num_bad:,} of {array.size:,} values are not finite ({num_nan:,} NaN, {num_bad - num_nan:,} "
                f"infinite); replace them before training"
            )
    # Pillow's arrays may be read-only, which neither augmentation nor torch likes.
    return np.require(array, requirements=["C", "W"])


def read_mask(path: Path, *, threshold: int | None = None) -> NDArray[np.int64]:
    """Reads label values, (H, W) int64, from PNG, TIFF, BMP or .npy; palette images give the stored indices.

    threshold: values above it become 1 and all others 0, for masks that JPEG has blurred; colours are averaged first.
    Raises `DataError` naming the file if it is damaged, has several differing channels, or holds fractions or NaN.
    """
    if path.suffix.lower() == ".npy":
        array = _read_npy_mask(path)
    else:
        array = _decode(path, labels=True)
    if array.shape[2] in (2, 4) and array.dtype.kind == "u":
        array = array[:, :, :-1]  # alpha
    if array.dtype.kind == "f":
        num_bad = array.size - int(np.isfinite(array).sum())
        if num_bad:
            raise DataError(f"{path}: {num_bad:,} mask values are NaN or infinite")
    if threshold is not None:
        return (array.mean(axis=2) > threshold).astype(np.int64)
    if (array != array[:, :, :1]).any():
        raise DataError(
            f"{path}: a mask with {array.shape[2]} differing channels; a mask holds one class number a pixel "
            f"(for a two-class JPEG set data.mask_threshold=127)"
        )
    array = array[:, :, 0]
    if array.dtype.kind == "f" and (array != np.round(array)).any():
        raise DataError(
            f"{path}: mask values are fractions ({array.min():g} to {array.max():g}); a mask holds class numbers"
        )
    return np.ascontiguousarray(array).astype(np.int64)


def _read_npy_mask(path: Path) -> NDArray[Any]:
    array = read_npy(path)
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[:, :, 0]
    if array.ndim != 2 or array.dtype.kind not in "biuf":
        raise DataError(f"{path}: shape {array.shape} of {array.dtype}; a mask is (height, width) of class numbers")
    return array[:, :, None]


def to_float(image: NDArray[Any]) -> NDArray[np.float32]:
    """Pixels as float32: uint8 / 255, uint16 / 65535, floats unchanged. Raises ValueError for other types."""
    if image.dtype == np.uint8:
        return image.astype(np.float32) / np.float32(255)
    if image.dtype == np.uint16:
        return image.astype(np.float32) / np.float32(65535)
    if image.dtype.kind == "f":
        return image.astype(np.float32, copy=False)
    raise ValueError(f"an image is uint8, uint16 or float32, not {image.dtype}")


def set_channels(image: NDArray[Any], channels: Literal[1, 3] | None, path: Path) -> NDArray[Any]:
    """Grey <-> RGB when ``channels`` asks for it (grey = 0.299 R + 0.587 G + 0.114 B); None leaves the image alone.

    Raises `DataError` naming the file for an image that is neither grey nor RGB.
    """
    if channels is None or image.shape[2] == channels:
        return image
    if image.shape[2] == 1:
        return np.repeat(image, 3, axis=2)
    if image.shape[2] != 3:
        raise DataError(f"{path}: {image.shape[2]} channels; data.channels={channels} converts only grey and RGB")
    return np.asarray(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[:, :, None]


def resize(array: NDArray[Any], size: tuple[int, int], *, labels: bool = False) -> NDArray[Any]:
    """Resize an (H, W, C) image (area average down, bilinear up) or (H, W) labels (nearest) to (height, width)."""
    if array.shape[:2] == tuple(size):
        return array
    height, width = size
    if labels:
        # _EXACT samples at pixel centres, as the image's interpolation does; labels below 2^24 are exact in float32.
        return cv2.resize(array.astype(np.float32), (width, height), interpolation=cv2.INTER_NEAREST_EXACT).astype(
            array.dtype
        )
    shrinks = height <= array.shape[0] and width <= array.shape[1]
    method = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    # OpenCV resizes at most 4 channels at a time.
    parts = [array[:, :, c : c + 4] for c in range(0, array.shape[2], 4)]
    parts = [cv2.resize(p, (width, height), interpolation=method).reshape(height, width, p.shape[2]) for p in parts]
    return np.concatenate(parts, axis=2)


def normalise(
    image_HWC: NDArray[np.float32],
    mean: Sequence[float] | NDArray[np.float32] | None,
    std: Sequence[float] | NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """Subtract each channel's mean and divide by its deviation; None: the image's own.

    The result lies in memory channel by channel, as networks want it: so it is five times as fast, too.
    """
    if mean is None or std is None:
        mean_C, std_C = image_HWC.mean(axis=(0, 1)), image_HWC.std(axis=(0, 1))
    else:
        mean_C, std_C = np.asarray(mean, dtype=np.float32), np.asarray(std, dtype=np.float32)
    height, width, channels = image_HWC.shape
    normalised_CHW = np.empty((channels, height, width), dtype=np.float32)
    np.subtract(image_HWC.transpose(2, 0, 1), mean_C[:, None, None], out=normalised_CHW)
    np.divide(normalised_CHW, np.maximum(std_C, 1e-6)[:, None, None], out=normalised_CHW)
    return normalised_CHW.transpose(1, 2, 0)
