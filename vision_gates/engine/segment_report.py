"""The page of ``vision-gates segment``: what was found in each case, in numbers and in pictures of the source volume.

Pictures are in radiological orientation, see slices.py. Suffix HW: rows and columns of a picture.
"""

import hashlib
import html
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vision_gates.datasets.base import few, how_many
from vision_gates.engine.building import RunInfo
from vision_gates.engine.figures import class_colour, label_mask, png_uri
from vision_gates.engine.gate_views import GateViews
from vision_gates.engine.gate_window import gate_window
from vision_gates.engine.page_style import PAGE_STYLE
from vision_gates.engine.report_pictures import gates_section, side_letters, volume_frame
from vision_gates.engine.slices import AXIAL, CORONAL, SAGITTAL, Plane, fullest, grey_window, pixel_of, square, turned
from vision_gates.engine.volume_data import VolumePredictor
from vision_gates.gate_maps import collect_gate_maps, gates_of
from vision_gates.volumes.geometry import Geometry, reorient
from vision_gates.volumes.preprocessing import Prepared, restore_labels
from vision_gates.volumes.reading import Volume

__all__ = ["case_section", "page"]

_AXIAL_SLICES = 6
_SIDES = (360, 288, 224, 160)  # pixels of a picture's longest side: the first that keeps a case's pictures small
_PICTURE_BYTES = 240_000
_MASK_SIDE = 384  # masks stay sharp where pictures shrink: they are small files anyway
_FEW_LABELS, _MANY_LABELS = 8, 24  # named in one line, shown in an open table

_HEAD = re.compile(r'<section class="case" id="([^"]+)"><h2>(.*?)</h2>', re.DOTALL)
_HEAD_CHARACTERS = 8192  # more than it has: the name of a file is short, escaped too

_STYLE_MORE = """
.alert{border-left:4px solid var(--warn);background:var(--card);border-radius:6px;padding:10px 16px;margin:0 0 20px}
nav{columns:220px;column-gap:28px}nav a{display:block;overflow-wrap:anywhere;break-inside:avoid}
a{color:var(--a)}h2{overflow-wrap:anywhere;margin-bottom:2px}.slices{display:grid;gap:14px 12px;align-items:start;
grid-template-columns:repeat(auto-fill,minmax(min(220px,46%),1fr))}
.slices figcaption{margin-top:4px;color:var(--soft)}
.labels{width:auto;min-width:min(460px,100%);margin:14px 0 10px}details{margin:14px 0 10px}
"""


def _text(value: Any) -> str:
    """Escaped text."""
    return html.escape(_valid(str(value)))


