"""Every model as ONNX, measured: what docs/export.md shows. Rows are kept in a CSV file, so that it may be stopped."""

import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

import vision_gates  # noqa: F401  (registers the vg_* models)
from vision_gates.errors import UserError
from vision_gates.export.onnx import to_onnx
from vision_gates.export.runtime import open_session
from vision_gates.networks import available_networks, create_network

__all__ = ["COLUMNS", "candidates", "measure", "read_rows", "to_markdown", "write_table"]

COLUMNS = (
    *("model", "input", "problem", "relative_difference", "open_axes", "nodes", "megabytes"),
    *("export_seconds", "torch_ms", "onnxruntime_ms", "ratio", "threads", "torch", "onnxruntime"),
)
_SIZE = {2: (256, 256), 3: (64, 64, 64)}  # of networks for segmentation; classifiers are measured at their own
_ROUNDS, _SECONDS = 7, 0.3


def candidates(patterns: Sequence[str] = ()) -> dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]]:
    """Name to a function that builds a model and says its input (channels, *size).

    All ``vg_*``, and all whole networks, those for volumes in 2-D and 3-D; patterns choose among them.

    Raises:
        UserError: nothing matches.
    """
    known: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {}
    for name in timm.list_models("vg_*"):
        known[name] = partial(_classifier, name)
    for name in available_networks():
        for dims in (2, 3):
            known[f"{name} {dims}-D"] = partial(_network, name, dims)
    chosen = {k: v for k, v in known.items() if not patterns or any(fnmatchcase(k, pattern) for pattern in patterns)}
    if not chosen:
        raise UserError(f"no model matches {' '.join(patterns)}; there are {', '.join(known)}")
    return chosen


def _classifier(name: str) -> tuple[nn.Module, tuple[int, ...]]:
    model: Any = timm.create_model(name)
    return model, tuple(model.pretrained_cfg["input_size"])


def _network(name: str, dims: int) -> tuple[nn.Module, tuple[int, ...]]:
    options: dict[str, Any] = {} if dims == 2 else {"spatial_dims": 3}
    return create_network(name, in_channels=1, num_classes=4, **options), (1, *_SIZE[dims])


def measure(name: str, build: Callable[[], tuple[nn.Module, tuple[int, ...]]]) -> dict[str, Any] | None:
    """A row of the table; None of a network that has no such form.

    Speed is that of a batch of one on the CPU, both with as many threads as torch has: the two take turns, and
    ``ratio`` is the median over the turns of torch's time to ONNX Runtime's, above 1 where ONNX Runtime is faster.
    """
    torch.manual_seed(0)
    try:
        model, input_size = build()
    except (TypeError, ValueError):
        return None  # a network for slices only
    threads = torch.get_num_threads()
    row: dict[str, Any] = {"model": name, "input": " x ".join(map(str, input_size)), "threads": threads}
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = to_onnx(model, Path(folder) / "model.onnx", input_size=input_size)
        except UserError as error:
            return row | {"problem": str(error)}
        session = open_session(done.path, threads=threads)
        row |= {
            "relative_difference": f"{max(difference.relative for difference in done.differences):.1e}",
            "open_axes": " ".join(done.about.dynamic_axes),
            "nodes": done.nodes,
            "megabytes": round(done.path.stat().st_size / 1e6, 1),
            "export_seconds": round(done.seconds, 1),
            "torch": done.about.versions["torch"],
            "onnxruntime": done.about.versions["onnxruntime"],
        }
        return row | _speed(model.eval(), session, input_size)


def _speed(model: nn.Module, session: Any, input_size: tuple[int, ...]) -> dict[str, Any]:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, *input_size), dtype=np.float32))
    feed = {session.get_inputs()[0].name: x.numpy()}
    runs: tuple[Callable[[], Any], ...] = (lambda: model(x), lambda: session.run(None, feed))
    with torch.inference_mode():
        for run in runs:
            run()
        rounds = [[_milliseconds(run) for run in runs] for _ in range(_ROUNDS)]
    ours, theirs = zip(*rounds, strict=True)
    return {
        "torch_ms": round(statistics.median(ours), 1),
        "onnxruntime_ms": round(statistics.median(theirs), 1),
        "ratio": round(statistics.median(a / b for a, b in rounds), 2),
    }


def _milliseconds(run: Callable[[], Any]) -> float:
    began, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - began < _SECONDS:
        run()
        count += 1
    return 1e3 * (time.perf_counter() - began) / count


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a table written before; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, patterns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Measure what is not in the file yet and add it row by row; yields the new rows."""
    done = {row["model"] for row in read_rows(path)}
    for name, build in candidates(patterns).items():
        if name in done:
            continue
        row = measure(name, build)
        if row is None:
            continue
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            writer.writerow(row)
        yield row


def to_markdown(rows: Sequence[dict[str, str]]) -> str:
    """The table of docs/export.md."""
    lines = [
        "| model | input | exported, largest relative difference | open axes | nodes | MB | export s | ONNX Runtime ms "
        "| torch ms | torch : ONNX Runtime |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        cells = [f"`{row['model']}`", row["input"], row["problem"] or row["relative_difference"]]
        keys = ("open_axes", "nodes", "megabytes", "export_seconds", "onnxruntime_ms", "torch_ms", "ratio")
        lines.append(f"| {' | '.join([*cells, *(row[key] for key in keys)])} |")
    return "\n".join(lines) + "\n"
