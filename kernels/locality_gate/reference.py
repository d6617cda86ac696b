"""The locality gate in plain PyTorch: the specification and the CPU, float64, export and ONNX path.

    y = RMS(o; w_o) * s + RMS(l; w_l) * (1 - s),   s = sigmoid(g + b),   RMS(x; w) = x * rsqrt(mean(x^2) + eps) * w

then SiLU(y) with the activation (ViG, arXiv 2405.18425, section 3.3).

Suffixes: X any leading axes (with a bias the last of them is H), H heads, V channels of a head.
"""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["locality_gate_reference"]


def locality_gate_reference(
    o_XV: Tensor,
    l_XV: Tensor,
    g_XV: Tensor,
    w_o_V: Tensor,
    w_l_V: Tensor,
    gate_bias_HV: Tensor | None = None,
    *,
    eps: float = 1e-6,
    activation: bool = False,
) -> Tensor:
    """The gate in the dtype of `o_XV`; arguments as checked by `locality_gate`, result (X, V), contiguous."""
    if gate_bias_HV is not None:
        g_XV = g_XV + gate_bias_HV.to(g_XV.dtype)
    local_XV, global_XV = _normalise(l_XV, w_l_V, eps), _normalise(o_XV, w_o_V, eps)
    # lerp is local + s * (global - local): one product less than the two-term form, and one tensor less to keep.
    y_XV = local_XV.lerp(global_XV, F.sigmoid(g_XV))
    return (F.silu(y_XV) if activation else y_XV).contiguous()


def _normalise(x_XV: Tensor, w_V: Tensor, eps: float) -> Tensor:
    """Under autocast x is half and the weight float32, which would leave PyTorch's fused path."""
    return F.rms_norm(x_XV, w_V.shape, w_V.to(x_XV.dtype), eps)