def _valid(text: str) -> str:
    """A file name need not be valid Unicode; what is not becomes a backslash escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# ---------------------------------------------------------------- page


def page(sections: Sequence[Path], *, title: str) -> Iterator[str]:
    """One self-contained page in pieces, of which no more than one case is in memory; light or dark as the system is.

    Args:
        sections: UTF-8 files with what `case_section` gave.
        title: headline, plain text.
    """
    yield (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{_text(title)} - vision_gates</title>'
        f"<style>{PAGE_STYLE}{_STYLE_MORE}</style></head><body><main><header><div><h1>{_text(title)}</h1>"
        f'<div class="soft">{how_many(len(sections), "case")}</div></div></header>'
        '<p class="alert">These are predictions of a network, not a diagnosis. Somebody qualified has to check them '
        "before anything is concluded from them.</p>"
    )
    if len(sections) > 1:
        yield "<section><nav>"
        for section in sections:
            with open(section, encoding="utf-8", errors="replace") as file:
                head = _HEAD.search(file.read(_HEAD_CHARACTERS))
            yield f'<a href="#{head[1]}">{head[2]}</a>' if head else ""
        yield "</nav></section>"
    for section in sections:
        yield section.read_text(encoding="utf-8", errors="replace")
    yield "<footer>Made by vision_gates</footer></main></body></html>\n"


def case_section(
    name: str,
    volume: Volume,
    labels: NDArray[Any],
    prepared: Prepared,
    predictor: VolumePredictor,
    info: RunInfo,
) -> str:
    """A case as an HTML fragment: its labels' volumes, slices of it with them, and what the network's gates did.

    Args:
        name: of the case, plain text.
        volume: its first channel, as it lies in the file.
        labels: (I, J, K) integers on the volume's grid.
        prepared: the case as the network saw it.
        predictor: the network; it runs once more, on one window, where it has gates.
        info: of the run.
    """
    geometry = volume.geometry
    about = [
        f"{' x '.join(map(str, geometry.shape))} voxels",
        f"{' x '.join(f'{mm:.3g}' for mm in geometry.spacing)} mm",
        f"axes {geometry.orientation}",
    ]
    about += [volume.modality] if volume.modality else []
    name = _valid(name)
    anchor = hashlib.sha256(name.encode("utf-8")).hexdigest()[:12]  # a name may hold what an id may not
    return (
        f'<section class="case" id="case-{anchor}"><h2>{_text(name)}</h2>'
        f'<p class="soft">{_text(" · ".join(about))}</p>{_table(labels, geometry, info.class_names)}'
        f"{_slices(volume, labels, predictor, info.class_names)}"
        f"{_gate_section(name, labels, prepared, predictor, info)}</section>"
    )


def _table(labels: NDArray[Any], geometry: Geometry, names: Sequence[str]) -> str:
    """The labels found, which is the pictures' legend, too; those that were not in a line below."""
    counts = np.bincount(labels.ravel(), minlength=len(names)).tolist()
    found = {label: counts[label] * geometry.voxel_ml for label in range(1, len(names)) if counts[label]}
    if not found:
        return f'<p class="note">Nothing found: no voxel is labelled ({_text(few(names[1:], limit=_FEW_LABELS))}).</p>'
    most = max(found.values())
    digits = 1 if most >= 100 else 2 if most >= 10 else 3
    rows = "".join(
        f'<tr><td><span class="swatch" style="background:{class_colour(label)}"></span>{_text(names[label])}</td>'
        f'<td><i style="--w:{100 * ml / most:.1f}%"></i>{ml:,.{digits}f}</td><td>{counts[label]:,}</td></tr>'
        for label, ml in found.items()
    )
    table = (
        '<div class="scroll"><table class="labels"><tr><th>label</th><th>ml</th><th>voxels</th></tr>'
        f"{rows}</table></div>"
    )
    if len(found) > _MANY_LABELS:
        table = f"<details><summary>{len(found)} labels</summary>{table}</details>"
    missing = _text(few([names[label] for label in range(1, len(names)) if label not in found], limit=_FEW_LABELS))
    return table + (f'<p class="small soft">Not found: {missing}.</p>' if missing else "")


# ---------------------------------------------------------------- slices


@dataclass(frozen=True, eq=False)
class _Slice:
    """A slice in radiological orientation, its pixels as they are."""

    plane: Plane
    caption: str
    image_HW: NDArray[np.float32]
    labels_HW: NDArray[np.integer]
    pixel: tuple[float, float]


