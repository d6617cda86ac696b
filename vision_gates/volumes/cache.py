"""Prepared cases on disk: written once, then read by every worker and every later run with the same settings."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vision_gates.errors import DataError
from vision_gates.volumes.geometry import Geometry

__all__ = ["CachedCase", "CaseCache", "default_cache"]

_VERSION = 1  # of what is stored; a change makes the old files unused
_PLACES_A_CLASS = 2_000  # evenly spaced voxels of each label, for drawing patches around them
_WRITING = ".writing-"  # begins the folder of a case that is not whole yet
_ABANDONED = 3600.0  # seconds since anything changed in it: whoever wrote it is gone


def default_cache() -> Path:
    """``$VISION_GATES_CACHE``, else ``vision_gates`` in the user's cache folder."""
    chosen = os.environ.get("VISION_GATES_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vision_gates"


@dataclass(frozen=True)
class CachedCase:
    """One prepared case. Arrays are memory-mapped anew each time: of thousands of cases none keeps a file open."""

    folder: Path

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What case.json holds: ``shape``, ``affine``, ``source_shape``, ``source_affine``."""
        path = self.folder / "case.json"
        try:
            facts: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
        return facts

    @property
    def image(self) -> NDArray[np.float32]:
        """(C, X, Y, Z)."""
        return self._map("image")

    @property
    def labels(self) -> NDArray[Any]:
        """(X, Y, Z)."""
        return self._map("labels")

    def labelled_place(self, rng: np.random.Generator) -> tuple[int, int, int] | None:
        """A random voxel (x, y, z) with a label, each label of the case as likely; None where there is none."""
        path = self.folder / "places.npz"
        try:
            with np.load(path, allow_pickle=False) as data:
                if not data.files:
                    return None
                places = data[sorted(data.files)[int(rng.integers(len(data.files)))]]
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise _unreadable(path, error) from error
        x, y, z = places[int(rng.integers(len(places)))].tolist()
        return x, y, z

    @property
    def geometry(self) -> Geometry:
        """Of the prepared grid."""
        return Geometry(tuple(self.facts["shape"]), np.asarray(self.facts["affine"]))

    @property
    def source(self) -> Geometry:
        """Of the files' grid."""
        return Geometry(tuple(self.facts["source_shape"]), np.asarray(self.facts["source_affine"]))

    def __reduce__(self) -> tuple[Any, ...]:
        return CachedCase, (self.folder,)  # a worker reads for itself

    def _map(self, name: str) -> NDArray[Any]:
        path = self.folder / f"{name}.npy"
        try:
            array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise _unreadable(path, error) from error
        return array


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or error
    return DataError(
        f"{path}: a prepared volume cannot be read ({reason}); delete {path.parent}, and it is prepared anew when the "
        "run is started again, training with trainer.resume=true"
    )


class CaseCache:
    """Where prepared cases are, by what they were made of.

    Args:
        root: folder; created when something is written.
        settings: what a case is made with, JSON text; another text is another case.
    """

    def __init__(self, root: Path, settings: str) -> None:
        self.root, self.settings = root, settings

    def find(self, name: str, files: Sequence[Path], make: Callable[[], Any]) -> CachedCase:
        """The prepared case, made now if it is not there.

        Args:
            name: of the case.
            files: its files or folders; another size or time of change is another case.
            make: gives a ``Prepared`` with labels.

        Raises:
            DataError: what ``make`` raises, or the folder cannot be written.
        """
        folder = self.root / f"{_safe(name)}-{self._key(files)}"
        if (folder / "case.json").is_file():
            return CachedCase(folder)
        prepared = make()
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(self.root)
            with tempfile.TemporaryDirectory(prefix=_WRITING, dir=self.root) as temporary:
                inner = Path(temporary) / "case"
                _write(inner, prepared)
                try:
                    inner.rename(folder)
                except OSError:  # another process was faster, or an incomplete folder is in the way
                    if not (folder / "case.json").is_file():
                        raise
        except OSError as error:
            free = f", {shutil.disk_usage(self.root).free / 2**20:,.1f} MiB free" if self.root.is_dir() else ""
            raise DataError(
                f"data.cache: prepared volumes cannot be written to {self.root} ({error.strerror or error}{free}); "
                "set data.cache to a folder with room"
            ) from error
        return CachedCase(folder)

    def _key(self, files: Sequence[Path]) -> str:
        stamps: list[Any] = []
        for file in files:
            try:
                inner = sorted(file.iterdir()) if file.is_dir() else [file]
                stamps += [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in inner]
            except OSError as error:
                raise DataError(f"{file}: cannot be read: {error.strerror or error}") from error
        text = json.dumps([_VERSION, self.settings, stamps])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _remove_abandoned(root: Path) -> None:
    """What a process that was killed left half written; each is the size of a case."""
    for folder in root.glob(f"{_WRITING}*"):
        try:
            changed = max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
        except OSError:
            continue  # its writer has just finished
        if time.time() - changed > _ABANDONED:
            shutil.rmtree(folder, ignore_errors=True)


def _safe(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)[:80]


def _write(folder: Path, prepared: Any) -> None:
    folder.mkdir()
    np.save(folder / "image.npy", prepared.image)
    np.save(folder / "labels.npy", prepared.labels)
    places: dict[str, Any] = {}
    for label in np.unique(prepared.labels):
        if label > 0:
            found = np.argwhere(prepared.labels == label).astype(np.int32)
            places[str(int(label))] = found[
                np.linspace(0, len(found) - 1, min(len(found), _PLACES_A_CLASS)).astype(int)
            ]
    np.savez(folder / "places.npz", **places)
    facts = {
        "shape": list(prepared.geometry.shape),
        "affine": prepared.geometry.affine.tolist(),
        "source_shape": list(prepared.source.shape),
        "source_affine": prepared.source.affine.tolist(),
    }
    (folder / "case.json").write_text(json.dumps(facts), encoding="utf-8")
    for file in folder.iterdir():  # durable before the folder gets its name: case.json stands for whole files
        with open(file, "rb+") as written:
            os.fsync(written.fileno())
