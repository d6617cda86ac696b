"""The metrics against scikit-learn, torchmetrics and hand computations; misses, absent classes, one image, merging."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.functional.segmentation import dice_score

from vision_gates.errors import DataError, UserError
from vision_gates.metrics import (
    DEFAULT_MONITOR,
    ClassificationMetrics,
    SegmentationMetrics,
    create_metrics,
)

TISSUES = ("background", "csf", "grey", "white")


def _labels(count: int, *spatial: int, classes: int = 4, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (count, *spatial), generator=generator)
    noise = torch.randint(0, classes, truth.shape, generator=generator)
    keep = torch.rand(truth.shape, generator=generator) < 0.6
    return truth, torch.where(keep, truth, noise)


def _names(count: int) -> list[str]:
    return [f"image_{i}.png" for i in range(count)]


def _logits(labels: torch.Tensor, classes: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, classes).movedim(-1, 1).float()


# ---- segmentation


@pytest.mark.parametrize("spatial", [(8, 9), (4, 5, 6)], ids=["2d", "3d"])
def test_segmentation_against_scikit_learn_and_torchmetrics(spatial):
    truth, prediction = _labels(5, *spatial)
    metrics = SegmentationMetrics(TISSUES)
    metrics.update(_logits(prediction, 4), truth, _names(5))
    result = metrics.compute()
    flat_truth, flat_prediction = truth.reshape(5, -1).numpy(), prediction.reshape(5, -1).numpy()
    dice = np.array([sk.f1_score(t, p, average=None) for t, p in zip(flat_truth, flat_prediction, strict=True)])
    iou = np.array([sk.jaccard_score(t, p, average=None) for t, p in zip(flat_truth, flat_prediction, strict=True)])
    for c, row in enumerate(result.per_class):
        assert row["dice"] == pytest.approx(dice[:, c].mean(), abs=1e-12)
        assert row["iou"] == pytest.approx(iou[:, c].mean(), abs=1e-12)
        assert (row["n"], row["missed"], row["false_alarms"]) == (5, 0, 0)
    assert result.metrics["dice"] == pytest.approx(dice[:, 1:].mean(), abs=1e-12)
    assert result.metrics["iou"] == pytest.approx(iou[:, 1:].mean(), abs=1e-12)
    assert result.metrics["accuracy"] == pytest.approx(sk.accuracy_score(flat_truth.ravel(), flat_prediction.ravel()))
    pooled = sk.f1_score(flat_truth.ravel(), flat_prediction.ravel(), average=None)
    assert result.metrics["dice_pooled"] == pytest.approx(pooled[1:].mean(), abs=1e-12)
    theirs = dice_score(
        prediction, truth, num_classes=4, include_background=False, average="macro", input_format="index"
    )
    assert result.metrics["dice"] == pytest.approx(theirs.mean().item(), abs=1e-6)


def test_misses_and_false_alarms_score_zero_and_empty_agreement_is_not_counted():
    truth = torch.zeros(4, 2, 2, dtype=torch.long)
    prediction = torch.zeros_like(truth)
    truth[0] = prediction[0] = 1  # found: Dice 1
    truth[1, 0, 0] = 1  # missed: 0
    prediction[2, 0, 0] = 1  # false alarm: 0
    # Image 3: class 1 in neither, not counted; class 2 nowhere at all.
    metrics = SegmentationMetrics(("background", "lesion", "cyst"))
    badness = metrics.update(prediction, truth, _names(4))
    assert badness == [0.0, 1.0, 1.0, None]
    result = metrics.compute()
    lesion, cyst = result.per_class[1:]
    assert lesion["dice"] == lesion["iou"] == pytest.approx(1 / 3)
    assert (lesion["n"], lesion["missed"], lesion["false_alarms"]) == (3, 1, 1)
    assert lesion["dice_pooled"] == pytest.approx(8 / 10)
    assert cyst["n"] == 0 and math.isnan(cyst["dice"]) and math.isnan(cyst["dice_pooled"])
    assert result.metrics["dice"] == pytest.approx(1 / 3)
    assert result.images == 4 and len(result.notes) == 1 and "cyst" in result.notes[0]
    assert "miss" in result.convention and "N is" in result.convention
    rows = metrics.rows()
    assert [row["dice lesion"] for row in rows] == [1.0, 0.0, 0.0, None]
    assert rows[0]["truth lesion"] == 4 and rows[3]["dice"] is None


def test_ignored_pixels_are_not_scored():
    truth, prediction = _labels(2, 6, 6)
    clean = SegmentationMetrics(TISSUES)
    clean.update(prediction[:, 2:], truth[:, 2:], _names(2))
    truth[:, :2] = 255
    ignoring = SegmentationMetrics(TISSUES, ignore_index=255)
    ignoring.update(prediction, truth, _names(2))
    assert ignoring.compute() == clean.compute()
    nothing = SegmentationMetrics(TISSUES, ignore_index=255)
    nothing.update(prediction, torch.full_like(truth, 255), _names(2))
    result = nothing.compute()
    assert all(math.isnan(value) for value in result.metrics.values())
    assert any("ignored" in note for note in result.notes)


def test_one_image_of_background_only():
    metrics = SegmentationMetrics(TISSUES)
    assert metrics.update(torch.zeros(1, 3, 3, dtype=torch.long), torch.zeros(1, 3, 3, dtype=torch.long), ["a"]) == [
        None
    ]
    result = metrics.compute()
    assert math.isnan(result.metrics["dice"]) and result.metrics["accuracy"] == 1.0
    assert result.per_class[0]["dice"] == 1.0 and result.images == 1
    assert len(result.notes) == 3


# ---- classification


def _scores(count: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (count,), generator=generator)
    logits = torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), truth] += 1.0
    return logits, truth


@pytest.mark.parametrize("classes", [2, 3, 5])
def test_classification_against_scikit_learn(classes):
    logits, truth = _scores(60, classes)
    metrics = ClassificationMetrics([f"class {c}" for c in range(classes)])
    metrics.update(logits, truth, _names(60))
    result = metrics.compute()
    p, y, label = logits.double().softmax(1).numpy(), truth.numpy(), logits.argmax(1).numpy()
    auc = sk.roc_auc_score(y, p[:, 1]) if classes == 2 else sk.roc_auc_score(y, p, multi_class="ovr")
    assert result.metrics["accuracy"] == pytest.approx(sk.accuracy_score(y, label))
    assert result.metrics["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(y, label))
    assert result.metrics["auc"] == pytest.approx(auc, abs=1e-6)
    assert result.metrics["f1"] == pytest.approx(sk.f1_score(y, label, average="macro"))
    assert result.confusion == sk.confusion_matrix(y, label).tolist()
    recall, precision = (f(y, label, average=None) for f in (sk.recall_score, sk.precision_score))
    assert [row["recall"] for row in result.per_class] == pytest.approx(recall.tolist())
    assert [row["precision"] for row in result.per_class] == pytest.approx(precision.tolist())
    assert sum(row["n"] for row in result.per_class) == result.images == 60
    assert result.notes == []


def test_confident_outputs_keep_their_order_in_the_auc():
    # In float32 both probabilities of class 1 round to 1.0, a tie, and the AUC would be 0.5.
    metrics = ClassificationMetrics(("a", "b"))
    metrics.update(torch.tensor([[0.0, 20.0], [0.0, 30.0]]), torch.tensor([0, 1]), _names(2))
    assert metrics.compute().metrics["auc"] == 1.0


def test_a_class_that_never_occurs_is_left_out_and_named():
    logits, truth = _scores(40, 3)
    logits[:, 2] = -9.0
    truth = truth.clamp(max=1)
    metrics = ClassificationMetrics(("cat", "dog", "newt"))
    metrics.update(logits, truth, _names(40))
    result = metrics.compute()
    label, p = logits.argmax(1).numpy(), logits.double().softmax(1).numpy()
    assert result.metrics["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(truth.numpy(), label))
    aucs = [sk.roc_auc_score(truth.numpy() == c, p[:, c]) for c in (0, 1)]
    assert result.metrics["auc"] == pytest.approx(np.mean(aucs), abs=1e-6)
    newt = result.per_class[2]
    assert newt["n"] == 0 and all(math.isnan(newt[key]) for key in ("recall", "precision", "f1", "auc"))
    assert len(result.notes) == 1 and "newt" in result.notes[0]


def test_an_absent_class_that_was_predicted_counts_against_f1():
    metrics = ClassificationMetrics(("a", "b", "c"))
    metrics.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]), _names(3))
    result = metrics.compute()
    assert result.metrics["f1"] == pytest.approx(sk.f1_score([0, 1, 1], [0, 1, 2], average="macro", labels=[0, 1, 2]))
    assert result.metrics["balanced_accuracy"] == pytest.approx(0.75)
    assert math.isnan(result.metrics["auc"]) and any("labels" in note for note in result.notes)


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("classes", [2, 3])
def test_one_class_only_leaves_the_auc_undefined(count, classes):
    metrics = ClassificationMetrics([f"class {c}" for c in range(classes)])
    metrics.update(_scores(count, classes)[0], torch.zeros(count, dtype=torch.long), _names(count))
    result = metrics.compute()
    assert math.isnan(result.metrics["auc"])
    assert any("AUC is undefined" in note and "one class" in note for note in result.notes)
    assert result.metrics["balanced_accuracy"] == pytest.approx(result.metrics["accuracy"])


def test_update_returns_the_confidence_of_a_mistake():
    metrics = ClassificationMetrics(("a", "b"))
    badness = metrics.update(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]), _names(2))
    assert badness[0] is None and badness[1] == pytest.approx(1 / (1 + math.exp(-2.0)))


# ---- both


def _filled(task: str, order: list[int], split: int) -> tuple[object, object]:
    if task == "segmentation":
        truth, prediction = _labels(9, 5, 5)
        outputs = _logits(prediction, 4)
    else:
        outputs, truth = _scores(9, 4)
    parts = []
    for chunk in (order[:split], order[split:]):
        metrics = create_metrics(task, TISSUES)
        if chunk:
            metrics.update(outputs[chunk], truth[chunk], [_names(9)[i] for i in chunk], indices=torch.tensor(chunk))
        parts.append(metrics)
    return parts[0], parts[1]


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_rows_of_two_processes_give_the_result_of_one(task):
    whole, _ = _filled(task, list(range(9)), 9)
    # Two processes, interleaved; the sampler has padded the second with images of the first.
    first, second = _filled(task, [0, 2, 4, 6, 8, 1, 3, 5, 7, 0], 5)
    assert len(second) == 5
    first.load_rows(second.rows())
    assert len(first) == 9
    assert first.rows() == whole.rows()
    assert repr(first.compute()) == repr(whole.compute())


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_batches_do_not_change_the_result(task):
    whole, _ = _filled(task, list(range(9)), 9)
    truth, prediction = _labels(9, 5, 5)
    outputs = _logits(prediction, 4)
    if task == "classification":
        outputs, truth = _scores(9, 4)
    single = create_metrics(task, TISSUES)
    for i in range(9):
        single.update(outputs[i : i + 1], truth[i : i + 1], [_names(9)[i]])
    assert repr(single.compute()) == repr(whole.compute())
    single.reset()
    assert len(single) == 0 and single.rows() == []


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_bad_input(task):
    metrics = create_metrics(task, TISSUES)
    shape = (2, 3, 3) if task == "segmentation" else (2,)
    truth = torch.zeros(shape, dtype=torch.long)
    logits = torch.zeros(2, 4, *shape[1:])
    with pytest.raises(ValueError, match="no image"):
        metrics.compute()
    with pytest.raises(ValueError, match="names"):
        metrics.update(logits, truth, ["only one"])
    with pytest.raises(ValueError, match=r"\(2, 5"):
        metrics.update(torch.zeros(2, 5, *shape[1:]), truth, _names(2))
    wrong = truth.clone()
    wrong[1] = 7
    with pytest.raises(DataError, match=r"image_1\.png: label 7 is not in 0\.\.3"):
        metrics.update(logits, wrong, _names(2))
    with pytest.raises(ValueError, match=r"prediction: label -1"):
        metrics.update(torch.full_like(truth, -1), truth, _names(2))
    logits[1] = float("nan")
    with pytest.raises(UserError, match=r"image_1\.png is not a number"):
        metrics.update(logits, truth, _names(2))
    with pytest.raises(ValueError, match="different names"):
        create_metrics(task, ("a", "a"))
    with pytest.raises(ValueError, match="two classes"):
        create_metrics(task, ("a",))


def test_default_monitor_names_a_metric_of_its_task():
    for task, name in DEFAULT_MONITOR.items():
        metrics, _ = _filled(task, list(range(9)), 9)
        assert name in metrics.compute().metrics
    with pytest.raises(ValueError, match="detection"):
        create_metrics("detection", TISSUES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_gpu_tensors_give_the_result_of_the_cpu(task):
    truth, prediction = _labels(9, 5, 5)
    outputs = _logits(prediction, 4)
    if task == "classification":
        outputs, truth = _scores(9, 4)
    results = []
    for device in ("cpu", "cuda"):
        metrics = create_metrics(task, TISSUES)
        metrics.update(outputs.to(device), truth.to(device), _names(9))
        results.append(repr(metrics.compute()))
    assert results[0] == results[1]
