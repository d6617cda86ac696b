"""A run that is killed, however often and wherever, ends exactly as one that is not.

Real kills of real processes: tests/faults/.
"""

import copy
import hashlib
import json
import math
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console

from vision_gates.config import RunConfig
from vision_gates.engine import checkpoint
from vision_gates.engine.checkpoint import is_complete
from vision_gates.engine.data import ImageDataset
from vision_gates.engine.run_directory import read_metrics
from vision_gates.engine.trainer import Interrupted, Trainer, train
from vision_gates.errors import ConfigError, DataError, UserError

# Everything that could lose its place: stochastic depth, mixup, augmentation, accumulation, moving average, schedule.
# 24 images in batches of 4, two to an update: 3 updates an epoch, 9 in all.
HARD = (
    "schedule.epochs=3",
    "schedule.warmup_epochs=1",
    "optim.accumulate=2",
    "optim.clip_grad=1.0",
    "model.drop_path_rate=0.3",
    "task.label_smoothing=0.1",
    "augment.mixup=0.3",
    "augment.cutmix=0.5",
    "augment.train=[{HorizontalFlip: {}}, {Affine: {rotate: [-20, 20], p: 0.8}}, {GaussNoise: {p: 0.5}}]",
    "trainer.ema_decay=0.9",
    "trainer.checkpoint_steps=1",
    "trainer.log_every=2",
)


class Killed(BaseException):
    """Stands for the process's death: no ``except Exception`` may catch it."""


def outcome(run: Path) -> dict[str, Any]:
    """What must be the same: weights bit for bit, every number of the epochs and of the evaluation."""
    times = ("seconds", "images_per_second")
    evaluation = json.loads((run / "evaluation" / "test.json").read_text())
    return {
        **{
            name: hashlib.sha256((run / "checkpoints" / name / "weights.safetensors").read_bytes()).hexdigest()
            for name in ("last", "best")
        },
        "rows": [{k: v for k, v in row.items() if k not in times} for row in read_metrics(run / "metrics.jsonl")],
        "evaluation": {k: v for k, v in evaluation.items() if k not in ("seconds", "run")},
    }


