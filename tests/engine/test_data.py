"""Batches: order, augmentation, normalisation and errors do not depend on workers, processes or where one starts."""

import random

import numpy as np
import pytest
import torch

from vision_gates.augmentation import build_pipeline, run_pipeline
from vision_gates.datasets.base import Sample, Split, load_splits
from vision_gates.engine.building import RunInfo, build_loader
from vision_gates.engine.data import EvalBatches, ImageDataset, Loader, TrainBatches, derive_seed, resize
from vision_gates.errors import ConfigError, DataError

AUGMENT = "augment.train=[{HorizontalFlip: {}}, {Affine: {rotate: [-30, 30], p: 0.9}}, {GaussNoise: {p: 0.9}}]"
INFO = RunInfo(("dark", "light"), 3, (0.5,) * 3, (0.25,) * 3, None, {}, {})


class Volumes(Split):
    """Seven channels, floating-point values far outside 0..1; the last one cannot be read."""

    def __init__(self, count: int = 5) -> None:
        self.names = [f"volume{i}" for i in range(count)]

    def read(self, index: int) -> Sample:
        if index == len(self.names) - 1:
            raise DataError("volume4.tif: truncated")
        image = np.random.default_rng(index).uniform(-1000, 3000, (21, 17, 7)).astype(np.float32)
        return Sample(image, (image[..., 0] > 0).astype(np.int64), self.names[index])


def volumes(pipeline=None, **options) -> ImageDataset:
    settings = dict(image_size=(21, 17), mean=(0.0,) * 7, std=(1.0,) * 7, seed=0, purpose="augment") | options
    return ImageDataset(Volumes(), pipeline=build_pipeline(pipeline or [], key="augment.train"), **settings)


def test_workers_change_nothing(make_config):
    """0, 1 and 4 workers; two epochs; and an epoch entered in the middle."""
    splits = load_splits(make_config().data)
    seen = {}
    for workers in (0, 1, 4):
        loader = build_loader(make_config(AUGMENT, f"data.workers={workers}"), splits.train, INFO, train=True)
        seen[workers] = []
        for epoch, first in ((0, 0), (1, 0), (1, 4)):
            loader.batches.start(epoch=epoch, first=first)
            seen[workers].append(list(loader))
    for workers in (1, 4):
        for one, other in zip(seen[0], seen[workers], strict=True):
            assert [b["name"] for b in one] == [b["name"] for b in other]
            assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, other, strict=True))
            assert all(torch.equal(a["target"], b["target"]) for a, b in zip(one, other, strict=True))
    first, second, tail = seen[0]
    assert len(first) == 6 and len(tail) == 2
    assert all(torch.equal(a["image"], b["image"]) for a, b in zip(second[4:], tail, strict=True))
    names = [sorted(name for batch in epoch for name in batch["name"]) for epoch in (first, second)]
    assert names[0] == names[1] and len(set(names[0])) == 24
    assert [b["name"] for b in first] != [b["name"] for b in second]
    # The same image is augmented differently in the next epoch.
    images = [{n: i for b in epoch for n, i in zip(b["name"], b["image"], strict=True)} for epoch in (first, second)]
    assert not any(torch.equal(images[0][name], images[1][name]) for name in names[0])


def test_processes_share_an_epoch():
    whole = [pair for batch in TrainBatches(26, batch_size=6, seed=3) for pair in batch]
    shares = [list(TrainBatches(26, batch_size=3, seed=3, rank=rank, world=2)) for rank in (0, 1)]
    # Batch by batch, two processes with 3 images each see what one with 6 sees.
    together = [pair for a, b in zip(*shares, strict=True) for pair in a + b]
    assert together == whole and len(set(whole)) == 24
    evaluated = [list(EvalBatches(7, batch_size=2, rank=rank, world=2)) for rank in (0, 1)]
    assert evaluated == [[[(0, 0), (0, 2)], [(0, 4), (0, 6)]], [[(0, 1), (0, 3)], [(0, 5)]]]


def test_batches_of_few_images():
    assert [len(batch) for batch in TrainBatches(5, batch_size=8, seed=0)] == [5]
    assert [len(batch) for batch in TrainBatches(5, batch_size=8, seed=0, even=True)] == [4]
    with pytest.raises(ConfigError, match="1 training images are too few"):
        TrainBatches(1, batch_size=8, seed=0, even=True)
    with pytest.raises(ConfigError, match="too few for 4 processes"):
        TrainBatches(3, batch_size=1, seed=0, world=4)


