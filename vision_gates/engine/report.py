"""report.html: one self-contained page that tells how a run went, from what its directory holds at the moment.

No script, no external file; light or dark as the reader's system is. Written after every epoch, so it has to be quick:
curves alone take a few milliseconds. All text that comes from outside (file names, class names, the configuration) is
escaped.
"""

import html
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from vision_gates.engine.figures import (
    Series,
    class_colour,
    confusion_matrix,
    error_mask,
    heat_bar,
    heat_mask,
    heat_table,
    label_mask,
    line_chart,
    png_uri,
)
from vision_gates.engine.gate_views import GateViews, read_gate_views
from vision_gates.engine.overlays import read_overlays
from vision_gates.engine.run_directory import RunDirectory, atomic_write_bytes, read_metrics
from vision_gates.engine.volume_data import VolumeInfo
from vision_gates.errors import UserError
from vision_gates.metrics import DEFAULT_MONITOR

__all__ = ["CLASS_COLUMNS", "METRIC_LABELS", "PAGE_STYLE", "gates_section", "write_report"]

METRIC_LABELS = {
    "dice": "Dice",
    "iou": "IoU",
    "dice_pooled": "pooled Dice",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "auc": "AUC",
    "f1": "F1",
    "recall": "recall",
    "precision": "precision",
    "loss": "loss",
    "n": "N",
    "missed": "missed",
    "false_alarms": "false alarms",
}
"""How metrics and columns are called in tables."""

CLASS_COLUMNS = {
    "segmentation": ("dice", "iou", "dice_pooled", "n", "missed", "false_alarms"),
    "classification": ("recall", "precision", "f1", "auc", "n"),
}
"""Columns of the per-class table of a task."""

_CASE_COLUMNS = (
    ("dice", "Dice", 3),
    ("hd95_mm", "HD95, mm", 1),
    ("nsd", "NSD, {:g} mm", 3),
    ("volume_error_ml", "volume error, ml", 2),
    ("volume_error_percent", "volume error, %", 1),
    ("lesion_f1", "lesion F1", 3),
)
_SUMMARY = "_summary"  # ends the name of a file of scores of whole cases
_GALLERY_KEY = "Predicted class and its probability; the true class where it is another."

