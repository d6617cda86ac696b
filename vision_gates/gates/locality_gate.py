"""2-D gating locality injection: a gate that mixes a global and a local view of every token.

Paper: ViG, arXiv 2405.18425, section 3.3. Written from the paper.
Suffixes: B batch, N tokens, H heads, V channels of a head.
"""

from torch import Tensor, nn

from vision_gates.kernels.locality_gate import locality_gate

__all__ = ["LocalityGate"]


class LocalityGate(nn.Module):
    """y = RMS(global) * sigmoid(gate) + RMS(local) * (1 - sigmoid(gate)), normalised over each head's channels.

    Args:
        head_dim: channels of a head (V). Both normalisations share their weight between heads.
        eps: added to the mean square before the root.
        activation: return SiLU(y) instead.
    """

    def __init__(self, head_dim: int, *, eps: float = 1e-6, activation: bool = False) -> None:
        super().__init__()
        self.global_norm = nn.RMSNorm(head_dim, eps=eps)
        self.local_norm = nn.RMSNorm(head_dim, eps=eps)
        self.eps = eps
        self.activation = activation

    def forward(
        self, global_BNHV: Tensor, local_BNHV: Tensor, gate_BNHV: Tensor, gate_bias_HV: Tensor | None = None
    ) -> Tensor:
        """Mix the two views; they, the gate's logits ``gate_BNHV`` and the result are (B, N, H, V).

        ``gate_bias_HV`` is added to the logits: cheaper here than in the product that makes them.
        """
        return locality_gate(
            global_BNHV,
            local_BNHV,
            gate_BNHV,
            self.global_norm.weight,
            self.local_norm.weight,
            gate_bias=gate_bias_HV,
            eps=self.eps,
            activation=self.activation,
        )
