"""The losses against PyTorch's, MONAI's, hand computations and gradcheck; ignored pixels, absent classes, bad input.

The tests of the region losses reach them through SegmentationLoss, which hands them probabilities.
"""

import pytest
import torch
import torch.nn.functional as F

from vision_gates.config import parse_config
from vision_gates.engine.building import RunInfo, build_loss
from vision_gates.errors import ConfigError
from vision_gates.losses import ClassificationLoss, DeepSupervisionLoss, SegmentationLoss
from vision_gates.region_losses import RegionTversky, SoftDice, Tversky


def _batch(*spatial: int, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, classes, *spatial, generator=generator)
    return logits, torch.randint(0, classes, (3, *spatial), generator=generator)


@pytest.mark.parametrize("spatial", [(7,), (5, 9), (3, 4, 5)], ids=["1d", "2d", "3d"])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 1.0, 3.0, 0.0])], ids=["plain", "weighted"])
def test_cross_entropy_term_is_that_of_pytorch(spatial, weights):
    logits, target = _batch(*spatial)
    target.view(-1)[::5] = 255
    loss = SegmentationLoss(num_classes=4, dice_weight=0.0, class_weights=weights, ignore_index=255)
    expected = F.cross_entropy(logits, target, weight=weights, ignore_index=255)
    torch.testing.assert_close(loss(logits, target), expected)


def test_dice_term_by_hand():
    # Two pixels, two classes, p(class 1) = 0.75 and 0.25, truth 1 and 0.
    logits = torch.tensor([[0.25, 0.75], [0.75, 0.25]]).log().T.reshape(1, 2, 1, 2)
    target = torch.tensor([[[1, 0]]])
    # Each class: overlap 0.75, sizes 1 + 1: (2 * 0.75 + 1) / (2 + 1).
    loss = SegmentationLoss(num_classes=2, dice_weight=1.0)(logits, target)
    assert loss.item() == pytest.approx(1.0 - 2.5 / 3.0, abs=1e-6)


def test_terms_add_up_and_a_perfect_prediction_costs_nothing():
    logits, target = _batch(6, 6)
    parts = [SegmentationLoss(num_classes=4, dice_weight=w)(logits, target) for w in (0.0, 1.0, 0.3)]
    torch.testing.assert_close(parts[2], 0.7 * parts[0] + 0.3 * parts[1])
    perfect = 50.0 * F.one_hot(target, 4).movedim(-1, 1).float()
    assert SegmentationLoss(num_classes=4)(perfect, target).item() < 1e-6


def test_ignored_pixels_change_neither_loss_nor_gradient():
    logits, target = _batch(4, 4)
    target[:, 0] = 255
    other = logits.clone()
    other[:, :, 0] += 7.0 * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1))
    loss = SegmentationLoss(num_classes=4, ignore_index=255)
    logits.requires_grad_()
    value = loss(logits, target)
    torch.testing.assert_close(value, loss(other, target))
    value.backward()
    assert logits.grad[:, :, 0].abs().max() == 0.0
    assert logits.grad[:, :, 1:].abs().max() > 0.0


def test_degenerate_batches_stay_finite():
    logits = torch.zeros(2, 3, 4, 4, requires_grad=True)
    ignored = SegmentationLoss(num_classes=3, ignore_index=9)(logits, torch.full((2, 4, 4), 9))
    ignored.backward()
    assert ignored.item() == 0.0 and logits.grad.abs().max() == 0.0
    # Background only, predicted with certainty: the two absent classes cost nothing.
    certain = torch.zeros(1, 3, 4, 4)
    certain[:, 0] = 60.0
    assert SegmentationLoss(num_classes=3)(certain, torch.zeros(1, 4, 4, dtype=torch.long)).item() < 1e-6
    # Half precision logits far outside its comfortable range.
    hot = torch.full((1, 3, 4, 4), 6e4, dtype=torch.float16)
    value = SegmentationLoss(num_classes=3)(hot, torch.zeros(1, 4, 4, dtype=torch.long))
    assert value.dtype == torch.float32 and torch.isfinite(value)


