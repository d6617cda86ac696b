"""Two processes train what one trains: DDP and FSDP2 over gloo on the CPU, and going on with another number of them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from rich.console import Console

from vision_gates.config import RunConfig, parse_config
from vision_gates.engine.device import build_accelerator
from vision_gates.engine.evaluation import evaluate_run
from vision_gates.engine.trainer import Interrupted, Trainer, train
from vision_gates.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
# 24 images; an update is of 8: 2 batches of 2 in two processes, 4 in one. 3 updates an epoch, 6 in all.
COMMON = (
    "data.batch_size=2",
    "schedule.epochs=2",
    "schedule.warmup_epochs=1",
    "optim.clip_grad=1.0",
    "model.drop_path_rate=0.3",
    "augment.mixup=0.3",
    "augment.train=[{HorizontalFlip: {}}, {GaussNoise: {p: 0.5}}]",
    "trainer.ema_decay=0.9",
)
SEGMENTATION = (*COMMON[:-3], "trainer.ema_decay=0.9")
ONE, TWO = ("optim.accumulate=4",), ("optim.accumulate=2",)
STOP = 4  # updates after which some runs are stopped: in the middle of the second epoch


def weights(run: Path, name: str = "last") -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "checkpoints" / name / "weights.safetensors")


def assert_near(run: Path, other: Path) -> None:
    """Weights equal but for rounding: Adam divides by the gradient's size, so that rounding of tiny ones shows."""
    ours, theirs = weights(run), weights(other)
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        torch.testing.assert_close(value, theirs[key], rtol=1e-3, atol=2e-4, msg=lambda text, key=key: f"{key}: {text}")


