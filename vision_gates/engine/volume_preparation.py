"""From a data set of volumes to what a run needs: checked geometry, a preprocessing plan, prepared cases on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from vision_gates.config import RunConfig
from vision_gates.datasets.base import Split
from vision_gates.datasets.preflight import Statistics
from vision_gates.datasets.volumes import CaseSplit, Config, VolumeSplits
from vision_gates.datasets.volumes.checking import Report, check_cases
from vision_gates.datasets.volumes.folds import check_leakage
from vision_gates.engine.volume_data import VolumeCases, VolumeInfo, VolumePatches, choose_patch_size
from vision_gates.errors import ConfigError
from vision_gates.volumes.augmentation import build_volume_pipeline
from vision_gates.volumes.batch_augmentation import BatchAugmentation, build_batch_augmentation
from vision_gates.volumes.cache import CachedCase, CaseCache, default_cache
from vision_gates.volumes.preprocessing import fingerprint, plan_preprocessing, prepare

__all__ = ["batch_augmentation", "build_volume_dataset", "check_volumes", "plan_volumes", "prepared_cases"]

Progress = Callable[[int, int], None]
_PATCH_VOXELS = {2: 512 * 512, 3: 96**3}  # at most, of patches chosen here


def check_volumes(
    splits: VolumeSplits, config: Config, *, progress: Progress | None = None
) -> tuple[Statistics, Report]:
    """Read every case's geometry and labels before anything is trained.

    Returns:
        Voxels a class and cases of each split, as other data sets have them; and the table that a user sees.

    Raises:
        DataError: grids that do not fit together, labels that are no class; all faults at once.
    """
    assert splits.layout is not None
    number = {case.name: index for index, case in enumerate(splits.layout.cases)}
    on_all = config.fold == "all"  # then the validation cases are the training cases
    parts = {
        name: [number[case] for case in split.names] for name, split in splits.items() if name != "val" or not on_all
    }
    check_leakage(splits.layout.cases, parts, contents=True)
    report = check_cases(splits.layout, progress=progress, workers=4)
    labels = {case.name: case.labels or {} for case in report.cases}
    counts, images = {}, {}
    for name, split in splits.items():
        found = [labels[case] for case in split.names]
        counts[name] = [sum(voxels.get(label, 0) for voxels in found) for label in range(len(splits.class_names))]
        images[name] = len(split)
    warnings = list(report.warnings)
    if on_all:
        warnings.append("data.fold=all: validated on the training cases; those scores say nothing about other cases")
    missing = [
        f"{class_name}: no voxel in the {name} cases"
        for name in ("train", "val")
        for class_name, count in zip(splits.class_names, counts[name], strict=True)
        if count == 0
    ]
    if missing and not config.allow_missing_classes:
        raise ConfigError(f"{missing[0]}; set data.allow_missing_classes=true to train without, or another data.fold")
    channels = (0.0,) * splits.in_chans  # volumes are normalised case by case; see Preprocessing
    return Statistics(channels, channels, counts, images, warnings + missing), report


def plan_volumes(splits: VolumeSplits, config: Config, *, seed: int, progress: Progress | None = None) -> VolumeInfo:
    """Decide spacing, normalisation and patch size from the training cases alone."""
    assert splits.layout is not None and isinstance(splits.train, CaseSplit)
    facts = []
    for index in range(len(splits.train)):
        images, labels = splits.train.read_case(index)
        facts.append(fingerprint(images, labels, seed=seed))
        if progress is not None:
            progress(index + 1, len(splits.train))
    plan = plan_preprocessing(
        facts,
        channel_names=splits.layout.channel_names,
        spacing=None if config.spacing == "keep" else config.spacing,
        normalize=config.normalize,
        crop=config.crop,
    )
    spacings = np.array([fact.spacing for fact in facts])
    target = spacings if plan.spacing is None else np.asarray(plan.spacing)
    shape = np.median([fact.box if plan.crop else fact.shape for fact in facts] * spacings / target, axis=0)
    spacing = np.median(np.broadcast_to(target, spacings.shape), axis=0)
    # Slices lie across the axis with the largest spacing; of equal ones that to the head.
    axes: tuple[Literal[0, 1, 2], ...] = (0, 1, 2)
    axis = max(axes, key=lambda a: (round(float(spacing[a]), 3), a))
    dims: Literal[2, 3] = 2 if config.mode == "2d" else 3
    patch = config.patch_size
    if patch == "auto":
        sides = np.delete(shape, axis) if dims == 2 else shape
        patch = choose_patch_size(sides.tolist(), voxels=_PATCH_VOXELS[dims])
    return VolumeInfo(
        preprocessing=plan,
        spatial_dims=dims,
        patch_size=patch,
        slice_axis=axis,
        neighbours=config.neighbours,
        channel_names=splits.layout.channel_names,
        overlap=config.overlap,
        mirror=config.mirror,
    )


def prepared_cases(
    split: Split, config: Config, info: VolumeInfo, *, progress: Progress | None = None
) -> list[CachedCase]:
    """The cases of a part as the network sees them, from the cache, made where they are not there yet.

    Raises:
        DataError: a file that cannot be read, or a cache that cannot be written.
    """
    assert isinstance(split, CaseSplit)
    root = default_cache() / "volumes" if config.cache is None else Path(config.cache).expanduser()
    cache = CaseCache(root, info.preprocessing.model_dump_json())
    cases = []
    for index, case in enumerate(split.cases):
        assert case.labels is not None
        files = [*case.images, case.labels]

        def make(index: int = index) -> Any:
            images, labels = split.read_case(index)
            return prepare(info.preprocessing, images, labels)

        cases.append(cache.find(case.name, files, make))
        if progress is not None:
            progress(index + 1, len(split.cases))
    return cases


def batch_augmentation(config: RunConfig, info: VolumeInfo) -> BatchAugmentation:
    """``augment.batch`` for what the network sees."""
    spacing: tuple[float, ...] | None = info.preprocessing.spacing
    if spacing is not None and info.spatial_dims == 2:
        spacing = tuple(mm for axis, mm in enumerate(spacing) if axis != info.slice_axis)
    return build_batch_augmentation(
        config.augment.batch, size=info.patch_size, spacing=spacing, modalities=len(info.channel_names)
    )


def build_volume_dataset(config: RunConfig, split: Split, info: VolumeInfo, *, train: bool) -> Dataset[Any]:
    """Patches of the training cases, or the cases whole."""
    assert isinstance(config.data, Config)
    cases = prepared_cases(split, config.data, info)
    if not train:
        return VolumeCases(cases, split.names)
    return VolumePatches(
        cases,
        split.names,
        info,
        samples=config.data.samples,
        foreground=config.data.foreground,
        pipeline=build_volume_pipeline(config.augment.train),
        wide=batch_augmentation(config, info).sample_size,
        dropout=(config.augment.modality_dropout, config.augment.modality_dropout_epochs),
        seed=config.seed,
    )
