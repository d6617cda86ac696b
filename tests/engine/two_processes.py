"""Started by torchrun in two processes (test_processes.py): the runs that they train together.

Usage: torchrun --nproc-per-node=2 two_processes.py FOLDER, which holds configs.json: run name to {"config": mapping,
"stop": update after which one process is asked to stop, or null, "copy": where to copy its directory before}. Each
process writes FOLDER/process{0,1}.json: run name to the weights' digests and metrics that it had at the end.
"""

import hashlib
import io
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from rich.console import Console

from vision_gates.config import parse_config
from vision_gates.engine import parallel
from vision_gates.engine.parallel import gathered
from vision_gates.engine.trainer import Interrupted, Trainer, train

parallel.UNIT = 1000  # the tests' networks are tiny: without this, nothing but the whole would be a unit


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """Of all tensors, bit for bit."""
    total = hashlib.sha256()
    for name, tensor in sorted(gathered(tensors).items()):
        total.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return total.hexdigest()


def main(folder: Path) -> None:
    results: dict[str, dict] = {}
    stop_after: int | None = None
    current: dict = {}
    step, finish, evaluate = Trainer.step_optimizer, Trainer.finish, Trainer.evaluate

    def observed_step(self: Trainer) -> None:
        step(self)
        if self.state.update == stop_after and self.accelerator.process_index == 1:
            self.stop.requested = True  # a signal that reaches one process only

    def observed_finish(self: Trainer) -> None:
        current["network"] = digest(self.network.state_dict())
        current["deployed"] = digest(self.deployed().state_dict())
        current["shards"] = type(next(self.network.parameters())).__name__
        finish(self)

    def observed_evaluate(self: Trainer, *args, **kwargs):
        evaluation = evaluate(self, *args, **kwargs)
        current.setdefault("metrics", []).append([evaluation.loss, evaluation.result.metrics])
        return evaluation

    Trainer.step_optimizer, Trainer.finish, Trainer.evaluate = observed_step, observed_finish, observed_evaluate
    for name, run in json.loads((folder / "configs.json").read_text()).items():
        stop_after, current = run["stop"], {}
        if "copy" in run and int(os.environ["RANK"]) == 0:
            shutil.copytree(run["config"]["trainer"]["run_dir"], run["copy"])
        log = io.StringIO()
        try:
            train(parse_config(run["config"], [], source=name), console=Console(file=log, width=200))
        except Interrupted as error:
            current["interrupted"] = str(error)
        results[name] = {**current, "log": log.getvalue()}
    rank = torch.distributed.get_rank()
    (folder / f"process{rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