def _slices(volume: Volume, labels: NDArray[Any], predictor: VolumePredictor, names: Sequence[str]) -> str:
    image_XYZ, grid = reorient(volume.array, volume.geometry)
    labels_XYZ, _ = reorient(labels, volume.geometry)
    low, high = grey_window(image_XYZ, predictor.info.preprocessing.channels[0])
    chosen = []
    for plane in (AXIAL, CORONAL, SAGITTAL):
        file_axis, first, step = _place_in_file(grid, volume.geometry, plane.axis)
        total = volume.geometry.shape[file_axis]
        for index in _choose(labels_XYZ, plane):
            picture_HW = turned(image_XYZ.take(index, axis=plane.axis)).astype(np.float32)
            picture_HW = np.clip((picture_HW - low) / (high - low), 0.0, 1.0)
            mask_HW = turned(labels_XYZ.take(index, axis=plane.axis))
            caption = f"{plane.name}, slice {first + step * index + 1} of {total}"
            chosen.append(_Slice(plane, caption, picture_HW, mask_HW, pixel_of(grid, plane)))
    masks = [
        label_mask(square(s.labels_HW, s.pixel, _MASK_SIDE, nearest=True), len(names)) if s.labels_HW.any() else ""
        for s in chosen
    ]
    pictures: list[tuple[str, int, int]] = []
    for side in _SIDES:
        squares = [(square(s.image_HW, s.pixel, side) * 255 + 0.5).astype(np.uint8) for s in chosen]
        pictures = [(png_uri(picture), picture.shape[0], picture.shape[1]) for picture in squares]
        if sum(len(uri) for uri, *_ in pictures) + sum(map(len, masks)) <= _PICTURE_BYTES:
            break
    figures = []
    for s, (uri, height, width), mask in zip(chosen, pictures, masks, strict=True):
        layer = f'<img alt="" src="{mask}">' if mask else ""
        marks, words = side_letters(s.plane.letters, height, width)
        caption = s.caption + words
        frame = f"--image:url({uri});{volume_frame(height, width)}"
        figures.append(
            f'<figure style="{frame}"><div class="view" role="img" aria-label="{caption}">{layer}{marks}</div>'
            f"<figcaption>{caption}</figcaption></figure>"
        )
    most = "the coronal and the sagittal slice with most labelled voxels" if labels.any() else "the middle ones"
    return (
        f'<p class="small soft">Axial slices from the feet upwards, {most}. Slices are counted from 1 in the order of '
        f"the file. Grey values from {low:.4g} to {high:.4g}. Point at a slice to see it without its labels.</p>"
        f'<div class="slices">{"".join(figures)}</div>'
    )


def _choose(labels_XYZ: NDArray[Any], plane: Plane) -> list[int]:
    """Which slices are shown: axial ones in the middle of equal parts of what is labelled, else the fullest one."""
    if plane is not AXIAL:
        return [fullest(labels_XYZ, plane.axis)]
    labelled = np.flatnonzero(labels_XYZ.any(axis=(0, 1)))
    first, size = (int(labelled[0]), int(np.ptp(labelled)) + 1) if labelled.size else (0, labels_XYZ.shape[2])
    number = min(_AXIAL_SLICES, size)
    return [first + int((i + 0.5) * size / number) for i in range(number)]


def _place_in_file(grid: Geometry, file: Geometry, axis: int) -> tuple[int, int, int]:
    """The file's axis that is ``axis`` of the grid, the file's index of its first slice, and the step to the next."""
    change = np.rint(np.linalg.inv(file.affine) @ grid.affine).astype(int)
    own = int(np.abs(change[:3, axis]).argmax())
    return own, int(change[own, 3]), int(change[own, axis])


# ---------------------------------------------------------------- gates


def _gate_section(
    name: str, labels: NDArray[Any], prepared: Prepared, predictor: VolumePredictor, info: RunInfo
) -> str:
    """The maps of the gates in the slice with most label, of one window of the network around its label."""
    network = predictor.network
    if not gates_of(network):
        return ""
    on_grid = restore_labels(labels, prepared.source, prepared.geometry)
    window = gate_window(network, predictor.info, prepared.image, prepared.geometry, on_grid, name=name)
    try:
        maps = collect_gate_maps(network, window.input_1C.to(predictor.device))
    except torch.OutOfMemoryError:  # the windows of the prediction may have run in half precision
        return '<p class="note">No gate maps: the device has too little memory for them.</p>'
    views = window.views(maps)
    if not views:
        return ""
    gates = GateViews({0: views}, pictures={0: window.picture})
    return gates_section(gates, task="segmentation", class_names=info.class_names)
