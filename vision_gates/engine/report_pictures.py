"""Pictures of a report: samples with truth and prediction, and what the gates of the network did to them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from vision_gates.engine.figures import class_colour, error_mask, heat_bar, heat_mask, heat_table, label_mask, png_uri
from vision_gates.engine.gate_views import GateView, GateViews
from vision_gates.engine.page_style import escaped

__all__ = ["gallery", "gates_section", "samples", "side_letters", "volume_frame"]

_FLAT = 5  # how much longer than high a picture is that has no room for a letter above and one below
_TALLEST = 360  # of a slice of a volume on the page, pixels of the style sheet
_SIDES_KEY = (
    "Of each plane the slice with most truth, counted from 1 from the patient's left, back or feet; R and L are the "
    "patient's right and left, A front, P back, H head, F feet."
)
_GALLERY_KEY = "Predicted class and its probability; the true class where it is another."


def samples(overlays: Iterable[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> str:
    """Image, truth, prediction and errors of each segmentation sample; HTML.

    Args:
        overlays: See overlays.py.
        evaluation: What ``evaluation/<split>.json`` holds.
    """
    overlays = list(overlays)
    if not overlays:
        return ""
    names = evaluation["class_names"]
    pictures = [picture for o in overlays for picture in (o, *o.get("further", ()))]
    shown = {int(label) for p in pictures for key in ("target", "prediction") for label in np.unique(p[key])}
    legend = "".join(
        f'<span><span class="swatch" style="background:{class_colour(label)}"></span>{escaped(names[label])}</span>'
        for label in sorted(shown)
        if 0 < label < len(names)
    )
    legend += '<span><span class="swatch" style="background:#ff4081"></span>wrong class</span>'
    heads = "".join(f"<span>{head}</span>" for head in ("image", "truth", "prediction", "errors"))
    figures = []
    for o in overlays:
        rows = "".join(_views(picture, len(names)) for picture in (o, *o.get("further", ())))
        badge = '<span class="badge">worst</span>' if o["worst"] else ""
        score = f"Dice {o['score']:.3f}" if o["score"] is not None else "nothing to find, nothing found"
        figures.append(
            f'<figure><div class="heads">{heads}</div>{rows}<figcaption>{badge}{score} '
            f'<span class="soft">{escaped(o["name"])}</span></figcaption></figure>'
        )
    volumes = any("letters" in o for o in overlays)
    which = f" {_SIDES_KEY}" if volumes else ""
    return (
        '<h3>Samples</h3><p class="small soft">Evenly spaced over the split, then the worst by mean Dice of the '
        f"foreground classes. Point at a view to see the image below its mask.{which}</p>"
        f'<div class="legend">{legend}</div><div class="samples{" volumes" * volumes}">{"".join(figures)}</div>'
    )


def _views(picture: Mapping[str, Any], classes: int) -> str:
    """A line of image, truth, prediction and errors; of a volume with the sides of the patient."""
    height, width = picture["image"].shape[:2]
    target, prediction = picture["target"], picture["prediction"]
    masks = ["", label_mask(target, classes), label_mask(prediction, classes), error_mask(target, prediction, classes)]
    marks, caption, frame = "", "", f"--shape:{width}/{height}"
    if "letters" in picture:
        frame = volume_frame(height, width)
        marks, words = side_letters(picture["letters"], height, width)
        caption = f'<p class="plane">{escaped(picture["caption"] + words)}</p>'
    layers = [f'<img alt="" src="{mask}">' if mask else "" for mask in masks]
    layers[0] = marks  # all four lie the same way
    views = "".join(f'<div class="view">{layer}</div>' for layer in layers)
    # The picture is stored once, as a property that all four views use as their background.
    return f'<div class="views" style="--image:url({png_uri(picture["image"])});{frame}">{views}</div>{caption}'


def volume_frame(height: int, width: int) -> str:
    """Style of a view of a slice: of a thin volume it may be many times as high as wide."""
    return f"--shape:{width}/{height};--most:{_TALLEST * width / height:.0f}px"


def side_letters(letters: str, height: int, width: int) -> tuple[str, str]:
    """The patient's sides at the left, right, upper and lower side of a view, and words for those without room."""
    sides, words = dict(zip("wens", letters, strict=True)), ""
    if max(height, width) > _FLAT * min(height, width):  # no room for two letters
        left_out, where = ("ns", "above") if height < width else ("we", "on the left")
        words = f", {sides[left_out[0]]} {where}"
        sides = {side: letter for side, letter in sides.items() if side not in left_out}
    return "".join(f'<span class="side {side}">{letter}</span>' for side, letter in sides.items()), words


