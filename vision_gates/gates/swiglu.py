"""SwiGLU: the gated feed-forward layer y = W2 (SiLU(a) * b), (a, b) = W1 x.

Paper: GLU Variants Improve Transformer, arXiv 2002.05202.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from vision_gates.gates.plain_linear import is_plain_linear
from vision_gates.kernels.swiglu_linear import swiglu_linear

__all__ = ["SwiGLU"]


class SwiGLU(nn.Module):
    """Gated feed-forward layer on the last axis, without biases.

    ``in_proj`` is not called but read: its product and the gate are one kernel. Something else in its place (LoRA,
    quantisation, a bias) or a hook on it is called as usual.

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
        if is_plain_linear(self.in_proj) and self.in_proj.bias is None:
            return self.out_proj(swiglu_linear(x, self.in_proj.weight))
        gate, value = self.in_proj(x).chunk(2, dim=-1)
        return self.out_proj(F.silu(gate) * value)
