"""Reusable gates as modules, one file each. Models and decoders are made of them."""

from vision_gates.gates.gated_linear_attention import BidirectionalGatedLinearAttention
from vision_gates.gates.locality_gate import LocalityGate
from vision_gates.gates.residual_norm import add_norm
from vision_gates.gates.swiglu import SwiGLU

__all__ = ["BidirectionalGatedLinearAttention", "LocalityGate", "SwiGLU", "add_norm"]
