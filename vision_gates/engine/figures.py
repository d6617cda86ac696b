"""Pictures of the report as text: line charts and confusion matrices as SVG, images and masks as PNG data URIs.

Written by hand rather than with a plotting library: the colours follow the page's light or dark scheme, the text stays
text, and a chart takes a millisecond. Every name that comes from outside is escaped here.
"""

import base64
import colorsys
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Series",
    "class_colour",
    "confusion_matrix",
    "error_mask",
    "heat_alpha",
    "heat_bar",
    "heat_colours",
    "heat_mask",
    "heat_table",
    "label_mask",
    "line_chart",
    "png_uri",
]

# Okabe and Ito's palette, told apart with every common colour blindness; the dark blue last, it drowns on MR images.
_PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#0072B2")
_ERROR = (255, 64, 129)
_MASK_SIDE = 280  # pixels, about what a view has on the page


def class_colour(label: int) -> str:
    """Hex colour of a foreground class, label 1 first; after the seven safe ones, hues by the golden ratio."""
    if label <= len(_PALETTE):
        return _PALETTE[(label - 1) % len(_PALETTE)]
    red, green, blue = colorsys.hls_to_rgb(label * 0.618034 % 1.0, 0.45 + 0.2 * (label % 2), 0.65)
    return f"#{round(red * 255):02X}{round(green * 255):02X}{round(blue * 255):02X}"


# ---------------------------------------------------------------- images


def png_uri(image: NDArray[np.uint8]) -> str:
    """data: URI of an (H, W) grey, (H, W, 3) RGB or (H, W, 4) RGBA image."""
    if image.ndim == 3:  # OpenCV wants BGR
        image = np.ascontiguousarray(image[..., [2, 1, 0, 3][: image.shape[2]]])
    done, data = cv2.imencode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 6])
    if not done:
        raise ValueError(f"no PNG can be made of an array of shape {image.shape}")
    return f"data:image/png;base64,{base64.b64encode(data.tobytes()).decode()}"


