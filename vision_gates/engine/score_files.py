"""What ``vision-gates score`` does: compare masks in files with the truth in files."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from vision_gates.datasets.base import few
from vision_gates.engine.segment_journal import JOURNAL, read_class_names
from vision_gates.errors import ConfigError, DataError
from vision_gates.volumes.reading import VOLUME_SUFFIXES, Volume, read_labels, stem
from vision_gates.volumes.scoring import Summary, score_case, summarise, write_scores

__all__ = ["score_files"]


def score_files(
    prediction: str | Path,
    truth: str | Path,
    *,
    names: Sequence[str] = (),
    tolerance_mm: float = 2.0,
    out: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Score a mask, or every mask in a folder, against the truth of the same name.

    Every pair is read twice, first to find what is wrong with any of them, so that memory holds one pair at a time.

    Args:
        prediction: a file, or a folder of them; of its segment.jsonl the names of the labels are taken.
        truth: a file, or a folder with a file of the same case for each.
        names: of the labels from 0 on, background first; by default "label 1" and so on.
        tolerance_mm: of the normalised surface Dice.
        out: folder for cases.csv, summary.csv and summary.json; None: nothing is written.
        progress: called with the pairs done and their number.

    Raises:
        DataError: a file is missing or cannot be read, or a pair lies on different grids.
        ConfigError: a file beside a folder, or a tolerance that is no number of millimetres.
    """
    if not 0 <= tolerance_mm < math.inf:
        raise ConfigError(f"tolerance={tolerance_mm:g}: millimetres are needed, 0 or more")
    pairs = _pairs(Path(prediction).expanduser(), Path(truth).expanduser())
    most = max(max(int(labels.array.max()) for labels in _read_pair(*paths)) for paths in pairs.values())
    names = tuple(names) or _written_names(Path(prediction).expanduser())
    names = names or ("background", *(f"label {value}" for value in range(1, most + 1)))
    rows = {}
    progress(0, len(pairs))
    for name, paths in pairs.items():
        mask, expected = _read_pair(*paths)
        rows[name] = score_case(
            mask.array.astype(np.int64),
            expected.array.astype(np.int64),
            spacing=expected.geometry.spacing,
            class_names=names,
            tolerance_mm=tolerance_mm,
            name=str(mask.source),
        )
        progress(len(rows), len(pairs))
    summary = summarise(rows, class_names=names)
    if out is not None:
        write_scores(Path(out), rows, summary)
    return summary


def _read_pair(prediction: Path, truth: Path) -> tuple[Volume, Volume]:
    mask, expected = read_labels(prediction), read_labels(truth)
    differences = expected.geometry.differences(mask.geometry)
    if differences:
        raise DataError(f"{prediction}: not on the grid of {truth}: {'; '.join(differences)}")
    return mask, expected


def _pairs(prediction: Path, truth: Path) -> dict[str, tuple[Path, Path]]:
    for path in (prediction, truth):
        if not path.exists():
            raise DataError(f"{path}: no such file or folder")
    if prediction.is_file() and truth.is_file():
        return {stem(prediction): (prediction, truth)}
    if prediction.is_file() or truth.is_file():
        raise ConfigError(f"{prediction}, {truth}: two files or two folders are needed")
    found, expected = (
        {stem(p): p for p in sorted(folder.iterdir()) if p.name.lower().endswith(VOLUME_SUFFIXES)}
        for folder in (prediction, truth)
    )
    if not found:
        raise DataError(f"{prediction}: no masks in it; files that end in {', '.join(VOLUME_SUFFIXES)}")
    missing = [name for name in found if name not in expected]
    if missing:
        raise DataError(f"{truth}: no truth for {few(missing)}")
    return {name: (path, expected[name]) for name, path in found.items()}


def _written_names(prediction: Path) -> tuple[str, ...]:
    """The names that ``segment`` left beside its masks."""
    beside = prediction / JOURNAL if prediction.is_dir() else prediction.parent / f"{stem(prediction)}_{JOURNAL}"
    return read_class_names(beside) if beside.is_file() else ()
