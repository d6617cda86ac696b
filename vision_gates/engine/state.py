"""Where a run is, how it is asked to stop, and what the machine may refuse it."""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from vision_gates.engine.run_directory import full_disk_as_error
from vision_gates.errors import UserError
from vision_gates.volumes.blending import is_out_of_memory

__all__ = ["Interrupted", "State", "StopSignal", "machine_errors"]


class Interrupted(Exception):
    """Ctrl-C or SIGTERM stopped the run after a checkpoint; the message says where."""


@dataclass
class State:
    """Place in the run; everything but the tensors that a checkpoint holds."""

    epoch: int = 0  # epochs done
    batch: int = 0  # batches done in the current epoch
    update: int = 0  # optimiser updates done in all
    loss_sum: float = 0.0  # over the images of the current epoch
    images: int = 0
    seconds: float = 0.0  # spent training in the current epoch
    best: float | None = None  # monitored value of the best checkpoint
    best_epoch: int = 0
    stale: int = 0  # evaluations since
    finished: bool = False
    elapsed: float = 0.0  # seconds of training and validation in all
    skipped: int = 0  # updates of the current epoch left out because their loss was not finite
    skipped_in_row: int = 0


@contextmanager
def machine_errors(path: Path, *, lower: str) -> Iterator[None]:
    """Turn running out of memory, on a GPU or on the host, or of disk space into a one-line error.

    Args:
        path: What is worked on, to name where nothing more exact is known.
        lower: What to do where memory runs out.

    Raises:
        UserError: That.
    """
    try:
        with full_disk_as_error(path):
            yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Of what PyTorch says, how much was wanted; the rest is advice to programmers.
        reason = " ".join(re.split(r"(?<=\.) ", " ".join(str(error).split()))[:2]) or "MemoryError"
        raise UserError(f"{path}: out of memory ({reason.rstrip('.')}); {lower}") from error


class StopSignal:
    """Context in which the first Ctrl-C or SIGTERM only sets ``requested``; a second one ends the program at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
