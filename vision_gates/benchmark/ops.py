"""Rows of the operators' own ``kernels/<op>/bench.py``; what fails its check has no speed."""

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from vision_gates import kernels
from vision_gates.benchmark.cold import first_call
from vision_gates.benchmark.models import DTYPES, target_device
from vision_gates.errors import ConfigError
from vision_gates.kernels.timing import copy_gb_per_second, machine_facts

__all__ = ["bench_ops", "operator_rows", "operators"]

Row = dict[str, Any]


def operators() -> list[str]:
    """Names of the operators that have a ``bench.py``."""
    folders = {path for root in kernels.__path__ for path in Path(root).iterdir()}
    return sorted(folder.name for folder in folders if (folder / "bench.py").is_file())


def bench_ops(names: Sequence[str] = (), **settings: Any) -> list[Row]:
    """All rows of ``operator_rows``."""
    return [row for rows in operator_rows(names, **settings) for row in rows]


def operator_rows(
    names: Sequence[str] = (),
    *,
    device: str | None = None,
    dtype: str | None = None,
    seconds: float = 0.2,
    peers: bool = True,
    cold: bool = False,
    on_progress: Callable[[str], None] = lambda text: None,
) -> Iterator[list[Row]]:
    """Check and time operators, one after the other.

    Args:
        names: operators, see ``operators``; none for all of them.
        device: "cuda" or "cpu"; None takes the GPU if there is one.
        dtype: of the arguments; None leaves the choice to each operator.
        seconds: about how long each number is measured.
        peers: time the peers, too.
        cold: time the first forward and backward pass of a new process without Triton's cache, too.
        on_progress: called with what is being done, a few words.

    Yields:
        The rows of each operator with the bandwidth of a plain copy and the facts of the machine. An operator that
        fails, its own check for one, has a single row with the reason under ``problem``, and no speed.

    Raises:
        ConfigError: an unknown operator, dtype or device.
    """
    known = operators()
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise ConfigError(f"no operator {name!r}; nearest: {near}; known: {', '.join(known)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    target = target_device(device)
    on_progress("copy bandwidth")
    shared = {"copy_gb_per_second": copy_gb_per_second(target), **machine_facts(target)}
    for name in names or known:
        on_progress(name)
        rows = _attempt({"op": name}, partial(_rows, name, target, dtype, min_seconds=seconds, peers=peers))
        if cold:
            on_progress(f"{name}: cold process")
            rows += _attempt({"op": name, "backend": "cold process"}, partial(_cold_rows, name, target))
        yield [{**row, **shared} for row in rows]


def _rows(name: str, device: torch.device, dtype: str | None, **optional: Any) -> list[Row]:
    """Rows of one operator; of the optional settings it gets those that its ``rows`` has."""
    function = importlib.import_module(f"{kernels.__name__}.{name}.bench").rows
    settings = {key: value for key, value in optional.items() if key in inspect.signature(function).parameters}
    if dtype is not None:
        settings["dtype"] = DTYPES[dtype]
    return function(device, **settings)


def _cold_rows(name: str, device: torch.device) -> list[Row]:
    return [{"op": name, "backend": "cold process", **first_call(name, device)}]


def _attempt(row: Row, work: Callable[[], list[Row]]) -> list[Row]:
    """What ``work`` returns, or ``row`` with what went wrong, which is then all there is to report."""
    try:
        return work()
    except Exception as error:
        return [{**row, "problem": " ".join(f"{type(error).__name__}: {error}".split())}]
