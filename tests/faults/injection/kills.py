"""SIGKILL at random moments."""

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from injection.processes import CACHE, CHECKPOINT, EPOCH, PLACES, Process, current, entered
from injection.runs import Runs, newest


def kill_runs(runs: Runs, kills: int, seed: int, say: Callable[[str], None]) -> dict[str, Any]:
    """SIGKILL at random moments until ``kills`` have hit; each run is started again until it is finished."""
    rng, places, lost = random.Random(seed), Counter[str](), list[str]()
    finished, equal, attempts = 0, 0, 0
    kinds = (("images",), ("volumes",), ("images", "data.workers=1"))
    while sum(places.values()) < kills:
        kind, *changes = kinds[finished % len(kinds)]
        name, known = runs.new(), {"last": -1, "best": -1}
        run = runs.root / name
        while True:
            process = runs.train(kind, name, *changes)
            attempts += 1
            if sum(places.values()) < kills:
                _strike(process, rng, runs.seconds[kind], cached=kind == "volumes")
            process.wait()
            if process.code != -signal.SIGKILL:
                break
            place = PLACES[current()]
            if current() == EPOCH and newest(run, "last") < 0:
                place = "before the first checkpoint"
            places[place] += 1
            for what, before in known.items():
                known[what] = newest(run, what)
                if known[what] < before:
                    lost.append(f"{name}: {what} checkpoint of update {before} after a kill {place}")
        finished += 1
        try:
            assert process.code == 0, f"exit code {process.code}: {process.said()[-1:]}"
            runs.check(kind, run)
            equal += 1
        except AssertionError as error:
            lost.append(f"{name} ({kind}): {error}")
        say(f"{sum(places.values())}/{kills} kills, {finished} runs, {equal} equal, {len(lost)} lost")
        if not lost:
            shutil.rmtree(run)
            shutil.rmtree(f"{run}_cache", ignore_errors=True)
    return {"kills": dict(places), "starts": attempts, "runs": finished, "equal": equal, "lost": lost}


def _strike(process: Process, rng: random.Random, seconds: float, *, cached: bool) -> None:
    """SIGKILL at a random moment of a run, or a few milliseconds into an update, a checkpoint, a case of the cache."""
    aim = rng.choices((None, EPOCH, CHECKPOINT, CACHE), weights=(3, 3, 2, 3 * cached))[0]
    if aim is None:
        moment = time.monotonic() + rng.uniform(0, seconds)
        hit = process.wait(lambda: time.monotonic() >= moment)
    else:
        hit = process.wait(entered(aim, rng.randint(1, 6)))
        time.sleep(rng.uniform(0, {EPOCH: 0.03, CHECKPOINT: 0.01, CACHE: 0.003}[aim]))
    if hit:
        process.send(signal.SIGKILL)
