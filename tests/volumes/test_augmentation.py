"""MONAI's transforms from a configuration: repeatable, image and label alike, mistakes in one line."""

import numpy as np
import pytest

from vision_gates.errors import ConfigError
from vision_gates.volumes.augmentation import build_volume_pipeline

STEPS = [
    {"RandAffine": {"prob": 1.0, "rotate_range": [0.4], "scale_range": [[-0.2, 0.2], [-0.2, 0.2]]}},
    {"RandGaussianNoise": {"prob": 1.0, "std": 0.1}},
]


def _sample() -> tuple[np.ndarray, np.ndarray]:
    labels = np.zeros((40, 32), np.uint8)
    labels[10:30, 8:20] = 3
    return (labels[None] > 0).astype(np.float32), labels


def test_a_seed_decides_everything() -> None:
    image, labels = _sample()
    pipeline = build_volume_pipeline(STEPS)
    np.random.seed(0)
    first = pipeline(image, labels, seed=1)
    again = build_volume_pipeline(STEPS)(image, labels, seed=1)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], pipeline(image, labels, seed=2)[0])
    np.testing.assert_array_equal(image, _sample()[0]), "the arguments stay"


def test_the_label_moves_with_the_image_and_keeps_its_values() -> None:
    image, labels = _sample()
    moved, target = build_volume_pipeline(STEPS[:1])(image, labels, seed=5)
    assert moved.dtype == np.float32 and target.dtype == labels.dtype
    assert set(np.unique(target)) == {0, 3}
    assert not np.array_equal(target, labels)
    agreement = ((moved[0] > 0.5) == (target == 3)).mean()
    assert agreement > 0.97


@pytest.mark.parametrize("shape", [(33, 20), (12, 17, 9)])
def test_any_number_of_axes(shape: tuple[int, ...]) -> None:
    steps = [{"RandFlip": {"prob": 1.0, "spatial_axis": 0}}, {"RandScaleIntensity": {"prob": 1.0, "factors": 0.2}}]
    image = np.random.default_rng(0).random((2, *shape), dtype=np.float32)
    labels = (image[0] > 0.5).astype(np.uint8)
    moved, target = build_volume_pipeline(steps)(image, labels, seed=0)
    np.testing.assert_array_equal(target, labels[::-1])
    ratio = moved / image[:, ::-1]
    np.testing.assert_allclose(ratio, ratio.flat[0], rtol=1e-4)
    assert not build_volume_pipeline(steps).spatial and build_volume_pipeline(STEPS).spatial


@pytest.mark.parametrize(
    "step, message",
    [
        ({"RandAfine": {}}, r"augment.train: MONAI has no random transform 'RandAfine'; did you mean RandAffine\?"),
        ({"RandAffine": {"rotate": 1}}, r"augment.train: RandAffine has no argument 'rotate'; it has "),
        ({"RandAffine": {"keys": ["image"]}}, r"RandAffine has no argument 'keys'"),
        ({"RandFlip": {"prob": "often"}}, r"augment.train: RandFlip with "),
    ],
)
def test_mistakes(step: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_volume_pipeline([step])
