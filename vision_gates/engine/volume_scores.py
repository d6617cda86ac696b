"""Scores of whole cases, each on the grid of its own label file: of a run as it is evaluated, and over several folds.

The per-image metrics of an evaluation are those of the prepared grid, and depend on its spacing. These are what a
reader of the files would measure on the masks that ``vision-gates segment`` writes.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vision_gates.config import RunConfig
from vision_gates.datasets.base import DataSplits, few, how_many, load_splits
from vision_gates.datasets.volumes import Config, VolumeSplits
from vision_gates.datasets.volumes.layouts import Case, patients_of
from vision_gates.engine.building import RunInfo
from vision_gates.engine.data import Loader
from vision_gates.engine.run_directory import RunDirectory, atomic_write_text, read_json, reason_of, to_json
from vision_gates.engine.run_files import check_row, read_config
from vision_gates.errors import ConfigError, DataError, UserError
from vision_gates.volumes.cache import CachedCase
from vision_gates.volumes.preprocessing import restore_labels
from vision_gates.volumes.reading import read_labels
from vision_gates.volumes.scoring import METRICS, FoldSummary, Summary, score_case, summarise, summarise_folds

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CaseScorer", "Folds", "Scores", "build_scorer", "read_summary", "score_table", "summarise_runs"]

LESIONS = ("lesions_found", "lesions_true", "lesions_predicted", "lesions_false")  # numbers in a row

# What decides who is in which fold; fold itself has to differ.
_OF_ALL_FOLDS = ("root", "folds", "layout", "groups", "split_seed", "test_fraction")


@dataclass(frozen=True)
class Scores:
    """Of one pass over a split: name of a case to its rows (`score_case`), and their means."""

    cases: dict[str, list[dict[str, Any]]]
    summary: Summary


class CaseScorer:
    """Scores predictions as `evaluate_model` makes them, so that nothing is predicted twice.

    Args:
        cases: prepared, in the order of the split.
        files: the same cases on disk.
        class_names: in label order.
        ignore_index: label that is not scored.
        tolerance_mm: of the normalised surface Dice.
    """

    def __init__(
        self,
        cases: Sequence[CachedCase],
        files: Sequence[Case],
        *,
        class_names: Sequence[str],
        ignore_index: int | None,
        tolerance_mm: float = 2.0,
    ) -> None:
        self._cases, self._files = cases, files
        self._class_names, self._ignore_index, self._tolerance_mm = class_names, ignore_index, tolerance_mm
        self._rows: dict[str, list[dict[str, Any]]] = {}

    def add(self, batch: Mapping[str, Any], labels_BXYZ: Tensor) -> None:
        """Score predicted labels of prepared cases; ``batch["index"]`` says which.

        Raises:
            DataError: a label file cannot be read, or does not lie on the grid of its image any more.
        """
        for index, labels_XYZ in zip(batch["index"].tolist(), labels_BXYZ, strict=True):
            case, file = self._cases[index], self._files[index]
            assert file.labels is not None, "the splits hold labelled cases only"
            truth = read_labels(file.labels)
            differences = case.source.differences(truth.geometry)
            if differences:
                raise DataError(f"{file.labels}: has changed since training began: {'; '.join(differences)}")
            small = labels_XYZ.cpu().numpy().astype(np.min_scalar_type(len(self._class_names)))
            self._rows[file.name] = score_case(
                restore_labels(small, case.geometry, case.source),
                truth.array,
                spacing=case.source.spacing,
                class_names=self._class_names,
                tolerance_mm=self._tolerance_mm,
                ignore_index=self._ignore_index,
                name=str(file.labels),
            )

    def finish(self) -> Scores:
        """Scores of the cases of all processes; each of them has to call this."""
        rows, distributed = self._rows, torch.distributed
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            shares: list[Any] = [None] * distributed.get_world_size()
            distributed.all_gather_object(shares, rows)
            rows = {name: scored for share in shares for name, scored in share.items()}
        patients = {file.name: file.patient for file in self._files}
        return Scores(rows, summarise(rows, class_names=self._class_names, patients=patients))


def build_scorer(
    config: RunConfig, info: RunInfo, loader: Loader, splits: DataSplits | None = None
) -> CaseScorer | None:
    """For the cases of a loader of `build_loader`; None where the run is on images.

    Args:
        config: of the run.
        info: of the run.
        loader: of whole cases.
        splits: of the same data; None: found anew.

    Raises:
        DataError: the files of a case are not there any more.
    """
    if info.volumes is None:
        return None
    found = load_splits(config.data) if splits is None else splits
    assert isinstance(config.data, Config) and isinstance(found, VolumeSplits) and found.layout is not None
    files = {case.name: case for case in found.layout.cases}
    lost = [name for name in loader.dataset.names if name not in files]
    if lost:
        raise DataError(f"{found.layout.root}: {how_many(len(lost), 'case')} gone since training began: {few(lost)}")
    return CaseScorer(
        loader.dataset.cases,
        [files[name] for name in loader.dataset.names],
        class_names=info.class_names,
        ignore_index=config.data.ignore_index,
        tolerance_mm=config.data.tolerance_mm,
    )


def read_summary(path: Path) -> Summary:
    """What `write_scores` has written; `UserError` if the file is damaged or of another version."""
    summary: Summary = read_json(path, Summary, remedy="evaluate the run again", check=_is_whole)
    return summary


def _is_whole(summary: Summary) -> None:
    for row in (*summary.per_label, summary.overall):
        numbers = [f"{metric}{end}" for metric in METRICS for end in ("", "_low", "_high")]
        check_row(row, whole=("n", "missed", "false_positives"), numbers=("label", *LESIONS, *numbers))


def score_table(summary: Summary, split: str) -> "Table":
    """For a terminal, below the table of the metrics on the prepared grid."""
    from rich.text import Text

    table = summary.table()
    table.title = Text.assemble(
        f"{split}, on the grids of the files, " if split else "", str(table.title), style="bold"
    )
    return table


# ---------------------------------------------------------------- cross-validation


@dataclass(frozen=True)
class Folds:
    """A cross-validation, put together.

    Attributes:
        summary: mean and standard deviation of the folds' means.
        all_cases: over the cases of all folds, each validated on once, with 95 % intervals over their patients.
        notes: what to know about them, such as folds that are missing.
        path: the written CSV file; beside it lies a JSON file of the same name.
    """

    summary: FoldSummary
    all_cases: Summary
    notes: list[str]
    path: Path


def summarise_runs(run_dirs: Sequence[str | Path], out: str | Path) -> Folds:
    """Put the validation scores of the folds of one data set together, and write them.

    Args:
        run_dirs: run directories, each trained on volumes with another ``data.fold``.
        out: CSV file to write: a line a label, the means over the labels last; ``dice`` and ``dice_std`` are mean and
            deviation of the folds' means, ``dice_cases`` the mean over all cases, ``dice_cases_low`` and ``_high`` its
            interval, and so with every metric.

    Raises:
        UserError: a run that is none, has not been evaluated on its validation cases, or is no other fold of the same
            cross-validation; nothing is written then.
    """
    out = Path(out).expanduser()
    if out.suffix.lower() != ".csv":
        raise ConfigError(f"out={out}: must end in .csv; a .json file is written beside it")
    runs = [RunDirectory(path) for path in run_dirs]
    data = [_data_of(run) for run in runs]
    for run, own in zip(runs[1:], data[1:], strict=True):
        differing = [
            f"data.{key} is {own.get(key)!r}, not {data[0].get(key)!r} as in {runs[0].path}"
            for key in _OF_ALL_FOLDS
            if own.get(key) != data[0].get(key)
        ]
        if differing:
            raise ConfigError(f"{run.path}: no fold of the same cross-validation: {'; '.join(differing)}")
    by_fold: dict[int, RunDirectory] = {}
    for run, own in zip(runs, data, strict=True):
        other = by_fold.setdefault(own["fold"], run)
        if other is not run:
            raise ConfigError(f"{run.path} and {other.path} are both data.fold={own['fold']}; give each fold once")
    by_fold = dict(sorted(by_fold.items()))
    summaries = [_validation_of(run) for run in by_fold.values()]
    cases = _cases_of(by_fold, summaries)
    try:
        summary = summarise_folds(summaries)
        names = ("background", *(str(row["name"]) for row in summary.per_label))
        patients = patients_of(list(cases), data[0].get("groups", "auto"))
        all_cases = summarise(cases, class_names=names, patients=dict(zip(cases, patients, strict=True)))
    except (ValueError, IndexError) as error:  # of a label that the other runs do not have, too
        raise ConfigError(f"{few([str(run.path) for run in runs])}: {error}") from error
    notes = []
    missing = [str(fold) for fold in range(data[0]["folds"]) if fold not in by_fold]
    if missing:
        notes.append(f"{len(by_fold)} of {data[0]['folds']} folds; missing: {', '.join(missing)}")
    members = [
        {"fold": fold, "run": str(run.path), "cases": one.cases, "patients": one.patients, "overall": one.overall}
        for (fold, run), one in zip(by_fold.items(), summaries, strict=True)
    ]
    lines = [
        row | {f"{metric}_cases{end}": own[f"{metric}{end}"] for metric in METRICS for end in ("", "_low", "_high")}
        for row, own in zip(
            (*summary.per_label, summary.overall), (*all_cases.per_label, all_cases.overall), strict=True
        )
    ]
    lines[-1]["convention"] = " ".join([summary.convention, *notes, *all_cases.notes])
    text = io.StringIO()
    writer = csv.DictWriter(text, list(lines[-1]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out, text.getvalue())
        content = {**summary.to_dict(), "all_cases": all_cases.to_dict(), "notes": notes, "runs": members}
        atomic_write_text(out.with_suffix(".json"), to_json(content, indent=1) + "\n")
    except OSError as error:
        raise ConfigError(f"out={out}: cannot be written: {error.strerror or error}") from error
    return Folds(summary, all_cases, notes, out)


def _data_of(run: RunDirectory) -> dict[str, Any]:
    """The section ``data`` of a run that is a fold."""
    data: dict[str, Any] = read_config(run)["data"]
    is_fold = data["type"] == "volumes" and isinstance(data.get("folds"), int) and isinstance(data.get("fold"), int)
    if not is_fold or data.get("val") or data.get("test"):
        raise ConfigError(
            f"{run.path}: no fold of a cross-validation; that is a run with data.type=volumes, data.folds and data.fold"
        )
    return data


def _validation_of(run: RunDirectory) -> Summary:
    path = run.evaluation / "val_summary.json"
    if not path.is_file():
        raise UserError(f"{path}: is missing; write it with: python tools/evaluate.py {run.path} split=val")
    return read_summary(path)


def _cases_of(runs: Mapping[int, RunDirectory], summaries: Sequence[Summary]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each validated case, as `score_case` gave them; `UserError` for a file that is damaged.

    No case may have been validated on twice: then the files have changed between the runs.
    """
    cases: dict[str, list[dict[str, Any]]] = {}
    owner: dict[str, int] = {}
    for (fold, run), summary in zip(runs.items(), summaries, strict=True):
        path = run.evaluation / "val_cases.csv"
        try:
            with open(path, encoding="utf-8", newline="") as file:
                rows = [{key: _value(key, text) for key, text in row.items()} for row in csv.DictReader(file)]
            names = [str(row.pop("case")) for row in rows]
            if len(set(names)) != summary.cases:
                raise ValueError(f"it has {how_many(len(set(names)), 'case')}, val_summary.json {summary.cases}")
            for row in rows:
                read = {key: row[key] for key in ("label", "status", "tolerance_mm", *METRICS, *LESIONS)}
                counts = [read[key] for key in LESIONS if read["status"] != "absent"]
                if None in (read["label"], read["status"], read["tolerance_mm"], *counts) or read["label"] < 1:
                    raise ValueError("a line is not complete")
        except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
            raise UserError(f"{path}: cannot be read ({reason_of(error)}); evaluate the run again") from error
        for name, row in zip(names, rows, strict=True):
            first = owner.setdefault(name, fold)
            if first != fold:
                raise DataError(
                    f"{run.path}: case {name} was validated on in fold {fold} and in fold {first} "
                    f"({runs[first].path}): the data set has changed between the runs; train the folds anew"
                )
            cases.setdefault(name, []).append(row)
    return cases


def _value(column: str, text: str) -> Any:
    """A cell of the table of cases; an empty one is undefined."""
    if column in ("case", "name", "status"):
        return text
    number = float(text) if text else None
    return int(text) if number is not None and (column == "label" or column.startswith("lesions_")) else number
