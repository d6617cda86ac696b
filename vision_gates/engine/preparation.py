"""Everything that can go wrong because of a configuration or its data, tried before anything is written."""

import copy
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from vision_gates.config import RunConfig, load_config
from vision_gates.datasets.base import DataSplits, ImageDataConfig, load_splits
from vision_gates.datasets.preflight import Statistics, preflight
from vision_gates.datasets.volumes import Config as VolumeConfig
from vision_gates.datasets.volumes import VolumeSplits
from vision_gates.engine.building import RunInfo, build_info, build_loader, build_loss, build_model
from vision_gates.engine.checkpoint import MANIFEST
from vision_gates.engine.data import Loader, derive_seed
from vision_gates.engine.progress import Display
from vision_gates.engine.run_directory import RunDirectory
from vision_gates.engine.volume_data import VolumeInfo
from vision_gates.engine.volume_preparation import batch_augmentation, check_volumes, plan_volumes, prepared_cases
from vision_gates.errors import ConfigError, UserError
from vision_gates.volumes.batch_augmentation import BatchAugmentation

__all__ = ["Parts", "check_run_directory", "is_finished", "prepare"]

# What a resumed run may change: it does not touch the result.
_MAY_DIFFER = (
    *("trainer.resume", "trainer.run_dir", "trainer.log_every", "trainer.checkpoint_", "trainer.nan"),
    *("trainer.parallel", "data.workers", "data.batch_size"),  # the trainer sees to it that updates stay the same
)


@dataclass
class Parts:
    """What a trainer works with."""

    info: RunInfo
    model: nn.Module
    train: Loader
    val: Loader
    test: Loader | None
    augment: BatchAugmentation | None = None


def check_run_directory(run: RunDirectory, config: RunConfig) -> bool:
    """Whether there is a run to resume.

    Raises:
        ConfigError: The directory is used and the run is not to be resumed, or was started with another configuration.
    """
    if not run.is_used():
        return False
    if not run.path.is_dir():
        raise ConfigError(f"trainer.run_dir={run.path}: is a file; choose another trainer.run_dir")
    if not config.trainer.resume:
        raise ConfigError(
            f"trainer.run_dir={run.path}: holds files already; set trainer.resume=true to go on with that run, or "
            "another trainer.run_dir"
        )
    if not run.config.exists():
        if run.checkpoints.exists():
            raise ConfigError(f"{run.config}: is missing, so the run cannot be resumed; choose another trainer.run_dir")
        return False
    before = dict(_flatten(load_config(run.config).model_dump(mode="json")))
    now = dict(_flatten(config.model_dump(mode="json")))
    changed = [
        f"{key} was {before.get(key)!r}, is {now.get(key)!r}"
        for key in (before | now)
        if before.get(key) != now.get(key) and not key.startswith(_MAY_DIFFER)
    ]
    if changed:
        raise ConfigError(
            f"trainer.resume=true: {run.path} was started with another configuration: {'; '.join(changed)}; set them "
            "back or choose another trainer.run_dir"
        )
    return True


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def is_finished(run: RunDirectory) -> str | None:
    """The split that a finished run was evaluated on; None if there is still something to do."""
    try:
        finished = json.loads((run.checkpoint("last") / MANIFEST).read_bytes()).get("finished")
        info = RunInfo.from_dict(json.loads(run.info.read_bytes()))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return None
    split = "test" if "test" in info.images else "val"
    done = finished and (run.evaluation / f"{split}.json").exists() and run.report.exists()
    return split if done else None


def prepare(config: RunConfig, accelerator: Accelerator, display: Display) -> Parts:
    """Load and check the data, build the network, try it on a few training images.

    Raises:
        UserError: Whatever is wrong with the configuration or the data, in one line.
    """
    splits = load_splits(config.data)
    volumes = None
    if isinstance(splits, VolumeSplits):
        statistics, volumes = _prepare_volumes(splits, config, accelerator, display)
    else:
        statistics = _preflight(splits, config, accelerator, display)
    info = build_info(config, splits, statistics, volumes)
    share = dict(rank=accelerator.process_index, world=accelerator.num_processes)
    pin = accelerator.device.type == "cuda"
    train = build_loader(config, splits.train, info, train=True, pin_memory=pin, **share)
    val = build_loader(config, splits.val, info, train=False, pin_memory=pin, **share)
    test = None
    if splits.test is not None:
        test = build_loader(config, splits.test, info, train=False, pin_memory=pin, **share)
    torch.manual_seed(derive_seed(config.seed, "weights"))
    model = build_model(config, info)
    augment = None if volumes is None or not config.augment.batch else batch_augmentation(config, volumes)
    _try_model(config, info, model, train, augment, accelerator)
    _summarise(config, splits, info, model, train, accelerator, display)
    for warning in statistics.warnings:
        display.say(f"warning: {warning}")
    return Parts(info, model, train, val, test, augment)


def _preflight(splits: DataSplits, config: RunConfig, accelerator: Accelerator, display: Display) -> Statistics:
    """Preflight by the main process for all of them."""
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            with display.counting("checking images") as progress:
                assert isinstance(config.data, ImageDataConfig)
                outcome = [preflight(splits, config.data, progress=progress)]
        except UserError as error:
            outcome = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    statistics: Statistics = outcome[0]
    return statistics


