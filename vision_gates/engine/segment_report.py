"""The page of ``vision-gates segment``: what was found in each case, in numbers and in pictures of the source volume.

Pictures are in radiological orientation, as if one looked from the feet (axial), at the face (coronal) or from the
patient's left (sagittal): the patient's right is on the left of the picture, the front above or on the left, the head
above. Their pixels are square whatever the spacing. Suffix HW: rows and columns of a picture.
"""

import hashlib
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from vision_gates.datasets.base import few, how_many
from vision_gates.engine.building import RunInfo
from vision_gates.engine.figures import class_colour, label_mask, png_uri
from vision_gates.engine.gate_views import GateView, GateViews, gate_views
from vision_gates.engine.report import PAGE_STYLE, gates_section
from vision_gates.engine.volume_data import VolumePredictor
from vision_gates.gate_maps import collect_gate_maps, gates_of
from vision_gates.volumes.geometry import Geometry, reorient
from vision_gates.volumes.inference import neighbour_slices
from vision_gates.volumes.preprocessing import ChannelPlan, Prepared, restore_labels
from vision_gates.volumes.reading import Volume

__all__ = ["case_section", "page"]

_AXIAL_SLICES = 6
_SIDES = (360, 288, 224, 160)  # pixels of a picture's longest side: the first that keeps a case's pictures small
_PICTURE_BYTES = 240_000
_MASK_SIDE = 384  # masks stay sharp where pictures shrink: they are small files anyway
_MAP_SIDE = 96  # of a gate's map that is cut; maps are smooth
_SAMPLE_VOXELS = 2_000_000  # of a volume, for its percentiles
_TALLEST = 360  # of a picture on the page, pixels of the style sheet
_FLAT = 5  # how much longer than high a picture is that has no room for a letter above and one below
_FEW_LABELS, _MANY_LABELS = 8, 24  # named in one line, shown in an open table

_STYLE_MORE = """
.alert{border-left:4px solid var(--warn);background:var(--card);border-radius:6px;padding:10px 16px;margin:0 0 20px}
nav{columns:220px;column-gap:28px}nav a{display:block;overflow-wrap:anywhere;break-inside:avoid}
a{color:var(--a)}h2{overflow-wrap:anywhere;margin-bottom:2px}.slices{display:grid;gap:14px 12px;align-items:start;
grid-template-columns:repeat(auto-fill,minmax(min(220px,46%),1fr))}
.slices .view{width:min(100%,var(--most))}.slices figcaption{margin-top:4px;color:var(--soft)}
.side{position:absolute;color:#fff;text-shadow:0 0 3px #000,0 0 3px #000;
font-size:12px;font-weight:600;line-height:1;pointer-events:none}
.side.w{left:5px;top:50%;transform:translateY(-50%)}.side.e{right:5px;top:50%;transform:translateY(-50%)}
.side.n{top:5px;left:50%;transform:translateX(-50%)}.side.s{bottom:5px;left:50%;transform:translateX(-50%)}
.labels{width:auto;min-width:min(460px,100%);margin:14px 0 10px}details{margin:14px 0 10px}
"""


class _Plane(NamedTuple):
    """A kind of slice: the axis it lies across (x, y or z) and the letters at its left, right, upper and lower side."""

    name: str
    axis: int
    letters: str


_AXIAL, _CORONAL, _SAGITTAL = _Plane("axial", 2, "RLAP"), _Plane("coronal", 1, "RLHF"), _Plane("sagittal", 0, "APHF")
_PLANES = {plane.axis: plane for plane in (_SAGITTAL, _CORONAL, _AXIAL)}


def _text(value: Any) -> str:
    """Escaped text."""
    return html.escape(_valid(str(value)))