PAGE_STYLE = """
:root{color-scheme:light dark;--page:#f4f6f8;--card:#fff;--ink:#17202b;--soft:#5a6675;--rule:#e1e6eb;--fill:#eef2f5;
--a:#0072b2;--b:#d55e00;--c:#009e73;--warn:#8a5a00}
@media(prefers-color-scheme:dark){:root{--page:#0e1318;--card:#171d24;--ink:#e7ecf1;--soft:#9aa7b5;--rule:#2a333d;
--fill:#222a33;--a:#56b4e9;--b:#e69f00;--c:#2fc59a;--warn:#f0c060}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
main{max-width:1120px;margin:0 auto;padding:36px 24px 64px}
header{display:flex;flex-wrap:wrap;gap:20px 48px;align-items:flex-end;justify-content:space-between;margin-bottom:26px}
h1{font-size:29px;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:18px;margin:0 0 14px}h3{font-size:14px;margin:24px 0 10px}
p{margin:0 0 12px}.soft{color:var(--soft)}.small{font-size:13px}.note{color:var(--warn);font-size:13px}
.hero{display:flex;gap:14px;align-items:flex-end}.hero b{font-size:50px;line-height:1;font-weight:650;color:var(--a)}
.hero span{color:var(--soft);font-size:14px;line-height:1.35}
section{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:22px 24px;margin-bottom:20px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(128px,1fr));gap:12px;margin-bottom:20px}
.tile{background:var(--fill);border-radius:9px;padding:10px 14px}.tile b{display:block;font-size:22px;font-weight:600}
.tile span{color:var(--soft);font-size:13px}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:0 40px;margin:0}
dl div{display:flex;gap:14px;padding:7px 0;border-bottom:1px solid var(--rule)}
dt{flex:0 0 96px;color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;min-width:0}dl .wide{grid-column:1/-1}
code,pre{font:12.5px/1.55 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
pre{overflow:auto;margin:14px 0 0;background:var(--fill);border-radius:9px;padding:14px 16px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:24px 30px}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font-size:11px}svg .title{fill:var(--ink);font-size:13px;font-weight:600}
svg .key,svg .name{fill:var(--ink)}svg .grid{stroke:var(--rule)}svg .mark{stroke:var(--soft);stroke-dasharray:3 3}
svg .line{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .line.a{stroke:var(--a)}svg .line.b{stroke:var(--b)}svg .line.c{stroke:var(--c)}
svg .dot.a{fill:var(--a)}svg .dot.b{fill:var(--b)}svg .dot.c{fill:var(--c)}
svg .frame{fill:var(--fill)}svg .hit{fill:var(--a)}svg .slip{fill:var(--b)}
svg .count{fill:var(--ink)}svg .count.strong{fill:var(--card);font-weight:600}svg .pixels{image-rendering:pixelated}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%}th,td{text-align:right;padding:7px 12px;border-bottom:1px solid var(--rule)}
th{color:var(--soft);font-weight:500;font-size:13px;white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}tr.minor td{color:var(--soft)}
td{white-space:nowrap}td:first-child{white-space:normal;min-width:120px}
td i{display:inline-block;width:64px;height:6px;border-radius:3px;margin-right:10px;vertical-align:2px;background:
linear-gradient(var(--a),var(--a)) 0/var(--w) 100% no-repeat var(--fill)}
.split{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:36px;align-items:start}
.stack{display:grid;gap:24px}.stack .matrix{margin:0 auto}
@media(max-width:860px){.split{grid-template-columns:1fr}}
.legend{display:flex;flex-wrap:wrap;gap:6px 20px;margin:0 0 16px;font-size:13px}
.swatch{display:inline-block;width:12px;height:12px;border-radius:3px;margin-right:7px;vertical-align:-1px}
.samples{display:grid;grid-template-columns:repeat(auto-fill,minmax(500px,1fr));gap:22px 30px}
@media(max-width:600px){.samples{grid-template-columns:1fr}}
figure{margin:0;min-width:0}.views{display:grid;grid-template-columns:repeat(4,1fr);gap:4px}
.view{position:relative;aspect-ratio:var(--shape);background:#000 var(--image) center/100% 100% no-repeat;
border-radius:4px;overflow:hidden}
.view img{position:absolute;inset:0;width:100%;height:100%;image-rendering:pixelated}.view:hover img{opacity:0}
figcaption{font-size:13px;margin-top:6px;overflow-wrap:anywhere;line-height:1.4}
.heads{display:grid;grid-template-columns:repeat(4,1fr);gap:4px;color:var(--soft);font-size:12px;margin-bottom:3px}
.badge{display:inline-block;border-radius:4px;padding:0 7px;margin-right:8px;font-size:12px;background:var(--b);
color:var(--card);font-weight:600}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:18px}
.gallery img{display:block;width:100%;aspect-ratio:1;object-fit:contain;background:#000;border-radius:6px}
.gallery .tiny{image-rendering:pixelated}
.maps{display:grid;grid-template-columns:repeat(auto-fill,minmax(150px,1fr));gap:12px 8px;font-size:12px;
line-height:1.35}.maps .view img{image-rendering:auto}.maps .view .cells{image-rendering:pixelated}
.maps .heats::before{content:"";position:absolute;inset:0;background:inherit;filter:grayscale(1)}
.maps .heats:hover::before{opacity:0}
.maps p{margin:4px 0 0}.gates figure{margin-bottom:22px}
.bar{display:flex;flex-wrap:wrap;align-items:center;gap:4px 10px;font-size:13px;margin:0 0 16px}
.bar i{width:150px;height:11px;border-radius:3px}
.heat{width:auto;margin-bottom:14px}.heat td{text-align:center;border:2px solid var(--card);border-radius:5px;
padding:5px 12px}.heat th{text-align:center;border:0}
.heat td:first-child{text-align:left;min-width:0;white-space:nowrap}
.wrong{color:var(--b);font-weight:600}.right{color:var(--a);font-weight:600}
summary{cursor:pointer;font-weight:600;font-size:18px}footer{color:var(--soft);font-size:13px;text-align:center}
"""


