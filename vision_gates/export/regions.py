"""Nodes of an ONNX graph that stand for a function of this package: it is traced once, and put in their place.

An operator that every layer calls would otherwise be traced in every layer, which is what takes the time of an export.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["write_out"]

_DOMAIN = "vision_gates"
# Sizes of the axes in a trace, all of them but the last left open, so that one trace serves layers of different widths;
# they are like no other, and the tokens many: see onnx._TRACED.
_TRACED = (2, 1748, 7)


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
        widths = tuple(x.shape[-1] for x in node.inputs)
        numbers = {name: attribute.as_float() for name, attribute in node.attributes.items()}
        kind = (node.op_type, widths, tuple(x.dtype for x in node.inputs), tuple(sorted(numbers.items())))
        if kind not in written:
            graph = _trace(_Call(functions[node.op_type], numbers), [_example(x) for x in node.inputs], opset=opset)
            written[kind] = _function(graph, f"{node.op_type}_{len(written)}")
            model.functions[written[kind].identifier()] = written[kind]
        node.op_type, node.version = written[kind].name, None
        node.attributes.clear()
    if written:
        passes.InlinePass()(model)
        model.graph.opset_imports.pop(_DOMAIN, None)
        model.opset_imports.pop(_DOMAIN, None)


def _example(value: Any) -> Tensor:
    assert len(value.shape) == len(_TRACED) + 1
    return torch.zeros((*_TRACED, value.shape[-1]), dtype=getattr(torch, str(value.dtype.numpy())))


def _trace(call: nn.Module, inputs: list[Tensor], *, opset: int) -> Any:
    is_open = tuple({axis: torch.export.Dim.DYNAMIC for axis in range(len(_TRACED))} for _ in inputs)
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