def _valid(text: str) -> str:
    """A file name need not be valid Unicode; what is not becomes a backslash escape."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


# ---------------------------------------------------------------- page


def page(sections: Sequence[str], *, title: str) -> str:
    """One self-contained page, light or dark as the reader's system is.

    Args:
        sections: from `case_section`.
        title: headline, plain text.
    """
    heads = [re.search(r'<section class="case" id="([^"]+)"><h2>(.*?)</h2>', s, re.DOTALL) for s in sections]
    links = "".join(f'<a href="#{head[1]}">{head[2]}</a>' for head in heads if head)
    nav = f"<section><nav>{links}</nav></section>" if len(sections) > 1 else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{_text(title)} - vision_gates</title>'
        f"<style>{PAGE_STYLE}{_STYLE_MORE}</style></head><body><main><header><div><h1>{_text(title)}</h1>"
        f'<div class="soft">{how_many(len(sections), "case")}</div></div></header>'
        '<p class="alert">These are predictions of a network, not a diagnosis. Somebody qualified has to check them '
        f"before anything is concluded from them.</p>{nav}{''.join(sections)}"
        "<footer>Made by vision_gates</footer></main></body></html>\n"
    )


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

    plane: _Plane
    caption: str
    image_HW: NDArray[np.float32]
    labels_HW: NDArray[np.integer]
    pixel: tuple[float, float]


def _slices(volume: Volume, labels: NDArray[Any], predictor: VolumePredictor, names: Sequence[str]) -> str:
    image_XYZ, grid = reorient(volume.array, volume.geometry)
    labels_XYZ, _ = reorient(labels, volume.geometry)
    low, high = _window(image_XYZ, predictor.info.preprocessing.channels[0])
    chosen = []
    for plane in (_AXIAL, _CORONAL, _SAGITTAL):
        file_axis, first, step = _place_in_file(grid, volume.geometry, plane.axis)
        total = volume.geometry.shape[file_axis]
        for index in _choose(labels_XYZ, plane):
            picture_HW = _turned(image_XYZ.take(index, axis=plane.axis)).astype(np.float32)
            picture_HW = np.clip((picture_HW - low) / (high - low), 0.0, 1.0)
            mask_HW = _turned(labels_XYZ.take(index, axis=plane.axis))
            caption = f"{plane.name}, slice {first + step * index + 1} of {total}"
            chosen.append(_Slice(plane, caption, picture_HW, mask_HW, _pixel(grid, plane)))
    masks = [
        label_mask(_square(s.labels_HW, s.pixel, _MASK_SIDE, nearest=True), len(names)) if s.labels_HW.any() else ""
        for s in chosen
    ]
    pictures: list[tuple[str, int, int]] = []
    for side in _SIDES:
        squares = [(_square(s.image_HW, s.pixel, side) * 255 + 0.5).astype(np.uint8) for s in chosen]
        pictures = [(png_uri(picture), picture.shape[0], picture.shape[1]) for picture in squares]
        if sum(len(uri) for uri, *_ in pictures) + sum(map(len, masks)) <= _PICTURE_BYTES:
            break
    figures = []
    for s, (uri, height, width), mask in zip(chosen, pictures, masks, strict=True):
        layer = f'<img alt="" src="{mask}">' if mask else ""
        sides = dict(zip("wens", s.plane.letters, strict=True))
        caption = s.caption
        if max(height, width) > _FLAT * min(height, width):  # no room for two letters
            left_out, where = ("ns", "above") if height < width else ("we", "on the left")
            caption += f", {sides[left_out[0]]} {where}"
            sides = {side: letter for side, letter in sides.items() if side not in left_out}
        marks = "".join(f'<span class="side {side}">{letter}</span>' for side, letter in sides.items())
        frame = f"--image:url({uri});--shape:{width}/{height};--most:{_TALLEST * width / height:.0f}px"
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


def _window(image: NDArray[Any], channel: ChannelPlan, *, normalised: bool = False) -> tuple[float, float]:
    """Intensities shown as black and as white: of CT what the network was trained on, else 0.5 % to 99.5 %."""
    if channel.kind == "ct":
        low, high, mean, std = channel.low, channel.high, channel.mean, channel.std
        assert low is not None and high is not None and mean is not None and std is not None  # by ChannelPlan
        if normalised:
            low, high = (low - mean) / std, (high - mean) / std
        return low, max(high, low + 1e-6)
    # Evenly spaced along every axis: percentiles need no more, and a large volume would take seconds.
    stride = max(1, int(np.ceil((image.size / _SAMPLE_VOXELS) ** (1 / 3))))
    low, high = np.percentile(image[::stride, ::stride, ::stride], [0.5, 99.5])
    if high <= low:  # nearly constant: the rare other voxels are what there is to see
        low, high = image.min(), image.max()
    return float(low), float(high) if high > low else float(low) + 1.0


def _choose(labels_XYZ: NDArray[Any], plane: _Plane) -> list[int]:
    """Which slices are shown: axial ones in the middle of equal parts of what is labelled, else the fullest one."""
    counts = np.count_nonzero(labels_XYZ, axis=tuple({0, 1, 2} - {plane.axis}))
    if plane is not _AXIAL:
        return [int(counts.argmax()) if counts.any() else len(counts) // 2]
    labelled = np.flatnonzero(counts)
    first, size = (int(labelled[0]), int(np.ptp(labelled)) + 1) if labelled.size else (0, len(counts))
    number = min(_AXIAL_SLICES, size)
    return [first + int((i + 0.5) * size / number) for i in range(number)]


def _place_in_file(grid: Geometry, file: Geometry, axis: int) -> tuple[int, int, int]:
    """The file's axis that is ``axis`` of the grid, the file's index of its first slice, and the step to the next."""
    change = np.rint(np.linalg.inv(file.affine) @ grid.affine).astype(int)
    own = int(np.abs(change[:3, axis]).argmax())
    return own, int(change[own, 3]), int(change[own, axis])


def _turned(slice_AB: NDArray[Any]) -> NDArray[Any]:
    """Rows and columns in radiological orientation of a slice whose two axes run as in RAS: both run backwards."""
    return slice_AB[::-1, ::-1].T


def _pixel(grid: Geometry, plane: _Plane) -> tuple[float, float]:
    """Height and width in mm of a pixel of a slice, turned as `_turned` does."""
    width, height = (grid.spacing[axis] for axis in range(3) if axis != plane.axis)
    return height, width


def _square(picture_HW: NDArray[Any], pixel: tuple[float, float], side: int, *, nearest: bool = False) -> NDArray[Any]:
    """The picture with square pixels: as small as the smaller of its own, at most ``side`` along the longest side."""
    lengths = [count * mm for count, mm in zip(picture_HW.shape, pixel, strict=True)]
    size = max(min(pixel), max(lengths) / side)
    shape = [min(side, max(1, round(length / size))) for length in lengths]
    picture_HW = np.ascontiguousarray(picture_HW.astype(np.int16) if nearest else picture_HW)
    for axis in (0, 1):  # one after the other: OpenCV averages areas only where both shrink
        if shape[axis] != picture_HW.shape[axis]:
            smooth = cv2.INTER_AREA if shape[axis] < picture_HW.shape[axis] else cv2.INTER_LINEAR
            size_WH = (shape[1], picture_HW.shape[0]) if axis == 1 else (picture_HW.shape[1], shape[0])
            how = cv2.INTER_NEAREST_EXACT if nearest else smooth
            picture_HW = cv2.resize(picture_HW, size_WH, interpolation=how)
    return picture_HW


# ---------------------------------------------------------------- gates


def _gate_section(
    name: str, labels: NDArray[Any], prepared: Prepared, predictor: VolumePredictor, info: RunInfo
) -> str:
    """The maps of the gates in the slice with most label, of one window of the network around its label."""
    network, view = predictor.network, predictor.info
    if not gates_of(network):
        return ""
    # All happens on the axes that the network knows; only what is shown is turned to RAS.
    image_CXYZ, grid = reorient(prepared.image, prepared.geometry, view.view)
    labels_XYZ = restore_labels(labels, prepared.source, prepared.geometry)
    labels_XYZ, _ = reorient(labels_XYZ, prepared.geometry, view.view)
    slices = view.spatial_dims == 2
    axis = view.slice_axis if slices else next(a for a in range(3) if view.view[a] in "SI")
    rows, columns = (a for a in range(3) if a != axis)
    sides, divisors = list(view.patch_size), list(_divisors(network, view.spatial_dims))
    if slices:
        sides.insert(axis, 1)
        divisors.insert(axis, 1)
    centre = _centre(labels_XYZ, axis)
    starts = [_start(c, side, size) for c, side, size in zip(centre, sides, grid.shape, strict=True)]
    inside = [slice(max(s, 0), min(s + n, size)) for s, n, size in zip(starts, sides, grid.shape, strict=True)]
    window = [slice(part.start - s, part.stop - s) for part, s in zip(inside, starts, strict=True)]

    seen_CXYZ = image_CXYZ[(slice(None), *inside)]
    if slices:
        near = neighbour_slices(centre[axis], neighbours=view.neighbours, size=grid.shape[axis])
        across = [slice(None), *inside]
        across[axis + 1] = slice(None)
        seen_CXYZ = np.concatenate([image_CXYZ[tuple(across)].take([index], axis=axis + 1) for index in near])
    x_CXYZ = np.zeros((len(seen_CXYZ), *sides), dtype=np.float32)
    x_CXYZ[(slice(None), *window)] = seen_CXYZ
    x_1C = torch.from_numpy(x_CXYZ.squeeze(axis + 1) if slices else x_CXYZ)[None]
    try:
        maps = collect_gate_maps(network, x_1C.to(predictor.device))
    except torch.OutOfMemoryError:  # the windows of the prediction may have run in half precision
        return '<p class="note">No gate maps: the device has too little memory for them.</p>'

    padded = [n + -n % divisor for n, divisor in zip(sides, divisors, strict=True)]
    place = (centre[axis] - starts[axis] + 0.5) / padded[axis]
    depths: dict[str, str] = {}
    flat = []
    for gate in maps:
        values = gate.values
        if values.ndim != 2 + view.spatial_dims:  # a gate that is a parameter has no map
            continue
        if not slices:
            depth = values.shape[2 + axis]
            index = min(int(place * depth), depth - 1)
            depths[gate.name] = f", plane {index + 1} of {depth}"
            values = values.select(2 + axis, index)
        flat.append(replace(gate, values=values))
    extent = (padded[rows], padded[columns])
    found = gate_views(flat, extent)
    if not found:
        return ""

    plane = _PLANES[next(a for a, ends in enumerate(("RL", "AP", "SI")) if grid.orientation[axis] in ends)]
    pixel = _pixel(reorient(prepared.image, prepared.geometry)[1], plane)

    def turned(slice_HW: NDArray[Any]) -> NDArray[Any]:
        """As `_turned`, of a slice on the network's axes."""
        thick = np.expand_dims(slice_HW, axis)
        thick, _ = reorient(thick, Geometry((thick.shape[0], thick.shape[1], thick.shape[2]), grid.affine))
        return _turned(thick.squeeze(plane.axis))

    here: list[Any] = list(inside)
    here[axis] = centre[axis]
    low, high = _window(image_CXYZ[0], view.preprocessing.channels[0], normalised=True)
    picture_HW = np.clip((turned(image_CXYZ[(0, *here)]) - low) / (high - low), 0.0, 1.0).astype(np.float32)
    size = f"{' x '.join(map(str, view.patch_size))} {'pixels' if slices else 'voxels'}"
    which = "slice with most label" if labels_XYZ.any() else "middle slice"
    overlay = {
        "index": 0,
        "name": f"{name}, {plane.name} {which}, in a window of {size} as the network sees it",
        "image": (_square(picture_HW, pixel, _SIDES[2]) * 255 + 0.5).astype(np.uint8),
        "prediction": _square(turned(labels_XYZ[tuple(here)]), pixel, _MASK_SIDE, nearest=True),
    }
    shown = []
    for gate_view in found:
        values_HW = turned(_cut(gate_view, extent, (window[rows], window[columns])))
        shape = turned(np.broadcast_to(np.uint8(0), gate_view.grid)).shape
        title = gate_view.title + depths.get(gate_view.name, "")
        shown.append(replace(gate_view, values=values_HW, grid=(shape[0], shape[1]), title=title))
    return gates_section(GateViews({0: shown}), [overlay], {"task": "segmentation", "class_names": info.class_names})


