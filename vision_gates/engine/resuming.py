"""What a checkpoint of a run holds, and how a run goes on from it: with other processes, too, or other batches."""

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vision_gates.engine.checkpoint import Checkpoint, write_checkpoint
from vision_gates.engine.parallel import (
    gathered,
    load_weights,
    optimizer_state,
    read_shards,
    set_optimizer_state,
    write_shards,
)
from vision_gates.engine.state import State
from vision_gates.errors import ConfigError

if TYPE_CHECKING:
    from vision_gates.engine.trainer import Trainer

__all__ = ["restore", "save_checkpoint"]


def save_checkpoint(trainer: "Trainer", name: str) -> None:
    """Write a checkpoint; every process has to call this."""
    loss_sum, images = trainer.sum_over_processes(trainer.state.loss_sum, float(trainer.state.images))
    place = {**asdict(trainer.state), "loss_sum": loss_sum, "images": int(images), "elapsed": trainer.elapsed()}
    weights = trainer.deployed().state_dict()
    tensors = _tensors(trainer)
    shards = None
    if trainer.sharded:
        weights = gathered(weights)
        if name == "last":  # of the best weights nobody goes on
            shards = _write_shards(trainer, tensors)
        tensors = {}
    if trainer.main:
        scaler = trainer.accelerator.scaler
        state = {
            "place": place,
            "tensors": tensors,
            "optimizer": optimizer_state(trainer.network, trainer.optimizer)[1],
            "scaler": None if scaler is None else scaler.state_dict(),
            "processes": trainer.world,
            "step_images": trainer.images_per_step(),
            "accumulate": trainer.accumulate,
            "batches": trainer.batches,
            "threads": torch.get_num_threads(),
        }
        about: dict[str, Any] = {"epoch": trainer.state.epoch, "step": trainer.state.update}
        about["finished"] = trainer.state.finished
        if name == "best":
            about[str(trainer.config.trainer.monitor)] = trainer.state.best
        write_checkpoint(trainer.run.checkpoints, name, weights=weights, state=state, about=about, shards=shards)
    if shards is not None:
        trainer.accelerator.wait_for_everyone()


def _tensors(trainer: "Trainer") -> dict[str, Tensor]:
    """What a checkpoint holds besides the weights that are deployed."""
    tensors = {f"optimizer/{k}": v for k, v in optimizer_state(trainer.network, trainer.optimizer)[0].items()}
    if trainer.ema is not None:
        tensors |= {f"network/{k}": v for k, v in trainer.network.state_dict().items()}
    return tensors


def _write_shards(trainer: "Trainer", tensors: dict[str, Tensor]) -> Path:
    """Every process's part, in a folder that becomes part of the checkpoint."""
    folder = trainer.run.checkpoints / "shards.writing"
    if trainer.main:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    trainer.accelerator.wait_for_everyone()
    write_shards(folder, tensors)
    trainer.accelerator.wait_for_everyone()
    return folder


def restore(trainer: "Trainer", checkpoint: Checkpoint) -> None:
    """Put a trainer where it was when the checkpoint was written.

    Raises:
        ConfigError: The update cannot be what it was.
    """
    state = checkpoint.state
    if "step_images" not in state:
        raise ConfigError(
            f"{checkpoint.path}: was written by an earlier version, which alone can go on with this run; its "
            "weights can still be evaluated"
        )
    tensors: dict[str, Tensor] = state["tensors"]
    if checkpoint.shards is not None:
        like = {f"network/{name}": tensor for name, tensor in trainer.network.state_dict().items()}
        like |= {f"optimizer/{name}": parameter for name, parameter in trainer.network.named_parameters()}
        tensors = read_shards(checkpoint.shards, like)
    load_weights(trainer.deployed(), checkpoint.weights)
    if trainer.ema is not None:
        load_weights(trainer.network, _below("network", tensors))
    set_optimizer_state(trainer.network, trainer.optimizer, _below("optimizer", tensors), state["optimizer"])
    if trainer.accelerator.scaler is not None and state["scaler"] is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    trainer.state = State(**state["place"])
    _take_over(trainer, state)
    trainer.elapsed_before = trainer.state.elapsed
    if not trainer.main:  # the sums are those of all processes
        trainer.state.loss_sum, trainer.state.images = 0.0, 0
    trainer.schedule.step_update(trainer.schedule_place())


def _take_over(trainer: "Trainer", state: dict[str, Any]) -> None:
    """Go on with another number of processes, or batches of another size, with the same images in every update."""
    step, step_before = trainer.images_per_step(), state["step_images"]
    update = step_before * state["accumulate"]
    if update % step:
        raise ConfigError(
            f"trainer.resume=true: {trainer.run.path}: an update is of {update} images, which {trainer.world} "
            f"processes with batches of {step // trainer.world} cannot share; choose another data.batch_size or number "
            "of processes"
        )
    trainer.set_accumulation(update // step)
    if step != step_before:
        whole = trainer.state.batch == state["batches"]
        trainer.state.batch = trainer.batches if whole else trainer.state.batch * step_before // step
        trainer.display.say(
            f"note: updates are of {update} images as before, now in {trainer.accumulate} batches of "
            f"{step // trainer.world} on each of {trainer.world} processes"
        )


def _below(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those under ``name/``, without it."""
    return {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
