"""Evaluation: one pass over a split, its tables on disk, and the samples that the report shows.

The trainer calls `evaluate_model` every epoch; `evaluate_run` evaluates a finished run from its directory alone.
"""

import csv
import io
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from vision_gates.config import RunConfig
from vision_gates.datasets.base import DataSplits, Split, few, load_splits
from vision_gates.engine.building import RunInfo, build_loader, build_metrics, build_model, labeller, load_run
from vision_gates.engine.checkpoint import find_weights
from vision_gates.engine.device import build_accelerator, deterministic_algorithms
from vision_gates.engine.gate_views import GateViews, observe_gates, pack_gate_views
from vision_gates.engine.overlays import OverlayCollector, pack_overlays
from vision_gates.engine.report import CLASS_COLUMNS, METRIC_LABELS, write_report
from vision_gates.engine.run_directory import RunDirectory, atomic_write_bytes, atomic_write_text, to_json
from vision_gates.engine.run_files import read_evaluation
from vision_gates.engine.state import machine_errors
from vision_gates.engine.volume_data import VolumePredictor
from vision_gates.engine.volume_scores import CaseScorer, Scores, build_scorer
from vision_gates.errors import DataError, UserError
from vision_gates.gate_maps import gates_of
from vision_gates.metrics import Metrics, Result
from vision_gates.volumes.scoring import write_scores

__all__ = [
    "NUM_OVERLAYS",
    "Evaluation",
    "evaluate_model",
    "evaluate_run",
    "evaluation_table",
    "load_best",
    "write_evaluation",
]

NUM_OVERLAYS = 12
"""Samples that the report shows of a split."""


@dataclass(frozen=True)
class Evaluation:
    """What one pass over a split gave.

    Attributes:
        result: Metrics.
        rows: One flat dict an image (`Metrics.rows`), the content of the per-image CSV.
        loss: Mean loss per image, None without a loss.
        overlays: Samples to look at, evenly spaced ones first, then the worst, the worst of all first: dicts with
            ``name``, ``index``, ``image`` ((H, W) or (H, W, 3) float32 in 0..1, stretched for display), ``target`` and
            ``prediction`` ((H, W) labels, or a class index), ``score`` (mean foreground Dice, or the probability of
            the predicted class; None where undefined) and ``worst`` (bool).
        seconds: Wall-clock time.
        task: "classification" or "segmentation".
        class_names: In label order.
        split: Name of the split; set by `evaluate_run`, as are the next two.
        path: The written JSON file.
        report: The written report.
        gates: What the gates did to a few of the overlays; None for a network without gates.
        scores: Of whole cases on the grids of their files; None where nobody asked for them.
    """

    result: Result
    rows: list[dict[str, Any]]
    loss: float | None
    overlays: list[dict[str, Any]]
    seconds: float
    task: str
    class_names: tuple[str, ...]
    split: str = ""
    path: Path | None = None
    report: Path | None = None
    gates: GateViews | None = None
    scores: Scores | None = None


