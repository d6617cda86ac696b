"""Batches transformed on the device: repeatable, image and label alike, each step as it says, mistakes in one line."""

import numpy as np
import pytest
import torch

from vision_gates.errors import ConfigError
from vision_gates.volumes.batch_augmentation import STEPS, BatchAugmentation, build_batch_augmentation

EVERYTHING = [
    {"Spatial": {"prob": 1, "rotate": 30, "scale": [0.8, 1.25], "stretch": 0.1, "shear": 0.1, "shift": 0.1,
                 "flip": [0, 1], "elastic": 2, "elastic_prob": 1}},
    *({name: {"prob": 1}} for name in STEPS if name != "Spatial"),
]  # fmt: skip


def batch(aug: BatchAugmentation, *, samples: int = 3, channels: int = 1, seed: int = 0):
    """A bright box with label 2 on faint noise, cut to what the steps want."""
    size = aug.sample_size
    image = 0.05 * torch.rand(samples, channels, *size, generator=torch.Generator().manual_seed(seed))
    target = torch.zeros(samples, *size, dtype=torch.uint8)
    box = tuple(slice(side // 4, side // 2) for side in size)
    image[(slice(None), slice(None), *box)] += 1
    target[(slice(None), *box)] = 2
    return image, target


def centre(tensor: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """The middle of the last axes."""
    for axis, side in enumerate(size, start=tensor.ndim - len(size)):
        tensor = tensor.narrow(axis, (tensor.shape[axis] - side) // 2, side)
    return tensor


@pytest.mark.parametrize("size", [(24, 17), (12, 16, 9)])
def test_a_seed_decides_everything(size):
    steps = [dict(step) for step in EVERYTHING]
    augment = build_batch_augmentation(steps, size=size)
    image, target = batch(augment)
    first = augment(image.clone(), target.clone(), seed=1)
    torch.manual_seed(5)
    again = build_batch_augmentation(steps, size=size)(image, target, seed=1)
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    torch.testing.assert_close(image, batch(augment)[0], rtol=0, atol=0), "the arguments stay"
    other = augment(image, target, seed=2)
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[1], other[1])
    assert first[0].shape == (3, 1, *size) and first[1].shape == (3, *size) and first[1].dtype == torch.uint8
    assert not torch.equal(first[1][0], first[1][1]), "each sample by its own numbers"


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("size", [(24, 17), (12, 16, 9)])
def test_a_step_of_no_sample_changes_nothing(name, size):
    augment = build_batch_augmentation([{name: {"prob": 0}}], size=size)
    image, target = batch(augment)
    changed, labels = augment(image, target, seed=0)
    torch.testing.assert_close(changed, centre(image, size), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(labels, centre(target, size), rtol=0, atol=0)


@pytest.mark.parametrize("name", [name for name in STEPS if name != "Spatial"])
def test_steps_on_intensities_leave_labels(name):
    augment = build_batch_augmentation([{name: {"prob": 1}}], size=(20, 20))
    image, target = batch(augment)
    changed, labels = augment(image, target, seed=0)
    assert ((changed - image).abs().amax(dim=(1, 2, 3)) > 1e-3).all()
    assert torch.equal(labels, target)


@pytest.mark.parametrize("size", [(40, 32), (20, 24, 16)])
def test_labels_move_with_the_image(size):
    augment = build_batch_augmentation(EVERYTHING[:1], size=size)
    image, target = batch(augment, samples=8)
    moved, labels = augment(image, target, seed=3)
    assert set(labels.unique().tolist()) == {0, 2}
    assert ((moved[:, 0] > 0.5) == (labels == 2)).float().mean() > 0.97


def test_axes_are_those_of_the_array():
    """A turn by 90 degrees, a flip, a zoom and a shift, against NumPy."""
    target = torch.zeros(1, 9, 9, dtype=torch.uint8)
    target[0, 1, 2:8] = 1
    image = target[:, None].float()

    class Fixed(np.random.Generator):
        """Draws the upper end, and of choices the first."""

        def uniform(self, low=0.0, high=1.0, size=None):
            return np.broadcast_to(np.asarray(high, dtype=float), np.empty(size).shape).copy()

        def choice(self, a, size=None):
            return np.full(size, a[0])

    def apply(**fields):
        step = build_batch_augmentation([{"Spatial": {"prob": 1, **fields}}], size=(9, 9)).steps[0]
        fixed = Fixed(np.random.PCG64(0))
        matrix, shift = step._affine(fixed, 1, np.array([9.0, 9.0]), np.ones(2))
        places = np.argwhere(np.ones((9, 9))) - 4
        source = np.rint(places @ matrix[0].T + shift[0] + 4).astype(int)
        inside = ((source >= 0) & (source < 9)).all(axis=1)
        result = np.zeros((9, 9), np.uint8)
        result[tuple((places[inside] + 4).T)] = target[0].numpy()[tuple(source[inside].T)]
        return result

    before = target[0].numpy()
    np.testing.assert_array_equal(apply(flip=(0,)), before[::-1])
    np.testing.assert_array_equal(apply(flip=(1,)), before[:, ::-1])
    assert any(np.array_equal(apply(rotate=90), np.rot90(before, k)) for k in (1, 3))
    np.testing.assert_array_equal(apply(shift=1 / 9), np.pad(before, ((0, 1), (0, 1)))[1:, 1:])
    flipped = build_batch_augmentation([{"Spatial": {"prob": 0, "flip": [0]}}], size=(9, 9))
    wide = torch.nn.functional.pad(image, (2, 2, 2, 2))
    seen = {bool(torch.equal(flipped(wide, wide[:, 0].byte(), seed=s)[1], target.flip(1))) for s in range(12)}
    assert seen == {True, False}, "a flip in half of the samples"


def test_angles_are_in_millimetres():
    """With voxels of 1 x 1 x 4 mm a turn about x keeps distances in millimetres."""
    step = build_batch_augmentation([{"Spatial": {"prob": 1, "rotate": [40, 0, 0]}}], size=(8, 8, 8)).steps[0]
    spacing = np.array([1.0, 1.0, 4.0])
    matrices, _ = step._affine(np.random.default_rng(0), 5, np.full(3, 8.0), spacing)
    turns = spacing[:, None] * matrices / spacing
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), (5, 3, 3)), atol=1e-12)
    assert np.abs(matrices[:, 1, 2]).max() > 0.5 and np.abs(matrices[:, 2, 1]).max() < 0.2


def test_neighbouring_slices_share_the_numbers_of_their_modality():
    """Channels are slices of modalities: slice 0 of both, slice 1 of both, ..."""
    augment = build_batch_augmentation([{"Brightness": {"prob": 1, "factor": [0.5, 2]}}], size=(6, 6), modalities=2)
    ratio = augment(torch.ones(2, 6, 6, 6), torch.zeros(2, 6, 6, dtype=torch.uint8), seed=0)[0][:, :, 0, 0]
    torch.testing.assert_close(ratio[:, 0::2], ratio[:, :1].expand(2, 3))
    torch.testing.assert_close(ratio[:, 1::2], ratio[:, 1:2].expand(2, 3))
    assert len(ratio.unique()) == 4


def test_gamma_keeps_mean_and_deviation_and_contrast_the_range():
    generator = torch.Generator().manual_seed(0)
    image, target = torch.randn(4, 1, 32, 32, generator=generator) + 3, torch.zeros(4, 32, 32, dtype=torch.uint8)
    bent, _ = build_batch_augmentation([{"Gamma": {"prob": 1}}], size=(32, 32))(image, target, seed=0)
    torch.testing.assert_close(bent.mean((1, 2, 3)), image.mean((1, 2, 3)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(bent.std((1, 2, 3)), image.std((1, 2, 3)), rtol=1e-3, atol=1e-3)
    steps = [{"Contrast": {"prob": 1, "factor": [2, 2]}}]
    stretched, _ = build_batch_augmentation(steps, size=(32, 32))(image, target, seed=0)
    torch.testing.assert_close(stretched.amax((1, 2, 3)), image.amax((1, 2, 3)))
    assert (stretched.std((1, 2, 3)) > 1.3 * image.std((1, 2, 3))).all()


def test_blur_is_scipys():
    from scipy import ndimage

    augment = build_batch_augmentation([{"Blur": {"prob": 1, "sigma": [0.8, 0.8]}}], size=(20, 16, 12))
    image = torch.rand(1, 1, 20, 16, 12, generator=torch.Generator().manual_seed(0))
    blurred, _ = augment(image, torch.zeros(1, 20, 16, 12, dtype=torch.uint8), seed=0)
    expected = ndimage.gaussian_filter(image[0, 0].numpy(), 0.8, mode="nearest", radius=3)
    np.testing.assert_allclose(blurred[0, 0].numpy(), expected, atol=1e-5)


def test_constant_samples_stay_finite():
    augment = build_batch_augmentation(EVERYTHING, size=(16, 16))
    size = augment.sample_size
    image, _ = augment(torch.zeros(2, 1, *size), torch.zeros(2, *size, dtype=torch.uint8), seed=0)
    assert image.isfinite().all()


@pytest.mark.parametrize(
    "steps, message",
    [
        ([{"Spatiel": {}}], r"augment.batch: there is no 'Spatiel'; did you mean Spatial\? \(Spatial, Noise, "),
        ([{"Noise": {"sigma": 1}}], r"augment.batch: Noise.sigma: it has prob, std"),
        ([{"Noise": {"prob": 2}}], r"augment.batch: Noise.prob: .* got 2"),
        ([{"Blur": {"sigma": [1, 0.5]}}], r"Blur.sigma: .*the first number must not be above the second"),
        ([{"Noise": {}}, {"Spatial": {}}], "Spatial must be the first step"),
        ([{"Spatial": {"flip": [2]}}], r"Spatial.flip: axes 0 to 1 are there, got \[2\]"),
        ([{"Spatial": {"rotate": [1, 2, 3]}}], "one number is needed for slices"),
    ],
)
def test_mistakes_are_one_line(steps, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_batch_augmentation(steps, size=(8, 8))
    assert "\n" not in str(caught.value)
