"""The preflight of volumes: reads every header and every label map before training, and finds all faults at once.

A label map that is shifted against its image, or a class that nobody declared, must not show after a night of training.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vision_gates.datasets.base import few, how_many
from vision_gates.datasets.volumes.layouts import Case, Layout
from vision_gates.errors import DataError
from vision_gates.volumes.geometry import Geometry
from vision_gates.volumes.reading import read_geometry, read_labels

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CaseFacts", "Report", "check_cases"]

_SHOWN = 3
_SHOWN_VALUES = 8
_THIN = 4  # voxels: an axis with fewer is worth a warning
_BLOCK = 2**22  # voxels counted at once, so that counting takes little memory
_COUNTED_DIRECTLY = 2**16  # np.bincount serves values below


@dataclass(frozen=True)
class CaseFacts:
    """What the files of one case showed. Sizes and spacing (mm) are along the axes of the first image's file.

    labels: label value -> voxels, or None without labels.
    """

    name: str
    patient: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    orientation: str
    labels: dict[int, int] | None


@dataclass(frozen=True)
class Report:
    """What :func:`check_cases` found in a data set without faults.

    Attributes:
        cases: the training cases, sorted by name.
        test_cases: those that the data set sets apart.
        class_names: by label value; empty where nothing names them.
        ignore_index: label value that is not scored.
        warnings: one sentence each.
    """

    cases: tuple[CaseFacts, ...]
    test_cases: tuple[CaseFacts, ...]
    class_names: tuple[str, ...]
    ignore_index: int | None
    warnings: tuple[str, ...]

    @property
    def label_voxels(self) -> dict[int, int]:
        """Label value -> voxels in all training cases; every declared class is there, sorted by value."""
        total = Counter(dict.fromkeys(range(len(self.class_names)), 0))
        for case in self.cases:
            total.update(case.labels or {})
        return dict(sorted(total.items()))

    @property
    def empty(self) -> list[str]:
        """Training cases that are all background."""
        return [case.name for case in self.cases if _is_empty(case, self.ignore_index)]

    def name_of(self, value: int) -> str:
        """Name of a label value."""
        if value == self.ignore_index:
            return "ignored"
        names = self.class_names or ("background",)
        return names[value] if value < len(names) else f"class_{value}"

    def to_dict(self) -> dict[str, Any]:
        """All of it in types that JSON has; label values are turned to text."""

        def facts(case: CaseFacts) -> dict[str, Any]:
            labels = None if case.labels is None else {str(value): count for value, count in case.labels.items()}
            return dict(vars(case), shape=list(case.shape), spacing=list(case.spacing), labels=labels)

        return {
            "cases": [facts(case) for case in self.cases],
            "test_cases": [facts(case) for case in self.test_cases],
            "label_voxels": {self.name_of(value): count for value, count in self.label_voxels.items()},
            "empty": self.empty,
            "warnings": list(self.warnings),
        }

    def table(self) -> "Table":
        """A summary on one screen, for rich's ``Console.print``."""
        from rich.table import Table

        table = Table(title="Training cases", show_header=False, title_justify="left")
        table.add_column(style="bold")
        table.add_column()
        patients = len({case.patient for case in self.cases})
        table.add_row("cases", f"{len(self.cases):,} of {how_many(patients, 'patient')}")
        if self.test_cases:
            table.add_row("test cases", f"{len(self.test_cases):,}")
        table.add_row("size, voxels", _spread([case.shape for case in self.cases]))
        table.add_row("spacing, mm", _spread([case.spacing for case in self.cases]))
        orientations = Counter(case.orientation for case in self.cases).most_common()
        table.add_row("orientation", ", ".join(f"{code} ({count:,})" for code, count in orientations))
        every = max(sum(self.label_voxels.values()), 1)
        for value, count in self.label_voxels.items():
            present = sum(1 for case in self.cases if case.labels and case.labels.get(value))
            share = f"{100 * count / every:.3g} % of the voxels, in {how_many(present, 'case')}"
            table.add_row(f"label {value} {self.name_of(value)}", f"{count:,}: {share}")
        table.add_row("empty labels", f"{len(self.empty):,}" + (f": {few(self.empty)}" if self.empty else ""))
        return table


