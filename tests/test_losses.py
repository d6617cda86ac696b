"""The losses against PyTorch's own, hand computations and gradcheck; ignored pixels, absent classes, bad input."""

import pytest
import torch
import torch.nn.functional as F

from vision_gates.losses import ClassificationLoss, DeepSupervisionLoss, SegmentationLoss


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
