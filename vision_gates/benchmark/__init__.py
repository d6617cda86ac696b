"""Honest speed tables: ours and peers in one run, with machine, versions and commit in every row.

models.py times timm models, ops.py collects the rows of the operators, cold.py times the first call of a fresh process;
tables.py and figures.py show and write rows, command.py is ``tools/bench.py``.
"""

from vision_gates.benchmark.figures import speed_figure
from vision_gates.benchmark.models import ModelSettings, auto_batch, bench_models
from vision_gates.benchmark.ops import bench_ops, operators
from vision_gates.benchmark.tables import rows_table, write_rows
from vision_gates.kernels.timing import machine_facts

__all__ = [
    "ModelSettings",
    "auto_batch",
    "bench_models",
    "bench_ops",
    "machine_facts",
    "operators",
    "rows_table",
    "speed_figure",
    "write_rows",
]
