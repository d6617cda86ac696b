"""Where and how exactly a run computes: Accelerate's device and precision, deterministic algorithms, peak memory."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from vision_gates.config import RunConfig
from vision_gates.errors import ConfigError

__all__ = ["build_accelerator", "deterministic_algorithms", "peak_memory_gib"]


def build_accelerator(config: RunConfig) -> Accelerator:
    """Accelerate for the configured device and precision, in one process or in those that torchrun started.

    Raises:
        ConfigError: The device has not that precision, or no CUDA graphs; shards do not go with another key; processes
            were started in a way that Accelerate does not understand.
    """
    trainer = config.trainer
    if trainer.parallel == "fsdp":
        for key, value, remedy in (
            ("compile", trainer.compile, "false"),
            ("cuda_graph", trainer.cuda_graph, "false"),
            ("precision", trainer.precision == "fp16", "bf16"),
        ):
            if value:
                raise ConfigError(f"trainer.parallel=fsdp: does not go with trainer.{key}; set it to {remedy}")
    on_gpu = trainer.device == "auto" and torch.cuda.is_available()
    if trainer.precision == "fp16" and not on_gpu:
        raise ConfigError("trainer.precision=fp16: needs a GPU; on the CPU use bf16 or no")
    if trainer.cuda_graph and not on_gpu:
        raise ConfigError("trainer.cuda_graph=true: needs a GPU; set it to false")
    # Accelerate keeps its settings in singletons meant for one run a process; a second run may want others.
    AcceleratorState._reset_state(reset_partial_state=not torch.distributed.is_initialized())
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    # Left to itself where there is no CUDA, Accelerate takes each of torchrun's processes for the only one.
    on_cpu = trainer.device == "cpu" or (processes > 1 and not torch.cuda.is_available())
    try:
        # Batch statistics are averaged after every update instead (parallel.py).
        ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
        # The newest PyTorch has another name for it, which Accelerate does not know yet.
        warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
        accelerator = Accelerator(mixed_precision=trainer.precision, cpu=on_cpu, kwargs_handlers=[ddp])
    except ValueError as error:
        raise ConfigError(f"trainer.precision={trainer.precision}: {' '.join(str(error).split())}") from error
    if accelerator.num_processes != processes:
        raise ConfigError(
            f"{processes} processes were started (WORLD_SIZE), but Accelerate has {accelerator.num_processes}; start "
            "them with torchrun"
        )
    return accelerator


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Deterministic kernels where PyTorch has them, for the duration of the context.

    An operation without a deterministic kernel on the GPU still runs (PyTorch then warns, once); on the CPU all are
    deterministic for a given number of threads.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it at its first use
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(enabled, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # only costs time
    torch.backends.cudnn.benchmark = not enabled
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("once", message=".*does not have a deterministic implementation.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = benchmark


def peak_memory_gib(device: torch.device) -> float:
    """Most memory used so far: on the GPU by tensors, on the CPU by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
