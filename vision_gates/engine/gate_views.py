"""What the gates did to a few samples: which gates are shown, their maps made small, and the file that keeps them.

A gate with one map (attention gates) is shown as it is. Of gates with several maps (heads, orders) the first, middle
and last layer are shown, averaged; their table has every layer and head.
"""

import io
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vision_gates.datasets.npz import open_npz
from vision_gates.gate_maps import GateMap, collect_gate_maps

__all__ = [
    "GateTable",
    "GateView",
    "GateViews",
    "Neighbourhood",
    "gate_tables",
    "gate_views",
    "neighbourhoods",
    "observe_gates",
    "pack_gate_views",
    "read_gate_views",
]

MAX_SIDE = 192
"""Longest side in pixels of a stored map; larger ones are averaged down, smaller ones kept."""

_MOST_GATES = 6  # of a kind with one map each
_MOST_LAYERS = 3  # of a kind with several maps
_SAMPLES = {"segmentation": 4, "classification": 2}


@dataclass(frozen=True)
class GateView:
    """One picture: a gate's map over an image.

    Attributes:
        name: Path of the module.
        kind: Which gate.
        title: Which of its kind, and what was averaged: "gate 2 of 5", "layer 6 of 12, mean of 3 heads".
        meaning: What 1 and 0 stand for.
        grid: Rows and columns of the gate's own map.
        values: (h, w) over the image from edge to edge, float in [0, 1] (uint8 / 255 once stored).
    """

    name: str
    kind: str
    title: str
    meaning: str
    grid: tuple[int, int]
    values: NDArray[Any]


@dataclass(frozen=True)
class GateTable:
    """Mean openness of each map of each gate of a kind: a row a gate, None where it has fewer maps."""

    kind: str
    unit: str
    meaning: str
    names: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class Neighbourhood:
    """Where the heads of a gate look from the middle of the grid: (maps, rows, columns) in [0, 1]."""

    name: str
    title: str
    unit: str
    values: NDArray[Any]


@dataclass(frozen=True)
class GateViews:
    """What a report shows of the gates.

    Attributes:
        samples: A sample's index in the split -> its views.
        tables: Of kinds with several maps.
        neighbourhoods: Of gates that attend by position.
        pictures: A sample's index -> the picture below its views, where that is not the sample's own: of a volume the
            part of a slice that one window of the network covers; dicts with ``name``, ``image`` (uint8),
            ``prediction`` and ``letters``.
    """

    samples: dict[int, list[GateView]] = field(default_factory=dict)
    tables: list[GateTable] = field(default_factory=list)
    neighbourhoods: list[Neighbourhood] = field(default_factory=list)
    pictures: dict[int, dict[str, Any]] = field(default_factory=dict)


# ---------------------------------------------------------------- choosing and shrinking


def gate_views(maps: Iterable[GateMap], size: tuple[int, int], *, divisor: int = 1) -> list[GateView]:
    """Pictures of the gates' maps for one image (the first of the batch), a few a kind, in running order.

    Args:
        maps: From :func:`~vision_gates.gate_maps.collect_gate_maps`; volumes and gates without positions are left out.
        size: Height and width of the image.
        divisor: The network pads images at the bottom and the right to a multiple of it; the padding is cut off.
    """
    views = []
    for kind in _by_kind(m for m in maps if m.values.ndim == 4).values():
        several = max(m.values.shape[1] for m in kind) > 1
        for i in _spread(len(kind), _MOST_LAYERS if several else _MOST_GATES):
            gate = kind[i]
            count = gate.values.shape[1]
            title = f"{'layer' if several else 'gate'} {i + 1} of {len(kind)}"
            title += f", mean of {count} {gate.unit}s" if count > 1 else ""
            grid = (gate.values.shape[2], gate.values.shape[3])
            values = _fit(gate.values[0].mean(dim=0), size, divisor)
            views.append(GateView(gate.name, gate.kind, title, gate.meaning, grid, values))
    return views


def gate_tables(samples: Sequence[Iterable[GateMap]]) -> list[GateTable]:
    """Mean over samples and positions of each map, for kinds with several maps whose values are absolute."""
    tables = []
    runs = [_by_kind(m for m in maps if not m.relative) for maps in samples]
    for kind, gates in (runs[0] if runs else {}).items():
        if max(len(gate.labels) for gate in gates) == 1:
            continue
        rows = []
        for i, gate in enumerate(gates):
            means = [run[kind][i].values for run in runs]
            means = [m.mean(dim=(0, *range(2, m.ndim))) if m.ndim > 1 else m for m in means]
            row = torch.stack(means).mean(dim=0).tolist()
            rows.append((*row, *[None] * (max(len(g.labels) for g in gates) - len(gate.labels))))
        first = gates[0]
        tables.append(GateTable(kind, first.unit, first.meaning, tuple(g.name for g in gates), tuple(rows)))
    return tables


def neighbourhoods(maps: Iterable[GateMap]) -> list[Neighbourhood]:
    """Where the first, middle and last layer look that attend by position."""
    gates = [m for m in maps if m.neighbourhoods is not None and m.neighbourhoods.ndim == 3]
    return [
        Neighbourhood(gate.name, f"layer {i + 1} of {len(gates)}", gate.unit, _shrunk(gate.neighbourhoods).numpy())
        for i, gate in enumerate(gates)
        if i in _spread(len(gates), _MOST_LAYERS) and gate.neighbourhoods is not None
    ]


