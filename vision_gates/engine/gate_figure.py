"""The picture that ``vision-gates gate-maps`` draws: images, what the network makes of them, and what its gates did."""

import fnmatch
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vision_gates.config import RunConfig
from vision_gates.datasets.base import Sample, Split, load_splits
from vision_gates.datasets.images import read_image, set_channels
from vision_gates.datasets.volumes import CaseSplit
from vision_gates.engine.building import RunInfo, build_loader, labeller, load_run
from vision_gates.engine.evaluation import load_best
from vision_gates.engine.figures import class_colour, heat_alpha, heat_colours
from vision_gates.engine.gate_views import GateTable, GateView, Neighbourhood, gate_tables, gate_views, neighbourhoods
from vision_gates.engine.gate_window import gate_window
from vision_gates.engine.overlays import display_image
from vision_gates.engine.run_directory import RunDirectory
from vision_gates.engine.volume_data import VolumePredictor
from vision_gates.errors import ConfigError, UserError
from vision_gates.gate_maps import GateMap, collect_gate_maps, record_gate_maps
from vision_gates.volumes.preprocessing import prepare
from vision_gates.volumes.reading import read_volume

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw_gate_maps"]

_PANEL = 2.3  # inches
_MOST_CLASSES = 8  # in the legend


@dataclass(frozen=True)
class _Prediction:
    """A picture under its predicted classes, and the names of these classes."""

    picture: NDArray[np.float32]
    classes: Sequence[str]


def draw_gate_maps(
    run_dir: str | Path, images: Sequence[str], out: str | Path, *, gates: str = "*", overrides: Sequence[str] = ()
) -> Path:
    """Draw what the gates of a run's network do to images.

    Args:
        run_dir: Run directory; its best weights are used.
        images: Image files, or samples of the run's data such as "test:3"; of a run on volumes also files and DICOM
            folders of one channel. Of a volume one window is shown, in the slice with most label.
        out: PNG file to write.
        gates: Pattern of the gates' names, such as "decoder.*".
        overrides: ``key=value`` changes of the run's configuration.

    Returns:
        Path of the picture.

    Raises:
        UserError: No complete run, an image that cannot be read, a network without (such) gates, or no PNG file.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"out={out}: a file that ends in .png is needed")
    config, info = load_run(run_dir, list(overrides))
    model, _ = load_best(RunDirectory(run_dir), config, info)
    model.eval()
    look = _of_image if info.volumes is None else _of_volume
    shown = [look(image, model, config, info) for image in images]
    for one in shown:
        chosen = [m for m in one.maps if fnmatch.fnmatch(m.name, gates)]
        if not chosen:
            known = ", ".join(m.name for m in one.maps)
            what = (
                f"no gate is called {gates!r}; there are {known}" if one.maps else f"{config.model.name} has no gates"
            )
            raise UserError(f"gates={gates}: {what}")
        one.maps[:] = chosen
    figure = _figure(shown, gate_tables([one.maps for one in shown]), neighbourhoods(shown[0].maps))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")
    figure.savefig(partial, format="png", dpi=110)
    os.replace(partial, out)
    return out


@dataclass(frozen=True)
class _Shown:
    """One image or slice: its picture (H, W, 3), the panels before its gates' maps, the maps, and views of them."""

    picture: NDArray[np.float32]
    panels: list[tuple[Any, str]]
    maps: list[GateMap]
    views: Callable[[list[GateMap]], list[GateView]]


def _of_image(image: str, model: nn.Module, config: RunConfig, info: RunInfo) -> _Shown:
    batch = _batch(image, config, info)
    with torch.no_grad(), record_gate_maps(model) as maps:
        output = model(batch["image"])
    image_CHW, name = batch["image"][0], batch["name"][0]
    picture = _rgb(display_image(image_CHW.cpu(), info.mean, info.std))
    size, divisor = (image_CHW.shape[-2], image_CHW.shape[-1]), getattr(model, "divisor", 1)
    panels = _prediction(picture, output[0], name, info)
    return _Shown(picture, panels, maps, lambda chosen: gate_views(chosen, size, divisor=divisor))


