"""Feeding files to a reader: one attempt, a worker that makes many, and a watch over the worker."""

import ctypes
import json
import logging
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import numpy as np

from fuzzing.damage import Files
from fuzzing.kinds import KINDS, mutant, real_files
from fuzzing.seeds import collect, put
from vision_gates.errors import UserError

MOST_SECONDS = 10
FIXED_BYTES = 64 * 2**20
_TOOL = Path(__file__).resolve().parents[3] / "tools" / "fuzz.py"
_START_SECONDS = 120  # imports and seeds of a worker on a busy machine


# ---------------------------------------------------------------- one file


@dataclass(frozen=True)
class Outcome:
    """What reading a file came to: read, refused, or what was wrong; ``peak`` bytes of memory on top of before."""

    result: str
    message: str = ""
    peak: int = 0
    seconds: float = 0.0

    @property
    def wrong(self) -> bool:
        return self.result not in ("read", "refused")


class _TooLong(BaseException):
    """Not an Exception, so that no reader takes it for damage."""


def _interrupt(*_: object) -> None:
    raise _TooLong


def _memory(name: str) -> int:
    """VmRSS, VmHWM (its peak) or VmSize in bytes; 0 where the system does not tell."""
    try:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]
    except (OSError, TypeError):
        return 0


def attempt(read: Callable[[Path], object], place: Path) -> Outcome:
    """Read the folder ``place``, in this process; a hang inside a C library is left to `watch`."""
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed is given back, so that the next file has to ask for it
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    except (OSError, AttributeError):  # not on Linux, or another libc
        pass
    before, start = _memory("VmRSS"), time.perf_counter()
    previous = signal.signal(signal.SIGALRM, _interrupt)
    signal.alarm(MOST_SECONDS)
    try:
        read(place)
        result, message = "read", ""
    except UserError as error:
        message = str(error)
        result = "refused" if message.strip() and "\n" not in message else "error"
    except _TooLong:
        result, message = "hang", traceback.format_exc()
    except Exception as error:
        result, message = "error", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    return Outcome(result, message, max(_memory("VmHWM") - before, 0), time.perf_counter() - start)


# ---------------------------------------------------------------- a kind


@dataclass
class Case:
    """A kind, ready: its seeds and traps, and the memory that a byte of file may take."""

    name: str
    root: Path
    extra: Path | None = None
    seeds: list[Any] = field(default_factory=list)
    traps: list[Any] = field(default_factory=list)
    factor: float = 0.0

    def __post_init__(self) -> None:
        self.kind = KINDS[self.name]
        self.canary = self.root / "executed"
        made = self.root / "seeds"
        made.mkdir(parents=True)
        self.kind.make(made, self.canary)
        folders = sorted(made.iterdir())
        for folder in folders:  # what is imported at first use counts for no file
            if not folder.name.startswith(("trap", "largest")):
                attempt(self.kind.read, folder)
        for folder in folders:
            if folder.name.startswith("largest"):
                size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
                outcome = attempt(self.kind.read, folder)
                assert outcome.result == "read", f"{self.name}/{folder.name}: {outcome.message}"
                self.factor = max(self.factor, outcome.peak / size)
            else:
                (self.traps if folder.name.startswith("trap") else self.seeds).append(collect(folder))
        self.seeds += real_files(self.kind, self.extra)
        shutil.rmtree(made)

    def run(self, index: int, seed: int) -> Outcome:
        """Number ``index``: first the honest seeds, then the traps, then mutants."""
        known = [*self.seeds, *self.traps]
        if index < len(known):
            files = known[index]
        else:
            files = mutant(np.random.default_rng([seed, index, *self.name.encode()]), self.kind, self.seeds)
        place = self.root / str(index)
        put(files, place)
        outcome = self._judge(index, files, attempt(self.kind.read, place))
        if not outcome.wrong:  # what is wrong stays for `fuzz` to keep
            shutil.rmtree(place)
        return outcome

    def _judge(self, index: int, files: Files, outcome: Outcome) -> Outcome:
        size = sum(len(content) for content in files.values())
        limit = 2 * self.factor * size + FIXED_BYTES
        if self.canary.exists():
            self.canary.rmdir()
            return Outcome("executed", "code in the file ran", outcome.peak, outcome.seconds)
        if not outcome.wrong and outcome.peak > limit:
            reason = f"{outcome.peak:,} bytes of memory for a file of {size:,}, at most {limit:,.0f} are expected"
            return Outcome("memory", reason, outcome.peak, outcome.seconds)
        if index < len(self.seeds) and outcome.result == "refused":
            return Outcome("honest", f"an honest file was refused: {outcome.message}", outcome.peak, outcome.seconds)
        if 0 <= index - len(self.seeds) < len(self.traps) and outcome.result == "read":
            return Outcome("trapped", "a trap was read", outcome.peak, outcome.seconds)
        return outcome


