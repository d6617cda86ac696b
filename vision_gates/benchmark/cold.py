"""Seconds of an operator's first call in a new process: what a user waits for kernels to be compiled.

Run as ``python -m vision_gates.benchmark.cold OP DEVICE`` it prints them as JSON.
"""

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import vision_gates
from vision_gates import kernels

__all__ = ["first_call"]


def first_call(name: str, device: torch.device) -> dict[str, Any]:
    """Columns with ``cold_seconds``: the first forward and backward pass of what the operator's ``bench.py`` gives.

    Its ``example(device)`` returns the function, its arguments and the gradient of its output.
    The process is new and the caches of Triton and torch.compile are empty; starting Python, torch and the GPU is not
    counted, importing the kernel is.

    Raises:
        RuntimeError: there is no ``example``, or the process failed; the last line that it wrote.
    """
    if not hasattr(importlib.import_module(f"{kernels.__name__}.{name}.bench"), "example"):
        raise RuntimeError(f"kernels/{name}/bench.py has no example() that could be run")
    root = str(Path(vision_gates.__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH")))),
            "TRITON_CACHE_DIR": f"{folder}/triton",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
        }
        command = [sys.executable, "-m", "vision_gates.benchmark.cold", name, str(device)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = (result.stdout if result.returncode == 0 else result.stderr).strip().splitlines()
    if result.returncode:
        raise RuntimeError(f"the cold process failed: {lines[-1] if lines else f'exit code {result.returncode}'}")
    return json.loads(lines[-1])


def _measure(name: str, device: torch.device) -> dict[str, Any]:
    module = importlib.import_module(f"{kernels.__name__}.{name}.bench")
    function, inputs, upstream = module.example(device)
    square = torch.ones(64, 64, device=device)
    (square @ square).sum().item()  # the libraries and the device are up
    start = time.perf_counter()
    output = function(*inputs)
    torch.autograd.grad(output, [x for x in inputs if x.requires_grad], upstream)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    return {"shape": list(inputs[0].shape), "dtype": dtype, "cold_seconds": seconds}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_measure(sys.argv[1], torch.device(sys.argv[2]))) + "\n")
