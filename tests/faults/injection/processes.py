"""Processes that train, and where in a run they are at the moment."""

import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from vision_gates.engine import resuming, trainer
from vision_gates.volumes import cache

PLACES = ("starting", "in an epoch", "in a checkpoint write", "in a cache write", "in evaluation", "writing the report")
STARTING, EPOCH, CHECKPOINT, CACHE, EVALUATION, REPORT = range(len(PLACES))
_shared = mmap.mmap(-1, 1 + len(PLACES))  # the place, and how often each has been entered; children write, we read


def _watch(owner: Any, name: str, place: int) -> None:
    """Note in shared memory that a function is being run."""
    original = getattr(owner, name)

    def watched(*args: Any, **kwargs: Any) -> Any:
        before = _shared[0]
        _shared[0] = place
        _shared[1 + place] = min(_shared[1 + place] + 1, 255)
        try:
            return original(*args, **kwargs)
        finally:
            _shared[0] = before

    setattr(owner, name, watched)


def entered(place: int, times: int = 1) -> Callable[[], bool]:
    """Whether a place has been entered so often, and not been left."""
    return lambda: _shared[0] == place and _shared[1 + place] >= times


def current() -> int:
    """The place where the process is, or where it was killed."""
    return _shared[0]


def watch_places() -> None:
    """Note all places from now on; to be called once, before any process is started."""
    for owner, name, place in (
        (trainer, "prepare", STARTING),
        (trainer.Trainer, "train_epoch", EPOCH),
        (trainer.Trainer, "step_optimizer", EPOCH),
        (trainer.Trainer, "evaluate", EVALUATION),
        (trainer, "write_evaluation", EVALUATION),
        (resuming, "write_checkpoint", CHECKPOINT),
        (cache, "_write", CACHE),
        (trainer, "append_line", REPORT),
        (trainer, "write_report", REPORT),
    ):
        _watch(owner, name, place)


class Process:
    """A forked process: it starts with everything imported, in a group of its own, its output in files."""

    def __init__(self, work: Callable[[], int], log: Path, *, patch: Callable[[], None] | None = None) -> None:
        self.log, self.code = log, 0
        self.errors = log.with_suffix(".err")
        _shared[:] = bytes(len(_shared))
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setpgid(0, 0)
                for number, path in ((1, self.log), (2, self.errors)):
                    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
                torch.set_num_threads(1)
                if patch is not None:
                    patch()
                code = work()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def ended(self) -> bool:
        """Whether it is over; then ``code`` is its exit code, negative for a signal."""
        if self.pid:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code, self.pid = os.waitstatus_to_exitcode(status), 0
        return not self.pid

    def wait(self, condition: Callable[[], bool] = lambda: False, *, seconds: float = 120.0) -> bool:
        """Wait for a condition or the end; whether it was the condition.

        Raises:
            TimeoutError: neither came; the process is killed.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition():
                return True
            if self.ended():
                return False
            time.sleep(0.0005)
        self.send(signal.SIGKILL)
        raise TimeoutError(f"no end after {seconds:.0f} s")

    def send(self, number: int, *, group: bool = False) -> None:
        """A signal; to its data workers, too, with ``group``, as batch systems send it."""
        if self.pid:
            workers = psutil.Process(self.pid).children(recursive=True) if group else []
            for pid in (self.pid, *(worker.pid for worker in workers)):
                os.kill(pid, number)

    def said(self) -> list[str]:
        """Lines on standard error."""
        return self.errors.read_text(errors="replace").splitlines()
