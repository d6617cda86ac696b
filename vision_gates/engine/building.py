"""From a configuration to the parts of a run: data description, network, loss, metrics, loaders.

The trainer and the evaluation build everything here, so that both see the same pixels through the same network.
``run.json`` holds what a run learnt from its data (`RunInfo`); with config.yaml it is all that is needed to rebuild it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import ConfigDict, TypeAdapter
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import load_state_dict as read_state_dict
from torch import Tensor, nn

import vision_gates  # noqa: F401  (registers the vg_* models)
from vision_gates.augmentation import build_pipeline
from vision_gates.config import RunConfig, load_config
from vision_gates.datasets.base import DataSplits, ImageDataConfig, Split
from vision_gates.datasets.preflight import Statistics
from vision_gates.engine.checkpoint import find_weights
from vision_gates.engine.data import EvalBatches, ImageDataset, Loader, TrainBatches
from vision_gates.engine.run_directory import RunDirectory, read_json
from vision_gates.engine.run_files import COPY_REMEDY
from vision_gates.engine.volume_data import VolumeInfo, VolumePredictor
from vision_gates.engine.volume_preparation import build_volume_dataset
from vision_gates.errors import ConfigError, UserError
from vision_gates.losses import ClassificationLoss, DeepSupervisionLoss, SegmentationLoss
from vision_gates.metrics import Metrics, create_metrics
from vision_gates.networks import available_networks, create_network, network_options
from vision_gates.region_losses import RegionTversky, SoftDice, Tversky
from vision_gates.segmenter import create_segmenter
from vision_gates.volumes.preprocessing import ChannelPlan, Preprocessing

__all__ = [
    "RunInfo",
    "build_info",
    "build_loader",
    "build_loss",
    "build_metrics",
    "build_model",
    "labeller",
    "load_run",
]


@dataclass(frozen=True)
class RunInfo:
    """What a run learnt from its data; saved as run.json.

    Attributes:
        class_names: In label order.
        in_chans: Channels of an image.
        mean, std: Per channel, of the image in 0..1, as the network's input is normalised; None: per image.
        class_weights: One a class, or None.
        counts: Split to images (classification) or pixels (segmentation) per class.
        images: Split to number of images.
        volumes: How volumes are looked at; None: the run is on images.
        slices: How volumes are looked at by a run on images that are slices of one, where its data set says so.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    class_names: tuple[str, ...]
    in_chans: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    class_weights: tuple[float, ...] | None
    counts: dict[str, list[int]]
    images: dict[str, int]
    volumes: VolumeInfo | None = None
    slices: VolumeInfo | None = None

    @property
    def segments(self) -> VolumeInfo | None:
        """How a whole volume is labelled; None where the run cannot."""
        return self.volumes or self.slices

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        views = {"volumes": self.volumes, "slices": self.slices}
        plain = {name: None if view is None else view.model_dump(mode="json") for name, view in views.items()}
        return {field.name: getattr(self, field.name) for field in fields(self)} | plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunInfo":
        """The inverse of ``to_dict``, after a trip through JSON; ValueError for values of other kinds."""
        return TypeAdapter(cls).validate_python(values)


def build_info(
    config: RunConfig, splits: DataSplits, statistics: Statistics, volumes: VolumeInfo | None = None
) -> RunInfo:
    """Normalisation and class weights that follow from the training images; of volumes ``volumes`` normalises.

    Raises:
        ConfigError: The data are of another task, or a setting does not fit their channels or classes.
    """
    if splits.task != config.task.type:
        raise ConfigError(f"task.type={config.task.type}: data.type={config.data.type} holds {splits.task} data")
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    if not isinstance(config.data, ImageDataConfig):
        mean = std = None
    elif config.data.normalize == "dataset":
        mean, std = tuple(map(float, statistics.mean)), tuple(map(float, statistics.std))
    elif config.data.normalize == "imagenet":
        if splits.in_chans != 3:
            raise ConfigError(f"data.normalize=imagenet: is for 3 channels, the images have {splits.in_chans}")
        mean, std = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    elif config.data.normalize == "none":
        mean, std = (0.0,) * splits.in_chans, (1.0,) * splits.in_chans
    else:
        mean = std = None
    weights, classes = config.task.class_weights, len(splits.class_names)
    if weights == "balanced":
        counts = statistics.counts["train"]
        present = sum(count > 0 for count in counts)
        weights = tuple(sum(counts) / (present * count) if count else 0.0 for count in counts)
    elif weights is not None and len(weights) != classes:
        raise ConfigError(f"task.class_weights: {len(weights)} numbers for {classes} classes; one a class is needed")
    return RunInfo(
        class_names=tuple(splits.class_names),
        in_chans=splits.in_chans if volumes is None else volumes.in_chans,
        mean=mean,
        std=std,
        class_weights=weights,
        counts={split: [int(c) for c in counts] for split, counts in statistics.counts.items()},
        images={split: int(n) for split, n in statistics.images.items()},
        volumes=volumes,
        slices=_slices(config, splits, mean, std),
    )


