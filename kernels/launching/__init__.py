"""What operators share: registering kernels so that torch.compile sees into them, and what a launch has to ask."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["as_rows", "autocast_dtype", "is_exporting", "on_device", "operator", "traceable"]

# Triton, too, reads this once. Its interpreter takes no symbolic tensors, so there an operator stays closed.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def operator(name: str, *, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Register a function that launches kernels as the operator ``name``.

    torch.compile looks into it and lets Inductor launch the kernels, many times faster than a call through Python.

    Args:
        name: "vision_gates::...".
        fake: the results' shapes and dtypes as new tensors, for the interpreter.
    """

    def register(function: Callable[..., Any]) -> Any:
        if _INTERPRETED:
            registered = torch.library.custom_op(name, mutates_args=())(function)
            registered.register_fake(fake)
            return registered
        return torch.library.triton_op(name, mutates_args={})(function)

    return register


def traceable(kernel: Any, argument: Tensor) -> Any:
    """The kernel in a form that a trace records when ``argument`` is a tensor of a trace, else the kernel itself."""
    if _INTERPRETED or type(argument) in (Tensor, torch.nn.Parameter):
        return kernel
    return torch.library.wrap_triton(kernel)


def is_exporting() -> bool:
    """Whether torch.export traces, which wants plain PyTorch; torch.compile does not count."""
    # torch.compiler.is_exporting() is also true under torch.compile in torch 2.11; the flag behind it is right.
    return getattr(torch.compiler, "_is_exporting_flag", False)


def autocast_dtype(*tensors: Tensor) -> torch.dtype | None:
    """The dtype to which autocast, if it is on, casts these arguments of F.linear."""
    kind = tensors[0].device.type
    if tensors[0].is_meta or any(x.dtype == torch.float64 for x in tensors):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def on_device(device: torch.device) -> AbstractContextManager:
    """Launches go to the present device; to enter one costs microseconds, so only where it is another."""
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if elsewhere else nullcontext()


def as_rows(x: Tensor) -> Tensor:
    """(..., C) as (M, C) with channels next to each other, copied only where strides ask for it."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