@pytest.fixture(scope="module")
def undisturbed(
    build_config: Callable[..., RunConfig], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """The outcome of the run when nothing happens to it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(build_config(run, *HARD), console=Console(file=open(os.devnull, "w")))  # noqa: SIM115
    torch.set_num_threads(threads)
    result = outcome(run)
    assert [row["epoch"] for row in result["rows"]] == [1, 2, 3] and result["rows"][-1]["step"] == 9
    yield result


def test_killed_after_updates(undisturbed, make_config, quiet, monkeypatch):
    """Before the first checkpoint, in the middle of epochs, at their ends, twice in a row at the same place."""
    config = make_config(*HARD, "trainer.resume=true", "trainer.checkpoint_steps=2")
    deaths = [1, 3, 4, 5, 5, 6, 8, 9]
    original = Trainer.step_optimizer

    def step(self):
        original(self)
        if deaths and self.state.update == deaths[0]:
            deaths.pop(0)
            raise Killed

    monkeypatch.setattr(Trainer, "step_optimizer", step)
    killed = 0
    while deaths:
        with pytest.raises(Killed):
            train(config, console=quiet)
        killed += 1
    run = train(config, console=quiet)
    assert killed == 8
    assert outcome(run) == undisturbed


def test_killed_at_every_stage_of_writing(undisturbed, make_config, quiet, monkeypatch):
    """Die before every kind of operation on files, the first time and a later time that the run comes to it."""
    config = make_config(*HARD, "trainer.resume=true")
    folder = Path(config.trainer.run_dir) / "checkpoints"
    seen: Counter[str] = Counter()

    def count(stage: str) -> None:
        seen[stage] += 1
        if seen[stage] in ((1, 4) if stage.startswith(("rename", "delete")) else (1,)):
            raise Killed

    def counted(name):
        original = getattr(os, name)

        def operation(first, *args):
            target = Path(first)
            count(f"{name} {target.parent.name}/{target.name}")
            return original(first, *args)

        monkeypatch.setattr(os, name, operation)

    def fsync(descriptor):
        """Of a checkpoint's file, which is counted; before any other, a kill leaves what it leaves at the next stage.

        Nothing is brought to the disk: that is for machines that die, not for processes.
        """
        target = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if target.is_file() and target.parent.name.endswith(".writing"):
            count(f"fsync {target.parent.name}/{target.name}")

    def rmtree(path):
        for file in sorted(Path(path).iterdir()):
            count(f"delete in {Path(path).name}")
            file.unlink()
        Path(path).rmdir()

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):
        counted(name)
    monkeypatch.setattr(checkpoint, "shutil", type("Shutil", (), {"rmtree": staticmethod(rmtree)}))
    had_last = had_best = False
    for deaths in range(100):
        try:
            run = train(config, console=quiet)
            break
        except Killed:
            # What was once there in full must still be there in full, under one name or another.
            last = any(is_complete(folder / name) for name in ("last", "last.writing", "previous"))
            best = any(is_complete(folder / name) for name in ("best", "best.writing", "best.previous"))
            assert last >= had_last and best >= had_best, f"death {deaths}"
            had_last, had_best = last, best
    assert outcome(run) == undisturbed
    wanted = {
        "fsync last.writing/weights.safetensors",
        "fsync last.writing/state.pt",
        "fsync last.writing/manifest.json",
        "delete in previous",
        "rename checkpoints/last",
        "rename checkpoints/last.writing",
        "fsync best.writing/weights.safetensors",
        "rename checkpoints/best.writing",
    }
    assert wanted <= set(seen) and deaths > 25


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_stops(undisturbed, make_config, quiet, monkeypatch, number):
    original = Trainer.step_optimizer
    sent = []

    def step(self):
        original(self)
        if self.state.update == 5 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trainer, "step_optimizer", step)
    before = signal.getsignal(number)
    config = make_config(*HARD, "trainer.resume=true", "trainer.checkpoint_steps=null")
    with pytest.raises(Interrupted, match="after update 5.*trainer.resume=true") as stopped:
        train(config, console=quiet)
    assert "\n" not in str(stopped.value)
    assert signal.getsignal(number) is before
    assert outcome(train(config, console=quiet)) == undisturbed


def test_damaged_checkpoint_is_noticed(undisturbed, make_config, quiet, monkeypatch):
    """A flipped byte in the last checkpoint: the previous one is used, and the run says so."""
    config = make_config(*HARD, "trainer.resume=true")
    original = Trainer.step_optimizer

    def step(self):
        original(self)
        if self.state.update == 6:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "step_optimizer", step)
        train(config, console=quiet)
    folder = Path(config.trainer.run_dir) / "checkpoints"
    state = folder / "last" / "state.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    run = train(config, console=quiet)
    assert "missing or damaged; previous is used" in (run / "log.txt").read_text()
    assert outcome(run) == undisturbed

    shutil.rmtree(run / "evaluation")  # a finished run would show its result and not look at the checkpoints
    for name in ("last", "previous"):
        (folder / name / "weights.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged .* no other complete checkpoint"):
        train(config, console=quiet)


def test_finished_run_ends_at_once(make_config, quiet, monkeypatch):
    config = make_config("schedule.epochs=1", "trainer.resume=true")
    run = train(config, console=quiet)
    files = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "log.txt"}
    monkeypatch.setattr(Trainer, "__init__", None)  # nothing may be trained
    console = Console(record=True, file=open(os.devnull, "w"), width=150)  # noqa: SIM115
    assert train(config, console=console) == run
    shown = console.export_text()
    assert "is finished" in shown and "accuracy" in shown and "report.html" in shown
    assert files == {
        path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file() and path.name != "log.txt"
    }


def test_final_evaluation_is_made_up_for(make_config, quiet):
    """Killed between the last epoch and the end of the evaluation."""
    config = make_config("schedule.epochs=1", "trainer.resume=true")
    run = train(config, console=quiet)
    before = outcome(run)
    shutil.rmtree(run / "evaluation")
    assert outcome(train(config, console=quiet)) == before


def test_used_directory_needs_resume(make_config, quiet):
    config = make_config("schedule.epochs=1")
    run = train(config, console=quiet)
    before = outcome(run)
    with pytest.raises(ConfigError, match="trainer.resume=true .* or another trainer.run_dir"):
        train(config, console=quiet)
    assert outcome(run) == before


def test_resume_with_another_configuration(make_config, quiet):
    train(make_config("schedule.epochs=1"), console=quiet)
    with pytest.raises(ConfigError) as error:
        train(make_config("schedule.epochs=2", "optim.lr=0.5", "trainer.resume=true"), console=quiet)
    assert "optim.lr was 0.002, is 0.5" in str(error.value)
    assert "schedule.epochs was 1, is 2" in str(error.value)
    assert "\n" not in str(error.value)
    harmless = ("trainer.log_every=3", "data.workers=1", "trainer.checkpoint_steps=5", "trainer.checkpoint_minutes=3")
    train(make_config("schedule.epochs=1", "trainer.resume=true", *harmless), console=quiet)


def test_other_number_of_threads_is_said(make_config, quiet, monkeypatch):
    """It changes the order of sums on the CPU, so the result is no longer the same bit for bit."""
    config = make_config("schedule.epochs=1", "trainer.resume=true", "trainer.checkpoint_steps=1")
    original = Trainer.step_optimizer

    def step(self):
        original(self)
        if self.state.update == 3:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "step_optimizer", step)
        train(config, console=quiet)
    torch.set_num_threads(2)
    run = train(config, console=quiet)
    assert "note: 1 threads before, 2 now" in (run / "log.txt").read_text()


# ---------------------------------------------------------------- losses that are not finite


def poison(monkeypatch: pytest.MonkeyPatch, *updates: int) -> None:
    """NaN in the images of these updates, or of all."""
    original = Trainer.forward_backward

    def forward_backward(self, batch, **place):
        if not updates or self.state.update + 1 in updates:
            batch["image"][1] = math.nan
        return original(self, batch, **place)

    monkeypatch.setattr(Trainer, "forward_backward", forward_backward)


def test_nan_stops_the_run_and_is_noted(make_config, quiet, monkeypatch):
    poison(monkeypatch, 5)
    config = make_config(*HARD)
    with pytest.raises(UserError, match="the loss is nan in epoch 2, update 5; the files of its batch are listed in"):
        train(config, console=quiet)
    run = Path(config.trainer.run_dir)
    noted = json.loads((run / "nan_batch.json").read_text())
    assert (noted["epoch"], noted["update"], len(noted["batches"])) == (2, 5, 2)
    for batch in noted["batches"]:
        assert (batch["process"], batch["loss"], len(batch["files"])) == (0, "nan", 4)
    weights = safetensors.torch.load_file(run / "checkpoints" / "last" / "weights.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert json.loads((run / "checkpoints" / "last" / "manifest.json").read_text())["step"] == 4


def test_skipped_update_changes_nothing_but_its_place(make_config, quiet, monkeypatch):
    """Of a network with batch statistics, which NaN would have spoilt for good."""
    original, skip, seen = Trainer.step_optimizer, Trainer.skip_update, []

    def state(self):
        return copy.deepcopy(
            (self.network.state_dict(), self.optimizer.state_dict()["state"], self.ema.module.state_dict())
        )

    def step(self):
        original(self)
        seen.append(state(self))

    def skipping(self, update):
        before = self.learning_rate()
        skip(self, update)
        torch.testing.assert_close(state(self), seen[-1], rtol=0, atol=0)
        assert self.learning_rate() != before and self.state.update == 5
        assert all(parameter.grad is None for parameter in self.network.parameters())
        seen.append("skipped")

    poison(monkeypatch, 5)
    monkeypatch.setattr(Trainer, "step_optimizer", step)
    monkeypatch.setattr(Trainer, "skip_update", skipping)
    run = train(make_config(*HARD, "trainer.nan=skip", "model.name=test_resnet"), console=quiet)
    assert len(seen) == 9 and seen[4] == "skipped"
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["train"]["skipped"] for row in rows] == [0, 1, 0]
    assert all(math.isfinite(row["train"]["loss"]) and math.isfinite(row["val"]["loss"]) for row in rows)
    (line,) = [line for line in (run / "log.txt").read_text().splitlines() if ", skipped; " in line]
    assert "epoch 2, update 5: loss nan, skipped; batch: " in line and line.count(".png") == 8


def test_skipping_is_exact_after_a_kill(make_config, quiet, monkeypatch):
    poison(monkeypatch, 2, 4, 5, 6)  # the second epoch is left out as a whole
    expected = outcome(train(make_config(*HARD, "trainer.nan=skip", run="whole"), console=quiet))
    assert [row["train"]["loss"] is None for row in expected["rows"]] == [False, True, False]
    config = make_config(*HARD, "trainer.nan=skip", "trainer.resume=true")
    deaths = [3, 4, 6, 8]
    original = Trainer._checkpoint_due

    def due(self):
        if deaths and self.state.update == deaths[0]:
            deaths.pop(0)
            raise Killed
        return original(self)

    monkeypatch.setattr(Trainer, "_checkpoint_due", due)
    while deaths:
        with pytest.raises(Killed):
            train(config, console=quiet)
    assert outcome(train(config, console=quiet)) == expected


def test_too_many_skipped_in_a_row_stop_the_run(make_config, quiet, monkeypatch):
    poison(monkeypatch)
    config = make_config("trainer.nan=skip", "schedule.epochs=4")
    with pytest.raises(UserError, match="update 11, as in the 10 updates before"):
        train(config, console=quiet)
    assert json.loads((Path(config.trainer.run_dir) / "nan_batch.json").read_text())["update"] == 11


def test_nan_weights_reach_no_checkpoint(make_config, quiet, monkeypatch):
    """A gradient may be NaN where the loss is not."""
    original = Trainer.step_optimizer

    def step(self):
        original(self)
        if self.state.update == 4:
            with torch.no_grad():
                next(self.network.parameters()).view(-1)[0] = math.nan

    monkeypatch.setattr(Trainer, "step_optimizer", step)
    config = make_config(*HARD)
    with pytest.raises(UserError, match="weights have become NaN by update 4, though the loss was finite"):
        train(config, console=quiet)
    folder = Path(config.trainer.run_dir) / "checkpoints"
    assert json.loads((folder / "last" / "manifest.json").read_text())["step"] == 3


# ---------------------------------------------------------------- data that end


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext"])
def test_unreadable_data_in_mid_update_lose_nothing(make_config, quiet, monkeypatch, name):
    """The second batch of an update cannot be read: the first has changed the batch statistics already."""
    settings = (*HARD, f"model.name={name}", "trainer.checkpoint_steps=null")
    expected = outcome(train(make_config(*settings, run="whole"), console=quiet))
    config, sample, calls = make_config(*settings, "trainer.resume=true"), ImageDataset._sample, Counter[str]()

    def unreadable(self, epoch, index):
        calls[self.purpose] += 1
        if (
            self.purpose == "augment" and calls["augment"] == 4 + 8 * 4 + 6
        ):  # after the trial: update 5, its second batch
            raise DataError("disk7/scan.png: cannot be read")
        return sample(self, epoch, index)

    with monkeypatch.context() as patch, pytest.raises(DataError, match="^disk7/scan.png: cannot be read$"):
        patch.setattr(ImageDataset, "_sample", unreadable)
        train(config, console=quiet)
    folder = Path(config.trainer.run_dir) / "checkpoints"
    assert json.loads((folder / "last" / "manifest.json").read_text())["step"] == 4
    assert outcome(train(config, console=quiet)) == expected


def test_a_dead_worker_is_met_at_the_next_batch(make_config, quiet):
    """PyTorch's own handler would raise wherever the program is, in the midst of an optimiser's step as well."""
    before = signal.getsignal(signal.SIGCHLD)
    train(make_config("schedule.epochs=1", "data.workers=1"), console=quiet)
    assert signal.getsignal(signal.SIGCHLD) is before


def test_out_of_memory_says_what_to_lower(make_config, quiet, monkeypatch):
    def forward(self, *args):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB."
        )

    monkeypatch.setattr(Trainer, "_loss_and_gradient", forward)
    with pytest.raises(
        UserError, match=r"run: out of memory \(CUDA out of memory. Tried .* 2.00 GiB\); lower data.batch"
    ):
        train(make_config(), console=quiet)
