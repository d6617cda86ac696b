"""MRI and CT volumes with voxel labels, for segmentation by slices or by patches.

Folders in the layout of nnU-Net v2 or of the Medical Segmentation Decathlon (both with a ``dataset.json``), or plain
``images/`` and ``labels/`` with equal names; files in NIfTI, NRRD, MetaImage, or a folder of DICOM slices a case. How
intensities and spacing are treated is decided from the training cases (`vision_gates.volumes.preprocessing`).

Splits: with ``folds``, fold number ``fold`` is validated on and the others are trained on (``fold: all`` trains on all
of them); ``test_fraction`` of the patients are set aside before. ``val`` and ``test`` name cases or patients instead.
All cases of a patient stay in one part: ``groups`` says who a case belongs to.
"""

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from vision_gates.datasets.base import DataConfig, DataSplits, Sample, Split, few, resolve_root
from vision_gates.datasets.volumes.folds import check_leakage, hold_out, k_folds, named_split
from vision_gates.datasets.volumes.layouts import Case, Layout, find_layout
from vision_gates.errors import ConfigError, DataError
from vision_gates.volumes.reading import Volume, read_labels, read_volume

__all__ = ["CaseSplit", "Config", "VolumeSplits", "load"]


class Config(DataConfig):
    """Options of volumes; axes are those of RAS+: x to the patient's right, y to the front, z to the head."""

    augmented_by: ClassVar[Literal["albumentations", "monai"]] = "monai"

    type: Literal["volumes"] = "volumes"
    root: str = Field(description="folder of the data set")
    layout: Literal["auto", "nnunet", "msd", "pairs"] = Field("auto", description="how files are found; see the module")
    images: str = Field("images", description="for pairs: folder of the images")
    labels: str = Field("labels", description="for pairs: folder of the labels")
    class_names: tuple[str, ...] | None = Field(None, description="for pairs: names by label value, background first")
    groups: str | None = Field(
        "auto", description="whose case it is: a regular expression with one group, auto (strips _frame01, _t2, ...)"
    )
    folds: int | None = Field(5, ge=2, description="folds of a cross-validation; null: val_fraction or val decide")
    fold: Annotated[int, Field(ge=0)] | Literal["all"] = Field(
        0, description="which of the folds is validated on; all: train on every case, and validate on the same"
    )
    val_fraction: float = Field(0.2, ge=0, lt=1, description="share of the patients for validation, without folds")
    test_fraction: float = Field(0.0, ge=0, lt=1, description="share of the patients set aside for the test")
    val: tuple[str, ...] = Field((), description="names of validation cases or patients; then folds is not used")
    test: tuple[str, ...] = Field((), description="names of test cases or patients")
    split_seed: int = Field(0, ge=0, description="seed of folds and fractions")
    mode: Literal["2d", "3d"] = Field("3d", description="2d: slice by slice along the coarsest axis; 3d: patches")
    neighbours: int = Field(0, ge=0, description="2d: slices on each side as further channels (2.5-D)")
    patch_size: tuple[int, ...] | Literal["auto"] = Field("auto", description="voxels the network sees: 2 or 3 numbers")
    spacing: tuple[float, float, float] | Literal["auto", "keep"] = Field(
        "auto", description="millimetres between voxels the network sees; keep: as in the files"
    )
    normalize: Literal["auto", "ct", "zscore"] = Field(
        "auto", description="ct: clipped to percentiles of the training set; zscore: each case by itself"
    )
    crop: bool | Literal["auto"] = Field("auto", description="cut empty (zero) borders off")
    samples: int = Field(250, ge=1, description="patches or slices that are an epoch")
    foreground: float = Field(0.5, ge=0, le=1, description="share of the samples centred on a labelled voxel")
    overlap: float = Field(0.5, ge=0, lt=1, description="of neighbouring windows in validation and segment")
    mirror: bool = Field(False, description="average the predictions of mirror images in validation and segment")
    tolerance_mm: float = Field(
        2.0, ge=0, allow_inf_nan=False, description="surfaces this near count as equal in the surface Dice (NSD)"
    )
    cache: str | None = Field(None, description="folder of prepared volumes; null: the user's cache folder")

    @field_validator("spacing")
    @classmethod
    def _positive(cls, value: Any) -> Any:
        if not isinstance(value, str) and min(value) <= 0:
            raise ValueError("millimetres between voxels must be positive")
        return value

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        dims = 2 if self.mode == "2d" else 3
        if self.patch_size != "auto" and (len(self.patch_size) != dims or min(self.patch_size) < 1):
            raise ValueError(f"patch_size must be {dims} positive numbers in mode {self.mode}, not {self.patch_size}")
        if self.neighbours and self.mode == "3d":
            raise ValueError("neighbours are for mode 2d")
        if self.fold == "all" and (self.val or self.folds is None):
            raise ValueError("fold: all goes with folds, and without val")
        if self.folds is not None and self.fold != "all" and self.fold >= self.folds:
            raise ValueError(f"fold {self.fold} of {self.folds} folds: they are 0 to {self.folds - 1}")
        return self


