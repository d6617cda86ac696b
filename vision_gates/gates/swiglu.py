"""SwiGLU: the gated feed-forward layer y = W2 (SiLU(a) * b), (a, b) = W1 x.

Paper: GLU Variants Improve Transformer, arXiv 2002.05202.
"""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SwiGLU"]


class SwiGLU(nn.Module):
    """Gated feed-forward layer on the last axis, without biases.

    Args:
        dim: channels in and out.
        hidden_dim: channels between the two products.
    """

    def __init__(self, dim: int, *, hidden_dim: int) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * hidden_dim, bias=False)
        self.out_proj = nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., dim) to (..., dim)."""
        gate, value = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(F.silu(gate) * value)
