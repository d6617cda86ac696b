"""Tiny data sets and runs on them, and what has to be the same whatever happened to a run."""

import hashlib
import importlib
import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from injection.processes import Process
from vision_gates import cli
from vision_gates.config import load_config, parse_config, save_config
from vision_gates.engine import trainer
from vision_gates.engine.checkpoint import MANIFEST, WEIGHTS, is_complete
from vision_gates.engine.run_directory import read_metrics

# Everything that could lose its place: stochastic depth, mixup, augmentation, accumulation, moving average, schedule.
IMAGES: dict[str, Any] = {
    "task": {"type": "classification", "label_smoothing": 0.1},
    "data": {"type": "image_folder", "image_size": 32, "batch_size": 4},
    "model": {"name": "test_convnext", "drop_path_rate": 0.3},
    "optim": {"lr": 2e-3, "accumulate": 2, "clip_grad": 1.0},
    "schedule": {"epochs": 3, "warmup_epochs": 1},
    "augment": {"mixup": 0.3, "cutmix": 0.5, "train": [{"HorizontalFlip": {}}, {"GaussNoise": {"p": 0.5}}]},
    "trainer": {"device": "cpu", "ema_decay": 0.9, "checkpoint_steps": 1, "checkpoint_minutes": None, "resume": True},
}
VOLUMES = (
    "model.options={widths: [4, 8, 8], norm: instance, deep_supervision: separate}",
    *("schedule.epochs=2", "schedule.warmup_epochs=0", "data.folds=3", "data.samples=4", "data.batch_size=2"),
    *("data.patch_size=[16, 16, 8]", "trainer.eval_every=1", "trainer.device=cpu", "trainer.checkpoint_steps=1"),
    "trainer.resume=true",
)


class Runs:
    """Tiny data sets, and runs on them in one folder.

    Args:
        root: An empty folder.
    """

    def __init__(self, root: Path) -> None:
        self.root, self._number = root, 0
        self.images, self.volumes = root / "images", root / "volumes"
        _write_images(self.images)
        _write_volumes(self.volumes)
        self.expected: dict[str, dict[str, Any]] = {}
        self.seconds: dict[str, float] = {}
        modules = root / "modules.json"

        def undisturbed(path: Path) -> int:
            code = cli.train([str(path)])
            modules.write_text(json.dumps(sorted(sys.modules)))
            return code

        for kind in ("images", "volumes"):
            path = self.config(kind, f"undisturbed_{kind}")
            began = time.monotonic()
            run = self._finish(Process(lambda path=path: undisturbed(path), root / "first.log"), path.with_suffix(""))
            self.seconds[kind], self.expected[kind] = (time.monotonic() - began) / 2, outcome(run)
            for name in json.loads(modules.read_text()):  # what it imported late; the next ones have it from the start
                with suppress(Exception):
                    importlib.import_module(name)

    def _finish(self, process: Process, run: Path) -> Path:
        process.wait()
        if process.code:
            raise RuntimeError(f"an undisturbed run failed: {process.errors.read_text()}")
        return run

    def new(self) -> str:
        """A name that no run has."""
        self._number += 1
        return f"run{self._number}"

    def config(self, kind: str, name: str, *changes: str, place: Path | None = None) -> Path:
        """Path of the configuration of ``place/name``, place being the root by default."""
        place = place or self.root
        if kind == "images":
            overrides = [f"data.root={self.images}", f"trainer.run_dir={place / name}", *changes]
            config = parse_config(IMAGES, overrides, source="fault_injection")
        else:
            own = [f"data.root={self.volumes}", f"data.cache={place / name}_cache", f"trainer.run_dir={place / name}"]
            config = load_config("segmentation/auto_3d.yaml", [*VOLUMES, *own, *changes])
        path = self.root / f"{name}.yaml"
        save_config(config, path)
        return path

    def train(
        self, kind: str, name: str, *changes: str, place: Path | None = None, patch: Callable[[], None] | None = None
    ) -> Process:
        """Start, or go on with, a run."""
        path = self.config(kind, name, *changes, place=place)
        return Process(lambda: cli.train([str(path)]), self.root / f"{name}.log", patch=patch)

    def check(self, kind: str, run: Path) -> None:
        """Raises AssertionError unless a finished run has the outcome of an undisturbed one, and leaves no rubbish."""
        found = outcome(run)
        wrong = [key for key, value in self.expected[kind].items() if found[key] != value]
        assert not wrong, f"differs from the undisturbed run: {', '.join(wrong)}"
        assert not list(run.rglob("*.writing")), "half-written files are left"