def _text(value: Any) -> str:
    """Escaped text."""
    return html.escape(str(value))


def _number(value: Any, digits: int = 4) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _read_json(path: Path) -> dict[str, Any]:
    """Content of a JSON file, {} if there is none yet."""
    if not path.is_file():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_report(run_dir: str | Path) -> Path:
    """Write (or renew, atomically) ``report.html`` of a run.

    Whatever the run does not have yet, such as an evaluation, is left out.

    Args:
        run_dir: Run directory; config.yaml is the least it must hold.

    Returns:
        Path of the page.

    Raises:
        UserError: There is no config.yaml.
    """
    run = RunDirectory(run_dir)
    if not run.config.is_file():
        raise UserError(f"{run.path}: not a run directory (it has no config.yaml)")
    config_text = run.config.read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(config_text)
    rows = read_metrics(run.metrics)
    files = (path for path in sorted(run.evaluation.glob("*.json")) if not path.stem.endswith(_SUMMARY))
    found = [_read_json(path) for path in files]
    order = {"test": 0, "val": 1, "train": 2}
    evaluations = sorted(found, key=lambda e: order.get(e["split"], 3))
    best = _best_row(rows, config)
    parts = [
        _header(run, config, rows, evaluations, best),
        _facts(run, config, rows),
        _curves(rows, config, best),
        *(_cases(run, str(evaluation["split"])) + _evaluation(run, evaluation) for evaluation in evaluations),
        f"<section><details><summary>Configuration</summary><pre>{_text(config_text)}</pre></details></section>",
    ]
    name = _text(run.path.resolve().name)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" '
        f'content="width=device-width,initial-scale=1"><title>{name} - vision_gates</title>'
        f"<style>{PAGE_STYLE}</style></head>"
        f"<body><main>{''.join(parts)}<footer>Made by vision_gates from {name}/</footer></main></body></html>\n"
    )
    # A file name need not be valid Unicode; what is not becomes a backslash escape.
    atomic_write_bytes(run.report, page.encode("utf-8", "backslashreplace"))
    return run.report


# ---------------------------------------------------------------- head of the page


def _monitor(config: Mapping[str, Any]) -> str:
    return str((config.get("trainer") or {}).get("monitor") or DEFAULT_MONITOR[config["task"]["type"]])


