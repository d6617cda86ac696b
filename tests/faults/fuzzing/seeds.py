"""Writing and reading the folders that seeds and traps are, and what their makers share."""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing.damage import Files


def write(folder: Path, **files: bytes | str) -> Path:
    """Files of a seed or trap, "_" in names for "."; returns the folder, made if need be."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (folder / name.replace("__", ".")).write_bytes(data)
    return folder


class Code:
    """Pickled, it makes a folder when it is loaded."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def put(files: Files, place: Path) -> None:
    """Write files into a new folder."""
    place.mkdir(parents=True)
    for name, content in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(content) if isinstance(content, str) else path.write_bytes(content)


def collect(folder: Path) -> Files:
    """The inverse of `put`."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]
    return {
        path.relative_to(folder).as_posix(): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in paths
    }


def every(*reads: Callable[[Path], Any]) -> Callable[[Path], None]:
    """Reads the files of a folder in each of several ways; refused is what no way reads."""

    def read(place: Path) -> None:
        from vision_gates.errors import UserError

        for path in sorted(place.iterdir()):
            refusals = []
            for one in reads:
                try:
                    one(path)
                except UserError as error:
                    if "\n" in str(error):
                        raise
                    refusals.append(error)
            if len(refusals) == len(reads):
                raise refusals[0]

    return read


def npy_bytes(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz_bytes(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)
    return stream.getvalue()


def picture_bytes(name: str, array: Any) -> bytes:
    import cv2

    done, data = cv2.imencode(name, array)
    assert done
    return bytes(data.tobytes())