def _edges(labels_HW: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Pixels that have a neighbour, up, down, left or right, of another label."""
    edges = np.zeros(labels_HW.shape, dtype=bool)
    for axis in (0, 1):
        change = np.diff(labels_HW.astype(np.int64), axis=axis) != 0
        before = [(0, 0), (0, 0)]
        after = [(0, 0), (0, 0)]
        before[axis], after[axis] = (1, 0), (0, 1)
        edges |= np.pad(change, before) | np.pad(change, after)
    return edges


def label_mask(labels_HW: NDArray[np.integer], num_classes: int) -> str:
    """PNG URI of a transparent mask: classes tinted, their outlines opaque; background and unscored pixels clear."""
    # Small masks are enlarged first, or an outline of one pixel would be as thick as what it surrounds.
    factor = max(1, math.ceil(_MASK_SIDE / max(labels_HW.shape)))
    labels_HW = labels_HW.repeat(factor, axis=0).repeat(factor, axis=1)
    colours = np.zeros((num_classes, 4), dtype=np.uint8)
    for label in range(1, num_classes):
        colours[label] = (*bytes.fromhex(class_colour(label)[1:]), 120)
    scored_HW = labels_HW < num_classes
    rgba_HW4 = colours[np.where(scored_HW, labels_HW, 0)]
    inside_HW = rgba_HW4[..., 3] > 0
    rgba_HW4[..., 3] = np.where(inside_HW & _edges(labels_HW), 255, rgba_HW4[..., 3])
    return png_uri(rgba_HW4)


def error_mask(target_HW: NDArray[np.integer], prediction_HW: NDArray[np.integer], num_classes: int) -> str:
    """PNG URI of a transparent mask of the scored pixels whose class is wrong."""
    wrong_HW = (target_HW != prediction_HW) & (target_HW < num_classes)
    rgba_HW4 = np.zeros((*target_HW.shape, 4), dtype=np.uint8)
    rgba_HW4[wrong_HW] = (*_ERROR, 235)
    return png_uri(rgba_HW4)


# ---------------------------------------------------------------- heat


def heat_colours(values: NDArray[Any]) -> NDArray[np.uint8]:
    """RGB colours of values in [0, 1]: black through purple and orange to light yellow, evenly spaced for the eye."""
    steps = np.clip(np.rint(np.asarray(values, dtype=np.float64) * 255), 0, 255).astype(np.uint8)
    colours_BGR = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[None], cv2.COLORMAP_INFERNO).reshape(256, 3)
    return colours_BGR[:, ::-1].astype(np.uint8)[steps]


def heat_alpha(values: NDArray[np.floating]) -> NDArray[np.floating]:
    """How much of an image the heat over it hides: more where it is bright, never so much that the image is lost."""
    return 0.35 + 0.3 * values


def heat_mask(values_HW: NDArray[np.floating], *, opaque: bool = False) -> str:
    """PNG URI of values in [0, 1] as heat over an image, which shines through most where they are small.

    Args:
        values_HW: (H, W), in 64 steps.
        opaque: Nothing shines through.
    """
    values_HW = np.rint(np.clip(values_HW, 0.0, 1.0) * 63) / 63  # fewer steps make a smaller file
    alpha_HW = np.ones(values_HW.shape) if opaque else heat_alpha(values_HW)
    alpha_HW1 = np.rint(255 * alpha_HW[..., None]).astype(np.uint8)
    return png_uri(np.concatenate((heat_colours(values_HW), alpha_HW1), axis=-1))


def heat_bar(low: str, high: str) -> str:
    """Colour bar of :func:`heat_mask` from 0 to 1, with a word for each end; HTML."""
    stops = ",".join(f"rgb({r},{g},{b})" for r, g, b in heat_colours(np.linspace(0, 1, 9)).tolist())
    bar = f'<i style="background:linear-gradient(90deg,{stops})"></i>'
    return f'<div class="bar"><span>0 {html.escape(low)}</span>{bar}<span>1 {html.escape(high)}</span></div>'


def heat_table(
    values: Sequence[Sequence[float | None]], *, rows: Sequence[str], columns: Sequence[str], titles: Sequence[str]
) -> str:
    """HTML table of numbers in [0, 1], each on its heat colour; ``titles`` are the rows' long names."""
    head = "".join(f"<th>{html.escape(column)}</th>" for column in columns)
    body = []
    for row, title, numbers in zip(rows, titles, values, strict=True):
        cells = []
        for value in numbers:
            if value is None:
                cells.append("<td></td>")
                continue
            r, g, b = heat_colours(np.asarray(value)).tolist()
            ink = "#000" if 0.299 * r + 0.587 * g + 0.114 * b > 128 else "#fff"
            cells.append(f'<td style="background:rgb({r},{g},{b});color:{ink}">{value:.2f}</td>')
        body.append(f'<tr><td title="{html.escape(title)}">{html.escape(row)}</td>{"".join(cells)}</tr>')
    return f'<div class="scroll"><table class="heat"><tr><th></th>{head}</tr>{"".join(body)}</table></div>'


# ---------------------------------------------------------------- line charts


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: Shown in the legend.
        style: CSS class of its colour, "a", "b" or "c".
        points: (x, y) pairs; pairs whose y is None or not finite are left out.
    """

    name: str
    style: str
    points: Sequence[tuple[float, float | None]]

    def finite(self) -> list[tuple[float, float]]:
        """The points that can be drawn."""
        return [(float(x), float(y)) for x, y in self.points if y is not None and math.isfinite(y)]


def _ticks(low: float, high: float, number: int = 4) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that span [low, high]."""
    span = high - low
    raw = span / number
    step = 10.0 ** math.floor(math.log10(raw))
    step *= next(factor for factor in (1, 2, 5, 10) if step * factor >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _number(value: float, largest: float, digits: int = 4) -> str:
    """Text of a number; with an exponent where the largest of its kind is small or huge, so that all look alike."""
    if value == 0 or 1e-2 <= largest < 1e5:
        return f"{value:.{digits}g}" if abs(value) > 1e-9 * largest else "0"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def line_chart(title: str, series: Sequence[Series], *, last_x: float, mark: tuple[float, str] | None = None) -> str:
    """SVG of a few lines over epochs.

    Args:
        title: Heading.
        series: Lines; those without a finite point are left out.
        last_x: Right end of the axis (the planned number of epochs); more if the points go further.
        mark: An x to mark with a vertical line, and its label.

    Returns:
        An <svg> element, or "" where there is nothing to draw.
    """
    lines = [(s, s.finite()) for s in series]
    lines = [(s, points) for s, points in lines if points]
    if not lines:
        return ""
    width, height, left, right, top, bottom = 360, 236, 46, 14, 46, 32
    xs = [x for _, points in lines for x, _ in points]
    ys = [y for _, points in lines for _, y in points]
    x_low, x_high = min(1.0, *xs), max(last_x, 2.0, *xs)
    y_low, y_high = min(ys), max(ys)
    if y_high - y_low < 1e-9 * max(abs(y_high), 1e-9):
        pad = abs(y_high) * 0.1 or 1.0
        y_low, y_high = y_low - pad, y_high + pad
    ticks = _ticks(y_low, y_high)
    y_low, y_high = ticks[0], ticks[-1]
    largest = max(abs(y_low), abs(y_high))

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (width - left - right)
        up = (y - y_low) / (y_high - y_low) * (height - top - bottom)
        return round(left + across, 1), round(height - bottom - up, 1)

    out = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(title)}">']
    out.append(f'<text class="title" x="0" y="13">{html.escape(title)}</text>')
    for y in ticks:
        _, py = at(x_low, y)
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py}" y2="{py}"/>')
        out.append(f'<text class="tick" x="{left - 7}" y="{py + 3.5}" text-anchor="end">{_number(y, largest)}</text>')
    x_ticks = sorted({1, *(round(t) for t in _ticks(x_low, x_high, 5) if 1 < t <= x_high)})
    for epoch in x_ticks:
        px, _ = at(epoch, y_low)
        out.append(f'<text class="tick" x="{px}" y="{height - bottom + 15}" text-anchor="middle">{epoch}</text>')
    middle = (left + width - right) / 2
    out.append(f'<text class="tick" x="{middle}" y="{height - 3}" text-anchor="middle">epoch</text>')
    if mark is not None:
        px, _ = at(mark[0], y_low)
        out.append(f'<line class="mark" x1="{px}" x2="{px}" y1="{top}" y2="{height - bottom}"/>')
        anchor = "end" if px > middle else "start"
        shift = -5 if px > middle else 5
        # At the foot of the chart: lines crowd at the other end, a loss falling and a metric rising towards it.
        foot = height - bottom - 6 if lines[0][1][-1][1] > (y_low + y_high) / 2 else top + 10
        out.append(
            f'<text class="tick" x="{px + shift}" y="{foot}" text-anchor="{anchor}">{html.escape(mark[1])}</text>'
        )
    key_x = 0.0
    for s, points in lines:
        placed = [at(x, y) for x, y in points]
        path = " ".join(f"{x},{y}" for x, y in placed)
        out.append(f'<polyline class="line {s.style}" points="{path}"/>')
        if len(points) <= 60:
            for (px, py), (x, y) in zip(placed, points, strict=True):
                tip = html.escape(f"{s.name}, epoch {x:g}: {_number(y, largest, 5)}")
                out.append(f'<circle class="dot {s.style}" cx="{px}" cy="{py}" r="2.2"><title>{tip}</title></circle>')
        label = html.escape(f"{s.name} {_number(points[-1][1], largest)}")
        out.append(f'<line class="line {s.style}" x1="{key_x}" x2="{key_x + 14}" y1="26" y2="26"/>')
        out.append(f'<text class="key" x="{key_x + 19}" y="30">{label}</text>')
        key_x += 32 + 6.3 * len(label)
    out.append("</svg>")
    return "".join(out)


