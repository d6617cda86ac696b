"""The samples of a split that a report shows: which ones, made fit for the eye, and their file.

An overlay is a dict with ``name``, ``index``, ``image`` ((H, W) or (H, W, 3), stretched for display), ``target`` and
``prediction`` ((H, W) labels, or a class index), ``score`` (mean foreground Dice, or the probability of the predicted
class; None where undefined) and ``worst`` (bool).

Of a case that is a volume, image, target and prediction are a slice, and there is more: ``caption`` (which slice),
``letters`` (of the patient's sides at the left, right, upper and lower side of the picture) and ``further``, its other
planes: dicts with these five keys.
"""

import heapq
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from vision_gates.datasets.npz import open_npz
from vision_gates.engine.slices import SamplePlane

__all__ = ["MAX_SIDE", "UNSCORED", "OverlayCollector", "display_image", "pack_overlays", "read_overlays"]

MAX_SIDE = 384
"""Longest side in pixels of an overlay; larger images are thinned out, their labels with them."""

UNSCORED = 65535
"""Label of a saved mask where a pixel is not scored (the ignored label)."""


class OverlayCollector:
    """Keeps the evenly spaced and the worst samples of a pass, never more than it will show.

    Args:
        number: Samples to keep: half of them (rounded up) evenly spaced, the others the worst (in segmentation at most
            a quarter of the split).
        length: Number of samples in the split.
        task: "classification" or "segmentation".
        mean, std: Per-channel normalisation to undo; None: the images are only stretched.
        ignore_index: Label whose pixels are not scored.
        classes: How many there are.
        inputs: Keep each image's input of the network, too, as ``input``; of a volume the batch says what is kept.
    """

    def __init__(
        self,
        number: int,
        length: int,
        *,
        task: str,
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        ignore_index: int | None,
        classes: int,
        inputs: bool = False,
    ) -> None:
        even = math.ceil(number / 2)
        self._even = set(np.linspace(0, length - 1, num=min(even, length)).round().astype(int).tolist())
        # Of a small segmentation split not every image is "among the worst"; a mistake of a classifier always is one.
        self._num_worst = number - even if task == "classification" else min(number - even, max(length // 4, 1))
        self._mean, self._std = mean, std
        self._inputs, self._classes = inputs, classes
        self._ignore = -1 if ignore_index is None else ignore_index
        self._kept: list[dict[str, Any]] = []
        self._worst: list[tuple[float, int, dict[str, Any]]] = []

    def add(self, batch: Mapping[str, Any], output: Tensor, badness: Sequence[float | None]) -> None:
        """Look at a batch, its logits (or labels) and what `Metrics.update` returned for it.

        A batch of volumes has their pictures with it: ``planes``, a list of `SamplePlane` a case, and perhaps
        ``input``; see `VolumePredictor.displayed`.
        """
        for i, bad in enumerate(badness):
            index = int(batch["index"][i])
            rank = (-1.0 if bad is None else bad, -index)  # of equally bad samples the first in the split
            has_room = len(self._worst) < self._num_worst
            is_worst = self._num_worst > 0 and rank[0] > 0 and (has_room or rank > self._worst[0][:2])
            # A distributed sampler may have padded the split with a sample that is here already.
            is_worst = is_worst and all(index != entry["index"] for *_, entry in self._worst)
            if not is_worst and index not in self._even:
                continue
            entry = self._entry(batch, output, i, bad)
            if index in self._even:
                self._kept.append(entry)
            if is_worst:
                heapq.heappush(self._worst, (*rank, entry))
                if len(self._worst) > self._num_worst:
                    heapq.heappop(self._worst)

    def _entry(self, batch: Mapping[str, Any], output: Tensor, i: int, bad: float | None) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": str(batch["name"][i]), "index": int(batch["index"][i]), "badness": bad}
        if "planes" in batch:
            if "input" in batch:
                entry["input"] = batch["input"][i]
            first, *further = (self._plane(plane) for plane in batch["planes"][i])
            return entry | first | {"further": further, "score": None if bad is None else 1.0 - bad}
        image_CHW, target = batch["image"][i].float().cpu(), batch["target"][i].cpu()
        stride = math.ceil(max(image_CHW.shape[-2:]) / MAX_SIDE)
        entry["image"] = display_image(image_CHW[:, ::stride, ::stride], self._mean, self._std)
        if self._inputs:
            entry["input"] = batch["image"][i].cpu().clone()  # a view would keep the whole batch
        if target.ndim:
            prediction_HW = (output[i].argmax(dim=0) if output.is_floating_point() else output[i]).cpu()
            masks = target[::stride, ::stride].numpy(), prediction_HW[::stride, ::stride].numpy()
            return entry | self._masks(*masks) | {"score": None if bad is None else 1.0 - bad}
        p_C = output[i].cpu().double().softmax(dim=0)  # cpu first: not every device has float64
        label = int(p_C.argmax())
        return entry | {"target": int(target), "prediction": label, "score": float(p_C[label])}

    def _plane(self, plane: SamplePlane) -> dict[str, Any]:
        masks = self._masks(plane.target_HW, plane.prediction_HW)
        return {"image": plane.image_HW, "caption": plane.caption, "letters": plane.letters} | masks

    def _masks(self, target_HW: NDArray[Any], prediction_HW: NDArray[Any]) -> dict[str, NDArray[np.uint16]]:
        scored = (target_HW >= 0) & (target_HW < self._classes) & (target_HW != self._ignore)
        target_HW = np.where(scored, target_HW, UNSCORED)
        return {"target": target_HW.astype(np.uint16), "prediction": prediction_HW.astype(np.uint16)}

    def finish(self) -> list[dict[str, Any]]:
        """The overlays of this process."""
        return self.choose(self._kept + [entry for *_, entry in self._worst])

    def choose(self, entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Evenly spaced samples in order, then the worst; a sample that is both comes with the worst."""
        unique = {entry["index"]: entry for entry in entries}
        ranked = sorted((e for e in unique.values() if (e["badness"] or 0.0) > 0.0), key=_rank)
        worst = {entry["index"] for entry in ranked[: self._num_worst]}
        even = [unique[i] | {"worst": False} for i in sorted(unique) if i in self._even and i not in worst]
        return even + [entry | {"worst": True} for entry in ranked[: self._num_worst]]


def _rank(entry: Mapping[str, Any]) -> tuple[float, int]:
    return (-entry["badness"], entry["index"])


def display_image(image_CHW: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> NDArray[np.float32]:
    """(H, W) or (H, W, 3) in 0..1 for the eye: normalisation undone, then 0.5 % to 99.5 % stretched to the full range.

    One range for all channels, so that colours stay. Of an image that is neither grey nor RGB the middle channel is
    shown, which for neighbouring slices is the slice itself.
    """
    image = image_CHW.numpy().astype(np.float32)
    if mean is not None and std is not None:
        shape = (-1, 1, 1)
        image = image * np.asarray(std, np.float32).reshape(shape) + np.asarray(mean, np.float32).reshape(shape)
    channels = len(image)
    image = image.transpose(1, 2, 0) if channels == 3 else image[channels // 2]
    low, high = np.percentile(image, [0.5, 99.5])
    if high <= low:  # nearly constant: the rare other pixels are what there is to see
        low, high = float(image.min()), float(image.max())
    return np.clip((image - low) / (high - low if high > low else 1.0), 0.0, 1.0).astype(np.float32)


def pack_overlays(overlays: Sequence[Mapping[str, Any]]) -> bytes:
    """Content of an npz file: uint8 images, uint16 masks (`UNSCORED` where nothing is scored). Sizes may differ."""
    arrays: dict[str, NDArray[Any]] = {
        "names": np.array([o["name"] for o in overlays], dtype=np.str_),
        "index": np.array([o["index"] for o in overlays], dtype=np.int64),
        "score": np.array([math.nan if o["score"] is None else o["score"] for o in overlays]),
        "worst": np.array([o["worst"] for o in overlays], dtype=bool),
    }
    words = {}  # of volumes
    for i, overlay in enumerate(overlays):
        for key, picture in _pictures(overlay, str(i)):
            arrays[f"image_{key}"] = (np.asarray(picture["image"]) * 255.0 + 0.5).astype(np.uint8)
            arrays[f"target_{key}"] = np.asarray(picture["target"], dtype=np.uint16)
            arrays[f"prediction_{key}"] = np.asarray(picture["prediction"], dtype=np.uint16)
            if "caption" in picture:
                words[key] = [picture["caption"], picture["letters"]]
    if words:
        arrays["words"] = np.array(json.dumps(words))
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _pictures(overlay: Mapping[str, Any], key: str) -> list[tuple[str, Mapping[str, Any]]]:
    """An overlay and its further planes, each with its key in the file."""
    return [(key, overlay), *((f"{key}_{n}", plane) for n, plane in enumerate(overlay.get("further", ()), start=1))]


def read_overlays(path: Path) -> list[dict[str, Any]]:
    """Overlays as `pack_overlays` stored them; a class index comes back as an array of shape ().

    Raises:
        DataError: The file is damaged.
    """
    with open_npz(path) as arrays:
        return _unpack(arrays)


def _unpack(arrays: Mapping[str, NDArray[Any]]) -> list[dict[str, Any]]:
    words = json.loads(str(arrays["words"])) if "words" in arrays else {}

    def picture(key: str) -> dict[str, Any]:
        about = dict(zip(("caption", "letters"), words[key], strict=True)) if key in words else {}
        return about | {name: arrays[f"{name}_{key}"] for name in ("image", "target", "prediction")}

    overlays = []
    for i, name in enumerate(arrays["names"]):
        score = float(arrays["score"][i])
        about = {"name": str(name), "index": int(arrays["index"][i]), "worst": bool(arrays["worst"][i])}
        overlay = about | {"score": None if math.isnan(score) else score, **picture(str(i))}
        if str(i) in words:
            overlay["further"] = [picture(key) for key in words if key.startswith(f"{i}_")]
        overlays.append(overlay)
    return overlays
