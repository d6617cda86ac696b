"""How operators are timed: two clocks, traffic against a plain copy, peak memory, and the facts of the machine.

Each operator's ``bench.py`` checks its results, then calls ``measure``; ``tools/bench.py ops`` collects the rows.
"""

import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_gates import __version__

__all__ = ["copy_gb_per_second", "machine_facts", "measure"]

_FLUSH_BYTES = 2**28  # written before each eager call; several times the L2 cache of any GPU
_FEWEST, _MOST = 3, 1000  # timed calls


def measure(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], upstream: Tensor, *, min_seconds: float = 0.2
) -> dict[str, Any]:
    """Time, traffic and peak memory of ``function(*inputs)`` without gradients, and of it with its backward pass.

    ``ms_*`` is the median of eager calls (CUDA: between two events, after the L2 cache was overwritten, so that what
    the host needs to launch kernels counts). ``ms_*_graph`` is the median of a replayed CUDA graph that goes through as
    many copies of the inputs as overflow the L2 cache, divided by their number: the GPU's time alone.
    ``gb_per_second_*`` is the bytes of all inputs and results, each counted once, over the shorter of the two; with the
    backward pass the upstream gradient is an input and the gradients are results. ``copy_percent_*`` is that in percent
    of ``copy_gb_per_second``. ``peak_extra_*`` is the memory a call needs at its worst over those inputs and results,
    in MiB and in percent of them.

    Args:
        function: takes ``inputs``, returns one tensor.
        inputs: tensors; those that require a gradient get one in the backward pass.
        upstream: gradient of the output, in its shape.
        min_seconds: about how long each number is measured; a slow call is still made three times.

    Returns:
        The columns above for ``forward`` and ``forward_backward``. None: graphs and memory on a CPU, and the graph of
        a function that cannot be captured.
    """
    device = upstream.device

    def forward(inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return [function(*inputs)]

    def forward_backward(inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
        output = function(*inputs)
        return [output.detach(), *torch.autograd.grad(output, [x for x in inputs if x.requires_grad], upstream)]

    columns: dict[str, Any] = {}
    for name, call, given in (
        ("forward", forward, inputs),
        ("forward_backward", forward_backward, [*inputs, upstream]),
    ):
        n_bytes = sum(x.nbytes for x in [*given, *call(inputs, upstream)])  # the first call compiles, too
        if device.type == "cuda":
            extra_mib = _peak_extra_mib(call, inputs, upstream)
            milliseconds = _eager_milliseconds(call, inputs, upstream, min_seconds)
            graph_milliseconds = _graph_milliseconds(call, inputs, upstream, min_seconds, n_bytes)
        else:
            extra_mib, graph_milliseconds = None, None
            milliseconds = _cpu_milliseconds(call, inputs, upstream, min_seconds)
        rate = n_bytes / 1e6 / min(milliseconds, graph_milliseconds or math.inf)
        columns |= {
            f"ms_{name}": milliseconds,
            f"ms_{name}_graph": graph_milliseconds,
            f"gb_per_second_{name}": rate,
            f"copy_percent_{name}": 100 * rate / copy_gb_per_second(device),
            f"peak_extra_mib_{name}": extra_mib,
            f"peak_extra_percent_{name}": None if extra_mib is None else 100 * extra_mib / (n_bytes / 2**20),
        }
    return columns


@cache
def copy_gb_per_second(device: torch.device) -> float:
    """Bytes read and written a second, in 1e9, of a large copy within the device's memory; measured once a process."""
    source = torch.zeros(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy(inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
        return [target.copy_(source)]

    clock = _eager_milliseconds if device.type == "cuda" else _cpu_milliseconds
    return 2 * source.nbytes / 1e6 / clock(copy, (), source, 0.1)


def machine_facts(device: torch.device) -> dict[str, Any]:
    """What a number needs to be compared with another: device, versions, commit, precision switches, date."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "triton": _version("triton", "pytorch-triton"),
        "timm": _version("timm"),
        "fla": _version("flash-linear-attention", "fla-core"),
        "vision_gates": __version__,
        "commit": _commit(),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


# ------------------------------------------------------------------------------------------------------------- clocks

_Call = Callable[[Sequence[Tensor], Tensor], list[Tensor]]


def _cpu_milliseconds(call: _Call, inputs: Sequence[Tensor], upstream: Tensor, min_seconds: float) -> float:
    seconds: list[float] = []
    while len(seconds) < _FEWEST or (sum(seconds) < min_seconds and len(seconds) < _MOST):
        start = time.perf_counter()
        call(inputs, upstream)
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds)


def _eager_milliseconds(call: _Call, inputs: Sequence[Tensor], upstream: Tensor, min_seconds: float) -> float:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=upstream.device)
    return _event_milliseconds(lambda: call(inputs, upstream), min_seconds, before=flush.zero_)


def _graph_milliseconds(
    call: _Call, inputs: Sequence[Tensor], upstream: Tensor, min_seconds: float, n_bytes: int
) -> float | None:
    cache_bytes = torch.cuda.get_device_properties(upstream.device).L2_cache_size
    n_copies = min(1 + math.ceil(2 * cache_bytes / n_bytes), 128)
    copies = [
        ([x.detach().clone().requires_grad_(x.requires_grad) for x in inputs], upstream.clone())
        for _ in range(n_copies)
    ]
    stream, graph = torch.cuda.Stream(upstream.device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(upstream.device))
    try:
        with torch.cuda.stream(stream):  # autograd remembers the stream that it first saw
            call(*copies[0])
        torch.cuda.current_stream(upstream.device).wait_stream(stream)
        with torch.cuda.graph(graph, stream=stream):
            for copy in copies:
                call(*copy)
    except RuntimeError:
        return None
    return _event_milliseconds(graph.replay, min_seconds) / n_copies


def _event_milliseconds(run: Callable[[], Any], min_seconds: float, before: Callable[[], Any] = lambda: None) -> float:
    """Median between two CUDA events around ``run``; ``before`` is enqueued ahead of each and not timed."""

    def sample(number: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(number)]
        for start, stop in events:
            before()
            start.record()
            run()
            stop.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(stop) for start, stop in events]

    estimate = min(sample(_FEWEST))
    return statistics.median(sample(int(min(max(1e3 * min_seconds / estimate, _FEWEST), _MOST))))


def _peak_extra_mib(call: _Call, inputs: Sequence[Tensor], upstream: Tensor) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call(inputs, upstream)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(x.nbytes for x in results)
    return max(extra, 0) / 2**20


# -------------------------------------------------------------------------------------------------------------- facts


def _version(*packages: str) -> str:
    """Version of the first of these packages that is installed, or "none"."""
    for package in packages:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "none"


@cache
def _commit() -> str:
    """Of the checkout, else $VISION_GATES_COMMIT (for a copy without its .git), else "not a checkout"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # no git
        found = ""
    return found or os.environ.get("VISION_GATES_COMMIT") or "not a checkout"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
