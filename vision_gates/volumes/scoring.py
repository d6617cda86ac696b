"""How well labels of a volume were predicted: Dice, surface distances in mm, volume and lesions, misses counted.

``score_case`` compares two label volumes, ``summarise`` averages over cases with bootstrap intervals over patients,
``summarise_folds`` over the folds of a cross-validation, and ``write_scores`` puts tables on disk.

Surfaces are the voxels of a label with a face on another label or on the border of the volume; distances run between
their centres. HD95 and NSD follow MONAI's ``compute_hausdorff_distance(percentile=95)`` and ``compute_surface_dice``
(NSD: Nikolov et al., arXiv:1809.04430) wherever truth and prediction both hold the label. They differ where one does
not: MONAI's averages pass over such a case, here it is a miss.
"""

import csv
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vision_gates.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = [
    "CONVENTION",
    "METRICS",
    "FoldSummary",
    "Summary",
    "score_case",
    "summarise",
    "summarise_folds",
    "write_scores",
]

CONVENTION = (
    "Mean over cases; a label in only one of truth and prediction is a miss or a false positive and scores Dice, NSD "
    "and lesion F1 0 and as HD95 the diagonal of the volume; a label in neither is not counted, and N is the number of "
    "cases counted; volume errors are prediction minus truth, in percent only where the label is in the truth; overall "
    "scores are means over the labels."
)
"""How misses count and what N is; every table and file of a summary carries it."""

METRICS = ("dice", "hd95_mm", "nsd", "volume_error_ml", "volume_error_percent", "lesion_f1")
"""Metrics that a summary averages."""

_COUNTS = ("lesions_found", "lesions_true", "lesions_predicted", "lesions_false")
_FEW_PATIENTS = 10
_EVERY_DIRECTION = np.ones((3, 3, 3), dtype=bool)

Row = dict[str, Any]
Box = tuple[slice, ...]


