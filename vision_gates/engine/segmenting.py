"""What ``vision-gates segment`` does: label volumes from files with a trained run, on the grids of the files.

Cases are done one after the other; each result is written at once and whole, and noted in ``segment.jsonl`` after that
(segment_journal.py), so that the same command goes on where it was stopped.
"""

import re
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vision_gates.datasets.base import few, how_many
from vision_gates.engine.building import RunInfo, load_run
from vision_gates.engine.evaluation import load_best
from vision_gates.engine.run_directory import RunDirectory, atomic_write_bytes, atomic_write_text
from vision_gates.engine.segment_journal import Journal
from vision_gates.engine.state import machine_errors
from vision_gates.engine.volume_data import VolumePredictor
from vision_gates.errors import ConfigError, DataError, UserError
from vision_gates.export.runtime import Session, VolumeLabeller
from vision_gates.volumes.dicom import needs
from vision_gates.volumes.dicom_seg import write_dicom_seg
from vision_gates.volumes.preprocessing import prepare, restore_labels
from vision_gates.volumes.reading import VOLUME_SUFFIXES, find_series, read_volume, stem
from vision_gates.volumes.writing import write_labels

__all__ = ["SegmentOptions", "find_inputs", "segment"]

_DICOM = ".dcm"  # a DICOM segmentation object
_CHANNEL = re.compile(r"^(.+)_(\d{4})$")  # nnU-Net's CASE_0000: the first channel


class SegmentOptions(BaseModel):
    """Options of ``segment``; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mirror: bool | None = Field(
        default=None,
        description="average the mirror images, too: 4 to 8 times the time, a little better; as in the run by default",
    )
    overlap: float | None = Field(
        default=None, ge=0, lt=1, description="of neighbouring windows; as in the run by default"
    )
    batch_size: int | None = Field(default=None, ge=1, description="windows at a time; as in the run by default")
    precision: str | None = Field(
        default=None, pattern="^(no|bf16|fp16)$", description="autocast; as in the run by default"
    )
    device: str = Field(default="auto", pattern="^(auto|cpu|cuda(:\\d+)?)$", description="where the network runs")
    format: str = Field(default=".nii.gz", description="of masks in a folder")
    series: str | None = Field(default=None, description="SeriesInstanceUID, where a DICOM folder holds several")
    overwrite: bool = Field(default=False, description="replace results that are there")
    report: bool = Field(default=True, description="write a page with pictures")


@dataclass(frozen=True)
class _Case:
    name: str
    images: tuple[Path, ...]
    out: Path


def segment(
    source: str | Path,
    out: str | Path,
    run_dir: str | Path,
    options: SegmentOptions | None = None,
    *,
    console: Console | None = None,
) -> list[Path]:
    """Label one case or a folder of them.

    Args:
        source: a volume file, a DICOM folder, or a folder of such (``CASE_0000.nii.gz`` is a channel of CASE).
        out: the mask to write, or for several cases, or where it has no suffix of a volume, a folder for them.
        run_dir: run directory of a network trained on volumes, whose best weights are used; or OUT.onnx, which was
            exported from one: then ONNX Runtime computes, and the report shows no gates.
        options: see `SegmentOptions`.
        console: where progress is shown; None: standard output.

    Returns:
        The masks, those that were there before included. Beside them are ``volumes.csv`` (ml a label and case),
        ``segment.jsonl`` and, with ``report``, ``report.html``; beside a single mask they begin with its name.

    Raises:
        UserError: an input, the run or an option that cannot be used; results of the cases before it stay.
    """
    options = options or SegmentOptions()
    console = console or Console(highlight=False, soft_wrap=True)
    checkpoint = _Exported(run_dir, options) if str(run_dir).lower().endswith(".onnx") else _Run(run_dir, options)
    info = checkpoint.info
    if info.segments is None:
        raise ConfigError(f"{run_dir}: was trained on images; a run trained on volumes (data.type=volumes) is needed")
    cases, folder, prefix = find_inputs(source, out, options, channels=len(info.segments.channel_names))
    run = Path(run_dir).resolve()
    about = {
        "run": str(run),
        "options": options.model_dump(mode="json", include={"mirror", "overlap", "precision", "format", "series"}),
    }
    renew = [case.name for case in cases] if options.overwrite else None
    journal = Journal(folder, prefix, about=about, class_names=info.class_names, renew=renew)
    for case in cases:
        if case.out.exists() and not journal.begun(case.name):
            raise UserError(f"{case.out}: exists and is no result of this run; choose another OUT, or overwrite=true")
        if case.out.name.lower().endswith(_DICOM):
            if any(path.is_file() for path in case.images):
                raise ConfigError(
                    f"{case.out}: a DICOM segmentation needs a DICOM series as input, not {case.images[0]}"
                )
            needs("highdicom")
    predictor, origin = checkpoint.load()
    console.print(f"{how_many(len(cases), 'case')}, {checkpoint.model} from {origin}", markup=False)
    for number, case in enumerate(cases, start=1):
        if journal.done(case.name, case.out):
            console.print(f"{number}/{len(cases)} {case.name}: done before", markup=False)
            continue
        title = f"{number}/{len(cases)} {case.name}"
        begin = partial(journal.begin, case.name)
        with machine_errors(case.out, lower="use batch_size=1, precision=bf16 or device=cpu, or a larger machine"):
            row, section = _segment_case(case, predictor, checkpoint, options, console, title, begin)
            if section is not None:
                _section_file(journal, case).parent.mkdir(parents=True, exist_ok=True)
                atomic_write_text(_section_file(journal, case), section)
            journal.add(case.name, row)
    console.print(f"volumes: {journal.finish()}", markup=False)
    if options.report:
        console.print(f"report: {_write_report(journal, cases, run.name)}", markup=False)
    return [case.out for case in cases]


def _section_file(journal: Journal, case: _Case) -> Path:
    """Where a case's part of the report is kept."""
    return journal.path("report_parts") / f"{case.name}.html"


