"""From a split to batches. All that is random is a function of (seed, epoch, sample index), never of a worker's state.

The batch sampler hands (epoch, index) pairs to the data set, so any process can make any sample, and a run is the same
with 0, 1 or 4 workers and after a resume in the middle of an epoch.
"""

import os
import signal
import threading
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from vision_gates.augmentation import run_pipeline
from vision_gates.datasets.base import Split
from vision_gates.datasets.images import normalise, resize, to_float
from vision_gates.errors import ConfigError, DataError, UserError

__all__ = ["EvalBatches", "ImageDataset", "Loader", "TrainBatches", "derive_seed", "resize"]


def derive_seed(seed: int, purpose: str, *numbers: int) -> int:
    """An independent 32-bit seed for one purpose ("shuffle", "augment", "step" ...) and place in the run."""
    key = [seed, zlib.crc32(purpose.encode()), *numbers]
    return int(np.random.SeedSequence(key).generate_state(1)[0])


class ImageDataset(Dataset[Any]):
    """Read, augment, resize, normalise one sample.

    Args:
        split: Where samples come from.
        pipeline: From ``build_pipeline``, or None.
        image_size: (height, width) the network sees.
        mean, std: Per channel, applied to the image in 0..1; None: each image's own mean and standard deviation.
        seed: The run's seed.
        purpose: "augment" for training, another word for evaluation; part of the augmentation's seed.
    """

    def __init__(
        self,
        split: Split,
        *,
        pipeline: Any | None,
        image_size: tuple[int, int],
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        seed: int,
        purpose: str,
    ) -> None:
        self.split = split
        self.pipeline = pipeline
        self.image_size = image_size
        self.mean = None if mean is None else np.asarray(mean, dtype=np.float32)
        self.std = None if std is None else np.asarray(std, dtype=np.float32)
        self.seed = seed
        self.purpose = purpose

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any] | UserError:
        """Sample of an (epoch, index); a UserError is returned, so that a worker passes it on as it is."""
        try:
            return self._sample(*key)
        except UserError as error:
            return error

    def _sample(self, epoch: int, index: int) -> dict[str, Any]:
        sample = self.split.read(index)
        image_HWC = to_float(sample.image)
        mask_HW = sample.target if isinstance(sample.target, np.ndarray) else None
        if self.pipeline is not None:
            try:
                image_HWC, mask_HW = run_pipeline(
                    self.pipeline, image_HWC, mask_HW, seed=derive_seed(self.seed, self.purpose, epoch, index)
                )
            except Exception as error:  # albumentations and OpenCV raise many types; the cause is the configuration
                reason = " ".join(str(error).split())
                section = "train" if self.purpose == "augment" else "eval"
                raise ConfigError(
                    f"augment.{section}: fails on {sample.name} of shape {tuple(sample.image.shape)}: {reason}"
                ) from error
        image_HWC = resize(image_HWC, self.image_size)
        if self.mean is not None and image_HWC.shape[2] != len(self.mean):
            raise DataError(f"{sample.name}: {image_HWC.shape[2]} channels, the training images have {len(self.mean)}")
        image_HWC = normalise(image_HWC, self.mean, self.std)
        target = sample.target if mask_HW is None else resize(mask_HW, self.image_size, labels=True)
        return {
            "image": torch.from_numpy(np.ascontiguousarray(image_HWC.transpose(2, 0, 1), dtype=np.float32)),
            "target": torch.as_tensor(target, dtype=torch.int64),
            "name": sample.name,
            "index": index,
        }


