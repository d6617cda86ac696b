"""Of several processes the first that fails says why, in one line, and all end: under torchrun, and the rules alone."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from vision_gates import cli, command_end
from vision_gates.config import save_config
from vision_gates.engine.checkpoint import read_checkpoint
from vision_gates.engine.parallel import is_lost_process
from vision_gates.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- under torchrun

_DAMAGE = """
import os, sys
from pathlib import Path
from vision_gates import cli
from vision_gates.engine.trainer import Trainer

def damaging(self):
    if self.accelerator.process_index == 1:
        index = list(self.parts.train.batches)[-1][-1][1]  # the epoch's last image of this process
        path = Path(self.config.data.root) / self.parts.train.dataset.split.read(index).name
        path.write_bytes(path.read_bytes()[:60])
        Path(sys.argv[2]).write_text(path.name)
    train_epoch(self)

train_epoch, Trainer.train_epoch = Trainer.train_epoch, damaging
sys.exit(cli.train(sys.argv[1:2]))
"""


def torchrun(folder: Path, script: str, *arguments: str) -> subprocess.Popen[str]:
    """Two processes of a script in a folder; arguments are names of files in it."""
    (folder / "train.py").write_text(script)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        + [str(folder / name) for name in ("train.py", *arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_an_image_that_one_process_cannot_read(make_config, images, tmp_path):
    shutil.copytree(images, tmp_path / "images")
    save_config(make_config(f"data.root={tmp_path / 'images'}"), tmp_path / "run.yaml")
    process = torchrun(tmp_path, _DAMAGE, "run.yaml", "damaged.txt")
    said = process.communicate(timeout=120)[1]
    ours, _, torchruns = said.partition("torch/distributed/elastic/")  # what it logs, and the pages of its end
    lines = [line for line in ours.splitlines() if "error: " in line]
    damaged = (tmp_path / "damaged.txt").read_text()
    assert process.returncode != 0 and torchruns
    assert len(lines) == 1 and lines[0].startswith("process 1: error: ") and damaged in lines[0], ours
    assert "Traceback" not in ours and "[rank" not in said
    assert "exitcode  : 2 " in torchruns and "SIGKILL" not in torchruns


_SLOW = """
import sys, time
from pathlib import Path
from vision_gates import cli
from vision_gates.engine.trainer import Trainer

def slow(self):
    step(self)
    if self.state.update == 2:
        Path(sys.argv[2]).touch()
    time.sleep(0.2)

step, Trainer.step_optimizer = Trainer.step_optimizer, slow
sys.exit(cli.train(sys.argv[1:2]))
"""


def test_torchrun_passes_a_signal_on(make_config, tmp_path):
    """It sends SIGTERM to the process groups of those that it has started: data workers must not be in them."""
    config = make_config("data.workers=1", "schedule.epochs=30", "trainer.device=auto")
    save_config(config, tmp_path / "run.yaml")
    process = torchrun(tmp_path, _SLOW, "run.yaml", "begun")
    deadline = time.monotonic() + 100
    while not (tmp_path / "begun").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert said.count("trainer.resume=true") == 1 and "error: " not in said.partition("Traceback")[0], said
    update = int(re.search(r"stopped in epoch \d+ after update (\d+)", said)[1])
    environment = json.loads((Path(config.trainer.run_dir) / "environment.json").read_text())
    assert environment["processes"] == 2, "without a GPU, too, they are one run"
    assert read_checkpoint(Path(config.trainer.run_dir) / "checkpoints", "last").state["place"]["update"] == update >= 2


# ---------------------------------------------------------------- the rules


def fail(reason: str, *, after: float = 0.0) -> int:
    time.sleep(after)
    raise UserError(reason)


def failing(error: BaseException, *, after: float = 0.0) -> int:
    time.sleep(after)
    raise error


def guarded(rank: int, world: int, folder: Path, torchrun: bool, work: Callable[[], int]) -> None:
    """One process, as torchrun would start it."""
    own = folder / "attempt_0" / str(rank) / "error.json"
    own.parent.mkdir(parents=True)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"TORCHELASTIC_ERROR_FILE": str(own)} if torchrun else {}
    sys.stderr = open(folder / f"said{rank}", "w", buffering=1)  # noqa: SIM115
    command_end._PATIENCE = 1.0
    sys.exit(command_end.guard(work, [], cli.train))


def ends(folder: Path, *works: Callable[[], int], torchrun: bool = True) -> list[tuple[int | None, str]]:
    """Exit code and standard error of processes that do this."""
    fork, count = multiprocessing.get_context("fork"), len(works)
    processes = [fork.Process(target=guarded, args=(r, count, folder, torchrun, work)) for r, work in enumerate(works)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
    return [(process.exitcode, (folder / f"said{rank}").read_text()) for rank, process in enumerate(processes)]


def test_a_mistake_that_all_find_is_said_by_the_first(tmp_path):
    mistake = partial(fail, "optim.lr: is text")
    assert ends(tmp_path, mistake, mistake, mistake) == [(2, "error: optim.lr: is text\n"), (2, ""), (2, "")]


def test_what_follows_from_a_failure_is_not_said(tmp_path):
    """Another's error, whatever PyTorch makes of a lost connection, and the signal that torchrun sends."""
    works = (
        partial(fail, "scan.png: is damaged"),
        partial(fail, "another process has ended", after=0.3),
        partial(failing, RuntimeError("connection lost"), after=0.3),
        partial(failing, KeyboardInterrupt(), after=0.3),
    )
    assert ends(tmp_path, *works) == [(2, "error: scan.png: is damaged\n"), (2, ""), (2, ""), (130, "")]


def test_who_waits_for_one_that_failed_is_ended(tmp_path):
    """As in a collective, where no signal reaches Python."""
    began = time.monotonic()
    works = partial(fail, "never", after=100), partial(fail, "scan.png: is damaged")
    assert ends(tmp_path, *works) == [(2, ""), (2, "process 1: error: scan.png: is damaged\n")]
    assert time.monotonic() - began < 50


def test_without_torchrun_all_speak(tmp_path):
    mistake = partial(fail, "optim.lr: is text")
    expected = [(2, "error: optim.lr: is text\n"), (2, "process 1: error: optim.lr: is text\n")]
    assert ends(tmp_path, mistake, mistake, torchrun=False) == expected


def test_a_signal_to_all_is_said_once(tmp_path):
    works = (partial(failing, KeyboardInterrupt()),) * 2
    assert ends(tmp_path, *works) == [(130, "interrupted\n"), (130, "")]


def test_an_unknown_error_of_the_first_to_fail_is_not_hidden(tmp_path):
    ((code, said),) = ends(tmp_path, partial(failing, RuntimeError("shapes do not fit")))
    assert code == 1 and "Traceback" in said and "shapes do not fit" in said


def test_what_a_lost_process_looks_like():
    lost: Mapping[Exception, bool] = {
        RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:59624"): True,
        RuntimeError("Gloo connectFullMesh failed with ..."): True,
        torch.distributed.DistNetworkError("The client socket has failed to connect"): True,
        RuntimeError("shapes do not fit"): False,
        OSError("Broken pipe"): False,
    }
    for error, expected in lost.items():
        assert is_lost_process(error) == expected, error
