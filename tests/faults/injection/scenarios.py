"""Every fault but SIGKILL: a function each, which raises AssertionError where the run does not end as it should."""

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from injection.disk import full_disk
from injection.processes import CHECKPOINT, EPOCH, EVALUATION, PLACES, STARTING, Process, entered
from injection.runs import IMAGES, Runs, newest, one_line, outcome, resumed, segment, slowly
from vision_gates.engine import segmenting, trainer
from vision_gates.engine.checkpoint import MANIFEST, STATE, WEIGHTS


def stopped_by(runs: Runs, number: int, where: int, *, workers: int = 0, group: bool = False) -> str:
    """A signal in a place; with ``group`` its data workers get it, too."""
    name, workers_ = runs.new(), f"data.workers={workers}"
    process = runs.train("images", name, workers_, patch=slowly)
    assert process.wait(entered(where)), f"{PLACES[where]} was missed"
    if where == EPOCH:
        assert process.wait(entered(CHECKPOINT, 2)) and process.wait(entered(EPOCH)), "the epoch was missed"
    process.send(number, group=group)
    process.wait()
    said = one_line(process, 130, "interrupted" if where == STARTING else "trainer.resume=true")
    resumed(runs, "images", name, workers_)
    return said


def interrupted_run(runs: Runs, checkpoints: int = 4) -> str:
    """Name of a run that was killed in an epoch after so many checkpoints."""
    name = runs.new()
    process = runs.train("images", name, patch=slowly)
    assert process.wait(entered(CHECKPOINT, checkpoints)) and process.wait(entered(EPOCH)), "the moment was missed"
    process.send(signal.SIGKILL)
    process.wait()
    return name


