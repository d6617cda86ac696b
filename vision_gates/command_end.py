"""How a command ends: with one line on standard error and an exit code, alone or with other processes.

What a user can mend ends in that line and 2; a run stopped by Ctrl-C or SIGTERM in 130. Of several processes that
torchrun started, the first that fails says why, and the others end with it. torch is loaded only where it is needed.
"""

import errno
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from vision_gates.errors import UserError

__all__ = ["guard"]

_PATIENCE = 10.0  # seconds that a process has to end by itself when another one has failed


def guard(work: Callable[[], int], argv: Sequence[str], command: Callable[..., int]) -> int:
    """Run a command; turn what a user can mend into one line and an exit code."""
    if any(text in ("-h", "--help") for text in argv):
        text = re.sub(r"\n    ", "\n", command.__doc__ or "")
        sys.stdout.write(text.rstrip() + "\n")
        return 0
    try:
        with _interrupted_by_sigterm(), _ended_with_others():
            return work()
    except UserError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "vision_gates":
            raise
        return _fail(f"the package {error.name} is missing: pip install 'vision-gates[train]'")
    except KeyboardInterrupt:
        return _stopped("interrupted")
    except Exception as error:
        if type(error).__name__ == "Interrupted":  # engine.trainer's, not imported here: it would load torch
            return _stopped(str(error))
        fault = _fault_of_machine(error)
        if fault is None and not _another_has_failed():
            raise
        return _fail(fault or "another process has failed")


# ---------------------------------------------------------------- several processes


def _failure_mark() -> Path | None:
    """The file that the first process to fail makes, of those that torchrun started on this host; None without it."""
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")  # in .../attempt_0/LOCAL_RANK/, new for every attempt
    return Path(own).parents[1] / "failed" if own and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def _another_has_failed() -> bool:
    mark = _failure_mark()
    return mark is not None and mark.exists()


def _fail(reason: str) -> int:
    """Say in one line why a command fails, unless another process has said why it did; the exit code."""
    rank, mark = int(os.environ.get("RANK", "0")), _failure_mark()
    if mark is not None:
        if rank:  # what all of them find, a mistake in the configuration, the first one is to say
            with suppress(KeyboardInterrupt), _interrupted_by_sigterm():
                time.sleep(1)
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return 2
        except OSError:  # better twice than never
            pass
    sys.stderr.write(f"{f'process {rank}: ' if rank else ''}error: {' '.join(reason.split())}\n")
    return 2


def _stopped(where: str) -> int:
    """Say that a signal ended the command, which all processes got or will get; the exit code."""
    if os.environ.get("RANK", "0") == "0" and not _another_has_failed():
        sys.stderr.write(f"{where}\n")
    return 130


@contextmanager
def _ended_with_others() -> Iterator[None]:
    """End this process soon after another one has failed.

    It may be waiting for that one inside PyTorch, where no signal reaches Python; torchrun would kill it after 30 s.
    """
    mark, over = _failure_mark(), threading.Event()

    def watch() -> None:
        while not over.wait(1):
            if _another_has_failed():
                if not over.wait(_PATIENCE):
                    os._exit(2)
                return

    if mark is not None:
        threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        over.set()


# ---------------------------------------------------------------- signals and machines


@contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, its unfinished files removed; training saves its state first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _fault_of_machine(error: Exception) -> str | None:
    """A full disk, too little memory or a lost process, in one line; None for anything else. Training says more."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}; make room and run the same command again"
    if isinstance(error, (MemoryError, RuntimeError)):
        from vision_gates.volumes.blending import is_out_of_memory

        if is_out_of_memory(error):
            return f"out of memory: {' '.join(str(error).split()) or 'the host has too little'}"
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from vision_gates.engine.parallel import is_lost_process

            if is_lost_process(error):
                return (
                    "another process has ended, see what it or its host said (SIGKILL, which says nothing, is most "
                    "likely lack of memory); go on with trainer.resume=true"
                )
    return None
