"""Which keys a configuration has: one frozen pydantic model a section."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, ValidationInfo, field_validator

from vision_gates.datasets.base import DataConfig

__all__ = ["MONITORS", "TASKS", "RunConfig"]

MONITORS = {
    "classification": ("accuracy", "balanced_accuracy", "auc", "f1", "loss"),
    "segmentation": ("dice", "iou", "accuracy", "dice_pooled", "loss"),
}
"""Validation metrics that can choose the best checkpoint."""


class Section(BaseModel):
    """A part of the configuration: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


ClassWeights = Literal["balanced"] | tuple[float, ...] | None


class ClassificationTask(Section):
    """One label an image; cross-entropy."""

    type: Literal["classification"] = Field(description="Task; selects the keys of this section.")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="Label smoothing of the cross-entropy.")
    class_weights: ClassWeights = Field(
        default=None,
        description="Class weights of the cross-entropy: null, balanced (inverse frequency) or one a class.",
    )


class SegmentationTask(Section):
    """One label a pixel; an overlap loss, soft Dice unless told otherwise, plus cross-entropy."""

    type: Literal["segmentation"] = Field(description="Task; selects the keys of this section.")
    dice_weight: float = Field(
        default=0.5, ge=0, le=1, description="Loss = dice_weight * overlap loss + (1 - dice_weight) * cross-entropy."
    )
    overlap: Literal["dice", "tversky", "region_tversky"] = Field(
        default="dice",
        description="Overlap loss: dice (soft Dice), tversky (false positives and negatives weighed), region_tversky "
        "(weighed by each region's own errors).",
    )
    tversky_alpha: float = Field(default=0.3, ge=0, description="Weight of false positives, for overlap: tversky.")
    tversky_beta: float = Field(
        default=0.7,
        ge=0,
        description="Weight of false negatives, for overlap: tversky; above tversky_alpha, recall comes first.",
    )
    region_grid: int | tuple[int, ...] = Field(
        default=8, description="Regions along every axis, or one number an axis, for overlap: region_tversky."
    )
    focal_gamma: float = Field(
        default=0.0,
        ge=0,
        description="Exponent of the focal cross-entropy, which lets pixels that are right already count for less; "
        "0: plain cross-entropy.",
    )
    class_weights: ClassWeights = Field(
        default=None,
        description="Class weights of the cross-entropy: null, balanced (inverse pixel frequency) or one a class.",
    )
    deep_supervision_weights: tuple[float, ...] | None = Field(
        default=None,
        description="Share of each output in the loss, finest first, for networks that give several in training; "
        "null: 1, 1/2, 1/4, ...",
    )

    @field_validator("tversky_alpha", "tversky_beta", "region_grid")
    @classmethod
    def _of_its_overlap(cls, value: Any, info: ValidationInfo) -> Any:
        """A key without effect is a mistake, unless it says no more than the default, as in the copy a run keeps."""
        name = str(info.field_name)
        overlap, its_own = info.data.get("overlap"), "region_tversky" if name == "region_grid" else "tversky"
        if overlap is not None and overlap != its_own:
            if value != cls.model_fields[name].default:
                raise ValueError(f"is for overlap: {its_own}, not for overlap: {overlap}; remove it")
        elif name == "region_grid" and min((value,) if isinstance(value, int) else value, default=0) < 1:
            raise ValueError("numbers of at least 1 are needed")
        elif name == "tversky_beta" and value == info.data.get("tversky_alpha") == 0:
            raise ValueError("tversky_alpha and tversky_beta cannot both be 0")
        return value


class ModelConfig(Section):
    """The network: a timm model, for segmentation with a decoder on its feature pyramid; or a whole network."""

    name: str = Field(
        description="Name in timm's registry, this package's included, or for segmentation a file in networks/: "
        "python tools/models.py lists them."
    )
    pretrained: bool = Field(default=False, description="Start from the registry's pretrained weights.")
    checkpoint: str | None = Field(default=None, description="Weights file or run directory to start from.")
    drop_path_rate: float = Field(default=0.0, ge=0, lt=1, description="Stochastic depth rate.")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="Further arguments of timm.create_model, such as patch_size or img_size, or of a whole network.",
    )
    decoder: dict[str, Any] | None = Field(
        default=None,
        description="Segmentation decoder: type (a file in decoders/) and its options; null: pyramid, or none where "
        "name is a whole network.",
    )