def _best_row(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The epoch with the best monitored metric, the first of equals, as the trainer chooses it."""
    key = _monitor(config)
    scored = [row for row in rows if row.get("val") and row["val"].get(key) is not None]
    sign = -1.0 if key == "loss" else 1.0
    return max(scored, key=lambda row: sign * row["val"][key], default=None)


def _header(
    run: RunDirectory,
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Mapping[str, Any]],
    best: Mapping[str, Any] | None,
) -> str:
    epochs = config["schedule"]["epochs"]
    key = DEFAULT_MONITOR[config["task"]["type"]]
    value, what = None, ""
    if evaluations:
        first = evaluations[0]
        value = first["metrics"].get(key)
        what = f"{METRIC_LABELS[key]} on {first['split']}<br>{first['images']:,} images"
    elif best is not None:
        value = best["val"].get(key)
        what = f"{METRIC_LABELS[key]} on val<br>best so far, epoch {best['epoch']}"
    state = "not started" if not rows else f"epoch {rows[-1]['epoch']} of {epochs}"
    hero = f'<div class="hero"><b>{_number(value)}</b><span>{what}</span></div>' if what else ""
    about = f"{config['task']['type']} · {config['data']['type']} · {config['model']['name']} · {state}"
    return (
        f"<header><div><h1>{_text(run.path.resolve().name)}</h1>"
        f'<div class="soft">{_text(about)}</div></div>{hero}</header>'
    )


def _parameters(run: RunDirectory) -> int | None:
    """Parameters in the weights file, from its header alone: batch norm's statistics are not counted."""
    for name in ("best", "last"):
        path = run.checkpoint(name) / "weights.safetensors"
        if path.is_file():
            with open(path, "rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(length))
            statistics = ("running_mean", "running_var", "num_batches_tracked")
            return sum(
                math.prod(tensor["shape"])
                for key, tensor in header.items()
                if key != "__metadata__" and not key.endswith(statistics)
            )
    return None


def _input_size(data: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    volumes = info.get("volumes")
    if not volumes:
        size = data.get("image_size", "?")
        return " x ".join(map(str, (size, size) if isinstance(size, int) else size)) + " pixels"
    return VolumeInfo.model_validate(volumes).describe()


def _facts(run: RunDirectory, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    info, environment = _read_json(run.info), _read_json(run.environment)
    data, model, optim = config["data"], config["model"], config.get("optim") or {}
    facts: list[tuple[str, str]] = []
    images = ", ".join(f"{count:,} {split}" for split, count in (info.get("images") or {}).items())
    facts.append(("data", f"{data['type']}{f': {images} images' if images else ''}"))
    if info:
        names = info["class_names"]
        listed = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
        facts.append(("classes", f"{len(names)}: {listed}"))
    channels = f", {info['in_chans']} channel{'s' * (info['in_chans'] != 1)}" if info else ""
    facts.append(("input", f"{_input_size(data, info)}{channels}, batches of {data.get('batch_size', '?')}"))
    count = _parameters(run)
    decoder = f" + {model['decoder']['type']} decoder" if model.get("decoder") else ""
    facts.append(("model", f"{model['name']}{decoder}" + (f", {count / 1e6:.2f} M parameters" if count else "")))
    facts.append(("optimiser", f"{optim.get('name', '?')}, learning rate {optim.get('lr', '?')}"))
    facts.append(("seed", str(config.get("seed", 0))))
    if environment:
        device = str(environment.get("device"))
        if device.startswith("cpu"):
            device = f"CPU, {environment.get('threads')} threads ({environment.get('cpu')})"
        many = environment.get("processes") or 1
        facts.append(("device", f"{many} x {device}" if many > 1 else device))
    if rows:
        seconds = sum(row["seconds"] for row in rows)
        speed = rows[-1].get("images_per_second")
        facts.append(("training", _duration(seconds) + (f", {speed:,.0f} images/s" if speed else "")))
    if environment:
        versions = [("vision_gates", environment.get("vision_gates")), ("Python", environment.get("python"))]
        versions += [(k, v) for k, v in (environment.get("versions") or {}).items() if k in ("torch", "timm", "numpy")]
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions if version)))
        if environment.get("started"):
            facts.append(("started", str(environment["started"]).replace("T", " ").replace("+00:00", " UTC")))
        if environment.get("commit"):
            facts.append(("commit", str(environment["commit"])))
        if environment.get("command"):
            facts.append(("command", " ".join(map(str, environment["command"]))))
    items = "".join(
        f"<div{' class=wide' if key == 'command' else ''}><dt>{key}</dt><dd>"
        f"{f'<code>{_text(value)}</code>' if key in ('command', 'commit') else _text(value)}</dd></div>"
        for key, value in facts
    )
    return f"<section><h2>Run</h2><dl>{items}</dl></section>"


def _curves(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], best: Mapping[str, Any] | None) -> str:
    if not rows:
        return ""
    last, key = float(config["schedule"]["epochs"]), _monitor(config)

    def line(name: str, style: str, *path: str) -> Series:
        points = []
        for row in rows:
            value: Any = row
            for step in path:
                value = value.get(step) if value else None
            points.append((row["epoch"], value))
        return Series(name, style, points)

    mark = (float(best["epoch"]), f"best, epoch {best['epoch']}") if best is not None else None
    label = METRIC_LABELS.get(key, key)
    charts = [line_chart("Loss", [line("train", "a", "train", "loss"), line("val", "b", "val", "loss")], last_x=last)]
    if key != "loss":
        charts.append(line_chart(f"Validation {label}", [line(label, "b", "val", key)], last_x=last, mark=mark))
    charts.append(line_chart("Learning rate", [line("rate", "c", "lr")], last_x=last))
    return f'<section><h2>Training</h2><div class="charts">{"".join(charts)}</div></section>'