def damage(path: Path, how: str) -> None:
    """``truncated``, ``flipped`` (a bit in the middle) or ``missing``."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data if how == "flipped" else data[: len(data) // 2])


def damaged_checkpoint(runs: Runs, before: str, file: str, how: str) -> str:
    """The last checkpoint damaged: the one before it is used, which is said."""
    name = runs.new()
    shutil.copytree(runs.root / before, runs.root / name)
    damage(runs.root / name / "checkpoints" / "last" / file, how)
    run = resumed(runs, "images", name)
    log = (run / "log.txt").read_text().splitlines()
    said = [line for line in log if "missing or damaged; previous is used" in line]
    assert len(said) == 1, "it is not said that the previous checkpoint is used"
    return said[0].split(" ", 2)[2]


def no_checkpoint_left(runs: Runs, before: str) -> str:
    """Both damaged: an error that says so."""
    name = runs.new()
    shutil.copytree(runs.root / before, runs.root / name)
    for checkpoint in ("last", "previous"):
        damage(runs.root / name / "checkpoints" / checkpoint / STATE, "flipped")
    process = runs.train("images", name)
    process.wait()
    return one_line(process, 2, "damaged", "no other complete checkpoint")


def dead_worker(runs: Runs) -> str:
    """SIGKILL of a data worker, as the kernel does where memory is short."""
    name = runs.new()
    process = runs.train("images", name, "data.workers=1", "trainer.checkpoint_steps=null", patch=slowly)
    assert process.wait(entered(EPOCH, 4)), "the epoch was missed"
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    process.wait()
    said = one_line(process, 2, "data worker has died (SIGKILL)", "data.workers", "trainer.resume=true")
    assert newest(runs.root / name, "last") > 0, "what was done has not been saved"
    resumed(runs, "images", name, "data.workers=1", "trainer.checkpoint_steps=null")
    return said


def vanished_images(runs: Runs, workers: int = 0) -> str:
    """The images of a class are gone in an epoch, and come back."""
    name, workers_ = runs.new(), f"data.workers={workers}"
    process = runs.train("images", name, workers_, "trainer.checkpoint_steps=null", patch=slowly)
    assert process.wait(entered(EPOCH)), "the epoch was missed"
    there, away = runs.images / "train" / "light", runs.images / "light"
    there.rename(away)
    try:
        process.wait()
    finally:
        away.rename(there)
    said = one_line(process, 2, str(there), "cannot be read")
    resumed(runs, "images", name, workers_, "trainer.checkpoint_steps=null")
    return said


def vanished_cache(runs: Runs) -> str:
    """The prepared volumes are gone in an epoch."""
    name = runs.new()
    process = runs.train("volumes", name, patch=slowly)
    assert process.wait(entered(EPOCH)), "the epoch was missed"
    shutil.rmtree(runs.root / f"{name}_cache")
    process.wait()
    said = one_line(process, 2, f"{name}_cache", "a prepared volume cannot be read", "trainer.resume=true")
    resumed(runs, "volumes", name)
    return said


def _poison() -> None:
    """The image light00.png, as if a disk had returned NaN."""
    original = trainer.Trainer.forward_backward

    def forward_backward(self: trainer.Trainer, batch: dict[str, Any], **place: Any) -> torch.Tensor:
        for i, name in enumerate(batch["name"]):
            if name.endswith("light00.png"):
                batch["image"][i] = torch.nan
        return original(self, batch, **place)

    trainer.Trainer.forward_backward = forward_backward  # type: ignore[method-assign]
    slowly()


def nan_stops(runs: Runs) -> str:
    """The run stops, its checkpoint without NaN, and the files of the batch are noted."""
    name = runs.new()
    process = runs.train("images", name, patch=_poison)
    process.wait()
    said = one_line(process, 2, "nan_batch.json", "trainer.nan=skip")
    noted = json.loads((runs.root / name / "nan_batch.json").read_bytes())
    assert "light00.png" in str(noted["batches"]) and noted["update"] > 0, noted
    resumed(runs, "images", name)
    return said


def nan_skipped(runs: Runs) -> str:
    """The update is left out; a run that is killed on the way ends as one that is not."""
    names, found = (runs.new(), runs.new()), []
    for name, kills in zip(names, (0, 2), strict=True):
        for kill in range(kills + 1):
            process = runs.train("images", name, "trainer.nan=skip", patch=_poison)
            if kill < kills and process.wait(entered(CHECKPOINT, 3)):
                process.send(signal.SIGKILL)
            process.wait()
        assert process.code == 0, process.said()[-3:]
        found.append(outcome(runs.root / name))
    assert found[0] == found[1], "killed and resumed, the weights are others"
    skipped = [row["train"]["skipped"] for row in found[0]["metrics"]]
    assert sum(skipped) == IMAGES["schedule"]["epochs"], skipped
    log = (runs.root / names[0] / "log.txt").read_text()
    assert log.count("loss nan, skipped") == sum(skipped) and "light00.png" in log
    return f"updates left out in each epoch: {skipped}"


def out_of_memory(runs: Runs) -> str:
    """As on a GPU that holds 3 images; then with smaller batches."""

    def patch() -> None:
        original = trainer.Trainer._loss_and_gradient

        def loss(self: trainer.Trainer, image: torch.Tensor, *args: Any) -> torch.Tensor:
            if len(image) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ...")
            return original(self, image, *args)

        trainer.Trainer._loss_and_gradient = loss  # type: ignore[method-assign]

    name = runs.new()
    process = runs.train("images", name, patch=patch)
    process.wait()
    said = one_line(process, 2, "out of memory", "2.00 GiB", "data.batch_size")
    process = runs.train("images", name, "data.batch_size=2", patch=patch)
    process.wait()
    assert process.code == 0, process.said()[-3:]
    return said


def fewer_windows(runs: Runs) -> str:
    """Volumes are labelled with fewer windows at a time where memory is short; where it holds none, a line says so."""
    run = runs.root / "undisturbed_volumes"
    for limit in (1, 0):

        def patch(limit: int = limit) -> None:
            original = segmenting.load_best

            def load_best(*args: Any) -> Any:
                network, weights = original(*args)

                def check(module: Any, inputs: Any) -> None:
                    if len(inputs[0]) > limit:
                        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

                network.register_forward_pre_hook(check)
                return network, weights

            segmenting.load_best = load_best

        out = runs.root / f"mask{limit}.nii.gz"
        process = Process(lambda out=out: segment(runs, run, out), runs.root / "command.log", patch=patch)
        process.wait()
        assert out.exists() == (limit > 0), process.said()[-3:]
    return one_line(process, 2, "too little memory for one window")


def scenarios(runs: Runs, quick: bool) -> Iterator[tuple[str, Callable[[], str]]]:
    """Name and function of every fault but SIGKILL."""
    yield "SIGTERM while starting", lambda: stopped_by(runs, signal.SIGTERM, STARTING)
    if not quick:
        yield "SIGTERM in an epoch", lambda: stopped_by(runs, signal.SIGTERM, EPOCH)
    yield "SIGTERM in validation", lambda: stopped_by(runs, signal.SIGTERM, EVALUATION)
    yield "SIGTERM to all processes", lambda: stopped_by(runs, signal.SIGTERM, EPOCH, workers=1, group=True)
    yield "Ctrl-C with a data worker", lambda: stopped_by(runs, signal.SIGINT, EPOCH, workers=1, group=True)
    before: list[str] = []
    for file in (WEIGHTS, MANIFEST) if quick else (WEIGHTS, STATE, MANIFEST):
        for how in ("truncated",) if quick else ("truncated", "flipped", "missing"):

            def one(file: str = file, how: str = how) -> str:
                before.extend([interrupted_run(runs)] if not before else [])
                return damaged_checkpoint(runs, before[0], file, how)

            yield f"{file} {how}", one
    yield "both checkpoints damaged", lambda: no_checkpoint_left(runs, before[0])
    yield "a data worker dies", lambda: dead_worker(runs)
    yield "images vanish", lambda: vanished_images(runs)
    if not quick:
        yield "images vanish, a data worker", lambda: vanished_images(runs, workers=1)
    yield "prepared volumes vanish", lambda: vanished_cache(runs)
    yield "disk full", lambda: full_disk(runs, quick)
    if not quick:
        yield "NaN, stop", lambda: nan_stops(runs)
        yield "NaN, skip", lambda: nan_skipped(runs)
        yield "out of memory in training", lambda: out_of_memory(runs)
    yield "out of memory in segment", lambda: fewer_windows(runs)
