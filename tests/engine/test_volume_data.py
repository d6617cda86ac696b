"""Patches and slices of prepared cases, and labelling whole volumes with what learnt from them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vision_gates.engine.volume_data import VolumeInfo, VolumePatches, VolumePredictor, choose_patch_size
from vision_gates.volumes.augmentation import build_volume_pipeline
from vision_gates.volumes.cache import CachedCase, CaseCache
from vision_gates.volumes.geometry import Geometry
from vision_gates.volumes.preprocessing import ChannelPlan, Prepared, Preprocessing

PLAN = Preprocessing(spacing=None, channels=(ChannelPlan(kind="zscore"),))


def _info(**changes) -> VolumeInfo:
    settings = dict(preprocessing=PLAN, spatial_dims=2, patch_size=(8, 8), channel_names=("MR",))
    return VolumeInfo(**(settings | changes))


@pytest.fixture
def case(tmp_path: Path) -> CachedCase:
    """Voxel (x, y, z) has the intensity 100 z + 10 y + x; one voxel is labelled."""
    x, y, z = np.meshgrid(np.arange(6), np.arange(7), np.arange(5), indexing="ij")
    labels = np.zeros((6, 7, 5), np.uint8)
    labels[4, 5, 3] = 1
    file = tmp_path / "image.nii"
    file.write_bytes(b"")
    geometry = Geometry((6, 7, 5), np.eye(4))
    prepared = Prepared((100.0 * z + 10 * y + x)[None].astype(np.float32), labels, geometry, geometry)
    return CaseCache(tmp_path / "cache", "").find("case", [file], lambda: prepared)


def _patches(case: CachedCase, info: VolumeInfo, **changes) -> VolumePatches:
    settings = dict(samples=6, foreground=1.0, pipeline=build_volume_pipeline([]), seed=3)
    return VolumePatches([case], ["case"], info, **(settings | changes))


def test_a_slice_comes_with_its_neighbours_in_order(case: CachedCase) -> None:
    sample = _patches(case, _info(neighbours=2))[0, 0]
    assert sample["image"].shape == (5, 8, 8) and sample["target"].shape == (8, 8)
    place = (sample["target"] == 1).nonzero()
    assert place.tolist() == [[4, 4]], "the labelled voxel is in the middle"
    assert sample["image"][:, 4, 4].tolist() == [154.0, 254.0, 354.0, 454.0, 454.0], "the last slice repeats"
    assert sample["image"][2, 4, 5] == 364.0, "columns run along y"
    assert sample["image"][2, 7, 7] == 0, "zero beyond the volume"


@pytest.mark.parametrize("axis, expected", [(0, 354.0 + 10), (1, 354.0 + 100), (2, 354.0 + 10)])
def test_slices_across_any_axis(case: CachedCase, axis: int, expected: float) -> None:
    sample = _patches(case, _info(slice_axis=axis))[0, 0]
    column = {0: (5, 4), 1: (4, 5), 2: (4, 5)}[axis]
    assert sample["image"][0, 4, 4] == 354.0
    assert sample["image"][(0, *column)] == expected


def test_patches_in_three_dimensions(case: CachedCase) -> None:
    sample = _patches(case, _info(spatial_dims=3, patch_size=(4, 2, 6)))[0, 0]
    assert sample["image"].shape == (1, 4, 2, 6)
    assert sample["target"].nonzero().tolist() == [[2, 1, 3]]
    assert sample["image"][0, 2, 1].tolist() == [54.0, 154.0, 254.0, 354.0, 454.0, 0.0]


def test_samples_are_wider_where_batches_are_turned_later(case: CachedCase) -> None:
    sample = _patches(case, _info(), wide=(12, 10))[0, 0]
    assert sample["image"].shape == (1, 12, 10) and sample["target"].shape == (12, 10)
    assert sample["image"][0, 6, 5] == 354.0 and sample["target"].dtype == torch.uint8
    plain = _patches(case, _info())[0, 0]
    torch.testing.assert_close(sample["image"][:, 2:10, 1:9], plain["image"])


def test_a_sample_is_a_function_of_seed_epoch_and_number(case: CachedCase) -> None:
    steps = [{"RandAffine": {"prob": 1.0, "rotate_range": [0.5]}}, {"RandGaussianNoise": {"prob": 1.0}}]
    info = _info(patch_size=(4, 4))

    def images(**changes) -> list[torch.Tensor]:
        patches = _patches(case, info, foreground=0.5, pipeline=build_volume_pipeline(steps), **changes)
        return [patches[epoch, index]["image"] for epoch in (0, 1) for index in range(3)]

    first, again, other = images(), images(), images(seed=4)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b) and not torch.equal(a, c)
        assert a.shape == (1, 4, 4)
    assert not torch.equal(first[0], first[3]), "another epoch, another sample"


def test_modalities_are_left_out_more_and_more(tmp_path: Path) -> None:
    file = tmp_path / "image.nii"
    file.write_bytes(b"")
    geometry = Geometry((4, 4, 4), np.eye(4))
    prepared = Prepared(np.ones((3, 4, 4, 4), np.float32), np.zeros((4, 4, 4), np.uint8), geometry, geometry)
    case = CaseCache(tmp_path / "cache", "").find("case", [file], lambda: prepared)
    info = _info(patch_size=(4, 4), channel_names=("T1", "T2", "FLAIR"))
    patches = _patches(case, info, samples=200, dropout=(0.5, 10))

    def left_out(epoch: int) -> float:
        kept = torch.stack([patches[epoch, index]["image"].amax(dim=(1, 2)) for index in range(200)])
        assert kept.amax(dim=1).eq(1).all(), "never all of them"
        return float(1 - kept.mean())

    assert left_out(0) == 0 < left_out(5) < left_out(10)


def test_patch_size_follows_the_typical_case() -> None:
    assert choose_patch_size((35.0, 50.0, 36.0), voxels=96**3) == (48, 64, 48)
    assert choose_patch_size((512, 512, 9), voxels=96**3)[2] == 9
    size = choose_patch_size((512, 512, 300), voxels=96**3)
    assert size[0] == size[1] and max(size) - min(size) <= 16 and np.prod(size) <= 112**3
    assert choose_patch_size((216.0, 256.0), voxels=512 * 512) == (224, 256)


class _Threshold(nn.Module):
    """Two classes by the first channel's sign; three-dimensional or flat."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack((-x[:, 0], x[:, 0]), dim=1)


@pytest.mark.parametrize("view", ["RAS", "PRS", "IRA", "IAR", "LPI"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_labels_come_back_in_the_order_of_the_image(view: str, spatial_dims: int) -> None:
    image = np.random.default_rng(0).normal(size=(1, 9, 12, 7)).astype(np.float32)
    info = _info(view=view, spatial_dims=spatial_dims, patch_size=(5, 4, 6)[:spatial_dims])
    predictor = VolumePredictor(_Threshold(), info, num_classes=2, batch_size=3, device=torch.device("cpu"))
    np.testing.assert_array_equal(predictor.predict(image), image[0] > 0)
    labels = predictor(torch.from_numpy(image)[None])
    assert labels.dtype == torch.int64 and torch.equal(labels[0], torch.from_numpy(image[0] > 0).long())
    assert "windows of" in predictor.plan(image.shape).describe()