class CaseSplit(Split):
    """The cases of one part, read as they are on the disk."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases
        self.names = [case.name for case in cases]

    def read_case(self, index: int) -> tuple[list[Volume], Volume]:
        """The channels of a case and its labels."""
        case = self.cases[index]
        if case.labels is None:
            raise DataError(f"{case.name}: has no label file")
        return [read_volume(path) for path in case.images], read_labels(case.labels)

    def read(self, index: int) -> Sample:
        """(I, J, K, C) float32 intensities and (I, J, K) labels, unprepared."""
        images, labels = self.read_case(index)
        image: NDArray[Any] = np.stack([volume.array for volume in images], axis=-1)
        return Sample(image, labels.array.astype(np.int64), self.names[index])


@dataclass(frozen=True)
class VolumeSplits(DataSplits):
    """`DataSplits` whose parts are `CaseSplit`, with the layout that they come from; ``in_chans`` counts modalities."""

    layout: Layout | None = None


def load(config: Config) -> VolumeSplits:
    """Finds the cases and deals them to the parts; `DataError` for what is missing, or a patient in two parts."""
    layout = find_layout(
        resolve_root(config.root),
        kind=config.layout,
        images=config.images,
        labels=config.labels,
        groups=config.groups,
    )
    names = layout.class_names or config.class_names
    if not names:
        raise ConfigError(
            "data.class_names: a layout without dataset.json does not say what its labels are; "
            "give their names by label value, such as [background, liver]"
        )
    if layout.ignore_index is not None and config.ignore_index != layout.ignore_index:
        raise ConfigError(
            f"data.ignore_index={config.ignore_index}: in dataset.json label {layout.ignore_index} is not scored; "
            f"set data.ignore_index={layout.ignore_index}"
        )
    layout = replace(layout, class_names=tuple(names), ignore_index=config.ignore_index)
    cases = list(layout.cases)
    if config.val or config.test:
        train, val, test = named_split(cases, val=config.val, test=config.test)
    else:
        fraction = 0.0 if config.folds else config.val_fraction
        train, val, test = hold_out(
            cases, val_fraction=fraction, test_fraction=config.test_fraction, seed=config.split_seed
        )
        if config.fold == "all":
            val = train = sorted([*train, *val])
        elif config.folds:
            rest = sorted([*train, *val])
            fold = k_folds([cases[i] for i in rest], folds=config.folds, seed=config.split_seed)[config.fold]
            val = [rest[i] for i in fold]
            train = [i for i in rest if i not in set(val)]
    parts = {"train": train, "val": val, "test": test}
    check_leakage(cases, {name: part for name, part in parts.items() if config.fold != "all" or name != "val"})
    if not train or not val:
        part = "train" if not train else "validate"
        raise DataError(
            f"{layout.root}: of {len(cases)} cases ({few([c.name for c in cases])}) none is left to {part} on"
        )
    splits = [CaseSplit([cases[i] for i in indices]) for indices in parts.values()]
    return VolumeSplits(
        task="segmentation",
        class_names=tuple(names),
        in_chans=len(layout.channel_names),
        train=splits[0],
        val=splits[1],
        test=splits[2] if test else None,
        layout=layout,
    )
