"""Measure every model as ONNX: python tools/export_table.py [PATTERN ...] [out=runs/export.csv]

Exports each model, compares it with PyTorch and times both on this CPU (OMP_NUM_THREADS threads). Rows are added to the
CSV file one by one, and a model that is there is not measured again. Prints the table of docs/export.md.
"""

import os
import sys
from pathlib import Path

# As tools/train.py: threads that spin while they wait make both slow on a busy machine.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from vision_gates.export.table import read_rows, to_markdown, write_table  # noqa: E402

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if any(argument.startswith("-") for argument in arguments):
        sys.exit((__doc__ or "").strip())
    out = Path(next((a.removeprefix("out=") for a in arguments if a.startswith("out=")), "runs/export.csv"))
    out.parent.mkdir(parents=True, exist_ok=True)
    for row in write_table(out, [argument for argument in arguments if not argument.startswith("out=")]):
        sys.stderr.write(f"{row['model']}: {row.get('problem') or row['relative_difference']}\n")
    sys.stdout.write(to_markdown(read_rows(out)))
