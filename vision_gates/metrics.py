"""Segmentation and classification metrics that count misses and say over how many images they run.

Both classes are fed batch by batch, keep what one image contributes as one row (the per-image table, and what
processes exchange), and compute the result from the rows in sample order, so that neither batch size nor the number
of processes changes a digit. Undefined numbers are NaN with a note, never 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from vision_gates.errors import DataError, UserError

__all__ = ["DEFAULT_MONITOR", "ClassificationMetrics", "Metrics", "Result", "SegmentationMetrics", "create_metrics"]

DEFAULT_MONITOR = {"classification": "accuracy", "segmentation": "dice"}
"""Metric that chooses the best checkpoint of a task unless the config names another; higher is better."""

_NAN = float("nan")


@dataclass(frozen=True)
class Result:
    """Metrics of one split.

    Attributes:
        metrics: Name to value; NaN where undefined (``notes`` says why).
        per_class: One dict a class: ``name``, the class's metrics (NaN where undefined) and ``n``, the number of
            images they run over.
        confusion: Classification: images per [true class][predicted class]; segmentation: None.
        convention: One sentence: how misses count and what N is.
        images: Number of images.
        notes: Why a number is undefined or partial; one sentence each, usually none.
    """

    metrics: dict[str, float]
    per_class: list[dict[str, Any]]
    confusion: list[list[int]] | None
    convention: str
    images: int
    notes: list[str] = field(default_factory=list)


def _non_finite(name: str) -> UserError:
    return UserError(
        f"the network's output for image {name} is not a number; lower optim.lr, set optim.clip_grad=1.0 or "
        "trainer.precision=no"
    )


def _no_class(name: str, label: int, classes: int, *, of_target: bool) -> ValueError:
    """A label out of range: the user's data if it is in the target, the caller's mistake if it was predicted."""
    if of_target:
        return DataError(
            f"{name}: label {label} is not in 0..{classes - 1}; correct the label, or leave its pixels out of a "
            f"segmentation with data.ignore_index={label}"
        )
    return ValueError(f"{name}: prediction: label {label} is not in 0..{classes - 1}")


def _mean(values: Tensor, counted: Tensor) -> float:
    """Mean of the counted float64 values; NaN if there are none."""
    return float(values[counted].mean()) if bool(counted.any()) else _NAN


class Metrics(ABC):
    """What both kinds of metrics share: the rows. Not used by itself; see the two subclasses.

    Args:
        class_names: Names of the classes in label order, at least two, no two alike.

    Raises:
        ValueError: Fewer than two classes or a name given twice.
    """

    task: ClassVar[str]

    def __init__(self, class_names: Sequence[str]) -> None:
        self.class_names = tuple(class_names)
        if len(self.class_names) < 2 or len(set(self.class_names)) != len(self.class_names):
            raise ValueError(f"at least two classes with different names are needed, got {list(self.class_names)}")
        self._store: dict[tuple[int, str], Any] = {}
        self._updates = 0

    def __len__(self) -> int:
        """Number of images seen."""
        return len(self._store)

    def reset(self) -> None:
        """Forget every image."""
        self._store.clear()
        self._updates = 0

    def _keys(self, names: Sequence[str], indices: Sequence[int] | Tensor | None, batch: int) -> list[tuple[int, str]]:
        """Identity of each image: its index in the split (or the running number) and its name."""
        if indices is None:
            numbers = list(range(self._updates, self._updates + batch))
        else:
            numbers = [int(i) for i in indices]
        if len(names) != batch or len(numbers) != batch:
            raise ValueError(f"a batch of {batch} came with {len(names)} names and {len(numbers)} indices")
        self._updates += batch
        return list(zip(numbers, (str(name) for name in names), strict=True))

    def _sorted(self) -> list[tuple[tuple[int, str], Any]]:
        if not self._store:
            raise ValueError("no image has been evaluated")
        return sorted(self._store.items(), key=lambda item: item[0])

    @abstractmethod
    def update(
        self,
        logits_or_labels: Tensor,
        target: Tensor,
        names: Sequence[str],
        *,
        indices: Sequence[int] | Tensor | None = None,
    ) -> list[float | None]:
        """Add a batch; see the subclass."""

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """One flat dict an image, in sample order; see the subclass."""

    @abstractmethod
    def load_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the rows of another process; an image (name and index) that is known already is not counted twice."""

    @abstractmethod
    def compute(self) -> Result:
        """Metrics over every image so far."""


