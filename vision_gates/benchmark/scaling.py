"""Training on several GPUs beside training on one: what tools/scaling.py measures and prints."""

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import cv2
import numpy as np

DEFAULTS = {
    "model": "vg_vig_small",
    "size": "224",
    "batch": "128",
    "processes": "1,2",
    "parallel": "ddp,fsdp",
    "precision": "bf16",
    "updates": "60",
    "workers": "",
}
_DIFFERENT, _CLASSES = 512, 4  # images that differ; the others are links
_PARTS = 6  # of an epoch, whose rates are read; the first, while workers start, is left out


def draw(path: Path, size: int, seed: int) -> None:
    """A JPEG of smooth random colours, about as large as a photograph of that size."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 255, (size // 8, size // 8, 3), dtype=np.uint8)
    fine = generator.integers(0, 40, (size, size, 3), dtype=np.uint8)
    cv2.imwrite(str(path), cv2.add(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC), fine))


def make_images(root: Path, *, size: int, images: int) -> None:
    """An image folder: ``images`` for training, one a class for validation."""
    for split in ("train", "val"):
        for label in range(_CLASSES):
            (root / split / f"class{label}").mkdir(parents=True)
    different = min(images, _DIFFERENT)
    firsts = [root / "train" / f"class{i % _CLASSES}" / f"{i:06d}.jpg" for i in range(different)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(draw, firsts, [size] * different, range(different), chunksize=16))
    for i in range(different, images):
        os.link(firsts[i % different], root / "train" / f"class{i % different % _CLASSES}" / f"{i:06d}.jpg")
    for label in range(_CLASSES):
        draw(root / "val" / f"class{label}" / "0.jpg", size, images + label)


def train(folder: Path, options: dict[str, str], overrides: list[str], *, processes: int, parallel: str) -> dict:
    """Train and read the rates back."""
    data, run = folder / f"images{processes}", folder / f"run_{parallel}{processes}"
    if not data.exists():
        make_images(data, size=int(options["size"]), images=processes * int(options["batch"]) * int(options["updates"]))
    updates = int(options["updates"])
    every = max(updates // _PARTS, 1)
    workers = options["workers"] or str(max((os.cpu_count() or 2) // processes - 1, 1))
    config = {
        "task": {"type": "classification"},
        "data": {"type": "image_folder", "root": str(data), "image_size": int(options["size"])},
        "model": {"name": options["model"]},
        "augment": {"train": [{"HorizontalFlip": {}}]},
        "schedule": {"epochs": 3},
        "trainer": {"run_dir": str(run), "log_every": every, "eval_every": 3, "deterministic": False},
    }
    path = folder / f"{run.name}.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += ["-m", "vision_gates.cli", "train", str(path), f"data.batch_size={options['batch']}"]
    command += [f"data.workers={workers}", f"trainer.precision={options['precision']}", f"trainer.parallel={parallel}"]
    done = subprocess.run([*command, *overrides], capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]  # torchrun adds pages to it
        raise SystemExit(said[0] if said else f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr}")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # it wonders why a new run purges what is not there
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    rates = [
        event.value
        for event in events.Scalars("train/images_per_second")
        if event.step > updates and (event.step - 1) % updates >= every
    ]
    shown = [line.split(" | ") for line in (run / "log.txt").read_text().splitlines() if "GiB" in line]
    waits = [float(part.removeprefix("data wait ").rstrip("%")) for line in shown for part in line if "wait" in part]
    return {
        "processes": processes,
        "parallel": parallel,
        "images_per_second": statistics.harmonic_mean(rates),
        "data_wait": statistics.median(waits),
        "memory": next(part.removesuffix(" GiB") for part in shown[-1] if part.endswith(" GiB")),
        "environment": json.loads((run / "environment.json").read_text()),
    }


def main(arguments: list[str]) -> None:
    known = [argument for argument in arguments if argument.partition("=")[0] in DEFAULTS]
    overrides = [argument for argument in arguments if argument not in known]
    if any("." not in override.partition("=")[0] or "=" not in override for override in overrides):
        raise SystemExit(
            f"error: {overrides}: key=value is needed; known: {', '.join(DEFAULTS)} and the configuration's"
        )
    options = DEFAULTS | dict(argument.split("=", 1) for argument in known)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for processes in map(int, options["processes"].split(",")):
            for parallel in options["parallel"].split(",") if processes > 1 else ["ddp"]:
                rows.append(train(Path(folder), options, overrides, processes=processes, parallel=parallel))
                sys.stderr.write(f"{processes} {parallel}: {rows[-1]['images_per_second']:.0f} images/s\n")
    about = rows[0]["environment"]
    sys.stdout.write(
        f"{options['model']}, {options['size']} x {options['size']}, {options['batch']} images a process, "
        f"{options['precision']}, {about['device']}, torch {about['versions']['torch']}"
        "\n\n"
        "| processes | parallel | images/s | of one process | efficiency | data wait | GiB a GPU |\n"
        "| --- | --- | --- | --- | --- | --- | --- |\n"
    )
    for row in rows:
        ratio = row["images_per_second"] / rows[0]["images_per_second"]
        share = ratio * rows[0]["processes"] / row["processes"]
        parallel = row["parallel"] if row["processes"] > 1 else ""
        numbers = f"{row['images_per_second']:.0f} | {ratio:.2f} | {share:.0%} | {row['data_wait']:.0f} %"
        sys.stdout.write(f"| {row['processes']} | {parallel} | {numbers} | {row['memory']} |\n")
