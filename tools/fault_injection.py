"""Kill training runs and break what they need: python tools/fault_injection.py [key=value ...]

Trains tiny runs, of generated images and of generated volumes with their cache, and ends them with SIGKILL at random
moments: anywhere, inside checkpoint writes, inside cache writes. Each is started again until it is finished; its
weights, metrics and evaluation must be those of a run that nothing happened to, bit for bit, and at no moment may a
checkpoint that was complete be missing. Then signals, damaged checkpoints, dead data workers, vanished files, full
disks, NaN and too little memory: each has to end in one clear line, and the run has to be finished when the cause is
gone.
    kills=200             SIGKILLs in all
    seed=0                of the moments
    quick=false           true tries fewer faults, and fewer variants of each
    only=                 scenarios whose name contains this; kills=0 leaves the kills out
    out=                  FILE.json for the counts
Needs Linux; a full disk is a small tmpfs, so needs root or user namespaces. Exit code 1: something was lost.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bit for bit the same is promised on a CPU
_CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_CHECKOUT), str(_CHECKOUT / "tests" / "faults")]

from injection.kills import kill_runs  # noqa: E402
from injection.processes import watch_places  # noqa: E402
from injection.runs import Runs  # noqa: E402
from injection.scenarios import scenarios  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402


def main(arguments: list[str]) -> int:
    """See the top of the file."""
    options = {"kills": "200", "seed": "0", "quick": "false", "only": "", "out": ""}
    given = dict(argument.partition("=")[::2] for argument in arguments)
    if given.keys() - options.keys():
        sys.stdout.write((__doc__ or "").strip() + "\n")
        return 0 if given.keys() <= {"-h", "--help"} else 2
    options |= given
    watch_places()
    began, console = time.monotonic(), Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    kills: dict[str, Any] = {"kills": {}, "starts": 0, "runs": 0, "equal": 0, "lost": []}
    rows = []
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        runs = Runs(Path(folder))
        for name, fault in scenarios(runs, options["quick"] == "true"):
            if options["only"] and options["only"] not in name:
                continue
            try:
                rows.append({"name": name, "ok": True, "said": fault().replace(folder, "...")})
            except PermissionError as error:
                rows.append({"name": name, "ok": None, "said": str(error)})
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
                rows.append({"name": name, "ok": False, "said": said.replace(folder, "...")})
            sys.stderr.write(f"{name}: {rows[-1]['said']}\n")
        if int(options["kills"]):
            say = lambda line: sys.stderr.write(f"{line}\n")  # noqa: E731
            kills = kill_runs(runs, int(options["kills"]), int(options["seed"]), say)
    report = {"kills": kills, "scenarios": rows, "minutes": round((time.monotonic() - began) / 60, 1)}
    _show(report, console)
    if options["out"]:
        Path(options["out"]).write_text(json.dumps(report, indent=1) + "\n")
    return 1 if kills["lost"] or any(row["ok"] is False for row in rows) else 0


def _show(report: dict[str, Any], console: Console) -> None:
    kills = report["kills"]
    if kills["runs"]:
        table = Table("SIGKILL", "count")
        for place, count in sorted(kills["kills"].items(), key=lambda item: -item[1]):
            table.add_row(place, str(count))
        table.add_row("all", str(sum(kills["kills"].values())), style="bold")
        table.add_row("runs, finished", str(kills["runs"]))
        table.add_row("of them as the undisturbed run, bit for bit", str(kills["equal"]))
        table.add_row("lost", "; ".join(kills["lost"]) or "nothing", style="bold")
        console.print(table)
    table = Table("fault", "as it should", "what was said")
    for row in report["scenarios"]:
        table.add_row(row["name"], {True: "yes", False: "NO", None: "not run"}[row["ok"]], row["said"])
    console.print(table)
    console.print(f"{report['minutes']} minutes")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