def _divisors(network: torch.nn.Module, dims: int) -> tuple[int, ...]:
    """What the network pads each axis to a multiple of, at its far end."""
    same = (int(getattr(network, "divisor", 1)),) * dims
    return tuple(getattr(network, "divisors", same))


def _centre(labels_XYZ: NDArray[Any], axis: int) -> tuple[int, ...]:
    """Middle of the labelled voxels of the slice across ``axis`` that has most; of the volume where there are none."""
    others = tuple({0, 1, 2} - {axis})
    counts = np.count_nonzero(labels_XYZ, axis=others)
    if not counts.any():
        return tuple(size // 2 for size in labels_XYZ.shape)
    fullest = int(counts.argmax())
    centre = [int(round(places.mean())) for places in np.nonzero(labels_XYZ.take([fullest], axis=axis))]
    centre[axis] = fullest
    return tuple(centre)


def _start(centre: int, side: int, size: int) -> int:
    """First voxel of a window: inside the volume if that is large enough, else the volume is in its middle."""
    return -((side - size) // 2) if size <= side else min(max(centre - side // 2, 0), size - side)


def _cut(view: GateView, extent: tuple[int, int], part: tuple[slice, slice]) -> NDArray[np.float32]:
    """The part of a map over ``extent`` positions that lies on the image."""
    if all(p.start == 0 and p.stop == n for p, n in zip(part, extent, strict=True)):
        return np.asarray(view.values)
    scale = min(1.0, _MAP_SIDE / max(p.stop - p.start for p in part))
    fine = [max(round(n * scale), 1) for n in extent]
    values = torch.from_numpy(np.ascontiguousarray(view.values))[None, None]
    fine_HW = F.interpolate(values, size=fine, mode="bilinear", antialias=True)[0, 0].clamp(0.0, 1.0).numpy()
    rows, columns = (
        slice(int(p.start * f / n), max(round(p.stop * f / n), int(p.start * f / n) + 1))
        for p, f, n in zip(part, fine, extent, strict=True)
    )
    return fine_HW[rows, columns]