def _slices(
    config: RunConfig, splits: DataSplits, mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> VolumeInfo | None:
    """How a run on slices labels their volume, where nothing is done to its images that a volume would not know."""
    view = splits.slices
    if view is None or mean is None or std is None or config.augment.eval:
        return None
    assert isinstance(config.data, ImageDataConfig)
    middle, span = len(mean) // 2, view.high - view.low
    channel = ChannelPlan(
        kind="ct", low=view.low, high=view.high, mean=view.low + span * mean[middle], std=span * std[middle]
    )
    return VolumeInfo(
        preprocessing=Preprocessing(spacing=view.spacing, channels=(channel,)),
        spatial_dims=2,
        patch_size=config.data.image_size,
        neighbours=view.neighbours,
        channel_names=(view.channel,),
        view=view.orientation,
    )


def build_model(config: RunConfig, info: RunInfo | DataSplits) -> nn.Module:
    """The network of a run, on the CPU; random where no weights are asked for, so seed torch before.

    Returns:
        (B, in_chans, H, W) -> (B, classes) logits for classification, (B, classes, H, W) for segmentation; a network
        with deep supervision gives a list of such in training mode, finest level first.

    Raises:
        ConfigError: The network cannot be built with these options or weights.
    """
    model, classes = config.model, len(info.class_names)
    try:
        if config.task.type == "classification":
            network = timm.create_model(
                model.name,
                pretrained=model.pretrained,
                in_chans=info.in_chans,
                num_classes=classes,
                drop_path_rate=model.drop_path_rate or None,  # None: not passed on; some networks do not take it
                **model.options,
            )
        elif model.name in available_networks():
            own_keys: dict[str, Any] = {"pretrained": model.pretrained, "drop_path_rate": model.drop_path_rate}
            if isinstance(info, RunInfo) and info.volumes is not None:
                own_keys["spatial_dims"] = info.volumes.spatial_dims
            known = network_options(model.name)
            taken = {key: own_keys[key] for key in known if key in own_keys and key not in model.options}
            network = create_network(
                model.name, in_channels=info.in_chans, num_classes=classes, **taken, **model.options
            )
        else:
            assert model.decoder is not None, "load_config fills it in"
            network = create_segmenter(
                model.name,
                decoder=model.decoder,
                num_classes=classes,
                in_chans=info.in_chans,
                pretrained=model.pretrained,
                drop_path_rate=model.drop_path_rate,
                **model.options,
            )
    except UserError:
        raise
    except (TypeError, ValueError, RuntimeError, AssertionError, KeyError, OSError) as error:
        options = f" with options {model.options}" if model.options else ""
        raise ConfigError(f"model: {model.name} cannot be built{options}: {' '.join(str(error).split())}") from error
    if model.checkpoint is not None:
        _load_weights(network, model.checkpoint)
    return network


def _load_weights(network: nn.Module, source: str) -> None:
    """Start from the weights of a file or run: of the whole network, or of a segmenter's encoder.

    The classifier may have another number of classes (it then stays as it is); everything else must fit.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        path = find_weights(RunDirectory(path).checkpoints)
    if not path.is_file():
        raise ConfigError(f"model.checkpoint: {source}: no such weights file or run directory")
    try:
        # weights_only: earlier versions of timm would run the code in a pickle.
        weights: dict[str, Tensor] = read_state_dict(str(path), weights_only=True)
        if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError("it holds other things than named tensors")
    except Exception as error:  # whatever the file's reader raises, the file is the cause
        raise ConfigError(f"model.checkpoint: {path}: cannot be read: {' '.join(str(error).split())}") from error
    parts = [part for part in (network, getattr(network, "encoder", None)) if isinstance(part, nn.Module)]
    part = max(parts, key=lambda p: len(p.state_dict().keys() & weights.keys()))
    try:
        weights = _in_present_layout(part, weights)
    except Exception as error:  # of a hook that knows why they do not fit, or did not think of such tensors
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"model.checkpoint: {path}: {reason}") from error
    own = part.state_dict()
    fits = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    # The names of classifier and segmentation head differ between networks; by convention they contain these words.
    wrong = [key for key in own if key not in fits and not any(word in key for word in ("head", "classifier", "fc."))]
    if wrong:
        raise ConfigError(
            f"model.checkpoint: {path}: {len(wrong)} of {len(own)} tensors are missing or of another shape, "
            f"first {wrong[0]}; model.name and model.options must be those of the checkpoint"
        )
    try:
        part.load_state_dict(fits, strict=False)
    except Exception as error:  # sparse, quantised or complex tensors cannot be copied
        raise ConfigError(f"model.checkpoint: {path}: does not fit: {' '.join(str(error).split())[:300]}") from error


def _in_present_layout(network: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What load_state_dict's hooks make of weights in an official or earlier layout, before any are compared."""
    weights = dict(weights)
    for name, module in network.named_modules():
        for hook in module._load_state_dict_pre_hooks.values():
            hook(weights, f"{name}." if name else "", {}, False, [], [], [])
    return weights


def build_loss(config: RunConfig, info: RunInfo) -> nn.Module:
    """The training loss, with class weights as a buffer; move it to the device."""
    weights = None if info.class_weights is None else torch.tensor(info.class_weights)
    if config.task.type == "classification":
        return ClassificationLoss(label_smoothing=config.task.label_smoothing, class_weights=weights)
    task = config.task
    overlap: nn.Module = SoftDice()
    if task.overlap == "tversky":
        overlap = Tversky(alpha=task.tversky_alpha, beta=task.tversky_beta)
    elif task.overlap == "region_tversky":
        overlap = RegionTversky(grid=task.region_grid)
    loss = SegmentationLoss(
        num_classes=len(info.class_names),
        dice_weight=task.dice_weight,
        class_weights=weights,
        ignore_index=config.data.ignore_index,
        overlap=overlap,
        focal_gamma=task.focal_gamma,
    )
    return DeepSupervisionLoss(loss, weights=task.deep_supervision_weights)


def build_metrics(config: RunConfig, info: RunInfo) -> Metrics:
    """Empty metrics of the run's task."""
    return create_metrics(config.task.type, info.class_names, ignore_index=config.data.ignore_index)


def build_loader(
    config: RunConfig,
    split: Split,
    info: RunInfo,
    *,
    train: bool,
    rank: int = 0,
    world: int = 1,
    pin_memory: bool = False,
    check: Callable[[], None] | None = None,
) -> Loader:
    """Batches of a split: shuffled and augmented for training, all images in order with ``augment.eval`` otherwise.

    Args:
        config: The run's configuration.
        split: Where samples come from.
        info: Normalisation.
        train: Which of the two.
        rank, world: This process and how many share the split.
        pin_memory: For copies to a GPU.
        check: Called before each batch; may raise to stop.
    """
    dataset: Any
    if info.volumes is not None:
        dataset = build_volume_dataset(config, split, info.volumes, train=train)
    else:
        assert isinstance(config.data, ImageDataConfig)
        dataset = ImageDataset(
            split,
            pipeline=build_pipeline(
                config.augment.train if train else config.augment.eval, key=f"augment.{'train' if train else 'eval'}"
            ),
            image_size=config.data.image_size,
            mean=info.mean,
            std=info.std,
            seed=config.seed,
            purpose="augment" if train else "evaluate",
        )
    batches: TrainBatches | EvalBatches
    if train:
        mixes = config.augment.mixup > 0 or config.augment.cutmix > 0
        batches = TrainBatches(
            len(dataset), batch_size=config.data.batch_size, seed=config.seed, even=mixes, rank=rank, world=world
        )
    else:
        size = config.data.batch_size if info.volumes is None else 1  # a whole volume
        batches = EvalBatches(len(split), batch_size=size, rank=rank, world=world)
    return Loader(dataset, batches, workers=config.data.workers, pin_memory=pin_memory, check=check)


def labeller(config: RunConfig, info: RunInfo, network: nn.Module, *, device: torch.device) -> nn.Module:
    """What is evaluated: the network itself, or around it what labels whole volumes."""
    if info.volumes is None:
        return network
    return VolumePredictor(
        network, info.volumes, num_classes=len(info.class_names), batch_size=config.data.batch_size, device=device
    )


def load_run(run_dir: str | Path, overrides: list[str] | None = None) -> tuple[RunConfig, RunInfo]:
    """Configuration and data description of a run.

    Raises:
        ConfigError: It is no run directory, or an override is wrong.
    """
    run = RunDirectory(run_dir)
    if not run.config.is_file() or not run.info.is_file():
        raise ConfigError(f"{run.path}: is no run directory (config.yaml or run.json is missing)")
    try:
        info: RunInfo = read_json(run.info, RunInfo, remedy=COPY_REMEDY)
    except UserError as error:
        raise ConfigError(str(error)) from error
    return load_config(run.config, overrides or []), info