def test_gradients():
    logits, target = _batch(2, 3)
    target[0, 0, 0] = 255
    weights = torch.tensor([0.5, 1.0, 2.0, 1.5])
    loss = SegmentationLoss(num_classes=4, class_weights=weights, ignore_index=255)
    logits = logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2))
    step = 1e-2
    with torch.no_grad():
        numeric = (loss(logits + step * direction, target) - loss(logits - step * direction, target)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("label", [4, 255, -1])
def test_a_label_that_is_no_class_is_an_error_not_a_dropped_pixel(label):
    logits, target = _batch(4, 4)
    target[1, 2, 3] = label
    with pytest.raises(ValueError, match=rf"label {label} is not in 0\.\.3"):
        SegmentationLoss(num_classes=4)(logits, target)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes"),
        ({"num_classes": 3, "dice_weight": 1.5}, "dice_weight"),
        ({"num_classes": 3, "class_weights": torch.ones(2)}, "class_weights"),
        ({"num_classes": 2, "class_weights": torch.tensor([1.0, float("nan")])}, "class_weights"),
        ({"num_classes": 2, "class_weights": torch.zeros(2)}, "class_weights"),
    ],
)
def test_segmentation_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        SegmentationLoss(**arguments)


def test_shapes_that_do_not_fit():
    logits, target = _batch(4, 4)
    with pytest.raises(ValueError, match="are needed"):
        SegmentationLoss(num_classes=4)(logits, target[:, :3])
    with pytest.raises(ValueError, match="are needed"):
        SegmentationLoss(num_classes=5)(logits, target)
    with pytest.raises(ValueError, match="are needed"):
        ClassificationLoss()(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="label_smoothing"):
        ClassificationLoss(label_smoothing=1.0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 1.0, 3.0, 0.5])], ids=["plain", "weighted"])
def test_one_hot_labels_give_the_loss_of_the_indices(smoothing, weights):
    logits, target = _batch()
    loss = ClassificationLoss(label_smoothing=smoothing, class_weights=weights)
    expected = F.cross_entropy(logits, target, weight=weights, label_smoothing=smoothing)
    torch.testing.assert_close(loss(logits, target), expected)
    torch.testing.assert_close(loss(logits, F.one_hot(target, 4)), expected)


def test_mixed_labels_give_the_mix_of_the_losses():
    logits, target = _batch()
    other = (target + 1) % 4
    mixed = 0.3 * F.one_hot(target, 4).float() + 0.7 * F.one_hot(other, 4).float()
    loss = ClassificationLoss()
    torch.testing.assert_close(loss(logits, mixed), 0.3 * loss(logits, target) + 0.7 * loss(logits, other))
    assert loss(logits.half(), mixed).dtype == torch.float32


def test_weights_move_with_the_module_and_stay_out_of_the_checkpoint():
    weights = torch.ones(3)
    loss = SegmentationLoss(num_classes=3, class_weights=weights)
    weights.zero_()
    assert loss.class_weights.sum() == 3.0
    assert not loss.state_dict()
    assert loss.to("meta").class_weights.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_gives_the_loss_and_gradient_of_the_cpu_deterministically():
    logits, target = _batch(33, 47)
    target[:, :5] = 255
    weights = torch.tensor([0.2, 1.0, 3.0, 0.5])
    results = []
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # raises for an operation that is not
    try:
        for device in ("cpu", "cuda", "cuda"):
            loss = SegmentationLoss(num_classes=4, class_weights=weights, ignore_index=255).to(device)
            leaf = logits.detach().to(device, copy=True).requires_grad_()
            value = loss(leaf, target.to(device))
            value.backward()
            results.append((value.cpu().detach(), leaf.grad.cpu()))
    finally:
        torch.use_deterministic_algorithms(before)
    torch.testing.assert_close(results[0], results[1])
    assert torch.equal(results[1][0], results[2][0]) and torch.equal(results[1][1], results[2][1])


