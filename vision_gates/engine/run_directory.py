"""A run's directory: where each file lies, and writing files so that a crash leaves the old or the new one, never half.

runs/NAME/  config.yaml  run.json  environment.json  metrics.jsonl  log.txt  report.html
            checkpoints/{last,previous,best}/  evaluation/  tensorboard/
"""

import errno
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import IO, Annotated, Any

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import NotRequired, TypedDict  # typing's, before Python 3.12, is not enough for pydantic

import vision_gates
from vision_gates.errors import UserError

__all__ = [
    "RunDirectory",
    "append_line",
    "atomic_write_bytes",
    "atomic_write_text",
    "describe_environment",
    "fsync_directory",
    "full_disk_as_error",
    "read_json",
    "read_metrics",
    "reason_of",
    "to_json",
    "truncate_metrics",
]


class RunDirectory:
    """Paths of a run; creates nothing by itself."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.info = self.path / "run.json"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.log = self.path / "log.txt"
        self.report = self.path / "report.html"
        self.checkpoints = self.path / "checkpoints"
        self.evaluation = self.path / "evaluation"
        self.tensorboard = self.path / "tensorboard"

    def checkpoint(self, name: str) -> Path:
        """Folder of a checkpoint: last, previous or best."""
        return self.checkpoints / name

    def is_used(self) -> bool:
        """Whether something is there already."""
        return self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir()))


def fsync_directory(path: Path) -> None:
    """Make renames inside a directory durable (a no-op where directories cannot be opened, as on Windows)."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def full_disk_as_error(path: Path) -> Iterator[None]:
    """Turn "no space left" and "quota exceeded" while ``path`` is written into the one-line error they are.

    Raises:
        UserError: Names the path and the free space.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        folder = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
        free = shutil.disk_usage(folder).free
        raise UserError(
            f"{path}: cannot be written: {error.strerror}, {free / 2**20:,.1f} MiB are free; what was there before is "
            "whole; make room and run the same command again, training with trainer.resume=true"
        ) from error


def atomic_write_bytes(path: str | Path, data: bytes | Iterable[bytes]) -> None:
    """Replace a file by new content, durably: after a crash it holds the old content or the new.

    Args:
        path: file to write.
        data: the content, or pieces of it, which need not be in memory at once.

    Raises:
        UserError: The disk is full; nothing is left of the new content.
    """
    path = Path(path)
    writing = path.with_name(f".{path.name}.writing")
    with full_disk_as_error(path):
        try:
            with open(writing, "wb") as file:
                file.writelines((data,) if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(writing, path)
        except BaseException:
            writing.unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)


def atomic_write_text(path: str | Path, text: str) -> None:
    """``atomic_write_bytes`` of UTF-8 text; of a file name that is none, what is not becomes a backslash escape."""
    atomic_write_bytes(path, text.encode(errors="backslashreplace"))


def append_line(path: str | Path, line: str) -> None:
    """Append one line, durably; what a crash has left of another at the end is cut off before.

    Raises:
        UserError: The disk is full; nothing is left of the line.
    """
    # In JSON the escape of what is no Unicode means just that, so that it is read back as it was.
    path, data = Path(path), f"{line}\n".encode(errors="backslashreplace")
    with full_disk_as_error(path), open(path, "a+b", buffering=0) as file:
        before = _end_of_lines(file)
        file.truncate(before)
        try:
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def _end_of_lines(file: IO[bytes]) -> int:
    """Where the last complete line of a file ends."""
    end = file.seek(0, os.SEEK_END)
    while end:
        begin = max(0, end - 65_536)
        file.seek(begin)
        found = file.read(end - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        end = begin
    return 0


def to_json(value: Any, *, indent: int | None = None) -> str:
    """JSON text; NaN and infinity, which JSON lacks, become null."""

    def clean(item: Any) -> Any:
        if isinstance(item, float) and not math.isfinite(item):
            return None
        if isinstance(item, Mapping):
            return {str(key): clean(inner) for key, inner in item.items()}
        return [clean(inner) for inner in item] if isinstance(item, (list, tuple)) else item

    return json.dumps(clean(value), indent=indent, ensure_ascii=False)


def reason_of(error: Exception) -> str:
    """Why a file cannot be read, on one line."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        error = ValueError(": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"]))))
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_json(
    path: Path, kind: Any = dict[str, Any], *, remedy: str, check: Callable[[Any], None] = lambda content: None
) -> Any:
    """Content of a JSON file of a run.

    Args:
        path: of the file.
        kind: type of the content, such as a TypedDict.
        remedy: what to do if it is damaged.
        check: raises ValueError for content of that type which does not fit together.

    Raises:
        UserError: The file cannot be read, is no JSON, or holds something else; the line ends with ``remedy``.
    """
    try:
        content = _adapter(kind).validate_json(path.read_bytes())
        check(content)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: damaged ({reason_of(error)}); {remedy}") from error
    return content


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


Seconds = Annotated[float, Field(ge=0, lt=1e12)]
"""A span of time that a run can have taken; neither infinite nor NaN, so that sums can be shown."""


class _Epoch(TypedDict):
    """A row of metrics.jsonl, which may hold more."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    epoch: int
    lr: float | None
    train: dict[str, int | float | None]
    val: dict[str, int | float | None] | None
    seconds: Seconds
    images_per_second: NotRequired[float | None]


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, one an epoch; [] if there is none. A last line cut off by a crash is left out.

    Raises:
        UserError: Another line is damaged.
    """
    path, rows = Path(path), []
    if not path.exists():
        return []
    *lines, tail = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            rows += [_adapter(_Epoch).validate_json(line)] if line else []
        except ValueError as error:
            reason = f"line {number}: damaged ({reason_of(error)})"
            raise UserError(f"{path}, {reason}; delete that line, the curves will lack its epoch") from error
    return rows


def truncate_metrics(path: str | Path, rows: int) -> None:
    """Keep the first rows of a metrics.jsonl, as they are."""
    path = Path(path)
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    atomic_write_bytes(path, (line + b"\n" for line in lines[:rows]))


def describe_environment(*, device: torch.device, processes: int, command: Sequence[str]) -> dict[str, Any]:
    """What a run depended on: versions, hardware, commit of the checkout if there is one, the command."""
    versions = {}
    for name in ("torch", "torchvision", "timm", "numpy", "accelerate", "albumentations", "opencv-python", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    on_gpu = device.type == "cuda"
    return {
        "vision_gates": vision_gates.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_gpu else str(device),
        "cuda": torch.version.cuda if on_gpu else None,
        "processes": processes,
        "command": list(command),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017 (Python 3.10 has no UTC)
    }


def _commit() -> str | None:
    """Commit of the checkout this package runs from, "-dirty" added if files differ; None for an installed package."""
    root = Path(vision_gates.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
