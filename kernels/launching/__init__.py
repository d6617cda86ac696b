"""How Triton kernels become operators of PyTorch that torch.compile sees into, shared by all operators."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["operator", "traceable"]

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