def outcome(run: Path) -> dict[str, Any]:
    """What must be the same: weights bit for bit, every number of the epochs and of the evaluation."""
    times = ("seconds", "images_per_second", "run")
    evaluations = {path.name: json.loads(path.read_bytes()) for path in sorted(run.glob("evaluation/*.json"))}
    weights = {name: run / "checkpoints" / name / WEIGHTS for name in ("last", "best")}
    return {
        **{f"{name} weights": hashlib.sha256(path.read_bytes()).hexdigest() for name, path in weights.items()},
        "metrics": [_without(row, times) for row in read_metrics(run / "metrics.jsonl")],
        "evaluation": {name: _without(content, times) for name, content in evaluations.items()},
    }


def _without(values: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def newest(run: Path, name: str) -> int:
    """Updates that the newest complete checkpoint of a name knows; -1 if there is none."""
    folder, backup = run / "checkpoints", "previous" if name == "last" else f"{name}.previous"
    whole = [folder / each for each in (name, f"{name}.writing", backup) if is_complete(folder / each)]
    return max((int(json.loads((path / MANIFEST).read_bytes())["step"]) for path in whole), default=-1)


def _write_images(root: Path) -> None:
    """2 classes told apart by brightness: 24 training, 6 validation, 6 test images of 20 x 24."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3), ("test", 3)):
        for label, name in enumerate(("dark", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 120, (20, 24, 3)) + 110 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{name}{i:02d}.png")


def _write_volumes(root: Path) -> None:
    """nnU-Net's layout: 6 cases of a bright ball on noise."""
    import nibabel

    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    for case in range(6):
        generator = np.random.default_rng(case)
        centre = np.array((10, 9, 6)) + generator.integers(-2, 3, 3)
        grid = np.stack(np.meshgrid(*map(np.arange, (20, 18, 12)), indexing="ij"), axis=-1)
        labels = (np.linalg.norm(grid - centre, axis=-1) < 5).astype(np.uint8)
        image = (generator.normal(100, 10, labels.shape) + 100 * labels).astype(np.float32)
        affine = np.diag((1.0, 1.2, 2.5, 1.0))
        nibabel.save(nibabel.Nifti1Image(image, affine), root / "imagesTr" / f"case{case}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(labels, affine), root / "labelsTr" / f"case{case}.nii.gz")
    about = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "ball": 1}, "numTraining": 6}
    (root / "dataset.json").write_text(json.dumps(about | {"file_ending": ".nii.gz"}))


def slowly() -> None:
    """Updates that take long enough to be met."""
    original = trainer.Trainer.step_optimizer

    def step(self: trainer.Trainer) -> None:
        original(self)
        time.sleep(0.05)

    trainer.Trainer.step_optimizer = step  # type: ignore[method-assign]


def one_line(process: Process, code: int, *words: str) -> str:
    """What a process said, which has to be one line with these words, and its exit code this one."""
    said = process.said()
    assert process.code == code, f"exit code {process.code}, not {code}: {said[-3:]}"
    assert len(said) == 1, f"{len(said)} lines: {said[:5]}"
    missing = [word for word in words if word not in said[0]]
    assert not missing, f"{missing} not in {said[0]!r}"
    return said[0]


def resumed(runs: Runs, kind: str, name: str, *changes: str, place: Path | None = None) -> Path:
    """Run the command again; it has to finish with the outcome of an undisturbed run."""
    process = runs.train(kind, name, *changes, place=place)
    process.wait()
    assert process.code == 0, f"not finished when the cause was gone: {process.said()[-3:]}"
    run = (place or runs.root) / name
    runs.check(kind, run)
    return run


def segment(runs: Runs, run: Path, out: Path) -> int:
    scan = runs.volumes / "imagesTr" / "case0_0000.nii.gz"
    return cli.segment([str(scan), str(out), "--checkpoint", str(run), "report=false", "overwrite=true", "device=cpu"])
