"""Small image data sets on disk, and shortcuts that load and check one."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vision_gates.datasets.base import data_config_type, load_splits
from vision_gates.datasets.preflight import preflight
from vision_gates.errors import UserError


def _picture(seed: int, *, size: tuple[int, int] = (12, 10), channels: int = 3) -> np.ndarray:
    shape = size if channels == 1 else (*size, channels)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    """picture(seed, size=, channels=): random uint8 pixels, (H, W, channels) or (H, W)."""
    return _picture


@pytest.fixture
def make_classes(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``root/CLASS/i.png`` images and returns root."""

    def make(root: str = "data", *, classes: tuple[str, ...] = ("cat", "dog"), count: int = 6, seed: int = 0) -> Path:
        for c, name in enumerate(classes):
            folder = tmp_path / root / name
            folder.mkdir(parents=True, exist_ok=True)
            for i in range(count):
                Image.fromarray(_picture(1000 * seed + 100 * c + i)).save(folder / f"{i}.png")
        return tmp_path / root

    return make


@pytest.fixture
def make_pairs(tmp_path: Path) -> Callable[..., Path]:
    """Writes ``root/{images,masks}/i.png`` with masks of the given values and returns root."""

    def make(
        root: str = "data", *, count: int = 8, values: tuple[int, ...] = (0, 1), size: tuple[int, int] = (12, 10)
    ) -> Path:
        first = int(np.sum([ord(c) for c in root])) * 100  # different images in each folder
        for name in ("images", "masks"):
            (tmp_path / root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            mask = np.random.default_rng(i).choice(np.array(values, dtype=np.uint8), size)
            Image.fromarray(_picture(first + i, size=size)).save(tmp_path / root / "images" / f"{i}.png")
            Image.fromarray(mask).save(tmp_path / root / "masks" / f"{i}.png")
        return tmp_path / root

    return make


@pytest.fixture
def data() -> SimpleNamespace:
    """Shortcuts for a data set by name and options.

    config, load -> splits, check -> (splits, statistics) of good data, fault -> the message bad data must end in.
    """

    def config(type_name: str, **options: object):
        return data_config_type(type_name)(**({"image_size": 32} | options))

    def load(type_name: str, **options: object):
        return load_splits(config(type_name, **options))

    def check(type_name: str, **options: object):
        splits = load(type_name, **options)
        return splits, preflight(splits, config(type_name, **options))

    def fault(type_name: str, **options: object) -> str:
        with pytest.raises(UserError) as caught:
            check(type_name, **options)
        message = str(caught.value)
        assert "\n" not in message and message == message.strip()
        return message

    return SimpleNamespace(config=config, load=load, check=check, fault=fault)