def evaluate_model(
    model: nn.Module,
    loader: Iterable[Mapping[str, Any]],
    metrics: Metrics,
    *,
    device: torch.device | str,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    loss: nn.Module | None = None,
    collect: int = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    scorer: CaseScorer | None = None,
) -> Evaluation:
    """Evaluate a network on every batch of a loader.

    The network is put in eval mode for the pass and back into its mode afterwards. Where torch.distributed is
    initialised, every process has to call this with its share of the images; all of them get the result over all
    images, each image counted once.

    Args:
        model: (B, C, H, W) images to logits.
        loader: Gives ``{"image": (B, C, H, W) float32, "target": tensor, "name": list[str], "index": (B,)}``, where
            index is the position in the split. With ``collect``, ``len(loader.dataset)`` is its length.
        metrics: Empty metrics of the task.
        device: Where the network is.
        autocast: Makes a fresh context in which the network runs.
        loss: (logits, target) to a scalar mean over the batch.
        collect: Number of samples kept as overlays: half of them evenly spaced over the split, half the worst
            (segmentation: lowest Dice; classification: most confident mistakes). The choice is deterministic.
        mean, std: Per-channel normalisation of the images, undone for display.
        scorer: Scores the labels of whole cases, too.

    Raises:
        ValueError: The loader is empty.
        UserError: The network gives NaN; DataError: a label that is no class, a sample that cannot be read.
    """
    started = time.perf_counter()
    whole = model if isinstance(model, VolumePredictor) else None
    keep = None
    if collect:
        length = len(loader.dataset)  # type: ignore[attr-defined]
        ignore = getattr(metrics, "ignore_index", None)
        keep = OverlayCollector(
            collect,
            length,
            task=metrics.task,
            mean=mean,
            std=std,
            ignore_index=ignore,
            classes=len(metrics.class_names),
            inputs=whole is None and bool(gates_of(model)),  # of a volume ``displayed`` says what is kept
        )
    total, count = 0.0, 0
    was_training = model.training
    model.eval()
    try:
        # no_grad, not inference_mode: a tensor that a model caches here (positions, masks) must stay usable for
        # training, and autograd refuses inference tensors.
        with torch.no_grad():
            for batch in loader:
                # A labeller of volumes takes windows of them to the device.
                image = batch["image"] if whole is not None else batch["image"].to(device, non_blocking=True)
                target = batch["target"].to(device, non_blocking=True)
                with autocast():
                    output = model(image)
                    value = loss(output, target) if loss is not None else None
                if value is not None:
                    total += float(value) * len(target)
                count += len(target)
                badness = metrics.update(output, target, batch["name"], indices=batch["index"])
                if scorer is not None:
                    scorer.add(batch, output)
                if keep is not None:
                    seen, labels = (batch, output) if whole is None else whole.displayed(dict(batch), output)
                    keep.add(seen, labels, badness)
    finally:
        model.train(was_training)
    overlays = keep.finish() if keep is not None else []
    total, count, overlays = _gather(metrics, total, count, overlays, keep)
    if not count:
        raise ValueError("no image has been evaluated: the loader is empty")
    gates = None
    if overlays and "input" in overlays[0] and _is_first_process():
        network = model if whole is None else whole.network
        gates = observe_gates(network, overlays, task=metrics.task, device=device, autocast=autocast)
    overlays = [{key: value for key, value in entry.items() if key != "input"} for entry in overlays]
    return Evaluation(
        result=metrics.compute(),
        rows=metrics.rows(),
        loss=None if loss is None else total / count,
        overlays=overlays,
        seconds=time.perf_counter() - started,
        task=metrics.task,
        class_names=metrics.class_names,
        gates=gates,
        scores=None if scorer is None else scorer.finish(),
    )


def _is_first_process() -> bool:
    distributed = torch.distributed
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_rank() == 0


