"""Layers that decoders share."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from vision_gates.gates.attention_gate import norm_layer
from vision_gates.kernels.launching import surely_equal

__all__ = ["check_levels", "conv_norm_act", "norm_act", "resize"]


def check_levels(encoder_reductions: Sequence[int], *, fewest: int) -> None:
    """Raise ValueError unless there are ``fewest`` encoder levels or more, from fine to coarse."""
    if len(encoder_reductions) < fewest:
        needed = "one encoder level" if fewest == 1 else f"{fewest} encoder levels"
        raise ValueError(
            f"the decoder needs at least {needed}, got {len(encoder_reductions) or 'none'}: "
            "choose another encoder, or more of its levels with out_indices"
        )
    if any(fine > coarse for fine, coarse in pairwise(encoder_reductions)):
        raise ValueError(f"encoder levels must go from fine to coarse, got reductions {list(encoder_reductions)}")


def norm_act(channels: int) -> tuple[nn.Module, nn.Module]:
    """Group normalisation and GELU."""
    # Group normalisation: batches of a few large images are the rule in segmentation, and train equals eval.
    return norm_layer("group", channels, spatial_dims=2), nn.GELU()


def conv_norm_act(in_chans: int, out_chans: int, *, stride: int = 1) -> nn.Sequential:
    """Convolution 3x3, group normalisation, GELU."""
    conv = nn.Conv2d(in_chans, out_chans, kernel_size=3, stride=stride, padding=1, bias=False)
    return nn.Sequential(conv, *norm_act(out_chans))


def resize(x_BCHW: Tensor, like_BCHW: Tensor) -> Tensor:
    """Interpolate bilinearly to the height and width of another map."""
    if surely_equal(x_BCHW.shape[-2:], like_BCHW.shape[-2:]):
        return x_BCHW
    return F.interpolate(x_BCHW, size=like_BCHW.shape[-2:], mode="bilinear", align_corners=False)