def _write_report(journal: Journal, cases: Sequence[_Case], run: str) -> Path:
    """One page of all cases that have pictures."""
    from vision_gates.engine.segment_report import page

    sections = [file for file in (_section_file(journal, case) for case in cases) if file.is_file()]
    path = journal.path("report.html")
    atomic_write_bytes(path, (part.encode() for part in page(sections, title=f"Segmentation by {run}")))
    return path


def find_inputs(
    source: str | Path, out: str | Path, options: SegmentOptions, *, channels: int
) -> tuple[list[_Case], Path, str]:
    """The cases of a path and where their results go: also the folder of the files beside them, and their prefix.

    Raises:
        DataError: nothing there, or channels missing; ConfigError: a place that results cannot go to.
    """
    source, out = Path(source).expanduser(), Path(out).expanduser()
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    single = source.is_file() or (source.is_dir() and not _volumes_in(source) and bool(find_series(source)))
    if single and channels > 1:
        raise DataError(
            f"{source}: the network has {channels} channels; give a folder with CASE_0000, CASE_0001, ... of each case"
        )
    if single:
        name = _CHANNEL.sub(r"\1", stem(source) if source.is_file() else source.resolve().name)
        if out.name.lower().endswith((*VOLUME_SUFFIXES, _DICOM)):
            return [_Case(name, (source,), out)], out.parent, f"{stem(out)}_"
        return [_Case(name, (source,), out / f"{name}{options.format}")], out, ""
    if out.name.lower().endswith((*VOLUME_SUFFIXES, _DICOM)) or out.is_file():
        raise ConfigError(f"OUT={out}: {source} is a folder of cases; give a folder")
    groups: dict[str, dict[int, Path]] = {}
    for path in [*_volumes_in(source), *_dicom_folders(source)]:
        match = _CHANNEL.match(stem(path) if path.is_file() else path.name)
        name, channel = (match[1], int(match[2])) if match else (stem(path) if path.is_file() else path.name, 0)
        if channel in groups.setdefault(name, {}):
            raise DataError(f"{path}: {groups[name][channel].name} is the same channel of the same case")
        groups[name][channel] = path
    if not groups:
        raise DataError(f"{source}: no volumes in it; files that end in {', '.join(VOLUME_SUFFIXES)}, or DICOM folders")
    wrong = [name for name, files in groups.items() if sorted(files) != list(range(channels))]
    if wrong:
        raise DataError(
            f"{source}: the network has {how_many(channels, 'channel')}, {few(wrong)} "
            f"{'has' if len(wrong) == 1 else 'have'} others: {sorted(p.name for p in groups[wrong[0]].values())}"
        )
    cases = [
        _Case(name, tuple(files[i] for i in range(channels)), out / f"{name}{options.format}")
        for name, files in sorted(groups.items())
    ]
    return cases, out, ""


def _volumes_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name.lower().endswith(VOLUME_SUFFIXES))


def _dicom_folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".") and find_series(p))


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"device={name}: there is no GPU that PyTorch can use; device=cpu runs on the processor")
    return torch.device(name)


