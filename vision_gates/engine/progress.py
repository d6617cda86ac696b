"""What a run shows while it works: a rich bar on a terminal, plain lines elsewhere, and log.txt in either case."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

from vision_gates.engine.evaluation import Evaluation, evaluation_table
from vision_gates.engine.run_directory import RunDirectory
from vision_gates.engine.run_files import read_evaluation
from vision_gates.engine.volume_scores import read_summary, score_table
from vision_gates.metrics import Result

__all__ = ["Display", "Pace", "duration", "show_result"]


class Display:
    """Console and log of one process; all but the main one stay silent.

    Args:
        main: Whether this is the main process.
        console: Where to show; None: standard output.
        log_every: Updates between plain lines.
    """

    def __init__(self, *, main: bool = True, console: Console | None = None, log_every: int = 10) -> None:
        self.main = main
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.log_every = log_every
        self.log: Path | None = None
        self._held: list[str] = []  # lines from before the run directory exists
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> "Display":
        # timm and Accelerate announce on the root logger what the start summary says already.
        self._levels = {name: logging.getLogger(name).level for name in ("timm", "accelerate")}
        for name in self._levels:
            logging.getLogger(name).setLevel(logging.ERROR)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)

    def open_log(self, path: Path) -> None:
        """Write lines to this file from now on, those said before first."""
        if self.main:
            self.log = path
            held, self._held = self._held, []
            for line in held:
                self._write(line)

    def say(self, text: str) -> None:
        """One line on the console and in the log."""
        if self.main:
            (self._bar.console if self._bar is not None else self.console).print(text, markup=False)
            self.note(text)

    def note(self, text: str) -> None:
        """One line in the log only."""
        if self.main:
            line = f"{datetime.now().isoformat(sep=' ', timespec='seconds')} {text}"
            if self.log is None:
                self._held.append(line)
            else:
                self._write(line)

    def show(self, renderable: RenderableType) -> None:
        """A table on the console, and its text in the log."""
        if self.main:
            self.console.print(renderable)
            plain = Console(width=120, no_color=True, highlight=False)
            with plain.capture() as capture:
                plain.print(renderable)
            for line in capture.get().splitlines():
                self.note(line)

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for ``callback(done, total)``, shown on a terminal only."""
        if not self.main or not self.console.is_terminal:
            yield lambda done, total: None
            return
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
        with Progress(*columns, console=self.console, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)

    def start(self, *, total: int, done: int) -> None:
        """Begin to show training: ``total`` updates in all, ``done`` of them before."""
        if self.main and self.console.is_terminal:
            columns = TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[text]}")
            self._bar = Progress(*columns, console=self.console, transient=True)
            self._task = self._bar.add_task("training", total=total, completed=done, text="")
            self._bar.start()

    def step(self, *, update: int, epoch: str, text: str) -> None:
        """Show an update: the bar always, a plain line (and the log) every ``log_every``."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=update, description=epoch, text=text)
        if update % self.log_every == 0:
            line = f"{epoch} | update {update} | {text}"
            if self._bar is None:
                self.say(line)
            else:
                self.note(line)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _write(self, line: str) -> None:
        assert self.log is not None
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")


@dataclass
class Pace:
    """Of the updates since the last line of the log, whole: one update says little where the GPU is waited for."""

    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # for data

    def add(self, *, images: int, seconds: float, waited: float) -> None:
        """Another update."""
        self.images += images
        self.seconds += seconds
        self.waited += waited

    def rate(self) -> float:
        """Images a second."""
        return self.images / max(self.seconds, 1e-9)

    def waiting(self) -> float:
        """Share of the time that training stood still for the next batch."""
        return self.waited / max(self.seconds, 1e-9)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))


def show_result(display: Display, run: RunDirectory, split: str) -> None:
    """The table of metrics and where everything is, from the files of the run."""
    saved = read_evaluation(run.evaluation / f"{split}.json")
    result = Result(
        metrics={key: _number(value) for key, value in saved["metrics"].items()},
        per_class=[{key: _number(value) for key, value in row.items()} for row in saved["per_class"]],
        confusion=saved["confusion"],
        convention=saved["convention"],
        images=saved["images"],
        notes=saved["notes"],
    )
    names = tuple(saved["class_names"])
    display.show(evaluation_table(Evaluation(result, [], None, [], saved["seconds"], saved["task"], names, split)))
    scores = run.evaluation / f"{split}_summary.json"
    if scores.is_file():
        display.show(score_table(read_summary(scores), split))
    display.say(f"weights: {run.checkpoint('best') / 'weights.safetensors'}")
    display.say(f"report: {run.report}")


def _number(value: Any) -> Any:
    """Files say null where a number is undefined."""
    return math.nan if value is None else value
