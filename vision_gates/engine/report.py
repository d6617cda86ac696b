"""report.html: one self-contained page that tells how a run went, from what its directory holds at the moment.

No script, no external file; light or dark as the reader's system is. Written after every epoch, so it has to be quick:
curves alone take a few milliseconds. All text that comes from outside (file names, class names, the configuration) is
escaped.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vision_gates.datasets.base import how_many
from vision_gates.engine.figures import Series, class_colour, confusion_matrix, line_chart
from vision_gates.engine.gate_views import read_gate_views
from vision_gates.engine.overlays import read_overlays
from vision_gates.engine.page_style import PAGE_STYLE, escaped
from vision_gates.engine.report_pictures import gallery, gates_section, samples
from vision_gates.engine.run_directory import RunDirectory, atomic_write_bytes, read_metrics
from vision_gates.engine.run_files import (
    CLASS_COLUMNS,
    Evaluation,
    Learnt,
    read_config,
    read_environment,
    read_evaluation,
    read_learnt,
)
from vision_gates.engine.volume_scores import read_summary
from vision_gates.metrics import DEFAULT_MONITOR
from vision_gates.volumes.scoring import Summary

__all__ = ["CLASS_COLUMNS", "METRIC_LABELS", "write_report"]

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

_CASE_COLUMNS = (
    ("dice", "Dice", 3),
    ("hd95_mm", "HD95, mm", 1),
    ("nsd", "NSD, {:g} mm", 3),
    ("volume_error_ml", "volume error, ml", 2),
    ("volume_error_percent", "volume error, %", 1),
    ("lesion_f1", "lesion F1", 3),
)
_SUMMARY = "_summary"  # ends the name of a file of scores of whole cases


def _number(value: Any, digits: int = 4) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _summary(run: RunDirectory, split: str) -> Summary | None:
    """Scores of the whole cases of a split, where there are any."""
    path = run.evaluation / f"{split}{_SUMMARY}.json"
    return read_summary(path) if path.is_file() else None


def write_report(run_dir: str | Path) -> Path:
    """Write (or renew, atomically) ``report.html`` of a run.

    Whatever the run does not have yet, such as an evaluation, is left out.

    Args:
        run_dir: Run directory; config.yaml is the least it must hold.

    Returns:
        Path of the page.

    Raises:
        UserError: There is no config.yaml, or a file is damaged.
    """
    run = RunDirectory(run_dir)
    config = read_config(run)
    config_text = run.config.read_text(encoding="utf-8")
    rows = read_metrics(run.metrics)
    files = (path for path in sorted(run.evaluation.glob("*.json")) if not path.stem.endswith(_SUMMARY))
    found = [read_evaluation(path) for path in files]
    order = {"test": 0, "val": 1, "train": 2}
    evaluations = sorted(found, key=lambda e: order.get(e["split"], 3))
    best = _best_row(rows, config)
    parts = [
        _header(run, config, rows, evaluations, best),
        _facts(run, config, rows),
        _curves(rows, config, best),
        *(_cases(run, str(one["split"])) + _evaluation(run, one, noun=_noun(config)) for one in evaluations),
        f"<section><details><summary>Configuration</summary><pre>{escaped(config_text)}</pre></details></section>",
    ]
    name = escaped(run.path.resolve().name)
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


def _noun(config: Mapping[str, Any]) -> str:
    """What one sample of an evaluation is."""
    return "case" if config["data"]["type"] == "volumes" else "image"


def _header(
    run: RunDirectory,
    config: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    evaluations: Sequence[Evaluation],
    best: Mapping[str, Any] | None,
) -> str:
    key = DEFAULT_MONITOR[config["task"]["type"]]
    value, what = None, ""
    if evaluations:
        first = evaluations[0]
        summary = _summary(run, first["split"])
        value = summary.overall[key] if summary else first["metrics"].get(key)
        many = how_many(first["images"], _noun(config))
        what = f"{METRIC_LABELS[key]} on {first['split']}<br>{many}"
        if summary and summary.overall[f"{key}_low"] is not None:
            between = " to ".join(_number(summary.overall[f"{key}_{end}"], 3) for end in ("low", "high"))
            what = f"{METRIC_LABELS[key]} on {first['split']}, {many}<br>95 % interval {between}"
    elif best is not None:
        value = best["val"].get(key)
        what = f"{METRIC_LABELS[key]} on val<br>best so far, epoch {best['epoch']}"
    minutes = config["schedule"].get("minutes")
    planned = f"of {config['schedule']['epochs']}" if minutes is None else f"in {minutes:g} minutes"
    state = "not started" if not rows else f"epoch {rows[-1]['epoch']} {planned}"
    hero = f'<div class="hero"><b>{_number(value)}</b><span>{what}</span></div>' if what else ""
    about = f"{config['task']['type']} · {config['data']['type']} · {config['model']['name']} · {state}"
    return (
        f"<header><div><h1>{escaped(run.path.resolve().name)}</h1>"
        f'<div class="soft">{escaped(about)}</div></div>{hero}</header>'
    )


def _parameters(run: RunDirectory) -> int | None:
    """Parameters in the weights file, from its header alone: batch norm's statistics are not counted.

    None if no file can be read; who uses the weights says what is wrong with them.
    """
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name in ("best", "last"):
        try:
            with safe_open(run.checkpoint(name) / "weights.safetensors", framework="numpy") as file:
                names = [key for key in file.keys() if not key.endswith(statistics)]  # noqa: SIM118
                return sum(math.prod(file.get_slice(key).get_shape()) for key in names)
        except (OSError, SafetensorError):
            continue
    return None


def _input_size(data: Mapping[str, Any], info: Learnt | None) -> str:
    volumes = info.get("volumes") if info else None
    if volumes is None:
        size = data.get("image_size", "?")
        return " x ".join(map(str, size if isinstance(size, list | tuple) else (size, size))) + " pixels"
    return volumes.describe()


def _facts(run: RunDirectory, config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    info, environment = read_learnt(run), read_environment(run)
    data, model, optim = config["data"], config["model"], config.get("optim") or {}
    facts: list[tuple[str, str]] = []
    counts = info.get("images", {}) if info else {}
    images = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    facts.append(("data", f"{data['type']}{f': {images} {_noun(config)}s' if images else ''}"))
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
        sample = {"2d": "slices", "3d": "patches"}.get(str(data.get("mode")), "images")
        rate = f", {speed:,.{0 if speed >= 10 else 1}f} {sample}/s" if speed else ""
        facts.append(("training", _duration(seconds) + rate))
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
        f"{f'<code>{escaped(value)}</code>' if key in ('command', 'commit') else escaped(value)}</dd></div>"
        for key, value in facts
    )
    return f"<section><h2>Run</h2><dl>{items}</dl></section>"


def _curves(rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], best: Mapping[str, Any] | None) -> str:
    if not rows:
        return ""
    # By the clock the number of epochs is not known before, and ``epochs`` only their limit.
    timed = config["schedule"].get("minutes") is not None
    last, key = float(rows[-1]["epoch"] if timed else config["schedule"]["epochs"]), _monitor(config)

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


def _evaluation(run: RunDirectory, evaluation: Evaluation, *, noun: str) -> str:
    """Section of one split: numbers, classes, pictures."""
    split = str(evaluation["split"])
    path = run.evaluation / f"{split}_overlays.npz"
    overlays = read_overlays(path) if path.is_file() else []
    tiles = "".join(
        f'<div class="tile"><b>{_number(value)}</b><span>{escaped(METRIC_LABELS.get(key, key))}</span></div>'
        for key, value in evaluation["metrics"].items()
    )
    tiles += f'<div class="tile"><b>{evaluation["images"]:,}</b><span>{noun}s</span></div>'
    notes = "".join(f'<p class="note">{escaped(note)}</p>' for note in evaluation["notes"])
    convention = str(evaluation["convention"]).replace("image", noun)
    table = _class_table(evaluation) + f'<p class="small soft" style="margin-top:12px">{escaped(convention)}</p>{notes}'
    if evaluation["confusion"] is not None:
        matrix = confusion_matrix(evaluation["confusion"], evaluation["class_names"])
        # Side by side where both fit: many classes or long names need the whole width.
        narrow = len(evaluation["class_names"]) <= 12 and max(map(len, evaluation["class_names"])) <= 14
        pair = f"<div>{matrix}</div><div>{table}</div>"
        body = f'<div class="{"split" if narrow else "stack"}">{pair}</div>{gallery(overlays, evaluation)}'
    else:
        body = table + samples(overlays, evaluation)
    gates = run.evaluation / f"{split}_gates.npz"
    if gates.is_file():
        views, names = read_gate_views(gates), evaluation["class_names"]
        body += gates_section(views, overlays, task=evaluation["task"], class_names=names)
    title = f"{split.capitalize()} {noun}s" + (", on the grid of the network" if noun == "case" else "")
    return f'<section><h2>{escaped(title)}</h2><div class="tiles">{tiles}</div>{body}</section>'


def _class_table(evaluation: Evaluation) -> str:
    columns = CLASS_COLUMNS[evaluation["task"]]
    segments = evaluation["task"] == "segmentation"
    head = "".join(f"<th>{escaped(METRIC_LABELS[key])}</th>" for key in columns)
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
        body.append(f"<tr{minor}><td>{swatch}{escaped(row['name'])}</td>{''.join(cells)}</tr>")
    table = f'<div class="scroll"><table><tr><th>class</th>{head}</tr>{"".join(body)}</table></div>'
    if len(body) > 60:
        return f"<details><summary>{len(body)} classes</summary>{table}</details>"
    return table


def _cases(run: RunDirectory, split: str) -> str:
    """Section of the scores of whole cases, where there are any: a line a label, with 95 % intervals."""
    summary = _summary(run, split)
    if summary is None:
        return ""
    overall = summary.overall
    columns = [(key, label.format(summary.tolerance_mm), digits) for key, label, digits in _CASE_COLUMNS]
    tiles = "".join(
        f'<div class="tile"><b>{_number(overall[key], digits)}</b><span>{escaped(label)}</span></div>'
        for key, label, digits in columns
        if not key.startswith("volume")
    )
    for kind, number in (("cases", summary.cases), ("patients", summary.patients)):
        tiles += f'<div class="tile"><b>{number:,}</b><span>{kind}</span></div>'
    head = "".join(f"<th>{escaped(label)}</th>" for _, label, _ in columns)
    body = []
    for row in (*summary.per_label, overall):
        colour = class_colour(row["label"]) if row["label"] else "transparent"
        cells = f"<td>{row['n']:,}</td><td>{row['missed']:,} + {row['false_positives']:,}</td>"
        for key, _, digits in columns:
            low, high = row[f"{key}_low"], row[f"{key}_high"]
            between = "" if low is None else f"{_number(low, digits)} to {_number(high, digits)}"
            cells += f'<td>{_number(row[key], digits)}<div class="soft small">{between}</div></td>'
        swatch = f'<span class="swatch" style="background:{colour}"></span>'
        body.append(f"<tr><td>{swatch}{escaped(row['name'])}</td>{cells}</tr>")
    about = f"Intervals of 95 % over patients; every case is in evaluation/{split}_cases.csv. {summary.convention}"
    notes = "".join(f'<p class="note">{escaped(note)}</p>' for note in summary.notes)
    return (
        f"<section><h2>{escaped(split.capitalize())} cases, on the grids of their files</h2>"
        f'<div class="tiles">{tiles}</div><div class="scroll"><table><tr><th>label</th><th>N</th>'
        f"<th>missed + false</th>{head}</tr>{''.join(body)}</table></div>"
        f'<p class="small soft" style="margin-top:12px">{escaped(about)}</p>{notes}</section>'
    )
