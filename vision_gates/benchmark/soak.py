"""Does a long job keep its memory? Samples of a process with its workers, and the trend of what they hold.

``Recorder`` stands in the place of the console's file and samples when a line of progress comes by, so that samples
belong to steps, are taken at the same place of the loop, and need no thread of their own. ``trend`` is the verdict.
"""

import csv
import gc
import math
import os
import re
import threading
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from multiprocessing import get_context, parent_process, set_start_method
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from vision_gates.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["LIMITS", "Recorder", "Sample", "Trend", "apart", "trend", "trends", "verdict_table"]

LIMITS: Mapping[str, float | None] = {
    "memory": 1.0,
    "own": None,
    "physical": None,
    "resident": None,
    "handles": 0.1,
    "threads": 0.1,
    "objects": None,
}
"""Growth per 1,000 steps that is called flat, of each column of `Sample`; None: shown without a verdict."""

_FEWEST = 20  # samples after warm-up


@dataclass(frozen=True)
class Sample:
    """What a process holds after a step. Memory in MB (10**6 bytes).

    Args:
        part: which of several jobs.
        seconds: since the job began.
        step: number of the update or case.
        memory: of the process and its children, added up, without pages of files (programs, libraries).
        own: the same of the process alone.
        physical: as ``memory``, but what parent and children share is counted once. A fork shares everything; each page
            that the parent writes to from then on is two. So this grows, more and more slowly, without any leak.
        resident: of the process alone, with pages of files.
        handles: open files of the process: files, pipes, sockets.
        threads: of the process.
        processes: the process and its children.
        objects: that Python's garbage collector watches.
    """

    part: str
    seconds: float
    step: int
    memory: float
    own: float
    physical: float
    resident: float
    handles: int
    threads: int
    processes: int
    objects: int

    @classmethod
    def take(cls, part: str, *, seconds: float, step: int) -> "Sample":
        """Of this process, now."""
        import psutil  # accelerate depends on it

        me = psutil.Process()
        children = me.children(recursive=True)
        own, physical = _unfiled(me)
        memory = own
        for child in children:
            try:
                its, part_of_it = _unfiled(child)
            except (psutil.Error, OSError):  # it has just ended
                continue
            memory, physical = memory + its, physical + part_of_it
        return cls(
            part,
            round(seconds, 1),
            step,
            memory=memory / 1e6,
            own=own / 1e6,
            physical=physical / 1e6,
            resident=me.memory_info().rss / 1e6,
            handles=me.num_fds() if hasattr(me, "num_fds") else me.num_handles(),
            threads=me.num_threads(),
            processes=1 + len(children),
            objects=len(gc.get_objects()),
        )


_COLUMNS: Mapping[str, Any] = {field.name: field.type for field in fields(Sample)[1:]}
"""The numbers of a sample and their kinds."""


def _unfiled(process: Any) -> tuple[int, int]:
    """Bytes of memory that are no pages of files: all of them, and with shared ones shared out among their owners.

    Where the system is not Linux, both are what nobody shares.
    """
    place = Path(f"/proc/{process.pid}")
    if not (place / "smaps_rollup").exists():
        unshared = int(process.memory_full_info().uss)
        return unshared, unshared

    def total(file: str, pattern: str) -> int:
        return sum(1024 * int(kib) for kib in re.findall(pattern, (place / file).read_text(), re.MULTILINE))

    whole = total("status", r"^Rss(?:Anon|Shmem):\s+(\d+) kB$")
    shared_out = total("smaps_rollup", r"^Pss_(?:Anon|Shmem): +(\d+) kB$")
    return whole, shared_out