def stopped_run(config: RunConfig, console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train in this process and stop after some updates."""
    step = Trainer.step_optimizer

    def stopping(self: Trainer) -> None:
        step(self)
        self.stop.requested = self.state.update == STOP

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step_optimizer", stopping)
        with pytest.raises(Interrupted):
            train(config, console=console)


@pytest.fixture(scope="module")
def folder(build_config: Callable[..., RunConfig], quiet: Console, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process and of two; process{0,1}.json is what the two saw."""
    root = tmp_path_factory.mktemp("processes")
    torch.set_num_threads(1)
    train(build_config(root / "one", *COMMON, *ONE), console=quiet)
    with pytest.MonkeyPatch.context() as patch:
        stopped_run(build_config(root / "one_stopped", *COMMON, *ONE), quiet, patch)
    fsdp, resume = "trainer.parallel=fsdp", "trainer.resume=true"
    # The copy that FSDP goes on with keeps the configuration of one process.
    runs: dict[str, tuple[RunConfig, int | None]] = {
        "ddp": (build_config(root / "ddp", *COMMON, *TWO), None),
        "ddp_stopped": (build_config(root / "ddp_stopped", *COMMON, *TWO), STOP),
        "fsdp": (build_config(root / "fsdp", *COMMON, *TWO, fsdp), None),
        "fsdp_stopped": (build_config(root / "fsdp_stopped", *COMMON, *TWO, fsdp), STOP),
        "one_then_fsdp": (build_config(root / "one_stopped", *COMMON, *ONE, fsdp, resume), None),
        "segmentation": (build_config(root / "segmentation", *SEGMENTATION, task="segmentation"), None),
        "segmentation_fsdp": (
            build_config(root / "segmentation_fsdp", *SEGMENTATION, fsdp, task="segmentation"),
            None,
        ),
    }
    configs = {name: {"config": config.model_dump(mode="json"), "stop": stop} for name, (config, stop) in runs.items()}
    for name in ("ddp_stopped", "fsdp_stopped"):
        config = configs[name]["config"]
        resumed = {**config, "trainer": {**config["trainer"], "resume": True}}
        configs[f"{name}_resumed"] = {"config": resumed, "stop": None, "copy": str(root / f"{name}_copy")}
    launch(root, configs)
    return root


def launch(root: Path, configs: dict[str, Any]) -> None:
    (root / "configs.json").write_text(json.dumps(configs))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*torchrun, str(Path(__file__).with_name("two_processes.py")), str(root)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def processes(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"process{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_train_what_one_trains(folder):
    assert_near(folder / "ddp", folder / "one")


@pytest.mark.parametrize(("sharded", "whole"), [("fsdp", "ddp"), ("segmentation_fsdp", "segmentation")])
def test_shards_train_what_whole_networks_train(folder, processes, sharded, whole):
    assert_near(folder / sharded, folder / whole)
    assert [result[sharded]["shards"] for result in processes] == ["DTensor"] * 2
    assert [result[whole]["shards"] for result in processes] == ["Parameter"] * 2
    for ours, theirs in zip(processes[0][sharded]["metrics"], processes[0][whole]["metrics"], strict=True):
        assert ours == [pytest.approx(value, rel=1e-3, abs=2e-4) for value in theirs]


@pytest.mark.parametrize("run", ["ddp", "fsdp", "segmentation", "segmentation_fsdp"])
def test_processes_agree(processes, run):
    """Weights, batch statistics, the moving average of both, and every metric."""
    first, second = (dict(result[run]) for result in processes)
    assert first.pop("log") and not second.pop("log")
    assert first == second
    assert len(first["metrics"]) == 3


@pytest.mark.parametrize("run", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_both_and_the_run_goes_on_exactly(folder, processes, run):
    assert all("stopped in epoch 2 after update 4" in result[f"{run}_stopped"]["interrupted"] for result in processes)
    for name in ("last", "best"):
        ours, theirs = weights(folder / f"{run}_stopped", name), weights(folder / run, name)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_checkpoints_in_shards(folder):
    checkpoint = folder / "fsdp_stopped_copy" / "checkpoints" / "last"
    shards = sorted((checkpoint / "shards").iterdir())
    assert len(shards) == 2 and all(file.suffix == ".safetensors" for file in shards)
    sizes = [file.stat().st_size for file in shards]
    assert max(sizes) < 1.5 * min(sizes)


@pytest.mark.parametrize("run", ["ddp_stopped_copy", "fsdp_stopped_copy"])
def test_one_process_goes_on_with_what_two_began(folder, build_config, quiet, run, tmp_path):
    shutil.copytree(folder / run, tmp_path / "run")
    parallel = "fsdp" if run.startswith("fsdp") else "ddp"
    config = build_config(tmp_path / "run", *COMMON, *TWO, f"trainer.parallel={parallel}", "trainer.resume=true")
    done = train(config, console=quiet)
    assert (
        "updates are of 8 images as before, now in 4 batches of 2 on each of 1 processes"
        in (done / "log.txt").read_text()
    )
    assert_near(done, folder / "ddp")


def test_one_process_evaluates_segmentation_in_shards(folder, build_config, quiet, tmp_path):
    """From the checkpoint in shards, as if the two had been killed before the evaluation; and from the weights."""
    shutil.copytree(folder / "segmentation_fsdp", tmp_path / "run")
    (expected,) = (tmp_path / "run" / "evaluation").glob("*.json")
    content = json.loads(expected.read_text())
    shutil.rmtree(tmp_path / "run" / "evaluation")
    settings = (*SEGMENTATION, "trainer.parallel=fsdp", "trainer.resume=true")
    train(build_config(tmp_path / "run", *settings, task="segmentation"), console=quiet)
    assert json.loads(expected.read_text())["metrics"] == pytest.approx(content["metrics"], rel=1e-5)
    assert evaluate_run(tmp_path / "run").result.metrics == pytest.approx(content["metrics"], rel=1e-5)


def test_two_processes_go_on_in_shards_with_what_one_began(folder, processes):
    assert "now in 2 batches of 2 on each of 2 processes" in processes[0]["one_then_fsdp"]["log"]
    assert_near(folder / "one_stopped", folder / "one")


def test_updates_that_cannot_stay_the_same(folder, build_config, quiet, tmp_path):
    shutil.copytree(folder / "ddp_stopped_copy", tmp_path / "run")
    config = build_config(tmp_path / "run", *COMMON, *TWO, "data.batch_size=6", "trainer.resume=true")
    with pytest.raises(ConfigError, match="an update is of 8 images, which 1 processes with batches of 6 cannot share"):
        train(config, console=quiet)


@pytest.mark.parametrize("key", ["compile", "cuda_graph"])
def test_what_does_not_go_with_shards(make_config, key):
    raw = make_config().model_dump(mode="json")
    raw["trainer"] |= {"parallel": "fsdp", key: True}
    with pytest.raises(ConfigError, match=f"trainer.parallel=fsdp: does not go with trainer.{key}; set it to false"):
        build_accelerator(parse_config(raw, [], source="test.yaml"))
