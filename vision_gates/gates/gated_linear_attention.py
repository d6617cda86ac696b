"""Bidirectional gated linear attention with 2-D locality: ViG's token mixer.

Paper: ViG, arXiv 2405.18425, sections 3.2 and 3.3; gated linear attention: arXiv 2312.06635. Written from the papers.
Suffixes: B batch, H W height and width, N = H * W tokens, C channels, D (last axis) channels of a head.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vision_gates.gates.locality_gate import LocalityGate
from vision_gates.kernels.bidirectional_gla import bidirectional_gla

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

    def __init__(self, dim: int, *, num_heads: int, activation: bool, decay_rank: int = 16, eps: float = 1e-6) -> None:
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(f"dim must be a multiple of 2 * num_heads = {2 * num_heads}, got {dim}")
        self.num_heads = num_heads
        self.activation = activation
        self.local_conv = nn.Conv2d(dim, dim, kernel_size=3, padding=1, groups=dim, bias=False)
        self.qkv = nn.Linear(dim, 2 * dim, bias=False)
        self.decay_down = nn.Linear(dim, decay_rank, bias=False)
        self.decay_up = nn.Linear(decay_rank, dim)
        self.gate = nn.Linear(dim, dim)
        self.locality_gate = LocalityGate(dim // num_heads, eps=eps)
        self.proj = nn.Linear(dim, dim, bias=False)

    def init_weights(self) -> None:
        """Xavier-uniform with gain 2^-2.5 for every projection and for the convolution; biases zero."""
        for module in (self.local_conv, self.qkv, self.decay_down, self.decay_up, self.gate, self.proj):
            nn.init.xavier_uniform_(module.weight, gain=_INIT_GAIN)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Map (B, H, W, C), already normalised, to (B, H, W, C)."""
        B, H, W, C = x_BHWC.shape
        # Channels stay last in memory: the convolution sees an NCHW view of the same bytes.
        local_BHWC = self.local_conv(x_BHWC.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.activation:
            local_BHWC = F.silu(local_BHWC)
        local_BNC = local_BHWC.reshape(B, H * W, C)

        q, k, v = self.qkv(local_BNC).split((C // 2, C // 2, C), dim=-1)
        decay_BNC = F.logsigmoid(self.decay_up(self.decay_down(local_BNC))) / _DECAY_TEMPERATURE
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
            global_BNHD, local_BNC.unflatten(-1, heads), self.gate(local_BNC).unflatten(-1, heads)
        )
        mixed_BNC = mixed_BNHD.flatten(2)
        if self.activation:
            mixed_BNC = F.silu(mixed_BNC)
        return self.proj(mixed_BNC).view(B, H, W, C)