def _spread(rows: Sequence[Sequence[float]]) -> str:
    """Least, median and greatest along each axis."""
    least, median, most = np.quantile(np.array(rows), [0, 0.5, 1], axis=0)
    if np.array_equal(least, most):
        return f"{_by(least)} in all"
    return f"{_by(least)} to {_by(most)}, median {_by(median)}"


def _by(values: Any) -> str:
    return " x ".join(f"{value:.4g}" for value in values)


def _is_empty(case: CaseFacts, ignore_index: int | None) -> bool:
    return case.labels is not None and case.labels.keys() <= {0, ignore_index}


@dataclass
class _Reading:
    """What one case showed, and what is wrong with it; small, because a large data set has many."""

    facts: CaseFacts | None = None
    labels: dict[int, int] | None = None
    faults: list[str] = field(default_factory=list)
    grid_faults: list[str] = field(default_factory=list)


def check_cases(
    layout: Layout,
    *,
    progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
    tolerance: float = 1e-3,
) -> Report:
    """Checks all cases, the test cases too: reads the headers of the images and the whole label maps.

    Args:
        layout: the cases and classes. Without class names, any label value from 0 on is right.
        progress: called in the calling thread with (cases done, cases in all).
        workers: threads that read.
        tolerance: how far the grids of one case may differ, see :meth:`Geometry.differences`.

    Returns:
        The facts of all cases; it does not depend on the number of threads.

    Raises:
        DataError: one line that tells all faults: files that cannot be read, single slices, a wrong number of channels,
            channels or labels on another grid than the first image, label values that no class has.
    """
    every = [*layout.cases, *layout.test_cases]
    readings: list[_Reading] = []
    pool = ThreadPoolExecutor(max_workers=max(workers, 1))
    try:
        for reading in pool.map(partial(_read_case, layout=layout, tolerance=tolerance), every):
            readings.append(reading)
            if progress is not None:
                progress(len(readings), len(every))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait until all that is queued has been read
    messages = [
        *_first([fault for reading in readings for fault in reading.faults]),
        *_first(
            [fault for reading in readings for fault in reading.grid_faults],
            "resample these to the image's grid, or where the voxels do match, copy the image's header",
        ),
        *_label_faults(every, readings, layout),
    ]
    if messages:
        raise DataError(" ".join(f"data set at {layout.root}: {'; '.join(messages)}".split()))
    facts = tuple(reading.facts for reading in readings if reading.facts is not None)
    count = len(layout.cases)
    report = Report(facts[:count], facts[count:], layout.class_names, layout.ignore_index, ())
    return replace(report, warnings=_warnings(report))


def _read_case(case: Case, layout: Layout, tolerance: float) -> _Reading:
    """Reads one case; its faults come back rather than being raised, so that all can be reported."""
    reading = _Reading()
    grids: list[Geometry] = []
    for path in case.images:
        try:
            grids.append(read_geometry(path))
        except DataError as error:
            reading.faults.append(str(error))
    if case.labels is not None:
        try:
            labels = read_labels(case.labels)
            reading.labels = _count(labels.array)
        except DataError as error:
            reading.faults.append(str(error))
    expected = len(layout.channel_names)
    if len(case.images) != expected:
        reading.faults.append(
            f"{case.images[0]}: case {case.name} has {how_many(len(case.images), 'image')}, but there are {expected} "
            f"channels ({few(layout.channel_names, limit=6)})"
        )
    if len(grids) < len(case.images):  # nothing to compare with
        return reading
    first = grids[0]
    if min(first.shape) < 2:
        reading.faults.append(
            f"{case.images[0]}: a single slice ({_by(first.shape)} voxels), not a volume; stack the slices of a patient"
        )
    others = list(zip(case.images[1:], grids[1:], strict=True))
    if case.labels is not None and reading.labels is not None:
        others.append((case.labels, labels.geometry))
    for path, grid in others:
        differences = first.differences(grid, tolerance=tolerance)
        if differences:
            reading.grid_faults.append(f"{path}: {' and '.join(differences)} as {_relative(case.images[0], layout)}")
    reading.facts = CaseFacts(case.name, case.patient, first.shape, first.spacing, first.orientation, reading.labels)
    return reading