def _gather(
    metrics: Metrics, total: float, count: int, overlays: list[dict[str, Any]], keep: OverlayCollector | None
) -> tuple[float, int, list[dict[str, Any]]]:
    """Merge rows, loss and overlays of all processes."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1):
        return total, count, overlays
    shares: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(shares, (metrics.rows(), total, count, overlays))
    merged: list[dict[str, Any]] = []
    for rows, _, _, share in shares:
        metrics.load_rows(rows)
        merged.extend(share)
    if keep is not None:
        merged = keep.choose(merged)
    return sum(share[1] for share in shares), sum(share[2] for share in shares), merged


# ---------------------------------------------------------------- on disk


def _csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)  # None becomes an empty field
    return text.getvalue()


def write_evaluation(run_dir: str | Path, split: str, evaluation: Evaluation, *, checkpoint: str = "best") -> Path:
    """Write ``evaluation/<split>.json`` and ``.csv`` and, where there are any, overlays and gate maps as ``.npz`` and
    the scores of whole cases (``<split>_cases.csv``, ``<split>_summary.csv`` and ``.json``).

    Each file is written atomically, the JSON last, so that a reader who finds it finds the others too.

    Args:
        run_dir: Run directory.
        split: Name of the split, which names the files.
        evaluation: What to write.
        checkpoint: Which checkpoint of the run was evaluated.

    Returns:
        Path of the JSON file.
    """
    run_dir = Path(run_dir)
    folder = run_dir / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    # A file name that is no UTF-8 must not stop the table.
    atomic_write_bytes(folder / f"{split}.csv", _csv_text(evaluation.rows).encode(errors="backslashreplace"))
    pictures = {
        folder / f"{split}_overlays.npz": pack_overlays(evaluation.overlays) if evaluation.overlays else None,
        folder / f"{split}_gates.npz": None if evaluation.gates is None else pack_gate_views(evaluation.gates),
    }
    for file, data in pictures.items():
        if data is not None:
            atomic_write_bytes(file, data)
        else:
            file.unlink(missing_ok=True)  # of an earlier evaluation, whose samples these are not
    if evaluation.scores is not None:
        write_scores(folder, evaluation.scores.cases, evaluation.scores.summary, prefix=f"{split}_")
    content = _content(evaluation, split) | {"run": run_dir.resolve().name, "checkpoint": checkpoint}
    path = folder / f"{split}.json"
    atomic_write_text(path, to_json(content, indent=1) + "\n")
    return path


def _content(evaluation: Evaluation, split: str) -> dict[str, Any]:
    """What the JSON file of an evaluation holds, but for where it came from."""
    result = evaluation.result
    return {
        "split": split,
        "task": evaluation.task,
        "images": result.images,
        "noun": "images" if evaluation.scores is None else "cases",
        "class_names": list(evaluation.class_names),
        "metrics": result.metrics,
        "loss": evaluation.loss,
        "per_class": result.per_class,
        "confusion": result.confusion,
        "convention": result.convention,
        "notes": result.notes,
        "seconds": round(evaluation.seconds, 3),
    }


# ---------------------------------------------------------------- a finished run


def evaluate_run(run_dir: str | Path, *, split: str = "test", overrides: Sequence[str] = ()) -> Evaluation:
    """Evaluate the best weights of a run and write evaluation/ and report.html in its directory.

    Args:
        run_dir: Run directory.
        split: "test", "val" or "train" (without its augmentation).
        overrides: ``key.sub=value`` changes of the run's configuration, such as ``data.root=...``.

    Returns:
        The evaluation with ``split``, ``path`` and ``report`` set; `evaluation_table` prints it.

    Raises:
        UserError: No run directory, no complete checkpoint, no such split, other classes or channels than those the
            network was trained on, or weights that do not fit the (overridden) network; too little memory or disk.
    """
    run = RunDirectory(run_dir)
    if not run.config.is_file():
        raise UserError(_no_run(run.path))
    if split not in ("train", "val", "test"):
        near = get_close_matches(split, ("train", "val", "test"), n=1)
        raise UserError(f"split={split}: train, val or test is needed" + (f"; did you mean {near[0]}?" if near else ""))
    config, info = load_run(run.path, list(overrides))
    find_weights(run.checkpoints)  # before the data are read: whether there are any
    splits = load_splits(config.data)
    samples = _checked_split(splits, split, config, info)
    model, weights = load_best(run, config, info)
    accelerator = build_accelerator(config)
    device = accelerator.device
    lower = "lower data.batch_size=, or use trainer.precision=bf16 or trainer.device=cpu"
    with machine_errors(run.path, lower=lower), deterministic_algorithms(config.trainer.deterministic):
        loader = build_loader(config, samples, info, train=False, pin_memory=device.type == "cuda")
        evaluation = evaluate_model(
            labeller(config, info, model.to(device), device=device),
            loader,
            build_metrics(config, info),
            device=device,
            autocast=accelerator.autocast,
            collect=NUM_OVERLAYS,
            mean=info.mean,
            std=info.std,
            scorer=build_scorer(config, info, loader, splits),
        )
        path = write_evaluation(run.path, split, evaluation, checkpoint=weights.parent.name)
        return replace(evaluation, split=split, path=path, report=write_report(run.path))


def load_best(run: RunDirectory, config: RunConfig, info: RunInfo) -> tuple[nn.Module, Path]:
    """A run's network with its best weights, on the CPU, and the file they came from.

    Raises:
        UserError: No complete checkpoint, or weights that do not fit the (overridden) network.
    """
    weights = find_weights(run.checkpoints)
    # The weights come from the run: whatever training started from need not be there any more.
    bare = config.model.model_copy(update={"pretrained": False, "checkpoint": None})
    model = build_model(config.model_copy(update={"model": bare}), info)
    try:
        model.load_state_dict(safetensors.torch.load_file(weights))
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{weights}: does not fit model.name={config.model.name} and its options: {reason}") from error
    return model, weights


def _no_run(path: Path) -> str:
    """Why a path is no run, and which run may be meant."""
    why = "no such folder" if not path.exists() else "not a run directory (it has no config.yaml)"
    found = {config.parent for folder in (path, path.parent, Path("runs")) for config in folder.glob("*/config.yaml")}
    by_name = {run.name: run for run in sorted(found, reverse=True)}
    near = get_close_matches(path.name, list(by_name), n=1)
    if near:
        return f"{path}: {why}; did you mean {by_name[near[0]]}?"
    if found:
        return f"{path}: {why}; runs: {few([str(run) for run in sorted(found)])}"
    return f"{path}: {why}; train one first: python tools/train.py CONFIG"


def _checked_split(splits: DataSplits, split: str, config: RunConfig, info: RunInfo) -> Split:
    """The split to evaluate, once its classes and channels are those of the network."""
    source = f"data.type={config.data.type}"
    samples = dict(splits.items()).get(split)
    if samples is None:
        names = ", ".join(name for name, _ in splits.items())
        raise UserError(f"split={split}: {source} has no such split; choose one of {names}")
    if len(samples) == 0:
        raise DataError(f"split={split}: {source} has no images in it")
    if tuple(splits.class_names) != info.class_names:
        raise DataError(
            f"{source}: classes {few(splits.class_names)}, the run was trained on {few(info.class_names)}; "
            "evaluate on data with the same classes"
        )
    # Of slices with neighbours the network sees more channels than an image has.
    trained = info.in_chans if info.volumes is None else len(info.volumes.channel_names)
    if splits.in_chans != trained:
        raise DataError(f"{source}: images of {splits.in_chans} channels, the run was trained on {trained}")
    return samples


# ---------------------------------------------------------------- for the terminal


def _cell(value: float | int | None) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "-" if value is None or not math.isfinite(value) else f"{value:.4f}"


def evaluation_table(evaluation: Evaluation | str | Path) -> Table:
    """Table for a terminal: every class with its N, the overall metrics, how misses count, and what is undefined.

    Args:
        evaluation: An evaluation, or the path of the JSON file that `write_evaluation` wrote.

    Raises:
        UserError: The file is damaged.
    """
    if isinstance(evaluation, Evaluation):
        content = _content(evaluation, evaluation.split)
    else:
        content = dict(read_evaluation(Path(evaluation)))
    overall = ", ".join(f"{METRIC_LABELS[key]} {_cell(value)}" for key, value in content["metrics"].items())
    where, noun = f"{content['split']}, " if content["split"] else "", content.get("noun", "images")
    # Text, not markup: a class may be called "[red]".
    table = Table(
        title=Text(f"{where}{content['images']:,} {noun}: {overall}", style="bold"),
        caption=Text("\n".join([content["convention"].replace("images", noun), *content["notes"]]), style="dim"),
        title_justify="left",
        caption_justify="left",
    )
    columns = CLASS_COLUMNS[content["task"]]
    table.add_column("class")
    for key in columns:
        table.add_column(METRIC_LABELS[key], justify="right")
    for row in content["per_class"]:
        table.add_row(Text(str(row["name"])), *(_cell(row[key]) for key in columns))
    return table
