"""Honest speed tables: ours and peers in one run, interleaved, with machine, versions and commit in every row.

`tools/bench.py` prints what these functions return. Shared machines drift, so each round times every candidate once and
the ratios are medians over rounds; absolute times are medians too.
"""

import csv
import importlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import vision_gates
from vision_gates import kernels

__all__ = ["bench_models", "bench_ops", "machine_facts", "rows_table", "write_rows"]

Row = dict[str, Any]
_HEADINGS = {
    "parameters": "params",
    "ms_forward": "fwd ms",
    "ms_forward_backward": "fwd+bwd ms",
    "images_per_second": "images/s",
    "milliseconds": "ms",
    "ratio_low": "low",
    "ratio_high": "high",
    "peak_extra_mib": "peak MiB",
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def machine_facts(device: torch.device) -> Row:
    """What a number needs to be compared with another: device, versions, commit, precision switches."""
    try:
        triton_version = importlib.import_module("triton").__version__
    except ImportError:
        triton_version = "none"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "triton": triton_version,
        "vision_gates": vision_gates.__version__,
        "commit": _commit(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
    }


def bench_models(
    names: Sequence[str],
    *,
    size: int = 224,
    batch: int = 8,
    mode: str = "training",
    dtype: str = "float32",
    device: str | None = None,
    compiled: bool = False,
    rounds: int = 10,
    on_round: Callable[[int], None] = lambda done: None,
) -> list[Row]:
    """Time timm models on random images: a forward pass (inference) or forward and backward (training).

    Args:
        names: timm model names; the last one is the peer that the others are compared with.
        size: height and width of the images, pixels.
        batch: images a pass.
        mode: "training" (forward and backward; autocast for half types) or "inference" (weights in ``dtype``).
        dtype: "float32", "bfloat16" or "float16".
        device: "cuda" or "cpu"; None takes the GPU if there is one.
        compiled: pass the models through torch.compile first.
        rounds: timed rounds, after two for warming up.
        on_round: called with the number of finished rounds.

    Returns:
        One row a model: images/s, ms, the ratio of its images/s to the peer's (median over rounds; above 1 is faster),
        peak extra memory (GPU only), and the facts of the machine.

    Raises:
        ValueError: an unknown mode or dtype, or fewer than one round.
    """
    if mode not in ("training", "inference"):
        raise ValueError(f"mode must be 'training' or 'inference', got {mode!r}")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    images = torch.randn(batch, 3, size, size, device=target)
    passes, parameters = [], []
    for name in names:
        model = _create(name, size).to(target)
        parameters.append(sum(parameter.numel() for parameter in model.parameters()))
        passes.append(_one_pass(model, images, mode=mode, dtype=_DTYPES[dtype], compiled=compiled))
    for _ in range(2):
        for run in passes:
            run()
    seconds: list[list[float]] = [[] for _ in names]
    memory = [0.0] * len(names)
    for done in range(rounds):
        for i, run in enumerate(passes):
            seconds[i].append(_time(run, target))
            if target.type == "cuda":
                memory[i] = _peak_extra_mib(run, target)
        on_round(done + 1)
    facts = machine_facts(target)
    rows = []
    for i, name in enumerate(names):
        ratios = [peer / own for own, peer in zip(seconds[i], seconds[-1], strict=True)]
        median = statistics.median(seconds[i])
        rows.append(
            {
                "model": name,
                "parameters": parameters[i],
                "mode": mode,
                "size": size,
                "batch": batch,
                "dtype": dtype,
                "compiled": compiled,
                "images_per_second": batch / median,
                "milliseconds": 1000 * median,
                "ratio": statistics.median(ratios),
                "ratio_low": min(ratios),
                "ratio_high": max(ratios),
                "peer": names[-1],
                "peak_extra_mib": memory[i] if target.type == "cuda" else None,
                **facts,
            }
        )
    return rows


def bench_ops(*, device: str | None = None) -> list[Row]:
    """Rows of every operator's own ``bench.py``.

    Raises:
        AssertionError: an operator's result is wrong; no speed is reported for it.
    """
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    rows = []
    for name in _operators():
        module = importlib.import_module(f"{kernels.__name__}.{name}.bench")
        rows += module.rows(target)
    facts = machine_facts(target)
    return [facts | row for row in rows]


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as CSV or JSON, by the file's suffix.

    Raises:
        ValueError: another suffix.
    """
    if path.suffix not in (".csv", ".json"):
        raise ValueError(f"{path}: the suffix must be .csv or .json")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        if path.suffix == ".json":
            json.dump(list(rows), file, indent=1)
        else:
            writer = csv.DictWriter(file, fieldnames=list({key: None for row in rows for key in row}))
            writer.writeheader()
            writer.writerows(rows)
    os.replace(partial, path)


def rows_table(rows: Sequence[Row]) -> Any:
    """Rows as a rich table: what differs between them in columns, what they share in one line below.

    Raises:
        ValueError: no rows.
    """
    from rich.table import Table

    if not rows:
        raise ValueError("there is nothing to show: no rows were measured")
    keys = list(dict.fromkeys(key for row in rows for key in row))
    shared = [key for key in keys if len(rows) > 1 and all(row.get(key) == rows[0].get(key) for row in rows)]
    facts = ", ".join(f"{key.replace('_', ' ')} {_cell(rows[0][key])}" for key in shared if rows[0][key] is not None)
    table = Table(caption=facts, caption_justify="left")
    for key in keys:
        if key not in shared:
            text = isinstance(rows[0].get(key), str)
            table.add_column(
                _HEADINGS.get(key, key.replace("_", " ")), justify="left" if text else "right", no_wrap=True
            )
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in keys if key not in shared))
    return table


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _create(name: str, size: int) -> nn.Module:
    try:
        return timm.create_model(name, img_size=size)
    except TypeError:  # convolutional and hierarchical models take any size as they are
        return timm.create_model(name)


def _one_pass(
    model: nn.Module, images: torch.Tensor, *, mode: str, dtype: torch.dtype, compiled: bool
) -> Callable[[], None]:
    if mode == "inference":
        model = model.eval().to(dtype)
        images = images.to(dtype)
        network = torch.compile(model) if compiled else model

        def infer() -> None:
            with torch.inference_mode():
                network(images)

        return infer
    model.train()
    network = torch.compile(model) if compiled else model

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            loss = network(images).float().square().mean()
        loss.backward()

    return train


def _time(run: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start_event.record()
    run()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1000


def _peak_extra_mib(run: Callable[[], None], device: torch.device) -> float:
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _operators() -> list[str]:
    folders = {path for root in kernels.__path__ for path in Path(root).iterdir()}
    return sorted(folder.name for folder in folders if (folder / "bench.py").is_file())


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip() or "not a checkout"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
