"""Memory and file handles over a long time: python tools/soak.py [minutes=30] [volumes=1500] [workers=2]

First a training run of so many minutes on generated images, on the CPU with data workers, augmentation, moving average,
validation, checkpoints and reports; then so many generated volumes through the function behind tools/segment.py, in one
process; 0 leaves one out. Prints the growth per 1,000 steps after the first fifth, and exits with 1 if memory grows by
1 MB in 1,000 updates or volumes (one array kept of each volume would be 55). out=runs/soak.csv holds the samples.
"""

import os
import sys
import tempfile
from pathlib import Path

# As tools/train.py: threads that spin while they wait make a busy machine slow.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

import cv2  # noqa: E402
import nibabel  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402

from vision_gates.benchmark.soak import Recorder, Sample, apart, trends, verdict_table  # noqa: E402
from vision_gates.config import load_config  # noqa: E402
from vision_gates.engine.segmenting import SegmentOptions, segment  # noqa: E402
from vision_gates.engine.trainer import train  # noqa: E402
from vision_gates.errors import ConfigError, UserError  # noqa: E402


def ball(shape: tuple[int, ...], *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A bright ball on noise, and its mask."""
    generator = np.random.default_rng(seed)
    centre = [generator.uniform(0.35, 0.65) * size for size in shape]
    distance = np.linalg.norm(np.moveaxis(np.indices(shape), 0, -1) - centre, axis=-1)
    mask = (distance < 0.25 * min(shape)).astype(np.uint8)
    return np.clip(generator.normal(90, 20, shape) + 70 * mask, 0, 255).astype(np.uint8), mask


def training(place: Path, *overrides: str, images: int = 600, out: Path | None = None) -> list[Sample]:
    """A run on PNG files of 32 x 32 pixels, all in ``place``; a sample every five seconds or more."""
    for kind in ("images", "masks"):
        (place / kind).mkdir(parents=True, exist_ok=True)
    for i in range(images):
        for kind, array_HW in zip(("images", "masks"), ball((32, 32), seed=i), strict=True):
            cv2.imwrite(str(place / kind / f"{i:04d}.png"), array_HW)
    data = (f"data.root={place}", "data.classes=[background, disc]", "data.image_size=32", "data.batch_size=4")
    model = ("model.name=vg_vig_h_atto", "model.decoder={type: pyramid, channels: 16}", "schedule.warmup_epochs=0")
    trainer = ("trainer.device=cpu", "trainer.checkpoint_steps=50", "trainer.patience=null")
    run = f"trainer.run_dir={place / 'run'}"
    config = load_config("segmentation/image_mask_folder.yaml", [*data, *model, *trainer, run, *overrides])
    recorder = Recorder("training", r"\| update (\d+) \|", path=out, every=5.0)
    train(config, console=recorder.console)
    return recorder.samples


def segmenting(place: Path, *, volumes: int, out: Path | None = None) -> list[Sample]:
    """A network that has seen six cases for a moment labels volumes of 24 to 40 voxels a side, all in ``place``."""
    for i in range(6 + volumes):
        shape = tuple(int(side) for side in np.random.default_rng(i).integers(24, 40, 3))
        folders = ("images", "labels") if i < 6 else ("inputs",)
        for folder, array in zip(folders, ball(shape, seed=i), strict=False):
            (place / folder).mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), place / folder / f"case{i:04d}.nii.gz")
    data = (f"data.root={place}", "data.class_names=[background, ball]", "data.patch_size=[16, 16, 16]")
    short = ("data.samples=4", "schedule.epochs=1", "schedule.warmup_epochs=0", "trainer.device=cpu")
    model = ("model.options={widths: [4, 8], norm: instance}", f"trainer.run_dir={place / 'run'}")
    run = train(load_config("segmentation/auto_3d.yaml", [*data, *short, *model]), console=Console(quiet=True))
    recorder = Recorder("volumes", r"^(\d+)/\d+ .* s$", path=out)
    segment(place / "inputs", place / "results", run, SegmentOptions(device="cpu"), console=recorder.console)
    return recorder.samples


def main(arguments: list[str]) -> int:
    """Both jobs; 0: everything is flat."""
    options = {"minutes": "30", "volumes": "1500", "workers": "2", "out": "runs/soak.csv"}
    options |= dict(text.partition("=")[::2] for text in arguments)
    try:
        minutes, volumes, workers = float(options["minutes"]), int(options["volumes"]), int(options["workers"])
    except ValueError as error:
        raise ConfigError(f"{' '.join(arguments)}: {error}") from error
    if len(options) > 4 or (out := Path(options["out"])).exists():
        raise ConfigError(f"{' '.join(arguments)}: minutes=, volumes=, workers= and out=, a new file, are the options")
    clock, found = (f"schedule.minutes={minutes}", "schedule.epochs=1000000", f"data.workers={workers}"), {}
    with tempfile.TemporaryDirectory() as place:
        if minutes:
            found["training"] = trends(apart(training, Path(place, "training"), *clock, out=out))
        if volumes:
            found["volumes"] = trends(apart(segmenting, Path(place, "volumes"), volumes=volumes, out=out))
    sys.stdout.write(verdict_table(found))
    return 0 if all(one.flat for job in found.values() for one in job.values()) else 1


if __name__ == "__main__":
    if any(argument.startswith("-") for argument in sys.argv[1:]):
        sys.exit((__doc__ or "").strip())
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