class OptimConfig(Section):
    """Optimiser."""

    name: str = Field(default="adamw", description="Optimiser in timm's registry.")
    lr: float = Field(default=1e-3, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(default=0.05, ge=0, description="Weight decay; not applied to biases and norm layers.")
    betas: tuple[float, ...] | None = Field(
        default=None, description="Betas of Adam-like optimisers; null: their default."
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="Momentum of SGD-like optimisers.")
    layer_decay: float | None = Field(
        default=None, gt=0, le=1, description="Layer-wise learning rate decay: factor per layer, from the head down."
    )
    clip_grad: float | None = Field(default=None, gt=0, description="Maximum gradient norm; null: no clipping.")
    accumulate: int = Field(default=1, ge=1, description="Batches whose gradients are averaged for one update.")


class ScheduleConfig(Section):
    """Length of training and learning rate schedule: linear warm-up, then one cosine, changed at every update."""

    epochs: int = Field(default=20, ge=1, description="Passes over the training images; with minutes, at most.")
    minutes: float | None = Field(
        default=None,
        gt=0,
        description="Length of training by the clock, validation included: the schedule follows it, so that the result "
        "depends on the machine's speed; null: epochs decide.",
    )
    warmup_epochs: float = Field(default=0.0, ge=0, description="Epochs of linear warm-up; part of epochs.")
    min_lr: float = Field(default=1e-6, ge=0, description="Learning rate at the end.")
    warmup_lr: float = Field(default=1e-6, ge=0, description="Learning rate of the first update of the warm-up.")


class AugmentConfig(Section):
    """Augmentation: of samples in the workers, of batches on the device that trains."""

    train: tuple[dict[str, dict[str, Any] | None], ...] = Field(
        default=(),
        description="Transforms of training samples, each {Name: {argument: value}}: albumentations; for volumes "
        "MONAI's random ones, without keys and the final d (RandAffine).",
    )
    eval: tuple[dict[str, dict[str, Any] | None], ...] = Field(
        default=(), description="albumentations transforms of validation and test images."
    )
    batch: tuple[dict[str, dict[str, Any] | None], ...] = Field(
        default=(),
        description="Volumes: transforms of whole training batches on the device, each {Name: {field: value}}: "
        "Spatial, Noise, Blur, Brightness, Contrast, BiasField, LowResolution, Gamma.",
    )
    mixup: float = Field(default=0.0, ge=0, description="Mixup alpha; 0: off.")
    cutmix: float = Field(default=0.0, ge=0, description="CutMix alpha; 0: off.")
    mixup_prob: float = Field(default=1.0, ge=0, le=1, description="Probability that a batch is mixed.")
    modality_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Volumes of several channels: probability that a channel is left out."
    )
    modality_dropout_epochs: int = Field(
        default=0, ge=0, description="Epochs over which that probability grows from 0."
    )


class TrainerConfig(Section):
    """How the run is carried out."""

    run_dir: str | None = Field(default=None, description="Run directory; null: runs/ and the name of the config file.")
    resume: bool = Field(default=False, description="Continue the run in run_dir from its last checkpoint.")
    precision: Literal["no", "bf16", "fp16"] = Field(default="no", description="Mixed precision (autocast).")
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="Several processes (torchrun): ddp, each has the whole network; fsdp, weights and optimiser in "
        "shards.",
    )
    device: Literal["auto", "cpu"] = Field(default="auto", description="auto: GPU where there is one.")
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="Decay of the exponential moving average of the weights; null: off."
    )
    monitor: str | None = Field(
        default=None, description="Validation metric that chooses the best checkpoint; null: accuracy or dice."
    )
    patience: int | None = Field(
        default=None, ge=1, description="Early stopping: evaluations without a better monitor; null: off."
    )
    eval_every: int = Field(
        default=1, ge=1, description="Epochs between validations; the last epoch is always validated."
    )
    checkpoint_minutes: float | None = Field(
        default=10.0, gt=0, description="Minutes between checkpoints within an epoch."
    )
    checkpoint_steps: int | None = Field(default=None, ge=1, description="Updates between checkpoints within an epoch.")
    nan: Literal["stop", "skip"] = Field(
        default="stop",
        description="At a loss that is NaN or infinite: stop, or skip the update (more than 10 in a row stop the run).",
    )
    deterministic: bool = Field(default=True, description="Deterministic algorithms on the GPU (slower).")
    log_every: int = Field(default=10, ge=1, description="Updates between log lines.")
    compile: bool = Field(default=False, description="torch.compile the network and the loss.")
    cuda_graph: bool = Field(
        default=False,
        description="Replay forward and backward pass as one CUDA graph, with compile or without, where launches take "
        "longer than the work.",
    )
    channels_last: bool = Field(
        default=False, description="Lay out images and weights with channels last: faster convolutions on a GPU."
    )


class RunConfig(Section):
    """Everything that defines a run."""

    task: ClassificationTask | SegmentationTask = Field(description="What is learnt, and its loss.")
    seed: int = Field(default=0, ge=0, description="Seed of everything random.")
    data: SerializeAsAny[DataConfig] = Field(description="Data set; type selects the keys of this section.")
    model: ModelConfig = Field(description="Network.")
    optim: OptimConfig = Field(default_factory=OptimConfig, description="Optimiser.")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="Learning rate schedule.")
    augment: AugmentConfig = Field(default_factory=AugmentConfig, description="Augmentation.")
    trainer: TrainerConfig = Field(default_factory=TrainerConfig, description="Trainer.")


TASKS = {"classification": ClassificationTask, "segmentation": SegmentationTask}
