"""swiglu_linear in plain PyTorch: the specification, the CPU path and what torch.export and ONNX see."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["swiglu_linear_reference"]


def swiglu_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """SiLU(a) * b with (a, b) = x W^T cut in halves; arguments and result as in :func:`swiglu_linear`."""
    gate, value = F.linear(x, weight).chunk(2, dim=-1)
    return F.silu(gate) * value
