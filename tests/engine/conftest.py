"""Tiny generated data sets and configurations, so that a whole training run takes about a second."""

import copy
import io
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from rich.console import Console

from vision_gates.config import RunConfig, parse_config

_BASE = {
    "task": {"type": "classification"},
    "data": {"type": "image_folder", "image_size": 32, "batch_size": 4},
    "model": {"name": "test_convnext"},
    "optim": {"lr": 2e-3},
    "schedule": {"epochs": 2},
    "trainer": {"device": "cpu", "checkpoint_minutes": None},
}


@pytest.fixture(autouse=True)
def _one_thread():
    """The tests' networks are too small for more, and threads of a busy machine wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """image_folder with 2 classes told apart by brightness: 24 training, 6 validation, 6 test images of 20 x 24."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3), ("test", 3)):
        for label, name in enumerate(("dark", "light")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = generator.integers(0, 120, (20, 24, 3)) + 110 * label
                cv2.imwrite(str(folder / f"{name}{i:02d}.png"), image.astype(np.uint8))
    return root


@pytest.fixture(scope="session")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """image_mask_folder with a bright square on noise: 12 training, 4 validation, 4 test images of 24 x 24."""
    root = tmp_path_factory.mktemp("scans")
    generator = np.random.default_rng(1)
    for split, count in (("train", 12), ("val", 4), ("test", 4)):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for i in range(count):
            image, mask = generator.integers(0, 100, (24, 24)), np.zeros((24, 24))
            top, left = generator.integers(2, 10, 2)
            image[top : top + 11, left : left + 11] += 120
            mask[top : top + 11, left : left + 11] = 1
            cv2.imwrite(str(root / split / "images" / f"scan{i:02d}.png"), image.astype(np.uint8))
            cv2.imwrite(str(root / split / "masks" / f"scan{i:02d}.png"), mask.astype(np.uint8))
    return root


@pytest.fixture(scope="session")
def build_config(images: Path, scans: Path) -> Callable[..., RunConfig]:
    """``build_config(run directory, overrides ..., task=...)``: configuration of a tiny run."""

    def build(run_dir: Path, *overrides: str, task: str = "classification") -> RunConfig:
        raw = copy.deepcopy(_BASE)
        raw["trainer"]["run_dir"] = str(run_dir)
        raw["data"]["root"] = str(images)
        if task == "segmentation":
            raw["task"] = {"type": "segmentation"}
            raw["data"] |= {"type": "image_mask_folder", "root": str(scans), "num_classes": 2}
            raw["model"]["decoder"] = {"type": "pyramid", "channels": 8}
        return parse_config(raw, overrides, source="test.yaml")

    return build


@pytest.fixture
def make_config(build_config: Callable[..., RunConfig], tmp_path: Path) -> Callable[..., RunConfig]:
    """The same with a run directory below tmp_path, "run" unless named."""

    def make(*overrides: str, run: str = "run", task: str = "classification") -> RunConfig:
        return build_config(tmp_path / run, *overrides, task=task)

    return make


@pytest.fixture(scope="session")
def quiet() -> Console:
    """A console that shows nothing."""
    return Console(file=io.StringIO())
