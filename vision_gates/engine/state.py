"""Where a run is, and how it is asked to stop."""

import signal
import threading
from dataclasses import dataclass
from types import FrameType
from typing import Any

__all__ = ["Interrupted", "State", "StopSignal"]


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
