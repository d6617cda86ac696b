"""Bidirectional gated linear attention with 2-D locality: ViG's token mixer.

Paper: ViG, arXiv 2405.18425, sections 3.2 and 3.3; gated linear attention: arXiv 2312.06635. Written from the papers.
Suffixes: B batch, H W height and width, N = H * W tokens, C channels, D (last axis) channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_gates.gates.locality_gate import LocalityGate
from vision_gates.gates.plain_linear import is_plain_linear, wide_linear
from vision_gates.kernels.bidirectional_gla import bidirectional_gla
from vision_gates.kernels.depthwise_conv3x3 import depthwise_conv3x3
from vision_gates.kernels.low_rank_decay import low_rank_decay

__all__ = ["BidirectionalGatedLinearAttention"]

_DECAY_TEMPERATURE = 16  # log-decay = log_sigmoid(logit) / 16: a fresh gate forgets about 4 % a token
_INIT_GAIN = 2**-2.5


class BidirectionalGatedLinearAttention(nn.Module):
    """Mix tokens along both scan directions in linear time, and inject local detail through a gate.

    A depthwise 3x3 convolution gives the local view l; queries, keys and values are projections of l; each direction
    has its own data-dependent decay, of low rank. The scan's result and l meet in a :class:`LocalityGate`.

    Args:
        dim: channels in and out; queries and keys take half of them, values all.
        num_heads: must divide ``dim / 2``.
        activation: SiLU after the convolution and after the gate (ViG-T) or neither (every other size).
        decay_rank: rank of the decays' projection.
        eps: of the gate's normalisations.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim / 2``.
    """

    gate_kind = "locality gate"
    gate_unit = "head"
    gate_meaning = "1 takes the view of the whole image, 0 that of the 3x3 neighbourhood"

    def __init__(self, dim: int, *, num_heads: int, activation: bool, decay_rank: int = 16, eps: float = 1e-6) -> None:
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(f"dim must be a multiple of 2 * num_heads = {2 * num_heads}, got {dim}")
        self.num_heads = num_heads
        self.activation = activation
        # Sizes of what one product makes of l: queries, keys, values, the gate's logits, the decays in low rank.
        self.sizes = (dim // 2, dim // 2, dim, dim, decay_rank)
        self.local_conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
        self.in_proj = nn.Linear(dim, sum(self.sizes), bias=False)
        self.gate_bias = nn.Parameter(torch.zeros(dim))
        self.decay_up = nn.Linear(decay_rank, dim)
        self.locality_gate = LocalityGate(dim // num_heads, eps=eps, activation=activation)
        self.proj = nn.Linear(dim, dim, bias=False)
        self.register_load_state_dict_pre_hook(_join_projections)

    def init_weights(self) -> None:
        """Xavier-uniform with gain 2^-2.5 for every projection and for the convolution; biases zero."""
        qkv, gate, decay_down = self.in_proj.weight.split((2 * self.sizes[2], self.sizes[3], self.sizes[4]))
        for weight in (self.local_conv.weight, qkv, gate, decay_down, self.decay_up.weight, self.proj.weight):
            nn.init.xavier_uniform_(weight, gain=_INIT_GAIN)
        nn.init.zeros_(self.gate_bias)
        nn.init.zeros_(self.decay_up.bias)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C), already normalised, to (B, H, W, C)."""
        B, H, W, C = x_BHWC.shape
        local_BHWC = depthwise_conv3x3(x_BHWC, self.local_conv.weight, activation=self.activation)
        local_BNC = local_BHWC.view(B, H * W, C)
        q, k, v, gate_BNC, low_rank = wide_linear(local_BNC, self.in_proj).split(self.sizes, dim=-1)
        if is_plain_linear(self.decay_up) and self.decay_up.bias is not None:
            decay_BNC = low_rank_decay(
                low_rank, self.decay_up.weight, self.decay_up.bias, temperature=_DECAY_TEMPERATURE
            )
        else:  # LoRA, quantisation, hooks
            decay_BNC = F.logsigmoid(self.decay_up(low_rank)) / _DECAY_TEMPERATURE
        decay_forward, decay_backward = decay_BNC.chunk(2, dim=-1)
        heads = (self.num_heads, -1)
        global_BNHD = bidirectional_gla(
            q.unflatten(-1, heads),
            k.unflatten(-1, heads),
            v.unflatten(-1, heads),
            decay_forward.unflatten(-1, heads),
            decay_backward.unflatten(-1, heads),
        )
        mixed_BNHD = self.locality_gate(
            global_BNHD,
            local_BNC.unflatten(-1, heads),
            gate_BNC.unflatten(-1, heads),
            self.gate_bias.unflatten(0, heads),
        )
        return self.proj(mixed_BNHD.flatten(2)).view(B, H, W, C)

    def gate_map(self, x_BHWC: Tensor) -> Tensor:
        """Return how open the locality gate is, its mean over a head's channels: (B, num_heads, H, W) in [0, 1]."""
        local_BHWC = depthwise_conv3x3(x_BHWC, self.local_conv.weight, activation=self.activation)
        logits_BNC = wide_linear(local_BHWC.flatten(1, 2), self.in_proj).split(self.sizes, dim=-1)[3] + self.gate_bias
        logits_BNC = logits_BNC.to(torch.promote_types(logits_BNC.dtype, torch.float32))
        gate_BNh = logits_BNC.sigmoid().unflatten(-1, (self.num_heads, -1)).mean(dim=-1)
        return gate_BNh.transpose(1, 2).unflatten(2, x_BHWC.shape[1:3])


def _join_projections(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Official checkpoints hold the three projections of l apart; here they are one."""
    parts = [f"{prefix}{name}.weight" for name in ("qkv", "gate", "decay_down")]
    if all(key in state_dict for key in parts):
        state_dict[f"{prefix}in_proj.weight"] = torch.cat([state_dict.pop(key) for key in parts])
    if f"{prefix}gate.bias" in state_dict:
        state_dict[f"{prefix}gate_bias"] = state_dict.pop(f"{prefix}gate.bias")
