"""upsample_concat in plain PyTorch: the specification, the CPU path and what torch.export and ONNX see."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_gates.kernels.launching import surely_equal

__all__ = ["upsample_concat_reference"]

_MODES = {4: "bilinear", 5: "trilinear"}  # by the rank of the tensor


def upsample_concat_reference(skip_BCS: Tensor, coarse_BCS: Tensor) -> Tensor:
    """Resize ``coarse_BCS`` linearly to the size of ``skip_BCS`` and append its channels to the skip connection's."""
    if not surely_equal(coarse_BCS.shape[2:], skip_BCS.shape[2:]):
        mode = _MODES[coarse_BCS.ndim]
        coarse_BCS = F.interpolate(coarse_BCS, size=skip_BCS.shape[2:], mode=mode, align_corners=False)
    return torch.cat((skip_BCS, coarse_BCS), dim=1)