def gallery(overlays: Iterable[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> str:
    """The most confident mistakes of a classifier, then evenly spaced samples; arguments as of `samples`."""
    names, overlays = evaluation["class_names"], list(overlays)
    parts = []
    for worst, title in ((True, "Most confident mistakes"), (False, "Evenly spaced samples")):
        figures = []
        for o in (o for o in overlays if o["worst"] == worst):
            target, prediction = int(o["target"]), int(o["prediction"])
            style = "right" if target == prediction else "wrong"
            tiny = ' class="tiny"' if max(o["image"].shape[:2]) < 64 else ""
            truth = "" if target == prediction else f", truth {escaped(names[target])}"
            figures.append(
                f'<figure><img{tiny} alt="" src="{png_uri(o["image"])}"><figcaption><span class="{style}">'
                f"{escaped(names[prediction])}</span> ({o['score']:.0%}){truth}<br>"
                f'<span class="soft">{escaped(o["name"])}</span></figcaption></figure>'
            )
        if figures:
            parts.append(
                f'<h3>{title}</h3><p class="small soft">{_GALLERY_KEY}</p><div class="gallery">{"".join(figures)}</div>'
            )
    return "".join(parts)


# ---------------------------------------------------------------- gates


def gates_section(
    gates: GateViews, overlays: Iterable[Mapping[str, Any]] = (), *, task: str, class_names: Sequence[str]
) -> str:
    """What the gates did: maps over a few samples, openness of heads, neighbourhoods.

    Args:
        gates: What is shown.
        overlays: The samples, where ``gates`` has no pictures of its own.
        task: "segmentation" or "classification".
        class_names: In label order.
    """
    shown = {o["index"]: o for o in overlays} | gates.pictures
    figures = [_gate_figure(shown[i], views, task, class_names) for i, views in gates.samples.items() if i in shown]
    parts = []
    if figures:
        meanings = {view.kind: view.meaning for views in gates.samples.values() for view in views}
        parts.append(_meanings(meanings))
        parts.append(heat_bar("(dark)", "(bright)"))
        parts.append(
            '<p class="small soft">The colours always span 0 to 1; the numbers below a map are its smallest and '
            f"largest value. Point at a view to see the image below.</p>{''.join(figures)}"
        )
    for table in gates.tables:
        rows = [f"layer {i}" for i in range(1, len(table.names) + 1)]
        columns = [f"{table.unit} {i}" for i in range(1, len(table.values[0]) + 1)]
        heat = heat_table(table.values, rows=rows, columns=columns, titles=table.names)
        parts.append(f"<h3>{escaped(table.kind).capitalize()}, {escaped(table.unit)} by {escaped(table.unit)}</h3>")
        parts.append(f"{_meanings({table.kind: table.meaning})}{heat}")
    for near in gates.neighbourhoods:
        frame = f"--image:none;--shape:{near.values.shape[2]}/{near.values.shape[1]}"
        views = "".join(
            f'<div><div class="view"><img class="cells" alt="" src="{heat_mask(values, opaque=True)}"></div>'
            f"<p>{escaped(near.unit)} {i}</p></div>"
            for i, values in enumerate(near.values, start=1)
        )
        title = f"Where {escaped(near.title)} looks by position, from the middle of the grid"
        parts.append(f'<h3 title="{escaped(near.name)}">{title}</h3><div class="maps" style="{frame}">{views}</div>')
    return f'<div class="gates"><h3>What the gates do</h3>{"".join(parts)}</div>' if parts else ""


def _meanings(meanings: Mapping[str, str]) -> str:
    return "".join(f'<p class="small"><b>{escaped(kind)}</b>: {escaped(text)}.</p>' for kind, text in meanings.items())


def _gate_figure(overlay: Mapping[str, Any], views: Iterable[GateView], task: str, names: Sequence[str]) -> str:
    """The image (with its prediction, in segmentation) and the gates' maps over it."""
    height, width = overlay["image"].shape[:2]
    marks, words, frame = "", "", f"--shape:{width}/{height}"
    if "letters" in overlay:
        frame = volume_frame(height, width)
        marks, words = side_letters(overlay["letters"], height, width)
    if task == "segmentation":
        mask = f'<img alt="" src="{label_mask(overlay["prediction"], len(names))}">'
        about = "image and prediction"
    else:
        mask, about = "", f"image, predicted {names[int(overlay['prediction'])]}"
    cells = [f'<div><div class="view">{mask}{marks}</div><p>{escaped(about + words)}</p></div>']
    for view in views:
        low, high = float(view.values.min()), float(view.values.max())
        cells.append(
            f'<div><div class="view heats"><img alt="" src="{heat_mask(view.values)}">{marks}</div>'
            f'<p title="{escaped(view.name)}">{escaped(view.kind)}, {escaped(view.title)}<br><span class="soft">'
            f"{view.grid[0]} x {view.grid[1]} positions, {low:.2f} to {high:.2f}</span></p></div>"
        )
    frame = f"--image:url({png_uri(overlay['image'])});{frame}"
    caption = f'<figcaption class="soft">{escaped(overlay["name"])}</figcaption>'
    return f'<figure style="{frame}"><div class="maps">{"".join(cells)}</div>{caption}</figure>'
