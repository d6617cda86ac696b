"""low_rank_decay in plain PyTorch: the specification, the CPU path and what torch.export and ONNX see."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["low_rank_decay_reference"]


def low_rank_decay_reference(low_rank: Tensor, weight: Tensor, bias: Tensor, *, temperature: float) -> Tensor:
    """logsigmoid(low_rank W^T + b) / temperature; arguments and result as in :func:`low_rank_decay`."""
    return F.logsigmoid(F.linear(low_rank, weight, bias)) / temperature
