"""Honest files and traps of what a finished run, and a folder of masks, hold beside the weights."""

import json
import shutil
from pathlib import Path

from fuzzing.damage import Rng, damage, poison
from fuzzing.seeds import write

_JOURNAL = (
    {"about": {"run": "runs/a", "overlap": 0.5}, "class_names": ["background", "a", "b"]},
    {"begun": "case1"},
    {"case": "case1", "mask": "case1.nii.gz", "ml": [900.0, 1.5, 0.25], "voxels": [9000, 15, 2], "seconds": 1.5},
    {"begun": "case2"},
)


def make_results(root: Path, canary: Path) -> None:
    import cv2
    import numpy as np
    from rich.console import Console

    from vision_gates.config import parse_config
    from vision_gates.engine.trainer import train

    images = root.parent / f"{root.name}_images"
    for label in range(2):
        (images / f"class{label}").mkdir(parents=True, exist_ok=True)
        for i in range(8):
            image = np.random.default_rng(i).integers(0, 200, (16, 16, 3)) + 50 * label
            cv2.imwrite(str(images / f"class{label}" / f"{i}.png"), image.astype(np.uint8))
    config = {
        "task": {"type": "classification"},
        "data": {"type": "image_folder", "root": str(images), "image_size": 32, "batch_size": 4},
        "model": {"name": "test_convnext"},
        "schedule": {"epochs": 2},
        "trainer": {"device": "cpu", "run_dir": str(root / "run")},
    }
    run = train(parse_config(config), console=Console(quiet=True))
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(run / name)
    for file in ("log.txt", "report.html"):
        (run / file).unlink()
    shutil.rmtree(images)
    lines = [json.dumps(line) + "\n" for line in _JOURNAL]
    write(root / "journal", segment__jsonl="".join(lines))
    write(root / "largest", segment__jsonl="".join(lines[:3] + lines[1:3] * 2000))
    for name, text in {
        "about": lines[1],
        "names": '{"about": {}, "class_names": [1, 2]}\n',
        "step": lines[0] + '{"case": "a"}\n',
        "deep": lines[0] + "[" * 100_000 + "\n",
        "digits": lines[0] + '{"case": "a", "ml": [' + "9" * 5000 + "]}\n",
        "huge": lines[0] + '{"case": "a", "mask": null, "ml": [1e300, 1, 1]}\n',
    }.items():
        write(root / f"trap_{name}", segment__jsonl=text)
    for name, text in (("list", "[]\n"), ("deep_row", "[" * 100_000 + "\n"), ("words", "epoch 1\n")):
        shutil.copytree(run, root / f"trap_{name}")
        (root / f"trap_{name}" / "metrics.jsonl").write_text(text)


def in_lines(rng: Rng, data: bytes, other: bytes) -> bytes:
    """One line of JSON of several."""
    lines = data.splitlines(keepends=True)
    at = int(rng.integers(len(lines)))
    if rng.random() < 0.8:
        lines[at] = json.dumps(poison(rng, json.loads(lines[at]))).encode() + b"\n"
    else:
        lines[at] = damage(rng, lines[at], other)
    return b"".join(lines)


def read_results(place: Path) -> None:
    from vision_gates.engine.report import write_report
    from vision_gates.engine.segment_journal import JOURNAL, Journal, read_class_names

    if (place / JOURNAL).exists():
        names = read_class_names(place / JOURNAL)
        about = _JOURNAL[0]["about"]
        journal = Journal(place, "", about=about, class_names=names)
        journal.add("case2", {"mask": None, "ml": [1.0] * len(names)})
        journal.finish()
    else:
        write_report(place)
