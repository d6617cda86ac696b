"""Gate maps: what every gate of a network did to some images, collected during one ordinary forward pass.

A gate joins by one method, ``gate_map``, that gets what its forward gets and returns how open the gate is::

    class MyGate(nn.Module):
        gate_kind = "my gate"                         # these four words are optional
        gate_unit = "head"                            # what a map belongs to
        gate_meaning = "1 lets x pass, 0 blocks it"   # what a reader should see in it
        gate_relative = False                         # True: values are relative to the largest of their map

        def gate_map(self, x, signal): ...            # (B, maps, *spatial) in [0, 1]

A gate that is a parameter, the same for all images and positions, returns (maps,). Where it weighs attention by
position, a second method ``neighbourhoods``, with the same arguments, may return where the query in the middle of the
grid looks: (maps, *grid) in [0, 1].

Suffixes: B batch, M maps of a gate, S spatial axes.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["GateMap", "collect_gate_maps", "gates_of", "record_gate_maps"]


@dataclass(frozen=True, eq=False)
class GateMap:
    """What one gate did.

    Attributes:
        name: Path of the module in the network, such as "decoder.gates.0".
        kind: Which gate it is, such as "attention gate".
        values: (B, M, *S), how open each position is, or (M,) where the gate is a parameter; float32 in [0, 1], on the
            CPU.
        labels: Names of the M maps, such as "head 1".
        unit: What a map belongs to, such as "head".
        meaning: What 1 and 0 stand for.
        relative: Whether the values are relative to the largest one of their map.
        neighbourhoods: (M, *grid) in [0, 1], where the query in the middle of the grid looks; None for most gates.
    """

    name: str
    kind: str
    values: Tensor
    labels: tuple[str, ...]
    unit: str = "map"
    meaning: str = "1 is open, 0 is closed"
    relative: bool = False
    neighbourhoods: Tensor | None = None

    @property
    def spatial(self) -> bool:
        """Whether there is a value for each image and position."""
        return self.values.ndim > 1


def gates_of(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a network that have a ``gate_map``, by their path, in the order of their definition."""
    return {_plain(name): module for name, module in model.named_modules() if hasattr(type(module), "gate_map")}


def collect_gate_maps(model: nn.Module, *inputs: Any, **options: Any) -> list[GateMap]:
    """Run ``model(*inputs, **options)`` once without gradients and return the maps of its gates, in running order.

    The mode of the network (eval or train) is left as it is; see :func:`record_gate_maps`, which also gives the result.

    Args:
        model: any network: of timm, a Segmenter, an AttentionUNet in 2-D or 3-D, a decoder ...
        inputs, options: its arguments, usually one batch of images (B, channels, H, W).

    Returns:
        One :class:`GateMap` a gate (two of a gate that runs twice); [] for a network without gates.

    Example:
        >>> maps = collect_gate_maps(segmenter.eval(), images)
        >>> [(m.name, tuple(m.values.shape)) for m in maps]
        [('decoder.gates.0', (1, 1, 6, 6)), ('decoder.gates.1', (1, 1, 12, 12)), ...]
    """
    with torch.no_grad(), record_gate_maps(model) as maps:
        model(*inputs, **options)
    return maps


@contextmanager
def record_gate_maps(model: nn.Module) -> Iterator[list[GateMap]]:
    """Fill a list with the maps of every gate that runs inside the context.

    The passes themselves are unchanged, bit for bit, in training mode too: a map is computed beside the gate's forward,
    without gradients, on copies of its buffers (running statistics) and with the random state put back. Networks under
    torch.compile run eagerly inside the context, because compiled code calls no hooks. Hooks of yours on a gate's
    submodules do see the second computation.

    Yields:
        The list, in running order; the context's end removes every hook, after an exception too.
    """
    maps: list[GateMap] = []
    busy = False

    def record(name: str, gate: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal busy
        if busy:  # a gate inside a gate, called by the other's gate_map
            return
        busy = True
        try:
            with torch.no_grad(), _untouched(gate, args):
                values = gate.gate_map(*args, **kwargs)
                seen = gate.neighbourhoods(*args, **kwargs) if hasattr(type(gate), "neighbourhoods") else None
        finally:
            busy = False
        maps.append(_gate_map(name, gate, values, seen))

    hooks = []
    try:
        for name, gate in gates_of(model).items():

            def hook(gate: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                record(name, gate, args, kwargs)

            # Before the forward, which may overwrite its inputs.
            hooks.append(gate.register_forward_pre_hook(hook, with_kwargs=True))
        with torch.compiler.set_stance("force_eager"):
            yield maps
    finally:
        for handle in hooks:
            handle.remove()


def _gate_map(name: str, gate: nn.Module, values: Tensor, seen: Tensor | None) -> GateMap:
    count = values.shape[1 if values.ndim > 1 else 0]
    unit = str(getattr(gate, "gate_unit", "map"))
    words = {key: getattr(gate, f"gate_{key}") for key in ("meaning", "relative") if hasattr(gate, f"gate_{key}")}
    return GateMap(
        name=name,
        kind=str(getattr(gate, "gate_kind", _words(type(gate).__name__))),
        values=values.detach().to("cpu", torch.float32),
        labels=(unit,) if count == 1 else tuple(f"{unit} {i}" for i in range(1, count + 1)),
        unit=unit,
        neighbourhoods=None if seen is None else seen.detach().to("cpu", torch.float32),
        **words,
    )


@contextmanager
def _untouched(module: nn.Module, args: tuple[Any, ...]) -> Iterator[None]:
    """Let the module compute on copies of its buffers, with random numbers that nobody else misses."""
    originals = [(part, key, buffer) for part in module.modules() for key, buffer in part.named_buffers(recurse=False)]
    devices = {arg.device.index for arg in args if isinstance(arg, Tensor) and arg.is_cuda}
    with torch.random.fork_rng(sorted(devices)) if module.training else nullcontext():
        try:
            if module.training:
                for part, key, buffer in originals:
                    setattr(part, key, buffer.clone())
            yield
        finally:
            for part, key, buffer in originals:
                setattr(part, key, buffer)


def _plain(name: str) -> str:
    """A module's path without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _words(class_name: str) -> str:
    """AttentionGate -> attention gate."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", class_name).lower()
