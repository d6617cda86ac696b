"""The data sets that installed packages hold: digits and mni152."""

import pickle

import numpy as np
import pytest

from vision_gates.datasets.base import load_splits
from vision_gates.datasets.preflight import preflight
from vision_gates.errors import ConfigError


def test_digits(data):
    splits, statistics = data.check("digits")
    assert statistics.images == {"train": 1197, "val": 300, "test": 300}
    assert splits.task == "classification" and splits.in_chans == 1
    assert splits.class_names == tuple("0123456789")
    assert statistics.counts["val"] == statistics.counts["test"] == [30] * 10
    assert statistics.warnings == []
    names = [name for _, split in splits.items() for name in split.names]
    assert len(set(names)) == 1797
    sample = splits.train.read(5)
    assert sample.image.shape == (8, 8, 1) and sample.image.dtype == np.uint8 and sample.image.max() > 200
    assert sample.target == splits.train.label(5)
    # 16 grey levels and the stated mean of the source, 4.884 of 16 over all images.
    assert abs(statistics.mean[0] - 4.884 / 16) < 0.01


def test_digits_come_out_as_in_the_source(data):
    from sklearn.datasets import load_digits

    source, splits = load_digits(), data.load("digits")
    for _, split in splits.items():
        for index in (0, len(split) - 1):
            number, sample = int(split.names[index][6:]), split.read(index)
            assert sample.target == source.target[number]
            np.testing.assert_allclose(sample.image[:, :, 0] / 255 * 16, source.images[number], atol=0.04)


def test_a_caller_may_change_what_it_read(data):
    split = data.load("digits").train
    expected = split.read(0).image.copy()
    split.read(0).image[:] = 0
    np.testing.assert_array_equal(split.read(0).image, expected)


def test_mni152(data):
    splits, statistics = data.check("mni152", image_size=96)
    assert splits.task == "segmentation" and splits.in_chans == 1
    assert splits.class_names == ("background", "csf", "grey_matter", "white_matter")
    assert statistics.images == {"train": 33, "val": 6, "test": 12}
    assert min(min(counts) for counts in statistics.counts.values()) > 1000
    assert statistics.warnings == []
    sample = splits.test.read(0)
    assert sample.image.shape == (96, 96, 1) and sample.image.dtype == np.float32
    assert sample.target.shape == (96, 96) and sample.target.dtype == np.int64
    assert 0 <= sample.image.min() and 0.5 < sample.image.max() <= 1
    # T1 weighting: white matter is brighter than grey, and grey than CSF.
    brightness = [
        np.mean([splits.train.read(i).image[..., 0][splits.train.read(i).target == c].mean() for i in range(20, 25)])
        for c in (1, 2, 3)
    ]
    assert brightness[0] < brightness[1] < brightness[2]
    # The whole brain is inside the slices: nothing touches their edge.
    for _, split in splits.items():
        for index in range(len(split)):
            target = split.read(index).target
            assert not (target[0].any() or target[-1].any() or target[:, 0].any() or target[:, -1].any())


def test_mni152_front_is_up(data):
    # The brain is narrower in front than behind, so the widest row of a middle slice is in its lower half.
    split = data.load("mni152", image_size=96).val
    target = split.read(0).target
    widths = (target > 0).sum(axis=1)
    rows = np.flatnonzero(widths)
    assert widths.argmax() > (rows[0] + rows[-1]) / 2


@pytest.mark.parametrize(("resolution", "plane"), [(2, "axial"), (2, "coronal"), (1, "sagittal")])
@pytest.mark.parametrize(("neighbours", "gap_mm"), [(0, 6.0), (1, 6.0), (1, 3.0)])
def test_mni152_gap_between_all_slices_used(data, resolution, plane, neighbours, gap_mm):
    splits = data.load(
        "mni152", image_size=96, resolution=resolution, plane=plane, neighbours=neighbours, gap_mm=gap_mm
    )
    used = {part: _channels(split.indices, neighbours) for part, split in splits.items()}
    for part in ("val", "test"):
        distance = min(abs(a - b) for a in used[part] for b in used["train"])
        assert distance * resolution > gap_mm
        assert min(used["train"]) < min(used[part]) and max(used[part]) < max(used["train"])
    assert min(abs(a - b) for a in used["val"] for b in used["test"]) * resolution > gap_mm


def _channels(indices: list[int], neighbours: int) -> set[int]:
    return {index + k for index in indices for k in range(-neighbours, neighbours + 1)}


def test_mni152_sagittal_slices_do_not_meet_their_mirror_image(data):
    splits = data.load("mni152", image_size=192, plane="sagittal", resolution=1)
    middle = (197 - 1) // 2
    assert all(index <= middle for _, split in splits.items() for index in split.indices)


def test_mni152_neighbours_are_channels(data):
    plain, stacked = data.load("mni152", image_size=96), data.load("mni152", image_size=96, neighbours=2)
    assert stacked.in_chans == 5
    sample = stacked.train.read(stacked.train.indices.index(28))
    assert sample.image.shape == (96, 96, 5)
    for k, channel in zip((-1, 0, 1), (1, 2, 3), strict=True):
        alone = plain.train.read(plain.train.indices.index(28 + k))
        np.testing.assert_array_equal(sample.image[:, :, channel], alone.image[:, :, 0])
    np.testing.assert_array_equal(sample.target, plain.train.read(plain.train.indices.index(28)).target)


def test_mni152_without_room_says_what_to_change(data):
    with pytest.raises(ConfigError, match=r"data.gap_mm=40.*leave none to train on; lower one of them"):
        data.load("mni152", image_size=96, gap_mm=40)


def test_ignore_index_is_for_segmentation(data):
    with pytest.raises(ConfigError, match="data.ignore_index=255: only segmentation"):
        data.load("digits", ignore_index=255)


@pytest.mark.parametrize("type_name", ["digits", "mni152"])
def test_splits_can_be_pickled(data, type_name):
    config = data.config(type_name)
    splits = load_splits(config)
    copy = pickle.loads(pickle.dumps(splits))
    np.testing.assert_array_equal(copy.val.read(1).image, splits.val.read(1).image)
    assert preflight(copy, config) == preflight(splits, config)