def _by_kind(maps: Iterable[GateMap]) -> dict[str, list[GateMap]]:
    kinds: dict[str, list[GateMap]] = {}
    for gate in maps:
        kinds.setdefault(gate.kind, []).append(gate)
    return kinds


def _spread(count: int, most: int) -> list[int]:
    """Up to ``most`` of the numbers below ``count``, first and last among them."""
    return sorted({round(x) for x in np.linspace(0, count - 1, num=min(count, most))})


def _shrunk(maps_MHW: Tensor) -> Tensor:
    stride = math.ceil(max(maps_MHW.shape[-2:]) / MAX_SIDE)
    return F.avg_pool2d(maps_MHW[None], stride, ceil_mode=True)[0] if stride > 1 else maps_MHW


def _fit(map_HW: Tensor, size: tuple[int, int], divisor: int) -> NDArray[np.float32]:
    """The part of a map that lies on the image, at most MAX_SIDE a side."""
    padded = [n + -n % divisor for n in size]
    if padded == list(size):
        return _shrunk(map_HW[None])[0].numpy()
    scale = min(1.0, MAX_SIDE / max(size))
    fine = [max(round(n * scale), 1) for n in padded]
    shown = [max(round(n * scale), 1) for n in size]
    fine_HW = F.interpolate(map_HW[None, None], size=fine, mode="bilinear", antialias=True)[0, 0]
    return fine_HW[: shown[0], : shown[1]].clamp(0.0, 1.0).numpy()


# ---------------------------------------------------------------- samples of an evaluation


def observe_gates(
    model: nn.Module,
    overlays: Iterable[Mapping[str, Any]],
    *,
    task: str,
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> GateViews | None:
    """Run the network once more on a few overlays, in eval mode, and keep what its gates did; None without gates.

    Args:
        model: The network; its mode is put back.
        overlays: Samples that a report shows, with their ``input``: an image (C, H, W), or the `GateWindow` of a
            volume. Up to half of those taken are the worst.
        task: "segmentation" (4 samples) or "classification" (2).
        device: Where the network is.
        autocast: Makes a fresh context in which it runs.
    """
    overlays = list(overlays)
    worst = [o for o in overlays if o["worst"]][: _SAMPLES[task] // 2]
    taken = [o for o in overlays if not o["worst"]][: _SAMPLES[task] - len(worst)] + worst
    views, found = GateViews(), []
    was_training = model.training
    model.eval()
    try:
        for overlay in taken:
            seen, index = overlay["input"], overlay["index"]
            image_1C = seen[None] if isinstance(seen, Tensor) else seen.input_1C
            with autocast():
                maps = collect_gate_maps(model, image_1C.to(device))
            if not maps:
                return None
            found.append(maps)
            if isinstance(seen, Tensor):
                size = (seen.shape[-2], seen.shape[-1])
                shown = gate_views(maps, size, divisor=getattr(model, "divisor", 1))
            else:
                shown, views.pictures[index] = seen.views(maps), seen.picture
            if shown:
                views.samples[index] = shown
    finally:
        model.train(was_training)
    if not found:
        return None
    return replace(views, tables=gate_tables(found), neighbourhoods=neighbourhoods(found[0]))


# ---------------------------------------------------------------- file


def pack_gate_views(views: GateViews) -> bytes:
    """Content of an npz file: maps as uint8, all words and tables as one JSON text."""
    arrays: dict[str, NDArray[Any]] = {}

    def words(item: GateView | Neighbourhood, key: str) -> dict[str, Any]:
        arrays[key] = (np.asarray(item.values) * 255.0 + 0.5).astype(np.uint8)
        return {k: v for k, v in vars(item).items() if k != "values"}

    about = {
        "samples": [
            {"index": index, "views": [words(view, f"map_{index}_{i}") for i, view in enumerate(shown)]}
            for index, shown in views.samples.items()
        ],
        "tables": [vars(table) for table in views.tables],
        "neighbourhoods": [words(n, f"neighbourhood_{i}") for i, n in enumerate(views.neighbourhoods)],
        "pictures": [{"index": i, "name": p["name"], "letters": p["letters"]} for i, p in views.pictures.items()],
    }
    for index, picture in views.pictures.items():
        arrays[f"image_{index}"] = picture["image"]
        arrays[f"prediction_{index}"] = np.asarray(picture["prediction"], dtype=np.uint16)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, about=np.array(json.dumps(about)), **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_gate_views(path: Path) -> GateViews:
    """What `pack_gate_views` stored; the maps come back as numbers in [0, 1].

    Raises:
        DataError: The file is damaged.
    """
    with open_npz(path) as arrays:
        return _unpack(arrays)


def _unpack(arrays: Mapping[str, NDArray[Any]]) -> GateViews:
    about = json.loads(str(arrays["about"]))

    def values(key: str) -> NDArray[np.float32]:
        return arrays[key].astype(np.float32) / np.float32(255)

    return GateViews(
        {
            sample["index"]: [
                GateView(**words, values=values(f"map_{sample['index']}_{i}"))
                for i, words in enumerate(sample["views"])
            ]
            for sample in about["samples"]
        },
        [GateTable(**table) for table in about["tables"]],
        [Neighbourhood(**n, values=values(f"neighbourhood_{i}")) for i, n in enumerate(about["neighbourhoods"])],
        {
            words["index"]: {**words, **{key: arrays[f"{key}_{words['index']}"] for key in ("image", "prediction")}}
            for words in about.get("pictures", ())  # files of before have none
        },
    )
