"""An update of the weights whose loss is on its way, and what happens where it is no number."""

import math
from itertools import islice
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from vision_gates.datasets.base import few
from vision_gates.engine.run_directory import atomic_write_text, to_json
from vision_gates.errors import UserError

if TYPE_CHECKING:
    from vision_gates.engine.trainer import Trainer

__all__ = ["Update", "not_finite", "refuse_nan", "stop_for_nan"]


class Update:
    """What is shown of an update once its loss is there.

    Args:
        losses: of its batches, on the device.
        sizes: images of each.
        names: of all images.
        number: of the update.
        lr: learning rate.
        waited: seconds for the data.
    """

    def __init__(
        self, losses: Tensor, sizes: list[int], names: list[str], *, number: int, lr: float, waited: float
    ) -> None:
        self.sizes, self.names, self.number, self.lr, self.waited = sizes, names, number, lr, waited
        self.seconds = 0.0  # from the end of the update before
        # The copy starts now; the event tells when it is done, whatever the GPU has been given to do since.
        self._losses = losses.to("cpu", non_blocking=True)
        self._copied: Any = None
        if losses.device.type == "cuda":
            self._copied = torch.cuda.Event()
            self._copied.record()

    def read(self) -> list[float]:
        """The loss of each batch."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._losses.tolist()


def not_finite(trainer: "Trainer", update: Update) -> list[dict[str, Any]]:
    """The batches of an update whose loss is not finite, of all processes."""
    names, found = iter(update.names), []
    for loss, size in zip(update.read(), update.sizes, strict=True):
        files = list(islice(names, size))
        if not math.isfinite(loss):
            found.append({"process": trainer.accelerator.process_index, "loss": str(loss), "files": files})
    if trainer.world == 1:
        return found
    shares: list[Any] = [None] * trainer.world
    torch.distributed.all_gather_object(shares, found, group=trainer.group)
    return [batch for share in shares for batch in share]


def stop_for_nan(trainer: "Trainer", update: Update) -> NoReturn:
    """End the run; which files were in the batch is in RUN/nan_batch.json."""
    batches, path = not_finite(trainer, update), trainer.run.path / "nan_batch.json"
    about = {"epoch": trainer.state.epoch + 1, "update": update.number}
    if trainer.main:
        atomic_write_text(path, to_json(about | {"batches": batches}, indent=1) + "\n")
    losses = ", ".join(dict.fromkeys(batch["loss"] for batch in batches))
    files = [name for batch in batches for name in batch["files"]]
    skipped = trainer.state.skipped_in_row
    raise UserError(
        f"{trainer.run.path}: the loss is {losses} in epoch {about['epoch']}, update {about['update']}"
        + (f", as in the {skipped - 1} updates before" if skipped else "")
        + f"; the files of its batch are listed in {path} ({few(files, limit=4)}); the last checkpoint is intact; "
        "lower optim.lr, set optim.clip_grad=1.0 or look at these files"
        + ("" if skipped else "; trainer.nan=skip leaves such batches out")
    )


def refuse_nan(trainer: "Trainer") -> None:
    """A gradient that is NaN where the loss was finite must not reach a checkpoint."""
    found = [parameter.detach().isnan().any() for parameter in map(_local, trainer.network.parameters())]
    if trainer.any_process(bool(torch.stack(found).any()) if found else False)[0]:
        raise UserError(
            f"{trainer.run.path}: weights have become NaN by update {trainer.state.update}, though the loss was "
            "finite; the last checkpoint is intact; lower optim.lr or set optim.clip_grad=1.0"
        )


def _local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor that may be shared out."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part
