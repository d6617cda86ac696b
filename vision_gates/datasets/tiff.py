"""TIFF files: any number of channels or pages, 8 and 16 bits, integers and floats, and a check that a file is complete.

tifffile reads the structure and the uncompressed, deflated and packed pixels. For LZW, JPEG and the rarer compressions
it needs imagecodecs, a large optional package; OpenCV decodes those instead, up to four channels a page.
"""

import io
import struct
import warnings
from typing import Any

import cv2
import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

__all__ = ["TruncatedError", "check_complete", "read_tiff"]

# Bytes of each TIFF field type (1 byte, 2 ascii, 3 short ... 13 ifd, 16-18 the 8-byte types of BigTIFF).
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}
_MOST_CHANNELS_LAST = 16
# LZW shrinks by at most 1365:1, an empty page in CCITT by more: up to _ALWAYS_SAMPLES are fine, whatever is claimed.
_MOST_COMPRESSION, _ALWAYS_SAMPLES = 1400, 2**22
_MOST_ABSENT = 2**14  # strips that a page claims and does not have: some writers count wrongly, millions take minutes


class TruncatedError(ValueError):
    """The file ends before something it refers to."""


def check_complete(data: bytes) -> None:
    """Raises `TruncatedError` if a directory or a field's value lies beyond the end of the file.

    Decoders skip such parts with a warning at best: a multi-page file that lost its tail would read as fewer channels.
    """
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 8:
        raise TruncatedError("not a TIFF file")
    big = struct.unpack_from(order + "H", data, 2)[0] == 43
    pointer, count_type, entry_bytes = ("Q", "Q", 20) if big else ("I", "H", 12)
    pointer_bytes, count_bytes = struct.calcsize(pointer), struct.calcsize(count_type)
    try:
        (offset,) = struct.unpack_from(order + pointer, data, 8 if big else 4)
        seen: set[int] = set()
        room = len(data) // entry_bytes
        while offset and offset not in seen:
            seen.add(offset)
            (entries,) = struct.unpack_from(order + count_type, data, offset)
            room -= entries + 1
            if room < 0:  # overlapping directories would take for ever
                raise TruncatedError("truncated, or damaged: its directories are longer than the file")
            for i in range(entries):
                entry = offset + count_bytes + i * entry_bytes
                _, kind, count = struct.unpack_from(order + "HH" + pointer, data, entry)
                num_bytes = _TYPE_BYTES.get(kind, 0) * count
                if num_bytes > pointer_bytes:
                    (start,) = struct.unpack_from(order + pointer, data, entry + 4 + pointer_bytes)
                    if start + num_bytes > len(data):
                        raise TruncatedError("truncated: the value of a field is missing")
            (offset,) = struct.unpack_from(order + pointer, data, offset + count_bytes + entries * entry_bytes)
    except struct.error as error:
        raise TruncatedError("truncated: a page's directory is missing") from error


def _channels_last(array: NDArray[Any], axes: str) -> NDArray[Any]:
    """Moves all axes but Y and X behind them, as one channel axis."""
    if axes == "QYX" and array.shape[2] <= _MOST_CHANNELS_LAST < min(array.shape[:2]):
        # An (H, W, C) array written without saying so: tifffile then takes H for the pages. Pages this narrow are no
        # images, so it is read the way it was meant.
        return array
    y, x = axes.index("Y"), axes.index("X")
    others = [i for i in range(array.ndim) if i not in (y, x)]
    height, width = array.shape[y], array.shape[x]
    return array.transpose(y, x, *others).reshape(height, width, -1)


def _decode_with_opencv(data: bytes) -> NDArray[Any]:
    done, pages = cv2.imdecodemulti(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if not done or not pages:
        raise ValueError("its compression cannot be decoded; save it uncompressed or pip install imagecodecs")
    planes = []
    for page in pages:
        page = page[:, :, None] if page.ndim == 2 else page
        # OpenCV stores colours as BGR(A).
        planes.append(page[:, :, [2, 1, 0, *range(3, page.shape[2])]] if page.shape[2] >= 3 else page)
    return np.concatenate(planes, axis=2)


def read_tiff(data: bytes, *, labels: bool) -> NDArray[Any]:
    """(H, W, C) pixels in the file's own type; pages and samples become channels, in that order.

    As an image (``labels`` false) a palette is looked up, one bit becomes 0 or 255, and files in which white is zero
    are inverted, so that larger is always brighter. As labels, the stored numbers come back as they are. Raises
    whatever the decoders raise; the caller names the file.
    """
    check_complete(data)
    with warnings.catch_warnings(), tifffile.TiffFile(io.BytesIO(data)) as tiff:
        warnings.simplefilter("ignore")  # about tags; whatever matters for the pixels raises
        page, series = tiff.pages.first, tiff.series[0]
        for part in tiff.pages:
            ends = [a + b for a, b in zip(part.dataoffsets, part.databytecounts, strict=True)]
            absent = int(np.prod(part.chunked, dtype=object)) - len(ends)
            if max(ends, default=0) > len(data) or absent > _MOST_ABSENT:
                raise TruncatedError("truncated: pixels are missing")
        photometric, bits = page.photometric, page.bitspersample
        samples = max(series.size, sum(part.size for part in tiff.pages))
        most = len(data) * (1 if page.compression == tifffile.COMPRESSION.NONE else _MOST_COMPRESSION)
        if samples > _ALWAYS_SAMPLES and samples * int(bits) // 8 > most:
            raise TruncatedError(
                f"its header claims {samples:,} samples of {bits} bits, but it holds {len(data):,} bytes"
            )
        if photometric == tifffile.PHOTOMETRIC.PALETTE:
            with Image.open(io.BytesIO(data)) as image:
                return np.atleast_3d(np.asarray(image if labels else image.convert("RGB")))
        try:
            pixels = _channels_last(series.asarray(), series.axes)
        except ValueError as error:
            if "imagecodecs" not in str(error):
                raise
            pixels = _decode_with_opencv(data)
            # OpenCV has inverted white-is-zero and spread one bit to 0 and 255 already.
            if labels and bits == 1:
                pixels = pixels // 255
            if labels and photometric == tifffile.PHOTOMETRIC.MINISWHITE:
                pixels = 1 - pixels if bits == 1 else ~pixels
            return pixels
    if photometric == tifffile.PHOTOMETRIC.MINISWHITE and not labels and pixels.dtype.kind in "ub":
        pixels = ~pixels
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * (1 if labels else 255)
    return pixels
