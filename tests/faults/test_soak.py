"""The tool that watches memory over a long time tells a leak from noise; short runs leave nothing behind."""

import csv
import gc
import importlib.util
import mmap
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from vision_gates.benchmark.soak import Recorder, Sample, Trend, trend, trends, verdict_table
from vision_gates.errors import ConfigError, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def soak():
    """tools/soak.py as a module."""
    spec = importlib.util.spec_from_file_location("soak", ROOT / "tools" / "soak.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def series(*, growth: float, noise: float = 3.0, samples: int = 360, steps: int = 20_000) -> tuple:
    """500 MB with noise, growing by so many MB per 1,000 steps, after a warm-up of 300 MB more."""
    generator = np.random.default_rng(0)
    x = np.linspace(10, steps, samples)
    warming = 300 * np.clip(x / (0.2 * steps), 0, 1)
    return x, 500 + warming + growth * x / 1000 + generator.normal(0, noise, samples)


@pytest.mark.parametrize(("growth", "flat"), [(0.0, True), (0.5, True), (2.0, False), (-2.0, True)])
def test_a_leak_is_told_from_noise(growth, flat):
    found = trend(*series(growth=growth), limit=1.0)
    assert found.low < growth < found.high and found.high - found.low < 0.5
    assert found.flat is flat


def test_peaks_do_not_matter():
    x, y = series(growth=0.0)
    y[::10] += 400  # a validation with its own workers
    assert abs(trend(x, y, limit=1.0).slope) < 0.1


def test_one_handle_in_a_thousand_steps_is_growth():
    x, _ = series(growth=0.0)
    assert trend(x, np.full(len(x), 20), limit=0.1).flat
    assert not trend(x, 20 + x // 1000, limit=0.1).flat


def test_too_short_is_no_verdict():
    x, y = series(growth=0.0, samples=22)
    with pytest.raises(UserError, match="17 samples after warm-up are too few"):
        trend(x, y)
    # Enough samples, but of so few steps that noise could hide a leak.
    assert not trend(*series(growth=0.0, samples=40, steps=1000), limit=1.0).flat


def test_recorder_samples_at_steps(tmp_path):
    recorder = Recorder("job", r"\| update (\d+) \|", path=tmp_path / "deep" / "samples.csv")
    kept = []
    for i in range(40):
        # A leak of 1 MB a step, in pages of its own: an array may lie in memory that was freed before.
        kept.append(mmap.mmap(-1, 10**6, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        kept[-1].write(bytes([1]) * 10**6)
        recorder.console.print(f"epoch 1/2 | update {10 * i} | loss 0.5 " + 300 * "x")
        recorder.console.print("something else")
    assert [sample.step for sample in recorder.samples] == list(range(0, 400, 10))
    with open(tmp_path / "deep" / "samples.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(0, 400, 10)) and float(rows[-1]["own"]) > 1
    found = trends(recorder.samples)
    assert found["memory"].slope == pytest.approx(100, rel=0.2) and not found["memory"].flat
    assert found["handles"].flat and "**grows**" in verdict_table({"job": found})


def test_sample_counts_workers():
    before = Sample.take("job", seconds=0, step=0)
    with torch.multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(abs, (-1,)) == 1
        during = Sample.take("job", seconds=0, step=0)
    assert during.processes > before.processes and during.handles > before.handles
    assert during.memory > before.memory


def test_table():
    found = {"memory": Trend(500, 500.4, 0.1, -0.2, 0.4, 1.0, 99), "objects": Trend(9e5, 9e5, 0, 0, 0, None, 99)}
    table = verdict_table({"training": found})
    assert "| training | memory, MB | 99 | 500.0 | 500.4 | +0.100 (-0.200 to +0.400) | 1 | flat |" in table
    assert "| training | objects | 99 | 900,000.0 | 900,000.0 | +0.000 (+0.000 to +0.000) | - | - |" in table


@pytest.mark.parametrize("argument", ["minutes=ten", "hours=1", f"out={__file__}", "volumes"])
def test_wrong_options_end_in_a_line(soak, argument):
    with pytest.raises(ConfigError, match=argument.split("=")[0]):
        soak.main([argument])


def live_tensors() -> int:
    """After a collection; asking an object for its type runs none of its code."""
    gc.collect()
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


def test_runs_leave_nothing_behind(soak, tmp_path):
    """Training three times in one process, with a worker: the first run loads what stays."""
    counts = []
    for i in range(3):
        soak.training(tmp_path / str(i), "data.workers=1", "schedule.epochs=1", images=24)
        tensors, now = live_tensors(), Sample.take("here", seconds=0, step=0)
        counts.append((tensors, now.handles, now.threads, now.processes))
    assert counts[1] == counts[0] and counts[2] == counts[0]


_WAITING = """
import os, time
from vision_gates.benchmark.soak import apart

def job():
    print(os.getpid(), flush=True)
    time.sleep(600)

if __name__ == "__main__":
    apart(job)
"""


@pytest.mark.slow
def test_a_job_ends_with_who_waits_for_it(tmp_path):
    (tmp_path / "waiting.py").write_text(_WAITING)
    waiting = subprocess.Popen([sys.executable, tmp_path / "waiting.py"], stdout=subprocess.PIPE, cwd=ROOT)
    job = psutil.Process(int(waiting.stdout.readline()))
    waiting.kill()
    waiting.communicate(timeout=60)
    job.wait(timeout=60)


@pytest.mark.slow
def test_volumes_leave_nothing_behind(soak, tmp_path, monkeypatch):
    """Of each volume the journal keeps a line of about 300 bytes; the smallest array that could stay has 55 KB."""
    held, handles = [], []

    class Watch(Recorder):
        def write(self, text: str) -> int:
            if not tracemalloc.is_tracing():  # the first line; numpy's arrays are traced, too
                tracemalloc.start()
            if self._pattern.search(text):
                tensors = live_tensors()
                held.append((tracemalloc.get_traced_memory()[0], tensors))
                handles.append(Sample.take("here", seconds=0, step=0).handles)
            return len(text)

    monkeypatch.setattr(soak, "Recorder", Watch)
    try:
        soak.segmenting(tmp_path, volumes=12)
    finally:
        tracemalloc.stop()
    assert len(held) == 12 and len(set(handles[3:])) == 1
    (before, tensors), (after, tensors_after) = held[3], held[-1]
    assert (after - before) / 8 < 5_000 and tensors_after == tensors, held


@pytest.mark.slow
def test_the_whole_tool(tmp_path):
    """Both jobs, for so short a time that slopes say little: the samples are there, the handles flat."""
    out = tmp_path / "samples.csv"
    command = [sys.executable, str(ROOT / "tools" / "soak.py"), "minutes=3", "volumes=30", f"out={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode in (0, 1), done.stderr
    for job in ("training", "volumes"):
        lines = [line for line in done.stdout.splitlines() if line.startswith(f"| {job} | handles |")]
        assert len(lines) == 1 and lines[0].endswith("| flat |"), done.stdout
    with open(out, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["part"] == "volumes"] == list(range(1, 31))
