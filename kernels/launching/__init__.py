"""What operators share: registering kernels so that torch.compile sees into them, and what a launch has to ask."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "as_rows",
    "autocast_dtype",
    "graph_node",
    "is_exporting",
    "on_device",
    "operator",
    "single_nodes",
    "surely_equal",
    "traceable",
]

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


def surely_equal(sizes: Sequence[int], others: Sequence[int]) -> bool:
    """Whether sizes are equal; in an exported graph that leaves some of them open, whether they always are.

    There a comparison would fix them at the example's.
    """
    if not is_exporting():
        return tuple(sizes) == tuple(others)
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(sizes) == len(others) and all(statically_known_true(a == b) for a, b in zip(sizes, others, strict=True))


_SINGLE_NODES: ContextVar[dict[str, Callable[..., Tensor]] | None] = ContextVar("single_nodes", default=None)


@contextmanager
def single_nodes() -> Iterator[dict[str, Callable[..., Tensor]]]:
    """Export to ONNX what `graph_node` is given as one node each; collects the functions, by the nodes' names.

    Whoever exports traces each function once and puts it in place of its nodes: a network that calls it in every layer
    is traced in a fraction of the time.
    """
    functions: dict[str, Callable[..., Tensor]] = {}
    token = _SINGLE_NODES.set(functions)
    try:
        yield functions
    finally:
        _SINGLE_NODES.reset(token)


def graph_node(function: Callable[..., Tensor], *tensors: Tensor, like: Tensor, **numbers: float) -> Tensor:
    """``function(*tensors, **numbers)`` in a graph that is exported; ``like`` has the result's shape and dtype."""
    functions = _SINGLE_NODES.get()
    if functions is None:
        return function(*tensors, **numbers)
    functions[function.__name__] = function
    name = f"vision_gates::{function.__name__}"
    return torch.onnx.ops.symbolic(name, tensors, attrs=numbers, dtype=like.dtype, shape=like.shape, version=1)


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
