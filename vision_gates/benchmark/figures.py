"""The speed plot: images/s and memory against resolution, one line a model and runtime."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["save_figure", "speed_figure"]

Row = dict[str, Any]
# Okabe and Ito's palette, told apart with every common colour blindness; runtimes differ in dashes and markers, too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_STYLES = {"eager": ((0, (1.5, 1.5)), "o"), "compiled": ((0, (5, 2)), "s"), "graph": ("-", "D")}
_GREY = "#555555"


def speed_figure(rows: Sequence[Row]) -> "Figure":
    """Images/s and, where it was measured, peak extra memory of an image against image size, both axes logarithmic.

    Args:
        rows: of ``bench_models``; those with a problem are named in the caption.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    has_memory = any(row["peak_extra_mib"] is not None for row in rows)
    figure = Figure(figsize=(11 if has_memory else 6.5, 5.6), dpi=160)
    FigureCanvasAgg(figure)
    mode = {row["mode"] for row in rows}.pop()
    panels = [(f"Images a second, {mode}", lambda row: row["images_per_second"])]
    if has_memory:
        panels.append(
            ("Peak memory over weights and input, MiB an image", lambda row: row["peak_extra_mib"] / row["batch"])
        )
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, value) in zip(all_axes, panels, strict=True):
        _panel(axes, rows, title, value)
    left = 0.07 if has_memory else 0.12
    # A legend fills its columns one after the other: a column a runtime, a line a model.
    lines = sorted(all_axes[0].get_lines(), key=lambda line: list(_STYLES).index(line.get_label().rpartition(", ")[2]))
    n_columns = len({row["runtime"] for row in rows})
    n_lines = -(-len(lines) // n_columns)
    figure.legend(
        handles=lines,
        loc="lower left",
        bbox_to_anchor=(left - 0.01, 0.12),
        ncols=n_columns,
        frameon=False,
        fontsize=9,
        borderaxespad=0,
    )
    figure.text(left, 0.02, _caption(rows), fontsize=7.5, color=_GREY, va="bottom", linespacing=1.4)
    figure.subplots_adjust(left=left, right=0.97, top=0.93, bottom=0.23 + 0.035 * n_lines)
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG that is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    os.replace(partial, path)


def _panel(axes: "Axes", rows: Sequence[Row], title: str, value: Any) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    models = list(dict.fromkeys(row["model"] for row in rows))
    for model, runtime in dict.fromkeys((row["model"], row["runtime"]) for row in rows):
        line = [row for row in rows if (row["model"], row["runtime"]) == (model, runtime) and row["problem"] is None]
        line.sort(key=lambda row: row["size"])
        dashes, marker = _STYLES[runtime]
        axes.plot(
            [row["size"] for row in line],
            [value(row) for row in line],
            color=_COLOURS[models.index(model) % len(_COLOURS)],
            linestyle=dashes,
            marker=marker,
            markersize=5,
            linewidth=1.8,
            label=f"{model}, {runtime}",
        )
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("image height and width, pixels", fontsize=9, color=_GREY)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({row["size"] for row in rows})))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda number, _: f"{number:,.10g}"))
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.tick_params(labelsize=9, color="#AAAAAA")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#AAAAAA")


def _caption(rows: Sequence[Row]) -> str:
    first = rows[0]
    batches = ", ".join(f"{batch} at {size}" for size, batch in {row["size"]: row["batch"] for row in rows}.items())
    versions = ", ".join(f"{name} {first[name]}" for name in ("torch", "triton", "timm", "vision_gates"))
    lines = [f"{first['device']}, {first['dtype']}, images a batch: {batches}"]
    lines.append(f"{versions}, commit {first['commit']}, {first['date']}")
    missing = [f"{row['model']} {row['runtime']} at {row['size']}" for row in rows if row["problem"] is not None]
    if missing:
        lines.append(f"no number (out of memory or failed): {', '.join(missing)}")
    return "\n".join(lines)
