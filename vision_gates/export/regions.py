"""Nodes of an ONNX graph that stand for a function of this package: it is traced once, and put in their place.

An operator that every layer calls would otherwise be traced in every layer, which is what takes the time of an export.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["write_out"]

_DOMAIN = "vision_gates"
_TRACED = {0: 2, 1: 1748}  # sizes of open axes in the trace; like no other, and many tokens: see onnx._TRACED


class _Call(nn.Module):
    def __init__(self, function: Callable[..., Tensor], numbers: dict[str, float]) -> None:
        super().__init__()
        self.function, self.numbers = function, numbers

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors, **self.numbers)


def write_out(model: Any, functions: Mapping[str, Callable[..., Tensor]], *, opset: int) -> None:
    """Replace the nodes of a model (``onnx_ir.Model``) that bear the names of ``functions`` by what these compute.

    Args:
        model: from an export within ``launching.single_nodes``.
        functions: what that collected.
        opset: of the model.
    """
    import onnx_ir.passes.common as passes

    written: dict[Any, Any] = {}
    for node in model.graph:
        if node.domain != _DOMAIN:
            continue
        shapes = tuple(tuple(size if isinstance(size, int) else None for size in x.shape) for x in node.inputs)
        numbers = {name: attribute.as_float() for name, attribute in node.attributes.items()}
        kind = (node.op_type, shapes, tuple(x.dtype for x in node.inputs), tuple(sorted(numbers.items())))
        if kind not in written:
            inputs = [_example(x, shape) for x, shape in zip(node.inputs, shapes, strict=True)]
            graph = _trace(_Call(functions[node.op_type], numbers), inputs, shapes, opset=opset)
            written[kind] = _function(graph, f"{node.op_type}_{len(written)}")
            model.functions[written[kind].identifier()] = written[kind]
        node.op_type, node.version = written[kind].name, None
        node.attributes.clear()
    if written:
        passes.InlinePass()(model)
        model.graph.opset_imports.pop(_DOMAIN, None)
        model.opset_imports.pop(_DOMAIN, None)


def _example(value: Any, shape: tuple[int | None, ...]) -> Tensor:
    sizes = [_TRACED[axis] if size is None else size for axis, size in enumerate(shape)]
    dtype = getattr(torch, str(value.dtype.numpy()))
    return torch.zeros(sizes, dtype=dtype)


def _trace(call: nn.Module, inputs: list[Tensor], shapes: tuple[tuple[int | None, ...], ...], *, opset: int) -> Any:
    is_open = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, size in enumerate(shape) if size is None} for shape in shapes
    )
    program = torch.export.export(call, tuple(inputs), dynamic_shapes=(is_open,), strict=False)
    exported: Any = torch.onnx.export(program, dynamo=True, opset_version=opset, optimize=False, verbose=False)
    return exported.model.graph


def _function(graph: Any, name: str) -> Any:
    """A function cannot have initializers: they become constants in it."""
    import onnx_ir as ir

    for initializer in list(graph.initializers.values()):
        constant = ir.node("Constant", inputs=[], attributes={"value": initializer.const_value})
        first = next(iter(graph))
        graph.insert_before(first, constant)
        initializer.replace_all_uses_with(constant.outputs[0])
        del graph.initializers[initializer.name]
    return ir.Function(_DOMAIN, name, "", graph=graph, attributes=[])
