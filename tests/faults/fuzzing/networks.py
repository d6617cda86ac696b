"""Honest files and traps of exported networks: ONNX with its description in the metadata."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from fuzzing.seeds import write


def _network(nodes: list[Any], weights: dict[str, Any], about: dict[str, Any]) -> Any:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    tensors = [
        numpy_helper.from_array(value, name) if isinstance(value, np.ndarray) else value
        for name, value in weights.items()
    ]
    ends = [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, "height", "width"])]
    outs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2, None, None])]
    graph = helper.make_graph(nodes, "network", ends, outs, initializer=tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.helper.set_model_props(model, {"vision_gates": json.dumps(about)})
    return model


def make_network(root: Path, canary: Path) -> None:
    from onnx import TensorProto, helper

    rng = np.random.default_rng(0)
    about = {
        **{"task": "segmentation", "spatial_dims": 2, "in_chans": 1, "input_size": [16, 16], "class_names": ["a", "b"]},
        **{"dynamic_axes": ["batch", "height", "width"], "images": {"size": [16, 16], "mean": [0.5], "std": [0.2]}},
    }
    conv, relu, head = (
        helper.make_node("Conv", ["image", "w"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Conv", ["b", "v"], ["logits"]),
    )
    weights = {
        "w": rng.normal(size=(4, 1, 3, 3)).astype(np.float32),
        "v": rng.normal(size=(2, 4, 1, 1)).astype(np.float32),
    }
    plain = _network([conv, relu, head], weights, about)
    write(root / "plain", network__onnx=plain.SerializeToString())
    scale = [
        helper.make_node("Concat", ["b", "b"], ["c"], axis=1),
        helper.make_node("Slice", ["c", "from", "to", "axis"], ["d"]),
        helper.make_node("Softmax", ["d"], ["e"], axis=1),
        helper.make_node("Conv", ["e", "v"], ["logits"]),
    ]
    places = {name: np.array([n], dtype=np.int64) for name, n in (("from", 2), ("to", 6), ("axis", 1))}
    write(root / "more", network__onnx=_network([conv, relu, *scale], weights | places, about).SerializeToString())
    wide = rng.normal(size=(4, 1, 301, 301)).astype(np.float32)
    same = helper.make_node("Conv", ["image", "w"], ["a"], auto_pad="SAME_UPPER")
    largest = _network([same, relu, head], weights | {"w": wide}, about)
    write(root / "largest", network__onnx=largest.SerializeToString())

    def claiming(*dims: int, **fields: Any) -> Any:
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=dims, raw_data=b"\0" * 144)
        for name, value in fields.items():
            tensor.external_data.add(key=name, value=value)
        if fields:
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL
        return tensor

    for name, tensor in (
        ("claim", claiming(10**6, 10**6, 3, 3)),
        ("negative", claiming(-4, 1, 3, 3)),
        ("outside", claiming(4, 1, 3, 3, location="/etc/passwd", offset="0", length="144")),
        ("above", claiming(4, 1, 3, 3, location="../" * 20 + "etc/passwd", offset="0", length="144")),
    ):
        model = _network([conv, relu, head], weights | {"w": tensor}, about)
        write(root / f"trap_{name}", network__onnx=model.SerializeToString())
    alien = helper.make_node("Run", ["image"], ["logits"], domain="com.example")
    write(root / "trap_alien", network__onnx=_network([alien], {}, about).SerializeToString())
    write(root / "trap_empty", network__onnx=b"")


def read_network(place: Path) -> None:
    """Load it. Running it is another matter: it is a program, which takes the memory that it says."""
    from vision_gates.export import Session

    for path in place.glob("*.onnx"):
        Session(path, threads=1)
