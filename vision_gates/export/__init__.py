"""Networks as ONNX files that carry their whole pipeline, and a session that runs them without PyTorch.

>>> to_onnx(network, "model.onnx", input_size=(1, 256, 256))          # needs torch and the extra [export]
>>> Session("model.onnx").segment_volume("scan.nii.gz")               # needs onnxruntime and the readers
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vision_gates.export.onnx import to_onnx
    from vision_gates.export.runtime import Session

__all__ = ["Session", "to_onnx"]


def __getattr__(name: str) -> Any:
    """Import what is asked for: a session must not load torch, nor an export onnxruntime before it is needed."""
    if name == "Session":
        from vision_gates.export.runtime import Session

        return Session
    if name == "to_onnx":
        from vision_gates.export.onnx import to_onnx

        return to_onnx
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
