"""Optimiser, learning rate schedule, weight averaging and batch mixing: timm's, set up from the configuration."""

import math
from typing import Any

import numpy as np
import timm.optim
import torch
from timm.data import Mixup
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from vision_gates.config import RunConfig
from vision_gates.errors import ConfigError

__all__ = ["build_ema", "build_mixup", "build_optimizer", "build_schedule", "is_better", "mix"]


def build_optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """timm's optimiser with its parameter groups: no decay on biases and norms, ``lr_scale`` per layer.

    Raises:
        ConfigError: The optimiser cannot be built, for instance because a package it needs is missing.
    """
    optim = config.optim
    if optim.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise ConfigError(f"optim.layer_decay: {config.model.name} does not say how its layers follow; set it to null")
    extra: dict[str, Any] = {} if optim.betas is None else {"betas": optim.betas}
    try:
        return timm.optim.create_optimizer_v2(
            model,
            opt=optim.name,
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            momentum=optim.momentum,
            layer_decay=optim.layer_decay,
            **extra,
        )
    except (ImportError, AssertionError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"optim: {optim.name} cannot be built: {' '.join(str(error).split())}") from error


def build_schedule(config: RunConfig, optimizer: torch.optim.Optimizer, *, updates_per_epoch: int) -> CosineLRScheduler:
    """Linear warm-up, then one cosine to ``min_lr``; call ``step_update(updates done)`` after every update."""
    schedule = config.schedule
    total = schedule.epochs * updates_per_epoch
    warmup = min(round(schedule.warmup_epochs * updates_per_epoch), total)
    return CosineLRScheduler(
        optimizer,
        t_initial=max(2, total - warmup),  # of length 1 a cosine does nothing, and timm says so on every start
        lr_min=schedule.min_lr,
        warmup_t=warmup,
        warmup_lr_init=schedule.warmup_lr,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def build_ema(config: RunConfig, model: nn.Module) -> ModelEmaV3 | None:
    """Moving average of the weights, with timm's warm-up of the decay so that short runs profit too."""
    if config.trainer.ema_decay is None:
        return None
    together = config.trainer.parallel != "fsdp"  # PyTorch cannot average a list of shards and whole tensors
    return ModelEmaV3(model, decay=config.trainer.ema_decay, use_warmup=True, foreach=together)


def build_mixup(config: RunConfig, num_classes: int) -> Mixup | None:
    """timm's mixup/cutmix, or None. Label smoothing stays with the loss, which applies it to mixed labels too."""
    augment = config.augment
    if augment.mixup == 0 and augment.cutmix == 0:
        return None
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        label_smoothing=0.0,
        num_classes=num_classes,
    )


def mix(mixup: Mixup, image_BCHW: Tensor, target_B: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
    """Mix a batch; a function of its arguments.

    timm draws from NumPy's global generator, so it is seeded here and put back as it was.

    Returns:
        Images, (B, C, H, W), and label probabilities, (B, classes).
    """
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        image_BCHW, target_BC = mixup(image_BCHW, target_B)
    finally:
        np.random.set_state(before)
    return image_BCHW, target_BC


def is_better(value: float, best: float | None, *, monitor: str) -> bool:
    """Whether a monitored value beats the best so far: lower for a loss, higher for a metric. NaN never does."""
    if math.isnan(value):
        return best is None  # the first validated weights are kept in any case
    if best is None or math.isnan(best):
        return True
    return value < best if monitor == "loss" else value > best
