"""Rows on paper: CSV and JSON files that are whole or absent, and tables that show what differs."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision_gates.benchmark.models import OUT_OF_MEMORY
from vision_gates.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["kernel_table", "results_folder", "rows_table", "write_rows"]

Row = dict[str, Any]
_HEADINGS = {
    "parameters": "params",
    "images_per_second": "images/s",
    "milliseconds": "ms",
    "ratio_low": "low",
    "ratio_high": "high",
    "compile_seconds": "first s",
    "cold_seconds": "cold s",
    "ms_graph": "graph ms",
    "gb_per_second": "GB/s",
    "copy_percent": "% of copy",
    "copy_gb_per_second": "copy GB/s",
    "peak_extra_mib": "peak MiB",
    "peak_extra_percent": "% of in+out",
    "worst_error": "error",
    "total_us": "µs",
    "percent": "%",
}
_MEASURED = ("images_per_second", "ms")  # where a row without numbers says so
_PASSES = {"_forward_backward": "fwd+bwd", "_forward": "forward"}  # parts of column names; the longer one first


def results_folder(out: str) -> Path | None:
    """The folder that ``out`` names, or None where it names a CSV or JSON file.

    Raises:
        ConfigError: another suffix, and no folder.
    """
    path = Path(out)
    if path.is_dir() or out.endswith("/") or not path.suffix:
        return path
    if path.suffix in (".csv", ".json"):
        return None
    raise ConfigError(f"out={out}: the suffix must be .csv or .json, or end it with / for a folder")


def write_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as CSV or JSON, by the file's suffix.

    Raises:
        ConfigError: another suffix.
    """
    if path.suffix not in (".csv", ".json"):
        raise ConfigError(f"{path}: the suffix must be .csv or .json")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as file:
        if path.suffix == ".json":
            json.dump(list(rows), file, indent=1)
        else:
            writer = csv.DictWriter(file, fieldnames=_keys(rows))
            writer.writeheader()
            writer.writerows(rows)
    os.replace(partial, path)


def rows_table(rows: Sequence[Row]) -> "Table":
    """Rows as a rich table: what differs between them in columns, what they share in one line below.

    Columns of the forward pass and of forward and backward, such as ``ms_forward``, become two lines of one column. A
    row without numbers shows its ``problem`` instead of the first.

    Raises:
        ValueError: no rows.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    if not rows:
        raise ValueError("there is nothing to show: no rows were measured")
    lines = [line for row in rows for line in _lines(row)]
    keys = [key for key in _keys(lines) if any(line.get(key) is not None for line in lines)]
    shared = [key for key in keys if len(lines) > 1 and all(line.get(key) == lines[0].get(key) for line in lines)]
    measured = next((key for key in _MEASURED if key in keys), "problem")
    keys = [key for key in keys if key not in shared and (key != "problem" or measured == "problem")]
    facts = ", ".join(f"{_heading(key)} {_cell(lines[0][key])}" for key in shared)
    table = Table(caption=facts, caption_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for key in keys:
        words = any(isinstance(line.get(key), (str, tuple, list)) for line in lines)
        table.add_column(_heading(key), justify="left" if words else "right", no_wrap=True)
    for line in lines:
        cells = {key: _cell(line.get(key)) for key in keys}
        if line.get("problem") is not None and measured != "problem" and line.get(measured) is None:
            cells[measured] = OUT_OF_MEMORY if line["problem"] == OUT_OF_MEMORY else "failed"
        table.add_row(*cells.values())
    return table


def kernel_table(title: str, kernels: Sequence[Row], *, top: int = 12) -> "Table":
    """The longest kernels of a profile."""
    table = rows_table(kernels[:top])
    table.title, table.title_justify = title, "left"
    table.columns[0].max_width, table.columns[0].overflow = 70, "ellipsis"
    return table


def _lines(row: Row) -> list[Row]:
    """A row, or one line for each pass that it has columns of."""
    ending_of = {key: next((ending for ending in _PASSES if ending in key), None) for key in row}
    lines = []
    for ending in reversed(_PASSES):
        if ending in ending_of.values():
            line: Row = {}
            for key, value in row.items():
                if ending_of[key] == ending:
                    line.setdefault("pass", _PASSES[ending])
                    line[key.replace(ending, "")] = value
                elif ending_of[key] is None:
                    line[key] = value
            lines.append(line)
    return lines or [row]


def _keys(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _heading(key: str) -> str:
    return _HEADINGS.get(key, key.replace("_", " "))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
