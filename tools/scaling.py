"""Measure training on several GPUs: python tools/scaling.py [key=value ...]

Trains under torchrun on generated JPEG images, once for every number of processes and every kind of parallelism, and
prints images/s of the whole loop beside one process's. A line's number is images by time over the last two of three
epochs, without the first sixth of each, while workers start; data wait is the share of the time that training stands
still for the next batch.

    model=vg_vig_small     a classifier of timm's registry
    size=224               pixels
    batch=128              images a process
    processes=1,2          numbers of processes, one a GPU; on a machine without a GPU they share the CPU
    parallel=ddp,fsdp      kinds of parallelism
    precision=bf16         no, bf16 or fp16
    updates=60             an epoch
    workers=               data workers a process; by default the CPU cores shared out, less one each
    key.key=value          any key of the configuration, such as trainer.compile=true
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as tools/train.py
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a checkout that is not installed, here and in the processes that train
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])

from vision_gates.benchmark.scaling import main  # noqa: E402

if __name__ == "__main__":
    if any(argument in ("-h", "--help") for argument in sys.argv):
        sys.exit((__doc__ or "").strip())
    main(sys.argv[1:])