def _relative(path: Path, layout: Layout) -> str:
    return path.relative_to(layout.root).as_posix() if path.is_relative_to(layout.root) else str(path)


def _count(labels: NDArray[Any]) -> dict[int, int]:
    """Voxels of each value, sorted by value."""
    found: Counter[int] = Counter()
    voxels = labels.ravel(order="K")
    for start in range(0, voxels.size, _BLOCK):
        block = voxels[start : start + _BLOCK]
        if block.min() >= 0 and block.max() < _COUNTED_DIRECTLY:
            counts = np.bincount(block)
            values = np.flatnonzero(counts)
            counts = counts[values]
        else:
            values, counts = np.unique(block, return_counts=True)
        found.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
    return dict(sorted(found.items()))


def _first(faults: Sequence[str], remedy: str = "") -> list[str]:
    """The first few faults of a kind, how many more there are, and the remedy."""
    if not faults:
        return []
    others = f"; and {how_many(len(faults) - _SHOWN, 'further fault')} of this kind" if len(faults) > _SHOWN else ""
    return ["; ".join(faults[:_SHOWN]) + others + (f"; {remedy}" if remedy else "")]


def _label_faults(cases: Sequence[Case], readings: Sequence[_Reading], layout: Layout) -> list[str]:
    """Label values without a class, as one sentence with the histogram of all values in these files."""
    top = len(layout.class_names) or np.inf
    files: list[str] = []
    histogram: Counter[int] = Counter()
    for case, reading in zip(cases, readings, strict=True):
        counts = reading.labels or {}
        if case.labels is not None and any(not 0 <= value < top and value != layout.ignore_index for value in counts):
            files.append(_relative(case.labels, layout))
            histogram.update(counts)
    if not files:
        return []
    common = sorted(value for value, _ in histogram.most_common(_SHOWN_VALUES))
    shown = ", ".join(f"{value}: {how_many(histogram[value], 'voxel')}" for value in common)
    rest = f" and {len(histogram) - len(common):,} rarer values" if len(histogram) > len(common) else ""
    classes = f"0..{len(layout.class_names) - 1}" if layout.class_names else "0, 1, 2 ..."
    return [
        f"labels outside {classes} in {how_many(len(files), 'file')}: {few(files)}; values found: {shown}{rest}; "
        f"{_label_remedy(sorted(histogram), layout)}"
    ]


def _label_remedy(values: Sequence[int], layout: Layout) -> str:
    """What makes these label values usable."""
    classes = len(layout.class_names)
    place = "data.class_names" if layout.kind == "pairs" else "labels in dataset.json"
    unknown = [value for value in values if not 0 <= value < classes and value != layout.ignore_index]
    if list(values) == [0, 255] and classes == 2:
        return "these are 0/255 masks: write 1 instead of 255"
    if unknown == [255] and layout.ignore_index is None:
        return "255 often marks voxels without a label: set data.ignore_index=255"
    if min(values) >= 0 and max(values) < 256 and classes and set(unknown) == set(range(classes, max(values) + 1)):
        return f"there are {max(values) + 1} classes: name them all, in {place}"
    return f"renumber the label files to 0, 1, 2 ..., or correct {place}"


def _warnings(report: Report) -> tuple[str, ...]:
    warnings = []
    thin = [f"{case.name} ({_by(case.shape)})" for case in report.cases + report.test_cases if min(case.shape) < _THIN]
    if thin:
        warnings.append(
            f"{how_many(len(thin), 'case')} with fewer than {_THIN} voxels along an axis: {few(thin)}; check that they "
            "are volumes: in mode 3d most of a patch around them is zeros, data.mode=2d may suit them better"
        )
    if report.empty:
        warnings.append(f"{len(report.empty):,} of {len(report.cases):,} cases are all background: {few(report.empty)}")
    missing = [report.name_of(value) for value, count in report.label_voxels.items() if count == 0]
    if missing:
        warnings.append(f"no training case has a voxel of {few(missing, limit=6)}")
    return tuple(warnings)