def test_seeds_differ_and_stay():
    keys = [("shuffle", 0), ("shuffle", 1), ("augment", 0), ("step", 0, 1), ("step", 1, 0)]
    seeds = [derive_seed(0, *key) for key in keys] + [derive_seed(1, "shuffle", 0)]
    assert len(set(seeds)) == 6
    assert derive_seed(0, "shuffle", 0) == 2673985380, "another value: runs would no longer be resumed exactly"


def test_transforms_are_independent_of_each_other():
    """A horizontal and a vertical flip of p = 0.5 must give all four results, each about a quarter of the time."""
    pipeline = build_pipeline([{"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.5}}], key="augment.train")
    image = np.arange(4, dtype=np.float32).reshape(2, 2, 1) / 4
    corners = [float(run_pipeline(pipeline, image, None, seed=seed)[0][0, 0, 0]) for seed in range(400)]
    counts = [corners.count(value) for value in (0.0, 0.25, 0.5, 0.75)]
    assert sum(counts) == 400 and min(counts) > 70, counts


def test_augmentation_ignores_global_state():
    pipeline = build_pipeline([{"GaussNoise": {"p": 1.0}}, {"Affine": {"rotate": [-45, 45], "p": 1.0}}], key="a")
    image = np.random.default_rng(0).random((9, 9, 3), dtype=np.float32)
    first = run_pipeline(pipeline, image.copy(), None, seed=7)[0]
    np.random.seed(1), random.seed(1), torch.manual_seed(1)
    run_pipeline(pipeline, image.copy(), None, seed=8)
    assert np.array_equal(run_pipeline(pipeline, image.copy(), None, seed=7)[0], first)


def test_many_channels_beyond_unit_range():
    """Seven channels from -1000 to 3000: augmented without clipping, resized with the mask, normalised."""
    flipped = volumes([{"HorizontalFlip": {"p": 1.0}}])[0, 0]
    plain = volumes()[0, 0]
    assert plain["image"].shape == (7, 21, 17) and plain["image"].dtype == torch.float32
    assert float(plain["image"].max()) > 2900 and float(plain["image"].min()) < -900
    torch.testing.assert_close(flipped["image"], plain["image"].flip(-1), rtol=1e-5, atol=1e-2)
    assert torch.equal(flipped["target"], plain["target"].flip(-1))
    small = volumes([{"RandomBrightnessContrast": {"p": 1.0}}], image_size=(10, 30), mean=None, std=None)[1, 2]
    assert small["image"].shape == (7, 10, 30) and small["target"].shape == (10, 30)
    assert set(small["target"].unique().tolist()) == {0, 1} and small["target"].dtype == torch.int64
    torch.testing.assert_close(small["image"].mean(dim=(1, 2)), torch.zeros(7), atol=1e-4, rtol=0)
    torch.testing.assert_close(small["image"].std(dim=(1, 2), correction=0), torch.ones(7), atol=1e-3, rtol=0)


def test_resize_keeps_image_and_mask_together():
    """A bright block stays where its labels are, up and down; large labels survive."""
    image, mask = np.zeros((8, 12, 5), np.float32), np.zeros((8, 12), np.int64)
    image[2:6, 4:8], mask[2:6, 4:8] = 1.0, 300
    for size in ((16, 24), (4, 6), (8, 6)):
        bright = resize(image, size)[..., 4] > 0.5
        assert np.array_equal(resize(mask, size, labels=True), np.where(bright, 300, 0))


def test_negative_labels_survive_augmentation():
    mask = np.full((6, 6), -100)
    mask[2:4] = 1
    pipeline = build_pipeline([{"VerticalFlip": {"p": 1.0}}], key="augment.train")
    assert np.array_equal(run_pipeline(pipeline, np.zeros((6, 6, 1), np.float32), mask, seed=0)[1], mask[::-1])


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_file_is_one_line(workers):
    """Also out of a worker, where PyTorch would wrap it in a traceback."""
    loader = Loader(volumes(), EvalBatches(5, batch_size=2), workers=workers)
    with pytest.raises(DataError) as error:
        list(loader)
    assert str(error.value) == "volume4.tif: truncated"


def test_failing_augmentation_names_key_and_file():
    error = volumes([{"RandomCrop": {"height": 100, "width": 100}}])[0, 0]
    assert isinstance(error, ConfigError)
    assert str(error).startswith("augment.train: fails on volume0 of shape (21, 17, 7): ") and "\n" not in str(error)