def _of_volume(image: str, model: nn.Module, config: RunConfig, info: RunInfo) -> _Shown:
    assert info.volumes is not None
    place = _place(image, config)
    if place is not None:
        split, index = place
        assert isinstance(split, CaseSplit)
        files, _ = split.read_case(index)
        name = f"{image}, {split.names[index]}"
    else:
        channels = len(info.volumes.channel_names)
        if channels > 1:
            raise UserError(f"{image}: the network has {channels} channels; name a sample of its data, such as val:0")
        files, name = [read_volume(Path(image).expanduser())], Path(image).name
    prepared = prepare(info.volumes.preprocessing, files)
    predictor = labeller(config, info, model, device=torch.device("cpu"))
    assert isinstance(predictor, VolumePredictor)
    labels = predictor.predict(prepared.image)
    window = gate_window(model, info.volumes, prepared.image, prepared.geometry, labels, name=name)
    picture = _rgb(window.picture["image"].astype(np.float32) / np.float32(255))
    mask = cv2.resize(window.picture["prediction"], picture.shape[1::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    about = f"{name}\n{window.plane.name}, {window.plane.letters[0]} on the left"
    panels = [(picture, about), (_Prediction(_tinted(picture, mask), info.class_names[1:]), "prediction")]
    return _Shown(picture, panels, collect_gate_maps(model, window.input_1C), window.views)


def _place(image: str, config: RunConfig) -> tuple[Split, int] | None:
    """The part and the number in it that "test:3" means; None for what is no sample of the run's data."""
    place = re.fullmatch(r"(train|val|test):(\d+)", image)
    if place is None:
        return None
    splits = dict(load_splits(config.data).items())
    if place[1] not in splits or int(place[2]) >= len(splits[place[1]]):
        there = ", ".join(f"{name}:0 to {name}:{len(split) - 1}" for name, split in splits.items())
        raise UserError(f"{image}: there is no such sample of data.type={config.data.type}; there are {there}")
    return splits[place[1]], int(place[2])


class _One(Split):
    """One image: a file, or a sample of the run's data such as "test:3"."""

    def __init__(self, image: str, config: RunConfig, in_chans: int) -> None:
        self.names, self._in_chans = [image], in_chans
        self._source = _place(image, config)

    def read(self, index: int) -> Sample:
        if self._source is not None:
            split, place = self._source
            sample = split.read(place)
            return Sample(sample.image, 0, f"{self.names[0]}, {sample.name}")
        path = Path(self.names[0]).expanduser()
        image = read_image(path)
        if self._in_chans == 1:
            image = set_channels(image, 1, path)
        elif self._in_chans == 3:
            image = set_channels(image, 3, path)
        if image.shape[2] != self._in_chans:
            raise UserError(f"{path}: {image.shape[2]} channels, the network was trained on {self._in_chans}")
        return Sample(image, 0, path.name)


def _batch(image: str, config: RunConfig, info: RunInfo) -> dict[str, Any]:
    """One image as the network sees it in an evaluation, as a batch."""
    alone = config.model_copy(update={"data": config.data.model_copy(update={"workers": 0})})
    return next(iter(build_loader(alone, _One(image, config, info.in_chans), info, train=False)))


# ---------------------------------------------------------------- drawing


def _figure(shown: Sequence[_Shown], tables: Sequence[GateTable], near: Sequence[Neighbourhood]) -> "Figure":
    """Rows of panels: of each image one a kind of gate, the decoder's first; at the end what holds for all of them."""
    rows: list[tuple[str, list[tuple[Any, str]]]] = []
    for one in shown:
        kinds: dict[str, list[GateView]] = {}
        for view in one.views(one.maps):
            kinds.setdefault(view.kind, []).append(view)
        panels = one.panels
        for kind, gates in reversed(kinds.items()):  # nearest to the prediction first
            rows.append((f"{kind}: {gates[0].meaning}", panels + [(_over(one.picture, v), _title(v)) for v in gates]))
            panels = [(None, "")] * len(panels)
        if not kinds:
            rows.append(("", panels))
    for table in tables:
        rows.append((f"{table.kind}: {table.meaning}", [(table, f"{table.unit} by {table.unit}")]))
    if near:
        panels = [(n, f"{n.title}, {n.unit}s 1 to {len(n.values)}") for n in near]
        rows.append(("where each head looks by position, from the middle of the grid", panels))
    return _drawn(rows)


def _drawn(rows: Sequence[tuple[str, Sequence[tuple[Any, str]]]]) -> "Figure":
    """The figure of rows that each have a headline and panels (content, title)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    columns = max(4, *(len(panels) for _, panels in rows))  # a headline needs about four
    figure = Figure(figsize=(_PANEL * columns + 0.8, (_PANEL + 1.3) * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    colours = ScalarMappable(cmap=ListedColormap(heat_colours(np.linspace(0, 1, 256)) / 255))  # its range is 0 to 1
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (headline, panels) in zip(parts, rows, strict=True):
        part.suptitle(headline, x=0.01, ha="left", fontsize=13, fontweight="bold")
        all_axes = part.subplots(1, columns, squeeze=False)[0]
        for axes in all_axes:
            axes.set_axis_off()
        for axes, (content, title) in zip(all_axes, panels, strict=False):
            if content is not None:
                _draw(axes, content)
                axes.set_title(title, fontsize=10, loc="left")
        if not headline:
            continue
        bar = part.colorbar(colours, ax=list(all_axes), fraction=0.02, pad=0.01, ticks=[0, 0.5, 1])
        bar.ax.tick_params(labelsize=10)
        bar.set_label("gate", fontsize=10)
    return figure


def _draw(axes: "Axes", content: Any) -> None:
    """An RGB picture, a table of layers and heads, or the neighbourhoods of a layer's heads side by side."""
    if isinstance(content, GateTable):
        values = np.array([[np.nan if value is None else value for value in row] for row in content.values])
        colours = heat_colours(np.nan_to_num(values))
        colours[np.isnan(values)] = 255
        axes.imshow(colours, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                ink = "black" if value > 0.6 else "white"
                axes.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=ink)
        axes.set_axis_on()
        axes.set_xticks(range(values.shape[1]), [str(j + 1) for j in range(values.shape[1])], fontsize=7)
        axes.set_yticks(range(values.shape[0]), [str(i + 1) for i in range(values.shape[0])], fontsize=7)
        axes.set_xlabel(content.unit, fontsize=8)
        axes.set_ylabel("layer", fontsize=8)
        return
    if isinstance(content, Neighbourhood):
        content = _tiles(content.values)
    if isinstance(content, _Prediction):
        from matplotlib.patches import Patch

        named = list(enumerate(content.classes[:_MOST_CLASSES], start=1))
        patches = [Patch(color=class_colour(label), label=name.replace("_", " ")) for label, name in named]
        axes.legend(
            handles=patches,
            loc="upper left",
            bbox_to_anchor=(0, 0),
            borderaxespad=0.2,
            ncols=2,
            columnspacing=0.8,
            handlelength=0.8,
            handleheight=0.8,
            frameon=False,
            fontsize=9,
        )
        content = content.picture
    axes.imshow(content, interpolation="nearest")


def _tiles(maps_MHW: NDArray[Any]) -> NDArray[np.float32]:
    """Maps as heat in a square of tiles, row by row, with white gaps of one position."""
    side = math.ceil(math.sqrt(len(maps_MHW)))
    height, width = maps_MHW.shape[1] + 1, maps_MHW.shape[2] + 1
    tiles = np.ones((-(-len(maps_MHW) // side) * height - 1, side * width - 1, 3), dtype=np.float32)
    for i, map_HW in enumerate(maps_MHW):
        y, x = i // side * height, i % side * width
        tiles[y : y + height - 1, x : x + width - 1] = heat_colours(map_HW) / np.float32(255)
    return tiles


def _rgb(image: NDArray[np.float32]) -> NDArray[np.float32]:
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)


def _over(picture: NDArray[np.float32], view: GateView) -> NDArray[np.float32]:
    """A gate's map as heat over the picture in grey, which shines through most where the map is small."""
    height, width = picture.shape[:2]
    values = np.asarray(cv2.resize(view.values.astype(np.float32), (width, height)), dtype=np.float32)
    alpha = heat_alpha(values[..., None])
    grey = picture.mean(axis=2, keepdims=True)
    return ((1 - alpha) * grey + alpha * (heat_colours(values) / np.float32(255))).clip(0, 1)


def _title(view: GateView) -> str:
    low, high = float(view.values.min()), float(view.values.max())
    return f"{view.title}\n{view.grid[0]} x {view.grid[1]} positions\nvalues {low:.2f} to {high:.2f}"


def _prediction(picture: NDArray[np.float32], output: torch.Tensor, name: str, info: RunInfo) -> list[tuple[Any, str]]:
    """The picture and, in segmentation, the picture under its predicted classes; a predicted class in words."""
    if output.ndim == 1:
        p = output.double().softmax(dim=0)
        label = int(p.argmax())
        return [(picture, f"{name}\npredicted {info.class_names[label]}, {float(p[label]):.0%}")]
    labels_HW = output.argmax(dim=0).cpu().numpy()
    return [(picture, name), (_Prediction(_tinted(picture, labels_HW), info.class_names[1:]), "prediction")]


def _tinted(picture: NDArray[np.float32], labels_HW: NDArray[Any]) -> NDArray[np.float32]:
    tinted = picture.copy()
    for label in np.unique(labels_HW[labels_HW > 0]):
        colour = np.frombuffer(bytes.fromhex(class_colour(int(label))[1:]), dtype=np.uint8) / np.float32(255)
        tinted[labels_HW == label] = 0.35 * picture[labels_HW == label] + 0.65 * colour
    return tinted