# ---------------------------------------------------------------- confusion matrix


def confusion_matrix(confusion: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """SVG of a confusion matrix, rows true and columns predicted, each row shaded by its share.

    Cells on the diagonal are blue, mistakes orange. Counts are written in up to 24 classes; above 60 the cells become
    one picture.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1.0)
    number = len(names)
    longest = max(len(name) for name in names)
    sizes = ((12, 44.0), (16, 36.0), (24, 26.0), (60, 14.0))
    cell = next((size for most, size in sizes if number <= most), 560.0 / number)
    named = number <= 60
    short = [name if len(name) <= 22 else f"{name[:21]}…" for name in names]
    margin = 30 + (min(longest, 22) * 7.0 if named else 0)
    # Column names that are wider than their cell stand on end.
    upright = named and max(len(name) for name in short) * 7.0 > cell + 2
    head = 30 + (min(longest, 22) * 7.0 if upright else 18 if named else 0)
    side = cell * number
    width, height = margin + side + 2, head + side + 2
    out = [
        f'<svg class="matrix" viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px" role="img" '
        'aria-label="confusion matrix">',
        f'<text class="tick" x="{margin + side / 2:.1f}" y="13" text-anchor="middle">predicted</text>',
        f'<text class="tick" transform="translate(12 {head + side / 2:.1f}) rotate(-90)" text-anchor="middle">'
        "true</text>",
    ]
    if number > 60:
        rgba = np.zeros((number, number, 4), dtype=np.uint8)
        rgba[...] = (213, 94, 0, 0)
        diagonal = np.arange(number)
        rgba[diagonal, diagonal, :3] = (0, 114, 178)
        rgba[..., 3] = np.round(255 * np.sqrt(share))
        out.append(
            f'<rect class="frame" x="{margin}" y="{head}" width="{side:.0f}" height="{side:.0f}"/>'
            f'<image class="pixels" x="{margin}" y="{head}" width="{side:.0f}" height="{side:.0f}" '
            f'href="{png_uri(rgba)}"/>'
        )
        return "".join([*out, "</svg>"])
    for i in range(number):
        centre = (i + 0.5) * cell
        name = html.escape(short[i])
        out.append(f'<text class="name" x="{margin - 7}" y="{head + centre + 4:.1f}" text-anchor="end">{name}</text>')
        place = f"translate({margin + centre + 4:.1f} {head - 7}) rotate(-90)"
        if not upright:
            place = f"translate({margin + centre:.1f} {head - 7})"
        anchor = "start" if upright else "middle"
        out.append(f'<text class="name" text-anchor="{anchor}" transform="{place}">{name}</text>')
        for j in range(number):
            kind = "hit" if i == j else "slip"
            count = int(counts[i, j])
            tip = html.escape(f"{names[i]} predicted as {names[j]}: {count} ({share[i, j]:.1%})")
            x, y = margin + j * cell, head + i * cell
            # The square root lifts rare mistakes, which are what one looks for, above the background.
            shade = math.sqrt(share[i, j])
            out.append(
                f'<g><title>{tip}</title><rect class="frame" x="{x:.1f}" y="{y:.1f}" width="{cell - 2}" '
                f'height="{cell - 2}" rx="3"/><rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{cell - 2}" '
                f'height="{cell - 2}" rx="3" fill-opacity="{shade:.3f}"/>'
            )
            if number <= 24 and count:
                strong = " strong" if shade > 0.6 else ""
                out.append(
                    f'<text class="count{strong}" x="{x + cell / 2 - 1:.1f}" y="{y + cell / 2 + 3:.1f}" '
                    f'text-anchor="middle">{count}</text>'
                )
            out.append("</g>")
    return "".join([*out, "</svg>"])