def score_case(
    prediction: NDArray[Any],
    truth: NDArray[Any],
    *,
    spacing: tuple[float, float, float],
    class_names: Sequence[str],
    tolerance_mm: float = 2.0,
    ignore_index: int | None = None,
    name: str = "",
) -> list[Row]:
    """Scores of one case, label by label.

    Args:
        prediction: (I, J, K) integer labels.
        truth: (I, J, K) integer labels on the same grid.
        spacing: mm between neighbouring voxels along i, j and k.
        class_names: names in label order, background first.
        tolerance_mm: surfaces this near count as equal in the NSD.
        ignore_index: label of the truth whose voxels are not scored: there both volumes count as background.
        name: of the case, for error messages.

    Returns:
        One flat dict for every label but the background (and ``ignore_index``): ``label``, ``name``, ``status``
        ("scored", "missed", "false positive" or "absent": see ``CONVENTION``), the ``METRICS``, ``tolerance_mm``,
        ``volume_ml`` (of the prediction), ``truth_ml``, and the number of lesions, 26-connected components, that were
        ``lesions_found`` (any voxel of them predicted) of ``lesions_true``, ``lesions_predicted`` and of these
        ``lesions_false`` (touching no true voxel). Lesion F1 is 2 found / (found + true + false). A metric is None
        where undefined: all of an absent label, and ``volume_error_percent`` of a false positive.

    Raises:
        ValueError: arrays that are not integer, not three-dimensional or of different shapes; spacing that is not three
            positive numbers; a negative tolerance.
        DataError: a label that is no class, with the number of voxels of each value.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape or truth.ndim != 3 or not truth.size:
        raise ValueError(f"two volumes (I, J, K) of one shape are needed, got {prediction.shape} and {truth.shape}")
    for array in (prediction, truth):
        if not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"integer labels are needed, got {array.dtype}")
    step = np.asarray(spacing, dtype=np.float64)
    if step.shape != (3,) or not (np.isfinite(step).all() and (step > 0).all()):
        raise ValueError(f"spacing must be three positive numbers, got {spacing}")
    if not (np.isfinite(tolerance_mm) and tolerance_mm >= 0):
        raise ValueError(f"tolerance_mm must be 0 or more, got {tolerance_mm}")
    if ignore_index is not None:
        ignored = truth == ignore_index
        prediction, truth = np.where(ignored, 0, prediction), np.where(ignored, 0, truth)
    prediction = _checked(prediction, class_names, f"{name}: prediction" if name else "prediction")
    truth = _checked(truth, class_names, f"{name}: truth" if name else "truth")

    from scipy import ndimage

    classes = len(class_names)
    boxes = zip(
        ndimage.find_objects(prediction, max_label=classes - 1),
        ndimage.find_objects(truth, max_label=classes - 1),
        strict=True,
    )
    diagonal = float(np.linalg.norm(step * truth.shape))
    rows = []
    for label, (predicted_box, true_box) in enumerate(boxes, start=1):
        if label == ignore_index:
            continue
        box = _union(predicted_box, true_box)
        scores = _score_label(prediction[box] == label, truth[box] == label, step, tolerance_mm, diagonal)
        rows.append({"label": label, "name": class_names[label], **scores, "tolerance_mm": float(tolerance_mm)})
    return rows


def _checked(labels: NDArray[Any], class_names: Sequence[str], what: str) -> NDArray[Any]:
    """The labels in the smallest type that holds them."""
    classes = len(class_names)
    if labels.min() < 0 or labels.max() >= classes:
        values, voxels = np.unique(labels, return_counts=True)
        wrong = [str(value) for value in values if not 0 <= value < classes]
        found = [f"{value}: {count:,}" for value, count in zip(values, voxels, strict=True)]
        wrong, found = (items[:20] + ["..."] * (len(items) > 20) for items in (wrong, found))
        raise DataError(
            f"{what}: label {', '.join(wrong)} is not in 0..{classes - 1}; correct the labels or the class names, or "
            f"leave voxels of the truth out with ignore_index; voxels of each value: {', '.join(found)}"
        )
    return labels.astype(np.min_scalar_type(classes))


def _union(first: Box | None, second: Box | None) -> Box:
    """The box around both; empty if there is neither."""
    if first is None or second is None:
        return first or second or (slice(0, 0),) * 3
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(first, second, strict=True))


def _score_label(
    prediction: NDArray[np.bool_],
    truth: NDArray[np.bool_],
    step: NDArray[np.float64],
    tolerance_mm: float,
    diagonal: float,
) -> Row:
    """Scores of one label from its masks, cropped to it."""
    voxel_ml = float(step.prod()) / 1000
    predicted, true = int(np.count_nonzero(prediction)), int(np.count_nonzero(truth))
    row: Row = {"status": "scored", **dict.fromkeys(METRICS), "volume_ml": predicted * voxel_ml}
    row |= {"truth_ml": true * voxel_ml, **dict.fromkeys(_COUNTS, 0)}
    if not predicted and not true:
        return row | {"status": "absent"}
    row["volume_error_ml"] = (predicted - true) * voxel_ml
    if true:
        row["volume_error_percent"] = 100 * (predicted - true) / true
    row |= _score_lesions(prediction, truth)
    if not predicted or not true:
        status = "missed" if true else "false positive"
        return row | {"status": status, "dice": 0.0, "nsd": 0.0, "hd95_mm": diagonal}
    row["dice"] = 2 * int(np.count_nonzero(prediction & truth)) / (predicted + true)
    distances = _surface_distances(prediction, truth, step)
    row["hd95_mm"] = max(float(np.percentile(side, 95)) for side in distances)
    # A millionth of a mm, so that rounding does not decide over surfaces exactly at the tolerance.
    row["nsd"] = float(np.mean(np.concatenate(distances) <= tolerance_mm + 1e-6))
    return row


def _surface_distances(
    first: NDArray[np.bool_], second: NDArray[np.bool_], step: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """From every surface voxel of each mask to the nearest one of the other, in mm.

    A tree of the surface rather than a distance transform of the box: one stray voxel far away makes the box large,
    not the surface.
    """
    from scipy.spatial import KDTree

    first_points, second_points = (np.argwhere(_surface(mask)) * step for mask in (first, second))
    to_second, _ = KDTree(second_points).query(first_points)
    to_first, _ = KDTree(first_points).query(second_points)
    return to_second, to_first


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Voxels with a face on the outside: scipy's ``mask & ~binary_erosion(mask)``, at a tenth of its time."""
    padded = np.pad(mask, 1)
    inside = mask.copy()
    for axis in range(3):
        for shift in (0, 2):
            window = [slice(1, -1)] * 3
            window[axis] = slice(shift, shift + mask.shape[axis])
            inside &= padded[tuple(window)]
    return mask & ~inside