class Recorder:
    """A text file for a rich Console that samples when a line tells of a finished step.

    Args:
        part: name of the job in the samples.
        pattern: regular expression of such a line; its first group is the step's number.
        path: CSV file that each sample is added to at once; None: none.
        every: least number of seconds between samples.
    """

    def __init__(self, part: str, pattern: str, *, path: Path | None = None, every: float = 0.0) -> None:
        self.part, self.path, self.every = part, path, every
        self._numbers = array("d")  # of all samples, 72 bytes each: what watches must not grow itself
        self._latest = -math.inf
        self._pattern, self._began = re.compile(pattern), time.perf_counter()

    @property
    def console(self) -> "Console":
        """A console whose lines are looked at, and not shown."""
        from rich.console import Console

        # soft_wrap as the commands: no line is broken, and rich keeps no widths of words (it has room for 4,096).
        return Console(file=cast(IO[str], self), width=10_000, highlight=False, soft_wrap=True)

    def write(self, text: str) -> int:
        """Look at a line."""
        found, seconds = self._pattern.search(text), time.perf_counter() - self._began
        if found and seconds - self._latest >= self.every:
            sample = Sample.take(self.part, seconds=seconds, step=int(found[1]))
            self._latest = seconds  # not the sample's, which are rounded, up as well
            self._numbers.extend(getattr(sample, name) for name in _COLUMNS)
            self._save(sample)
        return len(text)

    @property
    def samples(self) -> list[Sample]:
        """All that were taken."""
        width = len(_COLUMNS)
        rows = (self._numbers[i : i + width] for i in range(0, len(self._numbers), width))
        kinds = _COLUMNS.values()
        return [Sample(self.part, *(kind(number) for kind, number in zip(kinds, row, strict=True))) for row in rows]

    def flush(self) -> None:
        """There is nothing to flush."""

    def _save(self, sample: Sample) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = not self.path.exists()
        with open(self.path, "a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            if new:
                writer.writerow(field.name for field in fields(Sample))
            writer.writerow(f"{value:.3f}" if isinstance(value, float) else value for value in asdict(sample).values())


@dataclass(frozen=True)
class Trend:
    """Growth of one quantity after warm-up.

    Args:
        first, last: medians of the first and last fifth of the samples after warm-up.
        slope, low, high: per 1,000 steps, with the 95 % interval.
        limit: above which it is called growth; None: no verdict.
        samples: number of them, after warm-up.
    """

    first: float
    last: float
    slope: float
    low: float
    high: float
    limit: float | None
    samples: int

    @property
    def flat(self) -> bool:
        """Whether the whole interval lies below the limit: a job too short to tell is not flat."""
        return self.limit is None or self.high < self.limit


def trend(
    steps: Sequence[float], values: Sequence[float], *, limit: float | None = None, warm_up: float = 0.2
) -> Trend:
    """Theil-Sen's slope, the median over all pairs of samples, which single peaks do not move.

    Its interval (Sen 1968, https://doi.org/10.1080/01621459.1968.10480934) takes the noise as independent.

    Args:
        steps: in ascending order.
        values: of each.
        limit: see `Trend`.
        warm_up: share of the steps that is left out: caches fill, pools of memory reach their size.

    Raises:
        UserError: fewer than 20 samples are left.
    """
    from scipy.stats import theilslopes

    x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
    kept = x >= x[0] + warm_up * (x[-1] - x[0]) if len(x) else np.zeros(0, dtype=bool)
    x, y = x[kept], y[kept]
    if len(x) < _FEWEST:
        raise UserError(f"{len(x)} samples after warm-up are too few for a slope, {_FEWEST} are needed: run longer")
    slope, _, low, high = (1000 * float(value) for value in theilslopes(y, x, alpha=0.95))
    fifth = len(y) // 5
    return Trend(float(np.median(y[:fifth])), float(np.median(y[-fifth:])), slope, low, high, limit, len(y))


def trends(samples: Sequence[Sample], **limits: float) -> dict[str, Trend]:
    """The trend of every quantity of one job; ``limits`` change those of `LIMITS`.

    Raises:
        UserError: too few samples.
    """
    steps = [sample.step for sample in samples]
    return {
        name: trend(steps, [getattr(sample, name) for sample in samples], limit=limit)
        for name, limit in {**LIMITS, **limits}.items()
    }


def apart(job: Callable[..., list[Sample]], *arguments: Any, **named: Any) -> list[Sample]:
    """Call a job in a fresh process, so that what others have left in memory plays no part."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start_as_usual) as pool:
        return pool.submit(job, *arguments, **named).result()


def _start_as_usual() -> None:
    """A spawned process spawns in its turn; its data workers shall start as those of any other process.

    It ends with the process that waits for it, should that be killed.
    """
    set_start_method(None, force=True)

    def follow() -> None:
        waiting = parent_process()
        assert waiting is not None
        waiting.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def verdict_table(jobs: Mapping[str, Mapping[str, Trend]]) -> str:
    """Markdown: a line a job and quantity."""
    lines = [
        "| job | quantity | samples | at first | at last | growth per 1,000 steps (95 %) | limit | |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for job, found in jobs.items():
        for name, one in found.items():
            ends = f"{one.first:,.1f} | {one.last:,.1f}"
            growth = f"{one.slope:+.3f} ({one.low:+.3f} to {one.high:+.3f})"
            verdict = "-" if one.limit is None else "flat" if one.flat else "**grows**"
            limit = "-" if one.limit is None else f"{one.limit:g}"
            unit = ", MB" if name in ("memory", "own", "physical", "resident") else ""
            lines.append(f"| {job} | {name}{unit} | {one.samples} | {ends} | {growth} | {limit} | {verdict} |")
    return "\n".join(lines) + "\n"