# ---------------------------------------------------------------- evaluation


def _evaluation(run: RunDirectory, evaluation: Mapping[str, Any]) -> str:
    """Section of one split: numbers, classes, pictures."""
    split = str(evaluation["split"])
    path = run.evaluation / f"{split}_overlays.npz"
    overlays = read_overlays(path) if path.is_file() else []
    tiles = "".join(
        f'<div class="tile"><b>{_number(value)}</b><span>{_text(METRIC_LABELS.get(key, key))}</span></div>'
        for key, value in evaluation["metrics"].items()
    )
    tiles += f'<div class="tile"><b>{evaluation["images"]:,}</b><span>images</span></div>'
    notes = "".join(f'<p class="note">{_text(note)}</p>' for note in evaluation["notes"])
    table = (
        _class_table(evaluation) + f'<p class="small soft" style="margin-top:12px">{_text(evaluation["convention"])}'
    )
    table += f"</p>{notes}"
    if evaluation["task"] == "classification":
        matrix = confusion_matrix(evaluation["confusion"], evaluation["class_names"])
        # Side by side where both fit: many classes or long names need the whole width.
        narrow = len(evaluation["class_names"]) <= 12 and max(map(len, evaluation["class_names"])) <= 14
        pair = f"<div>{matrix}</div><div>{table}</div>"
        body = f'<div class="{"split" if narrow else "stack"}">{pair}</div>{_gallery(overlays, evaluation)}'
    else:
        body = table + _samples(overlays, evaluation)
    gates = run.evaluation / f"{split}_gates.npz"
    if gates.is_file():
        body += gates_section(read_gate_views(gates), overlays, evaluation)
    title = f"{split.capitalize()} images" if split in ("test", "val", "train") else split
    if (run.evaluation / f"{split}{_SUMMARY}.json").is_file():
        title = f"{split.capitalize()} cases, on the grid of the network"
    return f'<section><h2>{_text(title)}</h2><div class="tiles">{tiles}</div>{body}</section>'


def _class_table(evaluation: Mapping[str, Any]) -> str:
    columns = CLASS_COLUMNS[evaluation["task"]]
    segments = evaluation["task"] == "segmentation"
    head = "".join(f"<th>{_text(METRIC_LABELS[key])}</th>" for key in columns)
    body = []
    for label, row in enumerate(evaluation["per_class"]):
        swatch = ""
        if segments:
            colour = class_colour(label) if label else "transparent"
            swatch = f'<span class="swatch" style="background:{colour}"></span>'
        cells = []
        for key in columns:
            value = row[key]
            bar = ""
            if key == columns[0]:
                bar = f'<i style="--w:{100 * (value or 0.0):.1f}%"></i>'
            digits = 4 if segments else 3
            cells.append(f"<td>{bar}{_number(value, digits)}</td>")
        minor = ' class="minor"' if segments and label == 0 else ""
        body.append(f"<tr{minor}><td>{swatch}{_text(row['name'])}</td>{''.join(cells)}</tr>")
    table = f'<div class="scroll"><table><tr><th>class</th>{head}</tr>{"".join(body)}</table></div>'
    if len(body) > 60:
        return f"<details><summary>{len(body)} classes</summary>{table}</details>"
    return table