# ---------------------------------------------------------------- worker and watch


def work(name: str, *, start: int, stop: int, seed: int, root: Path, extra: Path | None) -> None:
    """The worker: a JSON line on stdout before and after every file."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)  # of C libraries
    warnings.simplefilter("ignore")
    logging.disable()
    case = Case(name, root, extra)
    room = _memory("VmSize") + 2 * 2**30  # a claim that is never touched takes no memory, but it shows here
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    ready = {"seeds": len(case.seeds), "traps": len(case.traps), "factor": case.factor}
    lines.write(json.dumps({"ready": ready}) + "\n")
    for index in range(start, stop + len(case.seeds) + len(case.traps)):
        lines.write(json.dumps({"start": index}) + "\n")
        lines.write(json.dumps({"index": index, **vars(case.run(index, seed))}) + "\n")


def watch(command: Sequence[str], *, most_seconds: float, start_seconds: float) -> Iterator[dict[str, Any]]:
    """The lines of a worker; where it falls silent or dies between, a last {"died": "hang" or "crash", ...}."""
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    queue: Queue[str | None] = Queue()

    def listen(stream: Any) -> None:
        for line in stream:
            queue.put(line)
        queue.put(None)

    threading.Thread(target=listen, args=(worker.stdout,), daemon=True).start()
    patience = start_seconds
    try:
        while True:
            try:
                line = queue.get(timeout=patience)
            except Empty:
                yield {"died": "hang", "message": f"no answer for {patience:g} s"}
                return
            if line is None:
                if worker.wait() != 0:
                    yield {"died": "crash", "message": f"the worker ended with {worker.returncode}"}
                return
            patience = most_seconds
            yield json.loads(line)
    finally:
        worker.kill()
        worker.wait()


def fuzz(name: str, *, count: int, seed: int, out: Path, extra: Path | None = None) -> dict[str, Any]:
    """Run a kind; what was wrong is kept in ``out``. Returns the kind's row of the table."""
    began, at, last = time.perf_counter(), 0, -1
    found: Counter[str] = Counter()
    row: dict[str, Any] = {"kind": name, "seeds": 0, "traps": 0, "peak": 0, "slowest": 0.0}

    def keep(index: int, result: str, message: str, current: Path) -> None:
        found[result] += 1
        target = out / f"{name}_{index:06d}_{result}"
        shutil.rmtree(target, ignore_errors=True)
        if current.exists():
            shutil.copytree(current, target, symlinks=True)
        target.mkdir(parents=True, exist_ok=True)
        (target / "MESSAGE.txt").write_text(message, encoding="utf-8", errors="replace")
        sys.stderr.write(f"{target}: {(message.splitlines() or [''])[0][:200]}\n")

    done = False
    while not done:
        done = True
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            settings = [f"start={at}", f"stop={count}", f"seed={seed}", f"root={folder}", f"seeds={extra or ''}"]
            command = [sys.executable, str(_TOOL), "worker", name, *settings]
            for event in watch(command, most_seconds=MOST_SECONDS + 5, start_seconds=_START_SECONDS):
                if "ready" in event:
                    row.update(event["ready"])
                elif "start" in event:
                    last = event["start"]
                elif "died" in event:
                    if last < at:
                        raise SystemExit(f"{name}: the worker does not start ({event['message']}); see its stderr")
                    keep(last, event["died"], event["message"], Path(folder) / str(last))
                    at, done = last + 1, False
                else:
                    outcome = Outcome(event["result"], event["message"], event["peak"], event["seconds"])
                    row["peak"] = max(row["peak"], outcome.peak)
                    row["slowest"] = max(row["slowest"], outcome.seconds)
                    if outcome.wrong:
                        keep(event["index"], outcome.result, outcome.message, Path(folder) / str(event["index"]))
                    else:
                        found[outcome.result] += 1
    return row | {"found": found, "seconds": time.perf_counter() - began}
