"""2-D gating locality injection: a gate that mixes a global and a local view of every token.

Paper: ViG, arXiv 2405.18425, section 3.3. Written from the paper.
Suffixes: B batch, N tokens, H heads, V channels of a head.
"""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LocalityGate"]


class LocalityGate(nn.Module):
    """y = RMS(global) * sigmoid(gate) + RMS(local) * (1 - sigmoid(gate)), normalised over each head's channels.

    Args:
        head_dim: channels of a head (V). Both normalisations share their weight between heads.
        eps: added to the mean square before the root.
    """

    def __init__(self, head_dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.global_norm = nn.RMSNorm(head_dim, eps=eps)
        self.local_norm = nn.RMSNorm(head_dim, eps=eps)

    def forward(self, global_BNHV: Tensor, local_BNHV: Tensor, gate_BNHV: Tensor) -> Tensor:
        """Mix the two views; all three inputs and the result are (B, N, H, V). ``gate_BNHV`` holds logits."""
        local_BNHV = _normalise(self.local_norm, local_BNHV)
        # lerp is local + s * (global - local): one product less than the two-term form, and one tensor less to keep.
        return local_BNHV.lerp(_normalise(self.global_norm, global_BNHV), F.sigmoid(gate_BNHV))


def _normalise(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    """Under autocast x is half and the weight float32, which would leave PyTorch's fused path."""
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)