def _score_lesions(prediction: NDArray[np.bool_], truth: NDArray[np.bool_]) -> Row:
    """Lesion counts and F1; at least one of the masks is not empty."""
    from scipy import ndimage

    true_components, true = ndimage.label(truth, _EVERY_DIRECTION)
    predicted_components, predicted = ndimage.label(prediction, _EVERY_DIRECTION)
    overlap = prediction & truth
    found = len(np.unique(true_components[overlap]))
    false = predicted - len(np.unique(predicted_components[overlap]))
    return dict(zip(_COUNTS, (found, true, predicted, false), strict=True)) | {
        "lesion_f1": 2 * found / (found + true + false)
    }


@dataclass(frozen=True)
class Summary:
    """Means over cases, with bootstrap intervals over patients.

    Attributes:
        per_label: a flat dict a label: ``label``, ``name``, ``n`` (cases counted), ``missed``, ``false_positives``, the
            sums of lesions, and each metric with the 95 % interval ``METRIC_low``, ``METRIC_high``; None if undefined.
        overall: the same over all labels; its ``n`` is the number of cases with any label counted.
        cases: number of cases.
        patients: number of patients, or of cases if the patients are not known.
        tolerance_mm: of the NSD.
        resamples: of the bootstrap.
        seed: of the bootstrap.
        notes: what is undefined or uncertain; one sentence each.
        convention: ``CONVENTION``.
    """

    per_label: list[Row]
    overall: Row
    cases: int
    patients: int
    tolerance_mm: float
    resamples: int
    seed: int
    notes: list[str]
    convention: str = CONVENTION

    def to_dict(self) -> dict[str, Any]:
        """Plain content for JSON."""
        return asdict(self)

    def table(self) -> "Table":
        """For a terminal: N, misses and means, with intervals of Dice, HD95 and NSD."""
        title = _how_many(self.cases, "case")
        if self.patients != self.cases:
            title += f" of {_how_many(self.patients, 'patient')}"
        return _table(f"{title}: mean, 95 % interval", self, self.notes, _with_interval)


@dataclass(frozen=True)
class FoldSummary:
    """Mean and standard deviation over folds of each fold's means.

    Attributes:
        per_label: a flat dict a label: ``label``, ``name``, ``folds`` (how many have the label), ``n``, ``missed``,
            ``false_positives`` and the lesions summed over folds, and each metric with ``METRIC_std`` (None for one
            fold).
        overall: the same over all labels.
        folds: number of folds.
        tolerance_mm: of the NSD.
        convention: ``CONVENTION``.
    """

    per_label: list[Row]
    overall: Row
    folds: int
    tolerance_mm: float
    convention: str = CONVENTION

    def to_dict(self) -> dict[str, Any]:
        """Plain content for JSON."""
        return asdict(self)

    def table(self) -> "Table":
        """For a terminal: N and misses of all folds, mean and standard deviation of Dice, HD95 and NSD."""
        title = f"{self.folds:,} folds: mean ± standard deviation of the folds' means"
        return _table(title, self, [], _with_deviation)