def _cases(run: RunDirectory, split: str) -> str:
    """Section of the scores of whole cases, where there are any: a line a label, with 95 % intervals."""
    summary = _read_json(run.evaluation / f"{split}{_SUMMARY}.json")
    if not summary:
        return ""
    overall = summary["overall"]
    columns = [(key, label.format(summary["tolerance_mm"]), digits) for key, label, digits in _CASE_COLUMNS]
    tiles = "".join(
        f'<div class="tile"><b>{_number(overall[key], digits)}</b><span>{_text(label)}</span></div>'
        for key, label, digits in columns
        if not key.startswith("volume")
    )
    for kind in ("cases", "patients"):
        tiles += f'<div class="tile"><b>{summary[kind]:,}</b><span>{kind}</span></div>'
    head = "".join(f"<th>{_text(label)}</th>" for _, label, _ in columns)
    body = []
    for row in (*summary["per_label"], overall):
        colour = class_colour(row["label"]) if row["label"] else "transparent"
        cells = f"<td>{row['n']:,}</td><td>{row['missed']:,} + {row['false_positives']:,}</td>"
        for key, _, digits in columns:
            low, high = row[f"{key}_low"], row[f"{key}_high"]
            between = "" if low is None else f"{_number(low, digits)} to {_number(high, digits)}"
            cells += f'<td>{_number(row[key], digits)}<div class="soft small">{between}</div></td>'
        swatch = f'<span class="swatch" style="background:{colour}"></span>'
        body.append(f"<tr><td>{swatch}{_text(row['name'])}</td>{cells}</tr>")
    about = f"Intervals of 95 % over patients; every case is in evaluation/{split}_cases.csv. {summary['convention']}"
    notes = "".join(f'<p class="note">{_text(note)}</p>' for note in summary["notes"])
    return (
        f"<section><h2>{_text(split.capitalize())} cases, on the grids of their files</h2>"
        f'<div class="tiles">{tiles}</div><div class="scroll"><table><tr><th>label</th><th>N</th>'
        f"<th>missed + false</th>{head}</tr>{''.join(body)}</table></div>"
        f'<p class="small soft" style="margin-top:12px">{_text(about)}</p>{notes}</section>'
    )