class SegmentationMetrics(Metrics):
    """Dice and IoU per image and class, misses counted.

    Class 0 is the background: it has its line in the per-class table, and the means run over the other classes.
    A class that is in the truth and not in the prediction of an image, or the reverse, scores 0 there. A class that is
    in neither is not counted for that image; N says how many images were.

    Metrics: ``dice`` and ``iou`` (mean over the foreground classes of the mean over images), ``accuracy`` (share of
    correct pixels) and ``dice_pooled`` (mean over the foreground classes of the Dice of all pixels put together).

    Args:
        class_names: Names of the classes, background first.
        ignore_index: Label whose pixels are not scored.
    """

    task: ClassVar[str] = "segmentation"

    def __init__(self, class_names: Sequence[str], ignore_index: int | None = None) -> None:
        super().__init__(class_names)
        self.ignore_index = ignore_index

    @torch.no_grad()
    def update(
        self,
        logits_or_labels: Tensor,
        target: Tensor,
        names: Sequence[str],
        *,
        indices: Sequence[int] | Tensor | None = None,
    ) -> list[float | None]:
        """Add a batch.

        Args:
            logits_or_labels: (B, C, *spatial) floating logits, or (B, *spatial) integer labels.
            target: (B, *spatial) integer labels, on any device.
            names: B image names.
            indices: B positions in the split; lets padded duplicates of a distributed sampler be dropped.

        Returns:
            For each image how bad it went, 1 - mean foreground Dice, or None where there was nothing to find.

        Raises:
            ValueError: Shapes that do not fit (for a target label that is no class: DataError).
            UserError: NaN in the logits.
        """
        classes, batch = len(self.class_names), len(target)
        keys = self._keys(names, indices, batch)
        prediction = logits_or_labels
        if prediction.is_floating_point():
            if prediction.ndim != target.ndim + 1 or prediction.shape[1] != classes:
                raise ValueError(
                    f"logits (B, {classes}, *spatial) with target (B, *spatial) are needed, "
                    f"got {tuple(prediction.shape)} with {tuple(target.shape)}"
                )
            bad = prediction.isnan().flatten(1).any(dim=1)
            if bool(bad.any()):
                raise _non_finite(keys[int(bad.nonzero()[0])][1])
            prediction = prediction.argmax(dim=1)
        if prediction.shape != target.shape:
            raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} differ in shape")
        prediction_BP = prediction.reshape(batch, -1).long()
        target_BP = target.to(prediction.device).reshape(batch, -1).long()
        valid_BP = torch.ones_like(target_BP, dtype=torch.bool)
        if self.ignore_index is not None:
            valid_BP = target_BP != self.ignore_index
        # One bin for each (image, class); the sums of the confusion matrix that Dice and IoU need, without its C^2.
        image_BP = torch.arange(batch, device=target_BP.device).unsqueeze(1).expand_as(target_BP)
        image_P, target_P, prediction_P = image_BP[valid_BP], target_BP[valid_BP], prediction_BP[valid_BP]
        for labels_P, of_target in ((target_P, True), (prediction_P, False)):
            wrong_P = (labels_P < 0) | (labels_P >= classes)
            if bool(wrong_P.any()):
                first = int(wrong_P.nonzero()[0])
                raise _no_class(keys[int(image_P[first])][1], int(labels_P[first]), classes, of_target=of_target)
        hit_P = target_P == prediction_P
        counts = [
            torch.bincount(image * classes + label, minlength=batch * classes).view(batch, classes)
            for image, label in (
                (image_P[hit_P], target_P[hit_P]),
                (image_P, target_P),
                (image_P, prediction_P),
            )
        ]
        counts_B3C = torch.stack(counts, dim=1).cpu()
        self._store.update((key, count) for key, count in zip(keys, counts_B3C, strict=True) if key not in self._store)
        dice_BC, _ = _overlap_scores(counts_B3C)
        means = [_mean(dice_C[1:], ~dice_C[1:].isnan()) for dice_C in dice_BC]
        return [None if mean != mean else 1.0 - mean for mean in means]

    def rows(self) -> list[dict[str, Any]]:
        """One flat dict an image: ``index``, ``name``, ``dice`` and ``iou`` (foreground means), and for each class
        ``dice NAME``, ``iou NAME`` (None where the class is in neither truth nor prediction) and the pixel counts
        ``both NAME``, ``truth NAME``, ``predicted NAME``."""
        rows = []
        for (index, name), counts_3C in self._sorted() if self._store else ():
            dice_C, iou_C = _overlap_scores(counts_3C)
            seen_C = ~dice_C.isnan()
            row: dict[str, Any] = {
                "index": index,
                "name": name,
                "dice": _none_if_nan(_mean(dice_C[1:], seen_C[1:])),
                "iou": _none_if_nan(_mean(iou_C[1:], seen_C[1:])),
            }
            for c, class_name in enumerate(self.class_names):
                row[f"dice {class_name}"] = _none_if_nan(float(dice_C[c]))
                row[f"iou {class_name}"] = _none_if_nan(float(iou_C[c]))
                for what, count in zip(("both", "truth", "predicted"), counts_3C[:, c].tolist(), strict=True):
                    row[f"{what} {class_name}"] = count
            rows.append(row)
        return rows

    def load_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the rows of another process; an image (name and index) that is known already is not counted twice."""
        for row in rows:
            counts = [[int(row[f"{what} {c}"]) for c in self.class_names] for what in ("both", "truth", "predicted")]
            self._store.setdefault((int(row["index"]), str(row["name"])), torch.tensor(counts))

    def compute(self) -> Result:
        """Metrics over every image so far.

        Raises:
            ValueError: No image yet.
        """
        counts_N3C = torch.stack([counts for _, counts in self._sorted()])
        dice_NC, iou_NC = _overlap_scores(counts_N3C)
        pooled_C, _ = _overlap_scores(counts_N3C.sum(dim=0))
        truth_NC, predicted_NC = counts_N3C[:, 1] > 0, counts_N3C[:, 2] > 0
        seen_NC = truth_NC | predicted_NC
        per_class, notes = [], []
        for c, name in enumerate(self.class_names):
            per_class.append(
                {
                    "name": name,
                    "dice": _mean(dice_NC[:, c], seen_NC[:, c]),
                    "iou": _mean(iou_NC[:, c], seen_NC[:, c]),
                    "dice_pooled": float(pooled_C[c]),
                    "n": int(seen_NC[:, c].sum()),
                    "missed": int((truth_NC & ~predicted_NC)[:, c].sum()),
                    "false_alarms": int((predicted_NC & ~truth_NC)[:, c].sum()),
                }
            )
            if c > 0 and not bool(seen_NC[:, c].any()):
                notes.append(
                    f"{name}: in no image and in no prediction, so it has no score and is left out of the means."
                )
        columns = ("dice", "iou", "dice_pooled")
        table = torch.tensor([[row[key] for key in columns] for row in per_class[1:]], dtype=torch.float64)
        dice, iou, dice_pooled = (_mean(column, ~column.isnan()) for column in table.T)
        pixels = int(counts_N3C[:, 1].sum())
        accuracy = int(counts_N3C[:, 0].sum()) / pixels if pixels else _NAN
        if not pixels:
            notes.append("Every pixel has the ignored label, so nothing is scored.")
        return Result(
            metrics={"dice": dice, "iou": iou, "accuracy": accuracy, "dice_pooled": dice_pooled},
            per_class=per_class,
            confusion=None,
            convention=(
                "Mean over images; a class present in only one of truth and prediction scores 0 there (a miss or a "
                "false alarm), a class in neither is not counted, and N is the number of images counted; overall "
                f"scores are means over the classes except {self.class_names[0]}."
            ),
            images=len(counts_N3C),
            notes=notes,
        )


def _none_if_nan(value: float) -> float | None:
    return None if value != value else value


def _overlap_scores(counts_3C: Tensor) -> tuple[Tensor, Tensor]:
    """Dice and IoU from (..., 3, C) counts of (both, truth, predicted); float64, NaN where a class is in neither."""
    both, truth, predicted = counts_3C.double().unbind(dim=-2)
    total = truth + predicted
    return 2.0 * both / total, both / (total - both)  # 0 / 0 = NaN


class ClassificationMetrics(Metrics):
    """Accuracy, balanced accuracy, AUC and F1, with torchmetrics doing the counting.

    Metrics: ``accuracy``; ``balanced_accuracy`` (mean recall of the classes that occur); ``auc`` (two classes: from
    the probability of class 1; more: mean of the one-versus-rest AUCs of the classes that have both positive and
    negative images; NaN with a note if there is none); ``f1`` (mean over the classes that occur or were predicted).

    Args:
        class_names: Names of the classes in label order.
    """

    task: ClassVar[str] = "classification"

    @torch.no_grad()
    def update(
        self,
        logits_or_labels: Tensor,
        target: Tensor,
        names: Sequence[str],
        *,
        indices: Sequence[int] | Tensor | None = None,
    ) -> list[float | None]:
        """Add a batch.

        Args:
            logits_or_labels: (B, C) floating logits, or (B,) integer labels (then the AUC is undefined).
            target: (B,) class indices, on any device.
            names: B image names.
            indices: B positions in the split; lets padded duplicates of a distributed sampler be dropped.

        Returns:
            For each image the probability of the wrong class it was given, or None where the prediction is right.

        Raises:
            ValueError: Shapes that do not fit (for a target label that is no class: DataError).
            UserError: NaN or infinity in the logits.
        """
        classes, batch = len(self.class_names), len(target)
        keys = self._keys(names, indices, batch)
        output = logits_or_labels.detach().cpu()
        probabilities: list[Tensor | None] = [None] * batch
        if output.is_floating_point():
            if tuple(output.shape) != (batch, classes):
                raise ValueError(f"logits ({batch}, {classes}) are needed, got {tuple(output.shape)}")
            # float64: float32 rounds confident outputs to ties at 1.0, which changes the AUC.
            p_BC = output.double().softmax(dim=1)
            bad = p_BC.isnan().any(dim=1)
            if bool(bad.any()):
                raise _non_finite(keys[int(bad.nonzero()[0])][1])
            prediction, probabilities = p_BC.argmax(dim=1), list(p_BC)
        else:
            prediction = output
        if tuple(prediction.shape) != (batch,) or target.ndim != 1:
            raise ValueError(f"prediction {tuple(prediction.shape)} and target {tuple(target.shape)} must be (B,)")
        scores: list[float | None] = []
        for key, truth, label, p_C in zip(keys, target.tolist(), prediction.tolist(), probabilities, strict=True):
            for value, of_target in ((truth, True), (label, False)):
                if not 0 <= value < classes:
                    raise _no_class(key[1], value, classes, of_target=of_target)
            self._store.setdefault(key, (int(truth), int(label), p_C))
            scores.append(None if truth == label else 1.0 if p_C is None else float(p_C[label]))
        return scores

    def rows(self) -> list[dict[str, Any]]:
        """One flat dict an image: ``index``, ``name``, ``target`` and ``prediction`` (class names), ``correct`` (0 or
        1) and for each class ``p NAME`` (None if labels were given instead of logits)."""
        rows = []
        for (index, name), (truth, label, p_C) in self._sorted() if self._store else ():
            row: dict[str, Any] = {
                "index": index,
                "name": name,
                "target": self.class_names[truth],
                "prediction": self.class_names[label],
                "correct": int(truth == label),
            }
            values = [None] * len(self.class_names) if p_C is None else p_C.tolist()
            row.update((f"p {c}", value) for c, value in zip(self.class_names, values, strict=True))
            rows.append(row)
        return rows

    def load_rows(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add the rows of another process; an image (name and index) that is known already is not counted twice."""
        label = {name: c for c, name in enumerate(self.class_names)}
        for row in rows:
            values = [row[f"p {c}"] for c in self.class_names]
            p_C = None if None in values else torch.tensor(values, dtype=torch.float64)
            entry = (label[row["target"]], label[row["prediction"]], p_C)
            self._store.setdefault((int(row["index"]), str(row["name"])), entry)

    def compute(self) -> Result:
        """Metrics over every image so far.

        Raises:
            ValueError: No image yet.
        """
        # torchmetrics takes a second to import and segmentation never needs it.
        from torchmetrics.functional import classification as tm

        entries = [entry for _, entry in self._sorted()]
        classes, images = len(self.class_names), len(entries)
        truth_N = torch.tensor([entry[0] for entry in entries])
        label_N = torch.tensor([entry[1] for entry in entries])
        p_list = [entry[2] for entry in entries]
        confusion_CC = tm.multiclass_confusion_matrix(label_N, truth_N, num_classes=classes)
        true_C, predicted_C = confusion_CC.sum(dim=1), confusion_CC.sum(dim=0)
        occurs_C, told_C = true_C > 0, predicted_C > 0
        recall_C, precision_C, f1_C = (
            metric(label_N, truth_N, num_classes=classes, average="none").double()
            for metric in (tm.multiclass_recall, tm.multiclass_precision, tm.multiclass_f1_score)
        )
        notes = []
        absent = [name for name, occurs in zip(self.class_names, occurs_C.tolist(), strict=True) if not occurs]
        if absent:
            notes.append(f"No image of {', '.join(absent)}: recall and AUC of such a class are undefined.")
        auc_C = torch.full((classes,), _NAN, dtype=torch.float64)
        defined_C = occurs_C & (true_C < images)
        if any(p is None for p in p_list):
            notes.append("AUC is undefined: labels were evaluated, not probabilities.")
        elif not bool(defined_C.any()):
            notes.append(f"AUC is undefined: all {images} image(s) are of one class.")
        else:
            p_NC = torch.stack(p_list)
            for c in defined_C.nonzero().flatten().tolist():
                auc_C[c] = tm.binary_auroc(p_NC[:, c], (truth_N == c).long())
        auc = float(auc_C[1]) if classes == 2 else _mean(auc_C, ~auc_C.isnan())
        undefined = torch.tensor(_NAN, dtype=torch.float64)
        columns = {
            "recall": torch.where(occurs_C, recall_C, undefined),
            "precision": torch.where(told_C, precision_C, undefined),
            "f1": torch.where(occurs_C | told_C, f1_C, undefined),
            "auc": auc_C,
        }
        return Result(
            metrics={
                "accuracy": float((truth_N == label_N).double().mean()),
                "balanced_accuracy": _mean(recall_C, occurs_C),
                "auc": auc,
                "f1": _mean(f1_C, occurs_C | told_C),
            },
            per_class=[
                {"name": name, **{key: float(column[c]) for key, column in columns.items()}, "n": int(true_C[c])}
                for c, name in enumerate(self.class_names)
            ],
            confusion=confusion_CC.tolist(),
            convention=(
                "N is the number of images of a class; balanced accuracy is the mean recall over classes, "
                + ("AUC uses the probability of class 1" if classes == 2 else "AUC the mean of one class versus rest")
                + ", F1 the mean over classes; a class without images is left out, except from F1 if it was predicted."
            ),
            images=images,
            notes=notes,
        )


def create_metrics(task: str, class_names: Sequence[str], *, ignore_index: int | None = None) -> Metrics:
    """Empty metrics of a task, "classification" or "segmentation".

    Raises:
        ValueError: Another task.
    """
    if task == "segmentation":
        return SegmentationMetrics(class_names, ignore_index)
    if task == "classification":
        return ClassificationMetrics(class_names)
    raise ValueError(f"task: classification or segmentation is needed, got {task!r}")