def test_deep_supervision_is_the_weighted_mean_of_the_outputs_losses():
    inner = SegmentationLoss(num_classes=4, class_weights=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    outputs, target = [_batch(5, 6, seed=seed)[0] for seed in range(3)], _batch(5, 6)[1]
    a, b, c = (inner(output, target) for output in outputs)
    torch.testing.assert_close(DeepSupervisionLoss(inner)(outputs, target), (4 * a + 2 * b + c) / 7)
    torch.testing.assert_close(DeepSupervisionLoss(inner, weights=(3, 0, 1))(tuple(outputs), target), (3 * a + c) / 4)
    assert torch.equal(DeepSupervisionLoss(inner, weights=(3, 0, 1))(outputs[1], target), b)
    torch.testing.assert_close(DeepSupervisionLoss(inner)(outputs[:1], target), a)
    leaves = [output.requires_grad_() for output in outputs]
    DeepSupervisionLoss(inner)(leaves, target).backward()
    assert all(leaf.grad.abs().max() > 0 for leaf in leaves)


def test_deep_supervision_mistakes():
    inner = SegmentationLoss(num_classes=4)
    logits, target = _batch(5, 6)
    with pytest.raises(ValueError, match="2 outputs for 3 weights of deep supervision"):
        DeepSupervisionLoss(inner, weights=(1, 1, 1))([logits, logits], target)
    with pytest.raises(ValueError, match="0 outputs for 0 weights"):
        DeepSupervisionLoss(inner)([], target)
    for weights in ((), (0, 0), (1, -1), (1, float("nan")), (1, float("inf"))):
        with pytest.raises(ValueError, match="finite numbers >= 0, not all zero, are needed"):
            DeepSupervisionLoss(inner, weights=weights)


# ---------------------------------------------------------------- region losses, focal cross-entropy

SPATIAL = pytest.mark.parametrize("spatial", [(7,), (5, 9), (3, 4, 5)], ids=["1d", "2d", "3d"])


def _only(overlap: torch.nn.Module, **kwargs) -> SegmentationLoss:
    return SegmentationLoss(num_classes=4, dice_weight=1.0, overlap=overlap, **kwargs)


@SPATIAL
def test_tversky_of_equal_weights_is_soft_dice(spatial):
    logits, target = _batch(*spatial)
    dice = _only(SoftDice())(logits, target)
    torch.testing.assert_close(_only(Tversky(alpha=0.5, beta=0.5))(logits, target), dice)
    assert torch.equal(SegmentationLoss(num_classes=4, dice_weight=1.0)(logits, target), dice)


def test_tversky_by_hand():
    # One class of two, p = 0.75, 0.25, 0.5 and truth 1, 0, 0: TP 0.75, FP 0.75, FN 0.25; the other mirrors it.
    p = torch.tensor([0.75, 0.25, 0.5])
    logits = torch.stack([1 - p, p]).log().reshape(1, 2, 3)
    loss = SegmentationLoss(num_classes=2, dice_weight=1.0, overlap=Tversky(alpha=0.2, beta=0.9))
    ones = (0.75 + 0.5) / (0.75 + 0.2 * 0.75 + 0.9 * 0.25 + 0.5)
    zeros = (1.25 + 0.5) / (1.25 + 0.2 * 0.25 + 0.9 * 0.75 + 0.5)
    assert loss(logits, torch.tensor([[1, 0, 0]])).item() == pytest.approx(1 - (ones + zeros) / 2, abs=1e-6)


@SPATIAL
def test_tversky_is_that_of_monai(spatial):
    losses = pytest.importorskip("monai.losses")
    logits, target = _batch(*spatial)
    theirs = losses.TverskyLoss(
        softmax=True, to_onehot_y=True, batch=True, alpha=0.2, beta=0.9, smooth_nr=0.5, smooth_dr=0.5
    )
    torch.testing.assert_close(_only(Tversky(alpha=0.2, beta=0.9))(logits, target), theirs(logits, target.unsqueeze(1)))


def test_beta_above_alpha_prefers_too_much_to_too_little():
    target = torch.zeros(1, 8, 8, dtype=torch.long)
    target[:, 2:6, 2:6] = 1
    wide, narrow = torch.zeros_like(target), torch.zeros_like(target)
    wide[:, 2:6, 2:8] = narrow[:, 2:6, 2:4] = 1  # 8 pixels too many, 8 too few
    wide, narrow = (20.0 * F.one_hot(mask, 2).movedim(-1, 1).float() for mask in (wide, narrow))

    def loss(logits, **weights):
        overlap = Tversky(**weights)
        return overlap(logits.softmax(1)[:, 1:], target.unsqueeze(1).float()).item()

    assert loss(wide, alpha=0.1, beta=0.9) < loss(narrow, alpha=0.1, beta=0.9)
    assert loss(wide, alpha=0.9, beta=0.1) > loss(narrow, alpha=0.9, beta=0.1)


def _region_tversky(p, y, windows) -> torch.Tensor:
    """Region by region and class by class, as it is written."""
    s, indices = 1e-5, []
    for window in windows:
        for c in range(1, p.shape[1]):
            p_BS, y_BS = (x[(slice(None), c, *window)] for x in (p, y))
            tp, fp, fn = (
                sum(part.mean() for part in counts) for counts in (p_BS * y_BS, p_BS * (1 - y_BS), (1 - p_BS) * y_BS)
            )
            alpha, beta = (0.3 + 0.4 * (n + s) / (fp + fn + s) for n in (fp, fn))
            indices.append((tp + s) / (tp + alpha * fp + beta * fn + s))
    return 1 - torch.stack(indices).mean()


@pytest.mark.parametrize(
    ("spatial", "grid", "windows"),
    [
        ((4, 6), 2, [(slice(a, a + 2), slice(b, b + 3)) for a in (0, 2) for b in (0, 3)]),
        # 5 positions in 2 cells: 3 and 2; one position in 2 cells: one.
        ((5, 1), 2, [(slice(0, 3), slice(0, 1)), (slice(3, 5), slice(0, 1))]),
        ((4, 3, 2), (2, 1, 2), [(slice(a, a + 2), slice(0, 3), slice(b, b + 1)) for a in (0, 2) for b in (0, 1)]),
    ],
    ids=["2d", "uneven", "3d"],
)
def test_region_tversky_by_hand(spatial, grid, windows):
    logits, target = _batch(*spatial)
    p, y = logits.double().softmax(1), F.one_hot(target, 4).movedim(-1, 1).double()
    expected = _region_tversky(p, y, windows)
    torch.testing.assert_close(RegionTversky(grid=grid)(p, y), expected)
    torch.testing.assert_close(_only(RegionTversky(grid=grid))(logits, target), expected.float())


@pytest.mark.parametrize("spatial", [(8, 12), (4, 8, 12)], ids=["2d", "3d"])
def test_cells_that_divide_the_axes_are_those_of_adaptive_pooling(spatial):
    x = torch.randn(3, *spatial)
    pool = F.adaptive_avg_pool2d if len(spatial) == 2 else F.adaptive_avg_pool3d
    torch.testing.assert_close(RegionTversky(grid=4)._cell_means(x), pool(x, 4))


def test_region_tversky_weighs_an_error_where_it_is():
    """The same few wrong pixels cost more in a region of their own than among many right ones."""
    target = torch.zeros(1, 8, 8, dtype=torch.long)
    target[:, :4] = 1
    p = F.one_hot(target, 2).movedim(-1, 1).double()
    among, alone = p.clone(), p.clone()
    among[:, :, 0, 0], alone[:, :, 7, 7] = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    loss = RegionTversky(grid=2)
    assert loss(p, p).item() == pytest.approx(0, abs=1e-12)
    assert loss(alone, p) > 5 * loss(among, p) > 0


@SPATIAL
@pytest.mark.parametrize("weights", [None, torch.tensor([0.2, 1.0, 3.0, 0.0])], ids=["plain", "weighted"])
def test_focal_cross_entropy_by_hand(spatial, weights):
    logits, target = _batch(*spatial)
    target.view(-1)[::5] = 255
    pixel = F.cross_entropy(logits, target, reduction="none", ignore_index=255)
    factor = torch.ones(4) if weights is None else weights
    factor = torch.where(target == 255, 0.0, factor[target.clamp(max=3)])
    for gamma in (0.5, 2.0):
        loss = SegmentationLoss(
            num_classes=4, dice_weight=0.0, class_weights=weights, ignore_index=255, focal_gamma=gamma
        )
        expected = (factor * (1 - (-pixel).exp()) ** gamma * pixel).sum() / factor.sum()
        torch.testing.assert_close(loss(logits, target), expected)


def test_focal_cross_entropy_is_that_of_monai():
    losses = pytest.importorskip("monai.losses")
    logits, target = _batch(5, 9)
    theirs = losses.FocalLoss(use_softmax=True, to_onehot_y=True, gamma=1.5)
    loss = SegmentationLoss(num_classes=4, dice_weight=0.0, focal_gamma=1.5)
    # Its mean counts the classes, too.
    torch.testing.assert_close(loss(logits, target) / 4, theirs(logits, target.unsqueeze(1)))


def test_a_gamma_that_vanishes_is_plain_cross_entropy():
    logits, target = _batch(5, 9)
    plain = F.cross_entropy(logits, target)
    losses = [SegmentationLoss(num_classes=4, dice_weight=0.0, focal_gamma=g)(logits, target) for g in (0.0, 1e-7, 1.0)]
    torch.testing.assert_close(losses[0], plain)
    torch.testing.assert_close(losses[1], plain)
    assert losses[2] < 0.95 * plain


OVERLAPS = pytest.mark.parametrize(
    "overlap", [SoftDice(), Tversky(), RegionTversky(grid=2)], ids=lambda overlap: type(overlap).__name__
)


@OVERLAPS
@pytest.mark.parametrize("spatial", [(3,), (2, 3), (2, 1, 3)], ids=["1d", "2d", "3d"])
def test_gradients_in_float64(overlap, spatial):
    logits, target = _batch(*spatial)
    target[0].view(-1)[0] = 255
    weights = torch.tensor([0.5, 1.0, 2.0, 1.5])
    loss = SegmentationLoss(
        num_classes=4, overlap=overlap, class_weights=weights, ignore_index=255, focal_gamma=1.5, dice_weight=0.4
    )
    logits = logits.double().requires_grad_()
    assert loss(logits, target).dtype == torch.float64
    assert torch.autograd.gradcheck(lambda x: loss(x, target), logits)


@OVERLAPS
def test_ignored_pixels_change_nothing_whatever_the_overlap(overlap):
    logits, target = _batch(6, 4)
    target[:, 0] = 255
    other = logits.clone()
    other[:, :, 0] += 7.0 * torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(1))
    loss = SegmentationLoss(num_classes=4, ignore_index=255, overlap=overlap, focal_gamma=0.5)
    value = loss(logits.requires_grad_(), target)
    assert torch.equal(value, loss(other, target))
    value.backward()
    assert logits.grad[:, :, 0].abs().max() == 0.0 < logits.grad[:, :, 1:].abs().max()
    nothing = loss(logits, torch.full((3, 6, 4), 255))
    assert nothing.item() == 0.0


