"""Feed hostile files to every reader: python tools/fuzz.py [KIND ...] [count=10000] [seed=0] [out=runs/fuzz]

Kinds: config run results checkpoint weights nifti itk dicom image tiff npz overlays layout sidecar network (default:
all of them).
seeds=DIR takes real files of DIR (below 1 MiB, at most 24 a kind) as further seeds.

Each kind has honest files, hand-made traps (claims of 10^6 x 10^6 voxels, bombs, pickles that run code, paths that
escape) and mutants of the honest files: flipped bits, runs, cuts, splices, extreme numbers in the format's own fields,
with checksums mended so that damage gets past them. A worker process reads one after the other. Right is: the file is
read, or refused by one line (`UserError`); a trap must be refused. Wrong, kept under out= and counted: any other
exception, a crash, more than 10 s, code that ran, or memory beyond twice what the largest honest file of the kind takes
for the same bytes (measured at the start) plus 64 MiB.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_CHECKOUT), str(_CHECKOUT / "tests" / "faults")]

from fuzzing.kinds import KINDS  # noqa: E402
from fuzzing.running import fuzz, work  # noqa: E402

_WRONG = ("error", "crash", "hang", "memory", "executed", "trapped", "honest")
_COLUMNS = ("kind", "seeds", "traps", "mutants", "read", "refused", *_WRONG, "peak MiB", "slowest s", "seconds")


def table(rows: Sequence[dict[str, Any]], count: int) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    for row in rows:
        counts = [str(row["found"].get(name, 0)) for name in ("read", "refused", *_WRONG)]
        ends = [f"{row['peak'] / 2**20:.0f}", f"{row['slowest']:.2f}", f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join([row["kind"], str(row["seeds"]), str(row["traps"]), f"{count}", *counts, *ends]))
        lines[-1] += " |"
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str]) -> int:
    known = {"count": "10000", "seed": "0", "out": "runs/fuzz", "seeds": "", "start": "0", "stop": "0", "root": ""}
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    names = [argument for argument in arguments if "=" not in argument]
    if names[:1] != ["worker"] and (set(given) - set(known) or set(names) - set(KINDS)):
        sys.stdout.write((__doc__ or "").strip() + "\n")
        return 2
    options = known | given
    extra = Path(options["seeds"]).expanduser() if options["seeds"] else None
    seed = int(options["seed"])
    if names[:1] == ["worker"]:
        start, stop = int(options["start"]), int(options["stop"])
        work(names[1], start=start, stop=stop, seed=seed, root=Path(options["root"]), extra=extra)
        return 0
    rows, out, count = [], Path(options["out"]), int(options["count"])
    for name in names or KINDS:
        rows.append(fuzz(name, count=count, seed=seed, out=out, extra=extra))
        sys.stderr.write(table(rows[-1:], count).splitlines()[-1] + "\n")
    sys.stdout.write(table(rows, count))
    return int(any(row["found"].get(name, 0) for row in rows for name in _WRONG))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