class TrainBatches:
    """Batches of one epoch in shuffled order, as (epoch, index) pairs; what one process of several sees.

    Every batch is full: the images left over (fewer than one batch over all processes) sit out this epoch, others the
    next. A data set smaller than a batch is one batch.

    Args:
        images: Number of images.
        batch_size: Images a batch and process.
        seed: The run's seed.
        even: Keep the batch size even (mixup pairs the images of a batch).
        rank, world: This process and how many there are.

    Raises:
        ConfigError: Fewer images than processes (or than 2 a process, with ``even``).
    """

    def __init__(
        self, images: int, *, batch_size: int, seed: int, even: bool = False, rank: int = 0, world: int = 1
    ) -> None:
        self.images, self.seed, self.rank, self.world = images, seed, rank, world
        self.batch_size = min(batch_size, images // world)
        if even:
            self.batch_size -= self.batch_size % 2
        if self.batch_size < 1:
            raise ConfigError(f"{images} training images are too few for {world} processes and this augmentation")
        self.epoch, self.first = 0, 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.images // (self.batch_size * self.world)

    def start(self, *, epoch: int, first: int = 0) -> None:
        """Choose the epoch and the first batch of the next iteration."""
        self.epoch, self.first = epoch, first

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order = np.random.default_rng(derive_seed(self.seed, "shuffle", self.epoch)).permutation(self.images)
        epoch = self.epoch
        for batch in range(self.first, len(self)):
            begin = (batch * self.world + self.rank) * self.batch_size
            yield [(epoch, int(index)) for index in order[begin : begin + self.batch_size]]


class EvalBatches:
    """All images once, in order; process ``rank`` of ``world`` takes every world-th."""

    def __init__(self, images: int, *, batch_size: int, rank: int = 0, world: int = 1) -> None:
        self.indices = range(rank, images, world)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for begin in range(0, len(self.indices), self.batch_size):
            yield [(0, index) for index in self.indices[begin : begin + self.batch_size]]


def _collate(samples: list[dict[str, Any] | UserError]) -> dict[str, Any] | UserError:
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
    batch: dict[str, Any] = default_collate(samples)
    return batch


def _start_worker(worker: int) -> None:
    """One thread a worker (more would fight over the cores), and signals are the main process's business."""
    cv2.setNumThreads(0)
    if hasattr(os, "setpgid"):  # torchrun passes SIGTERM on to the groups of the processes that it has started
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# More workers than cores is the user's choice, and often right where they wait for a disk.
_MANY_WORKERS = "This DataLoader will create .* worker processes"
_DEAD_WORKER = "DataLoader worker (pid"  # so begins what PyTorch says of one


@contextmanager
def _without_child_handler() -> Iterator[None]:
    """Undo PyTorch's handler of SIGCHLD, which raises wherever the program is when a worker dies.

    That may be in the midst of an optimiser's step. Without it the next batch raises, up to five seconds later.
    """
    number = getattr(signal, "SIGCHLD", None)  # Windows has none
    if number is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(number)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(number, before)


def _exit_codes(batches: Any) -> list[int]:
    """Of the workers of a DataLoader's iterator that have failed; negative for a signal."""
    workers = getattr(batches, "_workers", ())
    for worker in workers:
        worker.join(timeout=0.1)  # one that has just died
    return sorted({worker.exitcode for worker in workers if worker.exitcode})


class Loader:
    """A DataLoader that raises what a worker found wrong with the data, or its death, as a one-line error.

    Iterating yields {"image": (B, C, H, W) float32, "target": (B,) or (B, H, W) int64, "name": list of B strings,
    "index": (B,) int64}.

    Args:
        dataset: Samples by (epoch, index).
        batches: TrainBatches or EvalBatches.
        workers: Processes; 0: this one.
        pin_memory: For copies to a GPU.
        check: Called before each batch; may raise to stop the iteration.

    Attributes:
        rescue: Called before an error is raised, to save what is done; None: nothing is.
    """

    rescue: Callable[[], None] | None = None

    def __init__(
        self,
        dataset: Any,
        batches: TrainBatches | EvalBatches,
        *,
        workers: int = 0,
        pin_memory: bool = False,
        check: Callable[[], None] | None = None,
    ) -> None:
        cv2.setNumThreads(0)
        self.dataset, self.batches, self.check = dataset, batches, check
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=_MANY_WORKERS)
            self._loader: DataLoader[Any] = DataLoader(
                dataset,
                batch_sampler=batches,
                num_workers=workers,
                pin_memory=pin_memory,
                collate_fn=_collate,
                worker_init_fn=_start_worker,
                persistent_workers=workers > 0 and isinstance(batches, TrainBatches),
            )

    def __len__(self) -> int:
        return len(self.batches)

    def start(self, *, epoch: int, first: int = 0) -> None:
        """Choose the epoch and the first batch of the next iteration over training batches."""
        assert isinstance(self.batches, TrainBatches)
        self.batches.start(epoch=epoch, first=first)

    def close(self) -> None:
        """End the workers now: at the end of the program they would be killed, and PyTorch complain."""
        if hasattr(self, "_loader"):
            del self._loader

    def __iter__(self) -> Iterator[dict[str, Tensor | list[str]]]:
        batches: Any = None
        while True:
            try:
                if batches is None:  # here, too, workers of the epoch before may turn out to be dead
                    with warnings.catch_warnings(), _without_child_handler():
                        warnings.filterwarnings("ignore", message=_MANY_WORKERS)
                        batches = iter(self._loader)
                batch = next(batches, None)
            except (RuntimeError, OSError, EOFError) as error:  # the last two: it died while it handed over a batch
                codes = _exit_codes(batches or self._loader._iterator)
                if not str(error).startswith(_DEAD_WORKER) and not codes:
                    raise
                batch = UserError(self._of_dead_worker(codes))
            if self.check is not None:
                self.check()
            if batch is None:
                return
            if isinstance(batch, UserError):
                if self.rescue is not None:
                    self.rescue()
                raise batch
            yield batch

    def _of_dead_worker(self, codes: list[int]) -> str:
        how = ", ".join(f"exit code {c}" if c > 0 else signal.Signals(-c).name for c in codes) or "unknown"
        return (
            f"data.workers={self._loader.num_workers}: a data worker has died ({how}), most likely for lack of memory "
            "(SIGBUS: of shared memory, /dev/shm); lower data.workers or data.batch_size and run the same command "
            "again, training with trainer.resume=true: the last checkpoint is intact"
        )