@OVERLAPS
@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_certain_predictions_and_absent_classes_stay_finite(overlap, gamma):
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    for certain, about in ((60.0, 0.0), (-60.0, 1.0)):
        logits = torch.zeros(1, 4, 4, 4, dtype=torch.bfloat16)
        logits[:, 0] = certain
        logits.requires_grad_()
        value = SegmentationLoss(num_classes=4, overlap=overlap, focal_gamma=gamma)(logits, target)
        value.backward()
        assert value.dtype == torch.float32 and logits.grad.isfinite().all()
        assert value.item() == pytest.approx(0, abs=1e-6) if about == 0 else value.item() > about


@OVERLAPS
def test_autocast_does_not_reach_the_loss(overlap):
    logits, target = _batch(8, 8)
    loss = SegmentationLoss(num_classes=4, overlap=overlap, focal_gamma=1.0)
    expected = loss(logits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(logits, target), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tversky(alpha=-0.1), "alpha, beta: .* got -0.1, 0.7"),
        (lambda: Tversky(alpha=0, beta=0), "not both zero"),
        (lambda: Tversky(beta=float("nan")), "finite numbers >= 0"),
        (lambda: RegionTversky(grid=0), "grid: cells along an axis, at least 1, are needed; got 0"),
        (lambda: RegionTversky(grid=(4, 0)), r"got \(4, 0\)"),
        (lambda: RegionTversky(grid=()), r"got \(\)"),
        (lambda: _only(RegionTversky(grid=(2, 2)))(*_batch(4, 4, 4)), "grid: 2 numbers for 3 spatial axes"),
        (lambda: SegmentationLoss(num_classes=2, focal_gamma=-1.0), "focal_gamma: .* got -1.0"),
        (lambda: SegmentationLoss(num_classes=2, focal_gamma=float("inf")), "focal_gamma"),
    ],
)
def test_arguments_of_region_losses_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- configuration


