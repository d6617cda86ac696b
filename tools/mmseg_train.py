"""Train with mmsegmentation: python tools/mmseg_train.py configs/mmseg/mni152_vig_h_atto.py --work-dir runs/a

mmsegmentation's own tools/train.py with vision_gates importable from a checkout, and readable errors.
"""

import argparse
import os
import pickle
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # see tools/train.py
if "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ:  # mmengine would load once more without weights_only
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

from vision_gates.errors import ConfigError, UserError  # noqa: E402


def main() -> None:
    """Build mmengine's Runner from a configuration; train, or with ``--test`` score a checkpoint."""
    try:
        from mmengine.config import Config, DictAction
        from mmengine.runner import Runner
    except ImportError as error:
        raise ConfigError(f"mmsegmentation is needed ({error}): pip install 'vision-gates[train,mmseg]'") from error

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a configuration of mmsegmentation")
    parser.add_argument("--work-dir", help="where logs and checkpoints go; default: runs/mmseg/CONFIG")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of --work-dir")
    parser.add_argument("--test", metavar="CHECKPOINT", help="score this checkpoint on the test data instead")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, help="key=value of the config")
    parser.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none", help="of processes")
    options = parser.parse_args()
    for path in filter(None, (options.config, options.test)):
        if not Path(path).is_file():
            raise ConfigError(f"{path}: no such file")
    config = Config.fromfile(options.config)
    config.merge_from_dict(options.cfg_options)
    config.launcher, config.resume = options.launcher, options.resume
    config.work_dir = options.work_dir or config.get("work_dir") or f"runs/mmseg/{Path(options.config).stem}"
    config.load_from = options.test or config.get("load_from")
    runner = Runner.from_cfg(config)
    try:
        runner.test() if options.test else runner.train()
    except pickle.UnpicklingError as error:
        where = config.load_from or f"{config.work_dir}: the last checkpoint"
        raise ConfigError(
            f"{where}: not read, as it holds more than weights and numbers and could run code; if you trust it, set "
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1"
        ) from error


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        text = str(error).strip()
        if "Original Traceback" in text:  # of a data worker; its own message comes last
            text = text.splitlines()[-1].split("Error: ", 1)[-1]
        sys.exit(f"error: {' '.join(text.split())}")