class _Run:
    """The network of a run directory."""

    def __init__(self, path: str | Path, options: SegmentOptions) -> None:
        self._path, self._options = path, options
        self._config, self.info = load_run(path)
        self.model, self.precision = self._config.model.name, self._config.trainer.precision

    def load(self) -> tuple[VolumePredictor, str]:
        """What labels volumes, and where its weights are from."""
        options, volumes = self._options, self.info.segments
        assert volumes is not None
        device = _device(options.device)
        network, weights = load_best(RunDirectory(self._path), self._config, self.info)
        given = {"overlap": options.overlap, "mirror": options.mirror}
        predictor = VolumePredictor(
            network.to(device).eval(),
            volumes.model_copy(update={key: value for key, value in given.items() if value is not None}),
            num_classes=len(self.info.class_names),
            batch_size=options.batch_size or self._config.data.batch_size,
            device=device,
        )
        return predictor.eval(), f"{weights}, {device}"


class _Exported:
    """A network that ``export`` wrote, in the place of a run."""

    def __init__(self, path: str | Path, options: SegmentOptions) -> None:
        if options.precision is not None:
            raise ConfigError(f"precision={options.precision}: an exported network has its own; export it with --fp16")
        self._session, self._options = Session(path, device=options.device), options
        about = self._session.about
        self.model, self.precision = str(about.model.get("name", "a network")), "no"
        self.info = RunInfo(
            class_names=self._session.class_names,
            in_chans=about.in_chans,
            mean=None,
            std=None,
            class_weights=None,
            counts={},
            images={},
            volumes=about.volumes,
        )

    def load(self) -> tuple[VolumePredictor, str]:
        """As of a run."""
        options = self._options
        labeller = self._session.labeller(overlap=options.overlap, mirror=options.mirror, batch_size=options.batch_size)
        return _ExportedPredictor(labeller), f"{self._session.path}, ONNX Runtime"


class _ExportedPredictor(VolumePredictor):
    """ONNX Runtime labels the volume; there is no network whose gates a report could show."""

    def __init__(self, labeller: VolumeLabeller) -> None:
        super().__init__(
            torch.nn.Identity(),
            labeller.info,
            num_classes=labeller.session.num_classes,
            batch_size=labeller.batch_size,
            device=torch.device("cpu"),
        )
        self._labeller = labeller

    def predict(
        self,
        image_CXYZ: torch.Tensor | NDArray[np.float32],
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[Any]:
        """As of a network of PyTorch's; ``autocast`` has no effect."""
        return self._labeller.predict(np.asarray(image_CXYZ), progress=progress)


def _segment_case(
    case: _Case,
    predictor: VolumePredictor,
    checkpoint: "_Run | _Exported",
    options: SegmentOptions,
    console: Console,
    title: str,
    begin: Callable[[], None],
) -> tuple[dict[str, Any], str | None]:
    """Read, predict, ``begin``, write; returns the case's row of the tables and its part of the report."""
    began, info = time.perf_counter(), checkpoint.info
    volumes = [read_volume(path, series=options.series) for path in case.images]
    prepared = prepare(predictor.info.preprocessing, volumes)
    shape = " x ".join(map(str, volumes[0].geometry.shape))
    console.print(f"{title}: {shape} voxels, {predictor.plan(prepared.image.shape).describe()}", markup=False)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(case.name, total=None)
        try:
            labels = predictor.predict(
                prepared.image,
                autocast=lambda: _autocast(options.precision or checkpoint.precision, predictor.device),
                progress=lambda now, total: bar.update(task, completed=now, total=total),
            )
        except UserError as error:
            raise UserError(f"{case.images[0]}: {error}") from error
    on_source = restore_labels(labels, prepared.geometry, prepared.source)
    begin()
    empty = case.out.name.lower().endswith(_DICOM) and not on_source.any()
    if empty:
        console.print(f"{title}: nothing was found, and a DICOM segmentation cannot be empty: none is written")
    elif case.out.name.lower().endswith(_DICOM):
        names, model = info.class_names, checkpoint.model
        write_dicom_seg(case.out, on_source, case.images[0], names=names, model=model, series=options.series)
    else:
        write_labels(case.out, on_source, prepared.source, names=info.class_names)
    counts = np.bincount(on_source.ravel(), minlength=len(info.class_names)).tolist()
    ml = prepared.source.voxel_ml
    seconds = time.perf_counter() - began
    console.print(f"{title}: {case.out}, {seconds:.1f} s", markup=False)
    section = None
    if options.report:
        from vision_gates.engine.segment_report import case_section

        section = case_section(case.name, volumes[0], on_source, prepared, predictor, info)
    row = {
        "images": [str(path) for path in case.images],
        "mask": None if empty else str(case.out),
        "shape": list(prepared.source.shape),
        "spacing": list(prepared.source.spacing),
        "voxels": counts,
        "ml": [count * ml for count in counts],
        "seconds": round(seconds, 2),
    }
    return row, section


def _autocast(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    if precision == "no":
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if precision == "bf16" else torch.float16)