def _prepare_volumes(
    splits: VolumeSplits, config: RunConfig, accelerator: Accelerator, display: Display
) -> tuple[Statistics, VolumeInfo]:
    """The preflight of volumes, the plan, and every case prepared, by the main process for all of them."""
    assert isinstance(config.data, VolumeConfig)
    outcome: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            with display.counting("checking volumes") as progress:
                statistics, report = check_volumes(splits, config.data, progress=progress)
            display.show(report.table())
            with display.counting("measuring volumes") as progress:
                info = plan_volumes(splits, config.data, seed=config.seed, progress=progress)
            for name, split in splits.items():
                with display.counting(f"preparing {name} volumes") as progress:
                    prepared_cases(split, config.data, info, progress=progress)
            outcome = [(statistics, info)]
        except UserError as error:
            outcome = [error]
    if accelerator.num_processes > 1:
        broadcast_object_list(outcome)
    if isinstance(outcome[0], UserError):
        raise outcome[0]
    result: tuple[Statistics, VolumeInfo] = outcome[0]
    return result


def describe_input(config: RunConfig, info: RunInfo) -> str:
    """What the network sees: ``96 x 96``, ``64 x 64 x 32 voxels of 1 x 1 x 2 mm``."""
    if info.volumes is None:
        assert isinstance(config.data, ImageDataConfig)
        return " x ".join(map(str, config.data.image_size))
    return info.volumes.describe()


def _try_model(
    config: RunConfig,
    info: RunInfo,
    model: nn.Module,
    train: Loader,
    augment: BatchAugmentation | None,
    accelerator: Accelerator,
) -> None:
    """A forward pass and a loss on up to 4 training images, so that a misfit shows before training."""
    samples: list[dict[str, Any]] = []
    for index in range(min(4, len(train.dataset))):
        sample = train.dataset[0, index]
        if isinstance(sample, UserError):
            raise sample
        samples.append(sample)
    image = torch.stack([sample["image"] for sample in samples]).to(accelerator.device)
    target = torch.stack([sample["target"] for sample in samples]).to(accelerator.device)
    if augment is not None:
        image, target = augment(image, target, seed=0)
    model.to(accelerator.device).eval()  # eval: batch statistics stay as they are
    expected = (len(image), len(info.class_names), *target.shape[1:])
    shares = config.task.deep_supervision_weights if config.task.type == "segmentation" else None
    count = 1
    try:
        with torch.no_grad(), accelerator.autocast():
            logits = model(image)
            if shares is not None:
                outputs = copy.deepcopy(model).train()(image)  # a copy: batch statistics stay as they are
                count = 1 if isinstance(outputs, torch.Tensor) else len(outputs)
        if tuple(logits.shape) == expected:
            build_loss(config, info).to(accelerator.device)(logits.float(), target)
    except torch.OutOfMemoryError:
        raise  # no fault of the model: ``machine_errors`` says what to lower
    except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as error:
        raise ConfigError(
            f"model.name={config.model.name}: fails on images of {describe_input(config, info)} with "
            f"{info.in_chans} channels: {' '.join(str(error).split())}"
        ) from error
    if tuple(logits.shape) != expected:
        raise ConfigError(
            f"model.name={config.model.name}: gives {tuple(logits.shape)} where {expected} is needed for task.type="
            f"{config.task.type}"
        )
    if shares is not None and count != len(shares):
        raise ConfigError(
            f"task.deep_supervision_weights: {len(shares)} numbers for a network with {count} "
            f"output{'s' if count > 1 else ''} in training; give one each, or null"
        )
    model.train()


def _summarise(
    config: RunConfig,
    splits: DataSplits,
    info: RunInfo,
    model: nn.Module,
    train: Loader,
    accelerator: Accelerator,
    display: Display,
) -> None:
    """What is about to be trained, in a few lines."""
    images = ", ".join(f"{count:,} {split}" for split, count in info.images.items())
    names = ", ".join(info.class_names[:8]) + (" ..." if len(info.class_names) > 8 else "")
    device = accelerator.device
    hardware = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({torch.get_num_threads()} threads)"
    )
    many = f"{accelerator.num_processes} x " if accelerator.num_processes > 1 else ""
    parameters = sum(p.numel() for p in model.parameters())
    channels = f"{info.in_chans} channel{'s' if info.in_chans > 1 else ''}"
    noun = "images" if info.volumes is None else "cases"
    display.say(f"data     {config.data.type}: {images} {noun}, {describe_input(config, info)}, {channels}")
    display.say(f"classes  {len(info.class_names)}: {names}")
    display.say(f"model    {config.model.name}, {config.task.type}, {parameters / 1e6:.2f} M parameters")
    display.say(f"device   {many}{hardware}, precision {config.trainer.precision}")
    display.say(
        f"run      {config.trainer.run_dir}: {config.schedule.epochs} epochs of {len(train)} batches of "
        f"{train.batches.batch_size} images{f' on each of {accelerator.num_processes} processes' if many else ''}"
    )