def _samples(overlays: Iterable[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> str:
    """Image, truth, prediction and errors of each segmentation sample."""
    overlays = list(overlays)
    if not overlays:
        return ""
    names = evaluation["class_names"]
    shown = {int(label) for o in overlays for key in ("target", "prediction") for label in np.unique(o[key])}
    legend = "".join(
        f'<span><span class="swatch" style="background:{class_colour(label)}"></span>{_text(names[label])}</span>'
        for label in sorted(shown)
        if 0 < label < len(names)
    )
    legend += '<span><span class="swatch" style="background:#ff4081"></span>wrong class</span>'
    heads = "".join(f"<span>{head}</span>" for head in ("image", "truth", "prediction", "errors"))
    figures = []
    for o in overlays:
        height, width = o["image"].shape[:2]
        # The picture is stored once, as a property that all four views use as their background.
        frame = f"--image:url({png_uri(o['image'])});--shape:{width}/{height}"
        masks = ["", label_mask(o["target"], len(names)), label_mask(o["prediction"], len(names))]
        masks.append(error_mask(o["target"], o["prediction"], len(names)))
        layers = [f'<img alt="" src="{mask}">' if mask else "" for mask in masks]
        views = "".join(f'<div class="view">{layer}</div>' for layer in layers)
        badge = '<span class="badge">worst</span>' if o["worst"] else ""
        score = f"Dice {o['score']:.3f}" if o["score"] is not None else "nothing to find, nothing found"
        figures.append(
            f'<figure style="{frame}"><div class="heads">{heads}</div>'
            f'<div class="views">{views}</div><figcaption>{badge}{score} <span class="soft">{_text(o["name"])}</span>'
            "</figcaption></figure>"
        )
    return (
        '<h3>Samples</h3><p class="small soft">Evenly spaced over the split, then the worst by mean Dice of the '
        f'foreground classes. Point at a view to see the image below its mask.</p><div class="legend">{legend}</div>'
        f'<div class="samples">{"".join(figures)}</div>'
    )


def _gallery(overlays: Iterable[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> str:
    """The most confident mistakes, then evenly spaced samples."""
    names, overlays = evaluation["class_names"], list(overlays)
    parts = []
    for worst, title in ((True, "Most confident mistakes"), (False, "Evenly spaced samples")):
        figures = []
        for o in (o for o in overlays if o["worst"] == worst):
            target, prediction = int(o["target"]), int(o["prediction"])
            style = "right" if target == prediction else "wrong"
            tiny = ' class="tiny"' if max(o["image"].shape[:2]) < 64 else ""
            truth = "" if target == prediction else f", truth {_text(names[target])}"
            figures.append(
                f'<figure><img{tiny} alt="" src="{png_uri(o["image"])}"><figcaption><span class="{style}">'
                f"{_text(names[prediction])}</span> ({o['score']:.0%}){truth}<br>"
                f'<span class="soft">{_text(o["name"])}</span></figcaption></figure>'
            )
        if figures:
            parts.append(
                f'<h3>{title}</h3><p class="small soft">{_GALLERY_KEY}</p><div class="gallery">{"".join(figures)}</div>'
            )
    return "".join(parts)


# ---------------------------------------------------------------- gates


def gates_section(gates: GateViews, overlays: Iterable[Mapping[str, Any]], evaluation: Mapping[str, Any]) -> str:
    """What the gates did: maps over a few samples, openness of heads, neighbourhoods."""
    shown = {o["index"]: o for o in overlays}
    figures = [_gate_figure(shown[i], views, evaluation) for i, views in gates.samples.items() if i in shown]
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
        parts.append(f"<h3>{_text(table.kind).capitalize()}, {_text(table.unit)} by {_text(table.unit)}</h3>")
        parts.append(f"{_meanings({table.kind: table.meaning})}{heat}")
    for near in gates.neighbourhoods:
        frame = f"--image:none;--shape:{near.values.shape[2]}/{near.values.shape[1]}"
        views = "".join(
            f'<div><div class="view"><img class="cells" alt="" src="{heat_mask(values, opaque=True)}"></div>'
            f"<p>{_text(near.unit)} {i}</p></div>"
            for i, values in enumerate(near.values, start=1)
        )
        title = f"Where {_text(near.title)} looks by position, from the middle of the grid"
        parts.append(f'<h3 title="{_text(near.name)}">{title}</h3><div class="maps" style="{frame}">{views}</div>')
    return f'<div class="gates"><h3>What the gates do</h3>{"".join(parts)}</div>' if parts else ""


def _meanings(meanings: Mapping[str, str]) -> str:
    return "".join(f'<p class="small"><b>{_text(kind)}</b>: {_text(text)}.</p>' for kind, text in meanings.items())


def _gate_figure(overlay: Mapping[str, Any], views: Iterable[Any], evaluation: Mapping[str, Any]) -> str:
    """The image (with its prediction, in segmentation) and the gates' maps over it."""
    names = evaluation["class_names"]
    height, width = overlay["image"].shape[:2]
    if evaluation["task"] == "segmentation":
        mask = f'<img alt="" src="{label_mask(overlay["prediction"], len(names))}">'
        about = "image and prediction"
    else:
        mask, about = "", f"image, predicted {names[int(overlay['prediction'])]}"
    cells = [f'<div><div class="view">{mask}</div><p>{_text(about)}</p></div>']
    for view in views:
        low, high = float(view.values.min()), float(view.values.max())
        cells.append(
            f'<div><div class="view heats"><img alt="" src="{heat_mask(view.values)}"></div>'
            f'<p title="{_text(view.name)}">{_text(view.kind)}, {_text(view.title)}<br><span class="soft">'
            f"{view.grid[0]} x {view.grid[1]} positions, {low:.2f} to {high:.2f}</span></p></div>"
        )
    frame = f"--image:url({png_uri(overlay['image'])});--shape:{width}/{height}"
    caption = f'<figcaption class="soft">{_text(overlay["name"])}</figcaption>'
    return f'<figure style="{frame}"><div class="maps">{"".join(cells)}</div>{caption}</figure>'
