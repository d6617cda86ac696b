"""What the preflight measures, and that it reports all faults at once."""

import dataclasses
import shutil

import numpy as np
import pytest
import tifffile
from PIL import Image

from vision_gates.datasets.base import DataSplits, Sample, Split
from vision_gates.datasets.preflight import preflight
from vision_gates.errors import DataError


class _Memory(Split):
    """Samples in memory; ``decoded`` and ``looked_up`` count what was asked for."""

    def __init__(self, part: str, images: list[np.ndarray], targets: list) -> None:
        self.names = [f"{part}_{i}" for i in range(len(images))]
        self._images, self._targets = images, targets
        self.decoded: list[int] = []
        self.looked_up: list[int] = []
        self.absent: set[int] = set()

    def read(self, index: int) -> Sample:
        self.decoded.append(index)
        return Sample(self._images[index], self._targets[index], self.names[index])

    def label(self, index: int) -> int | None:
        return self._targets[index] if isinstance(self._targets[index], int) else None

    def check_exists(self, index: int) -> None:
        self.looked_up.append(index)
        if index in self.absent:
            raise DataError(f"{self.names[index]}: is missing")


def _splits(train: list[np.ndarray], *, seed: int = 100, task: str = "classification", targets=None) -> DataSplits:
    rng = np.random.default_rng(seed)
    channels = train[0].shape[2]
    val = [rng.random((4, 4, channels)).astype(np.float32) for _ in range(4)]
    targets = [i % 2 for i in range(len(train))] if targets is None else targets
    return DataSplits(
        task, ("a", "b"), channels, _Memory("train", train, targets), _Memory("val", val, [0, 1, 0, 1]), None
    )


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_mean_and_std_are_those_of_all_pixels(data, dtype):
    rng = np.random.default_rng(0)
    top = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
    images = [(rng.random((rng.integers(3, 9), 5, 2)) * top * [0.5, 1]).astype(dtype) for _ in range(9)]
    statistics = preflight(_splits(images), data.config("digits"))
    pixels = np.concatenate([image.reshape(-1, 2) for image in images]).astype(np.float64) / top
    np.testing.assert_allclose(statistics.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, pixels.std(axis=0), rtol=1e-10)
    assert statistics.counts == {"train": [5, 4], "val": [2, 2]} and statistics.images == {"train": 9, "val": 4}


def test_std_far_from_zero_is_accurate(data):
    rng = np.random.default_rng(0)
    images = [(1e6 + rng.normal(size=(16, 16, 1))).astype(np.float32) for _ in range(6)]
    statistics = preflight(_splits(images), data.config("digits"))
    assert abs(statistics.std[0] - np.std(np.stack(images).astype(np.float64))) < 1e-6


def test_constant_channel(data):
    rng = np.random.default_rng(0)
    images = [np.stack([rng.random((4, 4)), np.full((4, 4), 0.3)], axis=2).astype(np.float32) for _ in range(4)]
    statistics = preflight(_splits(images), data.config("digits"))
    assert statistics.std[1] == 1.0 and statistics.mean[1] == pytest.approx(0.3)
    assert statistics.warnings == ["channel 1 of the training images is constant"]


def test_progress_and_repeatability(data, make_classes):
    config = data.config("image_folder", root=str(make_classes(count=20)))
    splits, calls = data.load("image_folder", root=config.root), []
    first = preflight(splits, config, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 40) for i in range(40)]
    assert preflight(splits, config) == first


def test_fast_decodes_1000_and_looks_for_the_others(data):
    rng = np.random.default_rng(0)
    splits = _splits([rng.random((2, 2, 1)).astype(np.float32) for _ in range(2500)])
    config = data.config("digits", preflight="fast")
    statistics = preflight(splits, config)
    decoded, looked_up = sorted(splits.train.decoded), sorted(splits.train.looked_up)
    assert len(decoded) == 1000 and decoded[0] == 0 and decoded[-1] == 2499
    assert max(np.diff(decoded)) <= 3 and sorted(decoded + looked_up) == list(range(2500))
    assert statistics.counts["train"] == [1250, 1250] and statistics.images["train"] == 2500
    splits.train.absent = {looked_up[7]}
    with pytest.raises(DataError, match=f"train_{looked_up[7]}: is missing"):
        preflight(splits, config)
    preflight(splits, data.config("digits"))
    assert len(splits.train.decoded) == 3000 + 1500


