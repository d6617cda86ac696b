"""What the files of a run hold, as its readers count on it; `read_json` checks it, and names a file that is damaged."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ConfigDict, TypeAdapter
from typing_extensions import NotRequired, TypedDict  # typing's, before Python 3.12, is not enough for pydantic

from vision_gates.engine.run_directory import RunDirectory, Seconds, read_json, reason_of
from vision_gates.engine.volume_data import VolumeInfo
from vision_gates.errors import UserError

__all__ = [
    "CLASS_COLUMNS",
    "COPY_REMEDY",
    "Environment",
    "Evaluation",
    "Learnt",
    "check_row",
    "read_config",
    "read_environment",
    "read_evaluation",
    "read_learnt",
]

Number = int | float | None
"""None: undefined."""

CLASS_COLUMNS = {
    "segmentation": ("dice", "iou", "dice_pooled", "n", "missed", "false_alarms"),
    "classification": ("recall", "precision", "f1", "auc", "n"),
}
"""Columns of the per-class table of a task."""

COPY_REMEDY = "put a copy of it there, or train anew"
"""For a file that only its run could write."""

_OPEN = ConfigDict(extra="allow")  # a later version may write more


class Evaluation(TypedDict):
    """evaluation/SPLIT.json"""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    split: str
    task: Literal["classification", "segmentation"]
    images: int
    noun: NotRequired[str]
    class_names: list[str]
    metrics: dict[str, Number]
    loss: Number
    per_class: list[dict[str, Any]]
    confusion: list[list[int]] | None
    convention: str
    notes: list[str]
    seconds: Seconds


class Learnt(TypedDict):
    """run.json, as far as the report shows it; `load_run` needs all of it."""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    class_names: list[str]
    in_chans: int
    images: NotRequired[dict[str, int]]
    volumes: NotRequired[VolumeInfo | None]


class Environment(TypedDict, total=False):
    """environment.json"""

    __pydantic_config__ = _OPEN  # type: ignore[misc]

    vision_gates: str
    python: str
    versions: dict[str, str]
    device: str
    threads: int
    cpu: str
    processes: int
    started: str
    commit: str | None
    command: list[str]


def read_evaluation(path: Path) -> Evaluation:
    """The numbers of a split.

    Raises:
        UserError: The file is damaged, or does not fit together.
    """
    split = path.stem
    remedy = f"delete it, or write it anew with: python tools/evaluate.py {path.parent.parent} split={split}"
    return read_json(path, Evaluation, remedy=remedy, check=_fits)


def _fits(evaluation: Evaluation) -> None:
    rows, number, confusion = evaluation["per_class"], len(evaluation["class_names"]), evaluation["confusion"]
    if not number or len(rows) != number:
        raise ValueError(f"per_class has {len(rows)} rows for {number} class_names")
    for row in rows:
        check_row(row, whole=("n",), numbers=CLASS_COLUMNS[evaluation["task"]])
    if evaluation["task"] == "classification" and [len(row) for row in confusion or ()] != number * [number]:
        raise ValueError(f"confusion is not of {number} x {number} classes")


def check_row(row: Mapping[str, Any], *, whole: Sequence[str], numbers: Sequence[str]) -> None:
    """Raise ValueError if a line of a table has no name, or no (whole) number in one of these columns."""
    if not isinstance(row.get("name"), str):
        raise ValueError("a row has no name")
    for key in numbers:
        if key not in row or not isinstance(row[key], int | float | None):
            raise ValueError(f"{row['name']} has no number as {key}")
    for key in whole:
        if not isinstance(row.get(key), int):
            raise ValueError(f"{row['name']} has no whole number as {key}")


def read_learnt(run: RunDirectory) -> Learnt | None:
    """What the run learnt from its data; None: nothing yet.

    Raises:
        UserError: The file is damaged.
    """
    return read_json(run.info, Learnt, remedy=COPY_REMEDY) if run.info.is_file() else None


def read_environment(run: RunDirectory) -> Environment:
    """What the run depended on; empty if there is no such file.

    Raises:
        UserError: The file is damaged.
    """
    remedy = "delete it: only the report shows it"
    return read_json(run.environment, Environment, remedy=remedy) if run.environment.is_file() else {}


class _Task(TypedDict):
    type: Literal["classification", "segmentation"]


class _Data(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: str


class _Decoder(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    type: str


class _Model(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    name: str
    decoder: NotRequired[_Decoder | None]


class _Schedule(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    epochs: int
    minutes: NotRequired[float | None]


class _Optim(TypedDict, total=False):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    name: str
    lr: float


class _Trainer(TypedDict, total=False):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    monitor: str | None


class _Config(TypedDict):
    __pydantic_config__ = _OPEN  # type: ignore[misc]
    task: _Task
    data: _Data
    model: _Model
    schedule: _Schedule
    optim: NotRequired[_Optim | None]
    trainer: NotRequired[_Trainer | None]
    seed: NotRequired[int]


def read_config(run: RunDirectory) -> dict[str, Any]:
    """config.yaml as it stands, not through `load_config`: the data and the network need not be on this machine.

    Raises:
        UserError: It is missing or damaged.
    """
    if not run.config.is_file():
        raise UserError(f"{run.path}: not a run directory (it has no config.yaml)")
    try:
        content = yaml.safe_load(run.config.read_text(encoding="utf-8"))
        return dict(TypeAdapter(_Config).validate_python(content))
    except Exception as error:  # of YAML's constructors, too, as of a date without such a day
        raise UserError(f"{run.config}: damaged ({reason_of(error)}); {COPY_REMEDY}") from error
