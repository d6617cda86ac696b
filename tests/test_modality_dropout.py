"""Modality dropout: what goes, how often, that something stays, and the ramp."""

import pytest
import torch

from vision_gates.modality_dropout import modality_dropout, ramped


def dropped(image: torch.Tensor, probability: float, seed: int) -> list[bool]:
    """Which channels are 0 in the result; the others must be untouched."""
    result = modality_dropout(image, probability=probability, seed=seed)
    assert result.shape == image.shape and result.dtype == image.dtype
    gone = [not channel.any() for channel in result]
    assert all(is_gone or torch.equal(a, b) for is_gone, a, b in zip(gone, result, image, strict=True))
    return gone


@pytest.mark.parametrize("spatial", [(5, 6), (3, 4, 5)], ids=["2d", "3d"])
def test_whole_channels_go_and_the_rest_stays(spatial):
    image = 1 + torch.rand(4, *spatial)
    before = image.clone()
    patterns = {tuple(dropped(image, 0.5, seed)) for seed in range(200)}
    assert patterns == {tuple(bool(n >> c & 1) for c in range(4)) for n in range(15)}, "all but the empty image"
    assert torch.equal(image, before)


@pytest.mark.parametrize(("probability", "channels"), [(0.1, 4), (0.5, 3), (0.9, 2), (1.0, 4)])
def test_how_often(probability, channels):
    image, draws = torch.ones(channels, 1, 1), 4000
    gone = torch.tensor([dropped(image, probability, seed) for seed in range(draws)]).float()
    expected = probability - probability**channels / channels
    error = 4 * (expected * (1 - expected) / draws) ** 0.5  # 4 standard deviations, and the seeds are fixed
    assert (gone.mean(0) - expected).abs().max() < error
    assert gone.sum(1).max() == channels - 1 or probability == 0.1


def test_extremes():
    image = torch.full((3, 4, 4), float("nan"), dtype=torch.float16)
    image[1:] = 2.0
    assert not any(dropped(image[1:], 0.0, seed)[0] for seed in range(50))
    assert all(sum(dropped(torch.ones(3, 2, 2), 1.0, seed)) == 2 for seed in range(50))
    assert all(dropped(torch.ones(1, 2, 2), 1.0, seed) == [False] for seed in range(50)), "one alone stays"
    results = [modality_dropout(image, probability=1.0, seed=seed) for seed in range(50)]
    assert any(torch.equal(result[0], torch.zeros(4, 4).half()) for result in results), "0 whatever it was"


def test_a_function_of_the_seed_alone():
    image = torch.rand(6, 4, 4)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = modality_dropout(image, probability=0.5, seed=11)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert torch.equal(modality_dropout(image, probability=0.5, seed=11), first)
    assert any(
        not torch.equal(modality_dropout(image, probability=0.5, seed=seed), first) for seed in (12, 13, 14, 2**32 - 1)
    )


def test_a_greater_probability_drops_the_same_and_more():
    """A seed's draw is compared with the probability, so the ramp adds channels one after the other."""
    image = torch.ones(8, 1)
    for seed in range(50):
        few, many = (dropped(image, probability, seed) for probability in (0.2, 0.6))
        assert all(b for a, b in zip(few, many, strict=True) if a)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0.4, 0, 10), 0.0),
        ((0.4, 5, 10), 0.2),
        ((0.4, 10, 10), 0.4),
        ((0.4, 99, 10), 0.4),
        ((0.4, 0, 0), 0.4),
        ((0.0, 3, 10), 0.0),
    ],
)
def test_ramp(arguments, expected):
    assert ramped(*arguments) == pytest.approx(expected)


def test_mistakes():
    for probability in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="probability: a number from 0 to 1 is needed"):
            modality_dropout(torch.ones(2, 2), probability=probability, seed=0)
    for shape in ((), (0, 4, 4)):
        with pytest.raises(ValueError, match="of one channel or more is needed"):
            modality_dropout(torch.ones(shape), probability=0.5, seed=0)