def _built(*overrides: str) -> torch.nn.Module:
    raw = {
        "task": {"type": "segmentation"},
        "data": {"type": "image_mask_folder", "root": ".", "num_classes": 4, "image_size": 8, "ignore_index": 255},
        "model": {"name": "agunet"},
    }
    return build_loss(parse_config(raw, overrides, source="a.yaml"), RunInfo(("a",) * 4, 1, None, None, None, {}, {}))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], SegmentationLoss(num_classes=4, ignore_index=255)),
        (["task.overlap=tversky"], SegmentationLoss(num_classes=4, ignore_index=255, overlap=Tversky())),
        (
            ["task.overlap=tversky", "task.tversky_alpha=0.1", "task.tversky_beta=1", "task.focal_gamma=2"],
            SegmentationLoss(num_classes=4, ignore_index=255, overlap=Tversky(alpha=0.1, beta=1.0), focal_gamma=2.0),
        ),
        (
            ["task.overlap=region_tversky", "task.region_grid=[2, 4]", "task.dice_weight=0.8"],
            SegmentationLoss(num_classes=4, ignore_index=255, overlap=RegionTversky(grid=(2, 4)), dice_weight=0.8),
        ),
    ],
    ids=["default", "tversky", "weights-focal", "region"],
)
def test_configuration_builds_the_loss_and_it_trains(overrides, expected):
    loss = _built(*overrides)
    logits, target = _batch(8, 8)
    target[:, 0] = 255
    logits = logits.requires_grad_()
    before = loss([logits], target)
    assert torch.equal(before, expected(logits, target))
    (gradient,) = torch.autograd.grad(before, logits)
    assert loss([logits - gradient], target) < before


def test_configuration_mistakes_of_the_loss():
    for overrides, message in (
        (["task.overlap=dce"], "task.overlap: should be 'dice', 'tversky' or 'region_tversky', found 'dce'"),
        (["task.tversky_beta=0.9"], "task.tversky_beta: is for overlap: tversky, not for overlap: dice; remove it"),
        (["task.region_grid=4"], "task.region_grid: is for overlap: region_tversky, not for overlap: dice; remove it"),
        (["task.overlap=region_tversky", "task.region_grid=[4, 0]"], "task.region_grid: numbers of at least 1 are"),
        (
            ["task.overlap=tversky", "task.tversky_alpha=0", "task.tversky_beta=0"],
            "task.tversky_beta: tversky_alpha and tversky_beta cannot both be 0",
        ),
        (["task.focal_gamma=-1"], "task.focal_gamma: should be greater than or equal to 0"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            _built(*overrides)
        assert "\n" not in str(error.value)
    _built("task.tversky_beta=0.7", "task.region_grid=8")  # the defaults, as in the copy that a run keeps