def test_all_faults_end_in_one_message(data, make_pairs):
    root = make_pairs(count=20)
    for i in (1, 4, 5, 6, 9):
        path = root / "images" / f"{i}.png"
        path.write_bytes(path.read_bytes()[:-40])
    Image.fromarray(np.full((12, 10), 7, dtype=np.uint8)).save(root / "masks" / "11.png")
    Image.fromarray(np.zeros((5, 5), dtype=np.uint8)).save(root / "masks" / "12.png")
    Image.fromarray(np.zeros((12, 10), dtype=np.uint8)).save(root / "images" / "13.png")
    message = data.fault("image_mask_folder", root=str(root), num_classes=2)
    assert message.startswith(f"data set image_mask_folder at {root}: ")
    assert message.count("cannot be decoded (truncated") + message.count("the mask is 5 x 5") == 3
    assert "; and 3 further files" in message
    assert "labels outside 0..1 in 1 mask: images/11.png; values found: 7: 120 pixels" in message
    assert "images differ in channels: 12 have 3, but images/13.png with 1" in message


def test_nan_in_a_tiff(data, make_pairs):
    root, rng = make_pairs(), np.random.default_rng(0)
    for path in list((root / "images").iterdir()):
        pixels = rng.random((12, 10)).astype(np.float32)
        if path.stem == "5":
            pixels[2, 3:5] = np.nan
        path.unlink()
        tifffile.imwrite(path.with_suffix(".tif"), pixels)
    message = data.fault("image_mask_folder", root=str(root), num_classes=2)
    assert "images/5.tif: 2 of 120 values are not finite (2 NaN, 0 infinite)" in message


def test_no_training_image_can_be_read(data, make_classes):
    root = make_classes()
    for path in root.rglob("*.png"):
        path.write_bytes(b"nonsense")
    message = data.fault("image_folder", root=str(root))
    assert "none of the 8 training images can be used; the first: " in message and "not an image" in message


def test_class_without_pixels(data, make_pairs):
    root = make_pairs()
    message = data.fault("image_mask_folder", root=str(root), classes=["background", "organ", "lesion"])
    assert "no train sample of class lesion; add training data for it or remove the class" in message
    assert "no val sample of class lesion" in message
    _, statistics = data.check("image_mask_folder", root=str(root), num_classes=3, allow_missing_classes=True)
    assert len(statistics.warnings) == 3 and "no test sample of class class_2" in statistics.warnings


def test_copies_of_training_images_are_noticed(data, make_classes):
    make_classes("data/train")
    root = make_classes("data/val", seed=1).parent
    for name in ("0.png", "3.png"):
        shutil.copy(root / "train" / "cat" / name, root / "val" / "cat" / name)
    _, statistics = data.check("image_folder", root=str(root))
    assert len(statistics.warnings) == 1
    assert statistics.warnings[0].startswith(
        "2 of 12 val images are copies of training images: val/cat/0.png, val/cat/3"
    )


def test_blank_images_are_no_copies(data):
    rng = np.random.default_rng(0)
    splits = _splits([rng.random((4, 4, 1)).astype(np.float32) for _ in range(3)] + [np.zeros((4, 4, 1), np.float32)])
    splits.val._images[0] = np.zeros((4, 4, 1), np.float32)
    assert preflight(splits, data.config("digits")).warnings == []


def test_what_any_data_set_must_hold_to(data):
    rng = np.random.default_rng(0)
    images = [rng.random((4, 4, 1)).astype(np.float32) for _ in range(4)]
    config = data.config("digits")
    for change, message in (
        (lambda splits: splits.train._images.__setitem__(1, np.zeros((4, 4, 1))), r"train_1: \(4, 4, 1\) float64"),
        (lambda splits: splits.train._images.__setitem__(1, np.full((4, 4, 1), np.inf, np.float32)), "16 of 16 values"),
        (lambda splits: splits.train._targets.__setitem__(1, 2), "labels outside 0..1 in 1 image: train_1; .*2: 1 im"),
    ):
        splits = _splits(list(images))
        change(splits)
        with pytest.raises(DataError, match=message):
            preflight(splits, config)
    splits = dataclasses.replace(_splits(list(images)), in_chans=3)
    with pytest.raises(DataError, match="the images have 1 channel but the data set declares 3"):
        preflight(splits, config)
    with pytest.raises(DataError, match="1 training image; training needs at least 2"):
        preflight(_splits(images[:1]), config)
