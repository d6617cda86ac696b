"""Checkpoints that survive a kill at any instant.

A checkpoint is a folder: weights.safetensors (what is evaluated and deployed), state.pt (the rest of the training
state, loadable with ``weights_only=True``), shards/ where several processes wrote their parts of that state, and
manifest.json, written last, with the SHA-256 of all others.

``last`` is replaced in four steps, each of which leaves at least one complete checkpoint behind:
    write last.writing  ->  delete previous  ->  rename last to previous  ->  rename last.writing to last
``best`` likewise, with ``best.previous``, which is deleted at the end.
"""

import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from vision_gates.engine.run_directory import fsync_directory, full_disk_as_error, to_json
from vision_gates.errors import UserError

__all__ = ["Checkpoint", "find_weights", "is_complete", "read_checkpoint", "write_checkpoint"]

WEIGHTS, STATE, SHARDS, MANIFEST = "weights.safetensors", "state.pt", "shards", "manifest.json"
_FORMAT = 2
_OWN_NAME = re.compile(rf"{re.escape(WEIGHTS)}|{re.escape(STATE)}|{SHARDS}/(?!\.+$)[\w.-]+", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        weights: Name to tensor, on the CPU.
        state: The training state given to ``write_checkpoint``.
        path: The folder it came from.
        note: One line if it is not the folder that was asked for, else "".
        shards: Folder of what several processes wrote, each its part; None where the state holds all.
    """

    weights: dict[str, Tensor]
    state: dict[str, Any]
    path: Path
    note: str
    shards: Path | None = None


def _backup(name: str) -> str:
    return "previous" if name == "last" else f"{name}.previous"


def _write_file(path: Path, data: bytes) -> dict[str, Any]:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _describe(path: Path) -> dict[str, Any]:
    """Of a file that is there already: made durable, and what the manifest says of it."""
    digest = hashlib.sha256()
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


@contextmanager
def _all_or_nothing(final: Path, writing: Path) -> Iterator[None]:
    """Where the disk is full, leave nothing of what was written, and say so in one line."""
    try:
        with full_disk_as_error(final):
            yield
    except (OSError, UserError):
        shutil.rmtree(writing, ignore_errors=True)
        raise


def write_checkpoint(
    root: Path,
    name: str,
    *,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Any],
    about: Mapping[str, Any],
    shards: Path | None = None,
) -> Path:
    """Replace the checkpoint ``root/name``; whenever the process dies, a complete one is left.

    Args:
        root: The run's checkpoints folder; created if missing.
        name: "last" (the one before is kept as "previous") or "best".
        weights: Tensors on any device; tied and non-contiguous ones are allowed.
        state: Tensors and plain Python values only.
        about: Plain values for the manifest: epoch, step, metric.
        shards: A folder in root that becomes part of the checkpoint.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: The disk is full; the checkpoints that were there still are.
    """
    final, writing, backup = root / name, root / f"{name}.writing", root / _backup(name)
    root.mkdir(parents=True, exist_ok=True)
    if not final.exists():  # a kill fell between the two renames: finish them before anything is deleted
        survivor = next((p for p in (writing, backup) if is_complete(p)), None)
        if survivor is not None:
            os.rename(survivor, final)
    if writing.exists():
        shutil.rmtree(writing)
    with _all_or_nothing(final, writing):
        writing.mkdir()
        # clone: safetensors refuses tensors that share memory (tied weights).
        copies = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in weights.items()}
        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        files = {
            WEIGHTS: _write_file(writing / WEIGHTS, safetensors.torch.save(copies, metadata={"format": "pt"})),
            STATE: _write_file(writing / STATE, buffer.getvalue()),
        }
        if shards is not None:
            for file in sorted(shards.iterdir()):
                files[f"{SHARDS}/{file.name}"] = _describe(file)
            os.rename(shards, writing / SHARDS)
        manifest = {"format": _FORMAT, **about, "torch": str(torch.__version__), "files": files}
        _write_file(writing / MANIFEST, to_json(manifest, indent=2).encode())
        fsync_directory(writing)
    if backup.exists():
        shutil.rmtree(backup)
    if final.exists():
        os.rename(final, backup)
    os.rename(writing, final)
    fsync_directory(root)
    if name != "last" and backup.exists():
        shutil.rmtree(backup)
    return final


def is_complete(path: Path) -> bool:
    """Whether a folder is a checkpoint whose files are all there, with the checksums of its manifest."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != _FORMAT or not {WEIGHTS, STATE} <= set(manifest["files"]):
            return False
        if not all(_OWN_NAME.fullmatch(file) for file in manifest["files"]):  # a path out of the folder
            return False
        for file, expected in manifest["files"].items():
            if hashlib.sha256((path / file).read_bytes()).hexdigest() != expected["sha256"]:
                return False
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False
    return True


def _find(root: Path, name: str) -> tuple[Path, str] | None:
    """The folder to read and a note; None if there is no trace of such a checkpoint."""
    candidates = [root / name, root / f"{name}.writing", root / _backup(name)]
    if not candidates[0].exists() and not any(is_complete(path) for path in candidates):
        return None
    for path in candidates:
        if is_complete(path):
            note = "" if path == candidates[0] else f"{candidates[0]} is missing or damaged; {path.name} is used"
            return path, note
    raise UserError(f"{candidates[0]}: damaged (checksums differ) and no other complete checkpoint; start a new run")


def find_weights(root: Path, name: str = "best") -> Path:
    """The weights.safetensors of the complete checkpoint that stands for ``root/name``.

    Raises:
        UserError: There is none.
    """
    found = _find(root, name)
    if found is None:
        raise UserError(f"{root / name}: no such checkpoint; has the run been trained to its first validation?")
    return found[0] / WEIGHTS


def read_checkpoint(root: Path, name: str) -> Checkpoint | None:
    """Read ``root/name``, or what stands for it if it is missing or damaged: ``name.writing``, then ``previous``.

    Returns:
        The checkpoint with all tensors on the CPU, or None if there is none.

    Raises:
        UserError: There is one, but no complete one.
    """
    found = _find(root, name)
    if found is None:
        return None
    path, note = found
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        weights = safetensors.torch.load_file(path / WEIGHTS)
    except Exception as error:  # the checksums are right, so it was written like this: by something else, or to do harm
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: is no checkpoint of this program ({reason[:200]}); start a new run") from error
    if not isinstance(state, dict):
        raise UserError(f"{path / STATE}: holds a {type(state).__name__}, not a training state; start a new run")
    shards = path / SHARDS
    return Checkpoint(weights, state, path, note, shards if shards.is_dir() else None)
