"""NumPy files that are not trusted: what a header claims is compared with the bytes there are before memory is taken.

``numpy.load`` takes the memory that a header asks for, and reads a pickle where it is allowed to; nothing here does.
"""

import io
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from vision_gates.errors import DataError, UserError

__all__ = ["npz_names", "open_npz", "read_npy", "read_npz"]

_KINDS = "biufcUS"  # numbers and text; objects would be pickles
_MOST_COMPRESSION = 1100  # deflate shrinks by at most 1032:1


def npz_names(path: str | Path) -> list[str]:
    """Names of the arrays in an npz file; `DataError` if it is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except Exception as error:  # BadZipFile, struct.error, NotImplementedError ...: where the damage decides
        raise DataError(f"{path}: not a readable npz file, it may be incomplete ({_reason(error)})") from error


def read_npz(path: str | Path, names: Iterable[str]) -> dict[str, NDArray[Any]]:
    """Some arrays of an npz file.

    Raises:
        DataError: an array is missing or damaged, holds neither numbers nor text, or claims more than the file holds.
    """
    arrays: dict[str, NDArray[Any]] = {}
    name = ""
    try:
        held = Path(path).stat().st_size
        with zipfile.ZipFile(path) as archive:
            for name in names:
                member = archive.getinfo(f"{name}.npy")
                most = min(member.compress_size, held)
                most = most if member.compress_type == zipfile.ZIP_STORED else _MOST_COMPRESSION * most
                with archive.open(member) as stream:
                    arrays[name] = _read(stream, min(member.file_size, most))
    except Exception as error:
        raise DataError(
            f"{path}: array {name!r} cannot be read, the file may be incomplete ({_reason(error)})"
        ) from error
    return arrays


@contextmanager
def open_npz(path: str | Path) -> Iterator[dict[str, NDArray[Any]]]:
    """All arrays of an npz file; whatever its reader cannot do with them within the block is a `DataError`, too."""
    arrays = read_npz(path, npz_names(path))
    try:
        yield arrays
    except UserError:
        raise
    except Exception as error:  # an array is missing, or of another shape or type
        raise DataError(f"{path}: is damaged, or was not written by this program ({_reason(error)[:200]})") from error


def read_npy(path: str | Path) -> NDArray[Any]:
    """The array of an npy file; `DataError` as `read_npz`."""
    try:
        data = Path(path).read_bytes()
        return _read(io.BytesIO(data), len(data))
    except Exception as error:
        raise DataError(f"{path}: cannot be read as a NumPy array ({_reason(error)})") from error


def _read(stream: IO[bytes], held: int) -> NDArray[Any]:
    """The array of an npy stream of ``held`` bytes; raises ValueError for what it cannot hold."""
    version = npy.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the npy format")
    shape, fortran, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(stream)
    if dtype.kind not in _KINDS or dtype.itemsize == 0:
        raise ValueError(f"it holds {dtype}, neither numbers nor text")
    count = 1
    for size in shape:  # Python's integers do not overflow
        count *= size
    if min(shape, default=1) < 0 or count * dtype.itemsize > held:
        raise ValueError(f"its header claims {shape} of {dtype}, {count * dtype.itemsize:,} bytes; {held:,} are there")
    data = bytearray(count * dtype.itemsize)
    view, filled = memoryview(data), 0
    while filled < len(data):
        block = stream.read(min(2**20, len(data) - filled))
        if not block:
            raise ValueError(f"truncated: {filled:,} of {len(data):,} bytes are there")
        view[filled : filled + len(block)] = block
        filled += len(block)
    stream.read(1)  # at the end of a member its checksum is compared
    return np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