def summarise(
    cases: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    class_names: Sequence[str],
    patients: Mapping[str, str] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> Summary:
    """Average the scores of cases; intervals by percentile bootstrap, drawing patients with all their cases.

    Args:
        cases: name of a case to its rows from ``score_case``.
        class_names: names in label order, background first.
        patients: name of a case to its patient; left out, every case is a patient.
        seed: of the bootstrap; the order of the cases does not matter.
        resamples: number of bootstrap samples.

    Raises:
        ValueError: no cases, a case without patient, a label that is no foreground class, unequal tolerances.
    """
    names, labels = sorted(cases), len(class_names) - 1
    rows = [(at, row) for at, name in enumerate(names) for row in cases[name]]
    if not rows:
        raise ValueError("no case has been scored")
    tolerances = {float(row["tolerance_mm"]) for _, row in rows}
    if len(tolerances) > 1:
        raise ValueError(f"cases were scored with different tolerances: {sorted(tolerances)} mm")
    lost = [name for name in names if patients is not None and name not in patients]
    if lost:
        raise ValueError(f"no patient is given for case {lost[0]}")
    values = np.full((len(names), labels, len(METRICS)), np.nan)
    tallies = [dict.fromkeys(("n", "missed", "false_positives", *_COUNTS), 0) for _ in range(labels)]
    counted = set()
    for at, row in rows:
        label = int(row["label"])
        if not 1 <= label <= labels:
            raise ValueError(f"case {names[at]}: label {label} is not in 1..{labels}")
        if row["status"] == "absent":
            continue
        counted.add(at)
        values[at, label - 1] = [np.nan if row[metric] is None else row[metric] for metric in METRICS]
        tally = tallies[label - 1]
        tally["n"] += 1
        tally["missed"] += row["status"] == "missed"
        tally["false_positives"] += row["status"] == "false positive"
        for key in _COUNTS:
            tally[key] += int(row[key])
    groups = [name if patients is None else patients[name] for name in names]
    people, patient_of_case = np.unique(groups, return_inverse=True)
    means = _means(values, np.ones((1, len(names))))[0]
    low, high = np.full((2, *means.shape), np.nan)
    if len(people) > 1:
        drawn = np.random.default_rng(seed).multinomial(len(people), np.full(len(people), 1 / len(people)), resamples)
        samples = _means(values, drawn[:, patient_of_case].astype(np.float64))
        seen = np.zeros((len(people), labels, len(METRICS)), dtype=bool)
        np.logical_or.at(seen, patient_of_case, ~np.isnan(values))
        seen = np.concatenate([seen, seen.any(axis=1, keepdims=True)], axis=1)
        # One patient alone would always draw himself, and the interval would be a point.
        for label, metric in np.argwhere(seen.sum(axis=0) > 1):
            column = samples[:, label, metric]
            low[label, metric], high[label, metric] = np.nanpercentile(column, (2.5, 97.5))
    tallies.append({key: sum(tally[key] for tally in tallies) for key in tallies[0]} | {"n": len(counted)})
    heads: list[Row] = [{"label": c, "name": class_names[c]} for c in range(1, labels + 1)]
    heads.append({"label": None, "name": "all labels"})
    table = []
    for at, (head, tally) in enumerate(zip(heads, tallies, strict=True)):
        row = head | tally
        for m, metric in enumerate(METRICS):
            for ending, source in (("", means), ("_low", low), ("_high", high)):
                row[metric + ending] = _none_if_nan(source[at, m])
        table.append(row)
    notes = []
    absent = [str(row["name"]) for row in table[:-1] if not row["n"]]
    if absent:
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        notes.append(
            f"{', '.join(absent[:5])}{more}: in no truth and no prediction: without score, left out of the means."
        )
    if len(people) == 1:
        notes.append("One patient: there are no intervals.")
    elif len(people) < _FEW_PATIENTS:
        notes.append(f"{len(people)} patients are few: bootstrap intervals of so few are too narrow.")
    return Summary(table[:-1], table[-1], len(names), len(people), tolerances.pop(), resamples, seed, notes)


def _means(values: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means over cases and then labels, NaN left out.

    Args:
        values: (cases, labels, metrics).
        weights: (samples, cases), how often each case was drawn.

    Returns:
        (samples, labels + 1, metrics); the last line is the mean over labels.
    """
    known = ~np.isnan(values)
    with np.errstate(invalid="ignore"):  # 0 / 0 = NaN
        label_means = np.tensordot(weights, np.where(known, values, 0), 1) / np.tensordot(weights, known, 1)
        known = ~np.isnan(label_means)
        overall = np.where(known, label_means, 0).sum(axis=1, keepdims=True) / known.sum(axis=1, keepdims=True)
    return np.concatenate([label_means, overall], axis=1)


def _none_if_nan(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def summarise_folds(summaries: Sequence[Summary]) -> FoldSummary:
    """Mean and sample standard deviation of the folds' means, each fold counting alike.

    Args:
        summaries: one a fold, of the same labels.

    Raises:
        ValueError: no folds, folds of different labels or tolerances.
    """
    if not summaries:
        raise ValueError("no fold has been scored")
    kinds = {(s.tolerance_mm, *((row["label"], row["name"]) for row in s.per_label)) for s in summaries}
    if len(kinds) > 1:
        raise ValueError("the folds were scored with different labels or tolerances")
    table = []
    for rows in zip(*([*summary.per_label, summary.overall] for summary in summaries), strict=True):
        merged: Row = {"label": rows[0]["label"], "name": rows[0]["name"], "folds": sum(row["n"] > 0 for row in rows)}
        for key in ("n", "missed", "false_positives", *_COUNTS):
            merged[key] = sum(row[key] for row in rows)
        for metric in METRICS:
            means = [row[metric] for row in rows if row[metric] is not None]
            merged[metric] = float(np.mean(means)) if means else None
            merged[f"{metric}_std"] = float(np.std(means, ddof=1)) if len(means) > 1 else None
        table.append(merged)
    return FoldSummary(table[:-1], table[-1], len(summaries), summaries[0].tolerance_mm)


def _with_interval(row: Row, metric: str) -> str:
    low, high = row[f"{metric}_low"], row[f"{metric}_high"]
    return "" if low is None else f" {_cell(low, metric)}–{_cell(high, metric)}"


def _with_deviation(row: Row, metric: str) -> str:
    deviation = row[f"{metric}_std"]
    return "" if deviation is None else f" ±{_cell(deviation, metric)}"


def _cell(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return f"{value:,.1f}" if metric.endswith(("_mm", "_ml", "_percent")) else f"{value:.3f}"


def _table(
    title: str, summary: Summary | FoldSummary, notes: Sequence[str], spread: Callable[[Row, str], str]
) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    # Text, not markup: a class may be called "[red]".
    table = Table(
        title=Text(title, style="bold"),
        caption=Text("\n".join([summary.convention, *notes]), style="dim"),
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    table.add_column("label", overflow="fold")
    for heading in ("N", "missed\n+ false"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("Dice", "HD95 mm", f"NSD {summary.tolerance_mm:g} mm"):
        table.add_column(heading, justify="right", min_width=11)  # an interval; it goes below the mean if need be
    for heading in ("volume\n%", "lesion\nF1"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in (*summary.per_label, summary.overall):
        if row is summary.overall:
            table.add_section()
        table.add_row(
            Text(str(row["name"])),
            f"{row['n']:,}",
            f"{row['missed']:,} + {row['false_positives']:,}",
            *(Text.assemble(_cell(row[key], key), (spread(row, key), "dim")) for key in ("dice", "hd95_mm", "nsd")),
            *(_cell(row[key], key) for key in ("volume_error_percent", "lesion_f1")),
        )
    return table


def write_scores(
    folder: str | Path, cases: Mapping[str, Sequence[Mapping[str, Any]]], summary: Summary, *, prefix: str = ""
) -> Path:
    """Write PREFIXcases.csv (a line a case and label), PREFIXsummary.csv (a line a label, the overall means last) and
    PREFIXsummary.json (all of the summary). Each is replaced atomically, the JSON last.

    An undefined number is an empty cell, or null.

    Returns:
        Path of the JSON file.
    """
    rows = [{"case": name, **row} for name in sorted(cases) for row in cases[name]]
    # The convention stands once, in the line of the overall means, so that the other lines stay readable.
    lines = [*summary.per_label, {**summary.overall, "convention": " ".join([summary.convention, *summary.notes])}]
    contents = {
        "cases.csv": _csv_text(rows),
        "summary.csv": _csv_text(lines),
        "summary.json": json.dumps(summary.to_dict(), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        path = folder / f"{prefix}{name}"
        writing = path.with_name(f".{path.name}.writing")
        try:
            with open(writing, "wb") as file:
                # A case named after a file whose name is no UTF-8 must not stop the table.
                file.write(text.encode(errors="backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(writing, path)
        finally:
            writing.unlink(missing_ok=True)
    return path


def _csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _how_many(count: int, noun: str) -> str:
    """``1 case``, ``1,200 cases``."""
    return f"{count:,} {noun}{'s' if count != 1 else ''}"
