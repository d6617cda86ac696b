"""Reusable gates as modules, one file each. Models and decoders are made of them."""

from vision_gates.gates.attention_gate import AttentionGate
from vision_gates.gates.dual_attention import ChannelAttention, DualAttention, PositionAttention
from vision_gates.gates.gated_linear_attention import BidirectionalGatedLinearAttention
from vision_gates.gates.gated_positional_attention import GatedPositionalSelfAttention
from vision_gates.gates.global_local_filter import GlobalLocalFilter
from vision_gates.gates.gnconv import GnConv
from vision_gates.gates.locality_gate import LocalityGate
from vision_gates.gates.residual_norm import add_norm
from vision_gates.gates.swiglu import SwiGLU

__all__ = [
    "AttentionGate",
    "BidirectionalGatedLinearAttention",
    "ChannelAttention",
    "DualAttention",
    "GatedPositionalSelfAttention",
    "GlobalLocalFilter",
    "GnConv",
    "LocalityGate",
    "PositionAttention",
    "SwiGLU",
    "add_norm",
]
