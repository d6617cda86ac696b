"""Whatever happens to a run, it ends as an undisturbed one or in a clear line: fault_injection.py, short and long.

What a fault does inside one process is tested where that code is: tests/engine/test_resume.py, tests/volumes/.
"""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vision_gates import cli
from vision_gates.command_end import guard
from vision_gates.engine.run_directory import append_line, atomic_write_text
from vision_gates.errors import ConfigError, UserError
from vision_gates.volumes.blending import label_windows
from vision_gates.volumes.cache import CaseCache
from vision_gates.volumes.geometry import Geometry
from vision_gates.volumes.windows import plan_windows

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fault_injection.py"
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fault_injection.py reads Linux's /proc")


def inject(tmp_path: Path, *options: str, minutes: float) -> dict[str, Any]:
    out = tmp_path / "faults.json"
    done = subprocess.run(
        [sys.executable, str(TOOL), *options, f"out={out}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60 * minutes,
    )
    assert out.exists(), done.stderr[-4000:]
    report: dict[str, Any] = json.loads(out.read_text())
    wrong = {row["name"]: row["said"] for row in report["scenarios"] if row["ok"] is False}
    assert not wrong and not report["kills"]["lost"], (wrong, report["kills"]["lost"])
    assert done.returncode == 0
    return report


def skip_what_was_not_run(report: dict[str, Any]) -> None:
    missing = [f"{row['name']}: {row['said']}" for row in report["scenarios"] if row["ok"] is None]
    if missing:
        pytest.skip(f"all else is as it should be, not run: {'; '.join(missing)}")


@needs_linux
def test_every_fault_once(tmp_path):
    report = inject(tmp_path, "kills=4", "quick=true", minutes=5)
    kills = report["kills"]
    assert sum(kills["kills"].values()) == 4 and kills["equal"] == kills["runs"] > 0
    assert len(report["scenarios"]) == 12
    skip_what_was_not_run(report)


@needs_linux
@pytest.mark.slow
def test_two_hundred_kills(tmp_path):
    report = inject(tmp_path, "kills=200", minutes=45)
    kills = report["kills"]
    assert sum(kills["kills"].values()) == 200 and kills["equal"] == kills["runs"]
    for place in ("in an epoch", "in a checkpoint write", "in a cache write", "in evaluation"):
        assert kills["kills"][place] > 0, place
    assert len(report["scenarios"]) == 24
    skip_what_was_not_run(report)


# ---------------------------------------------------------------- a full disk, without one


class Full:
    """Stands for ``open``: a file that takes a few bytes, and no more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, number: int = errno.ENOSPC) -> None:
        self.error = OSError(number, os.strerror(number))
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        raise self.error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, number):
    path = tmp_path / "run.json"
    atomic_write_text(path, "old")
    append_line(tmp_path / "metrics.jsonl", "old")
    Full(monkeypatch, number=number)
    with pytest.raises(
        UserError, match=rf"^{path}: cannot be written: .*, [\d,.]+ MiB are free; .*trainer.resume=true"
    ):
        atomic_write_text(path, "new")
    with pytest.raises(UserError, match="metrics.jsonl: cannot be written"):
        append_line(tmp_path / "metrics.jsonl", "new")
    assert path.read_text() == "old" and (tmp_path / "metrics.jsonl").read_text() == "old\n"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "run.json"]


def test_other_errors_stay_what_they_are(tmp_path, monkeypatch):
    Full(monkeypatch, number=errno.EIO)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        atomic_write_text(tmp_path / "run.json", "new")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            OSError(errno.ENOSPC, "No space left on device", "/data/x"),
            "error: /data/x: No space left on device; make room",
        ),
        (MemoryError("Unable to allocate 9.1 TiB"), "error: out of memory: Unable to allocate 9.1 TiB"),
        (RuntimeError("[enforce fail] can't\nallocate memory"), "error: out of memory: [enforce fail] can't allocate"),
    ],
)
def test_what_the_machine_lacks_is_one_line_of_any_command(capsys, error, words):
    def work() -> int:
        raise error

    assert guard(work, [], cli.score) == 2
    said = capsys.readouterr().err
    assert said.startswith(words) and said.count("\n") == 1


def test_mistakes_of_the_program_are_not_hidden():
    for error in (RuntimeError("shapes do not fit"), OSError(errno.EIO, "Input/output error")):

        def work(error: Exception = error) -> int:
            raise error

        with pytest.raises(type(error)):
            guard(work, [], cli.score)


def test_sigterm_ends_a_command_as_ctrl_c_does(capsys):
    import signal

    before = signal.getsignal(signal.SIGTERM)

    def work() -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
        raise AssertionError("SIGTERM had no effect")

    assert guard(work, [], cli.score) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


# ---------------------------------------------------------------- prepared volumes


def prepared() -> Any:
    grid = Geometry((4, 4, 4), np.eye(4))
    labels = np.ones((4, 4, 4), dtype=np.uint8)
    return SimpleNamespace(image=np.zeros((1, 4, 4, 4), np.float32), labels=labels, geometry=grid, source=grid)


def test_what_a_kill_left_in_the_cache_is_removed_later(tmp_path):
    for name, age in ((".writing-old", 7200), (".writing-new", 0)):
        (tmp_path / name / "case").mkdir(parents=True)
        for path in (tmp_path / name / "case", tmp_path / name):
            os.utime(path, (time.time() - age,) * 2)
    CaseCache(tmp_path, "settings").find("case", [], prepared)
    assert [path.name for path in tmp_path.glob(".writing-*")] == [".writing-new"], "its writer may be at work"


@pytest.mark.parametrize("file", ["image.npy", "labels.npy", "places.npz", "case.json"])
@pytest.mark.parametrize("how", ["missing", "truncated"])
def test_damaged_cache_is_named(tmp_path, file, how):
    case = CaseCache(tmp_path, "settings").find("case", [], prepared)
    path = case.folder / file
    data = path.read_bytes()
    path.unlink()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=rf"{file}: a prepared volume cannot be read .*; delete {case.folder}"):
        case.image, case.labels, case.geometry  # noqa: B018
        case.labelled_place(np.random.default_rng(0))


# ---------------------------------------------------------------- memory, without PyTorch


@pytest.mark.parametrize("error", [MemoryError(), ValueError("Failed to allocate memory for requested buffer")])
def test_onnx_runtime_gets_fewer_windows_where_memory_is_short(error):
    image = np.random.default_rng(0).normal(size=(1, 8, 8, 8)).astype(np.float32)
    plan = plan_windows(image.shape, num_classes=2, patch_size=(4, 4, 4), spatial_dims=3, batch_size=8)
    sizes: list[int] = []
    limit = 3

    def network(x: np.ndarray) -> np.ndarray:
        sizes.append(len(x))
        if len(x) > limit:
            raise error
        return np.concatenate((x, -x), axis=1)

    labels = label_windows(network, image, plan)
    np.testing.assert_array_equal(labels, image[0] < 0)
    assert sizes[:3] == [8, 4, 2] and max(sizes[2:]) == 2
    limit = 0
    with pytest.raises(UserError, match="too little memory for one window of 4 x 4 x 4: lower patch_size"):
        label_windows(network, image, plan)


def test_key_for_nan(tmp_path):
    from vision_gates.config import load_config

    recipe = "classification/digits_vig_atto.yaml"
    assert load_config(recipe).trainer.nan == "stop"
    with pytest.raises(ConfigError, match="trainer.nan: .*'stop' or 'skip'"):
        load_config(recipe, ["trainer.nan=ignore"])
