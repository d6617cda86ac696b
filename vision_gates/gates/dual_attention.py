"""Dual attention: every position looks at all positions, every channel at all channels, in 2-D and 3-D.

Papers: Dual Attention Network for Scene Segmentation, arXiv 1809.02983 (both attentions); Meningioma segmentation in
T1-weighted MRI leveraging global context and attention mechanisms, arXiv 2101.07715 (their place in DAUNet, a U-Net).
Code of the latter's author: https://github.com/dbouget/ct_mediastinal_structures_segmentation; written from the papers
and from facts about it, nothing copied. Two of these facts are not followed: there the convolutions of the position
attention are made anew in each call, so nothing trains them, and the channel attention mixes by the transposed weights,
which do not sum to 1.
Suffixes: B batch, C channels, S the two or three spatial axes, N positions, H heads, D channels of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_gates.gates.attention_gate import Norm, conv_layer, dropout_layer, init_conv_and_norm, norm_layer

__all__ = ["ChannelAttention", "DualAttention", "PositionAttention"]


class PositionAttention(nn.Module):
    """y = x + gamma * v softmax(q k)^T over all positions; gamma is learned and starts at 0.

    q and k are 1x1 convolutions to an eighth of the channels, v to all of them, none with a bias; products of q and k
    are not scaled. The weights between positions never stand in memory.

    Args:
        channels: of x and y; fewer than eight give q and k one channel.
        spatial_dims: 2 or 3.
    """

    def __init__(self, channels: int, *, spatial_dims: int = 2) -> None:
        super().__init__()
        inner = max(channels // 8, 1)
        self.query = conv_layer(channels, inner, spatial_dims=spatial_dims, bias=False)
        self.key = conv_layer(channels, inner, spatial_dims=spatial_dims, bias=False)
        self.value = conv_layer(channels, channels, spatial_dims=spatial_dims, bias=False)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x_BCS: Tensor) -> Tensor:
        """Keep the shape (B, channels, *size)."""
        query_BDN, key_BDN, value_BCN = (layer(x_BCS).flatten(2) for layer in (self.query, self.key, self.value))
        # The fused kernels, which keep no matrix, want values as wide as the queries and channels last in memory: the
        # values become heads that share queries and keys.
        channels, width = value_BCN.shape[1], query_BDN.shape[1]
        if channels % width:
            value_BCN = F.pad(value_BCN, (0, 0, 0, -channels % width))
        value_BHND = value_BCN.unflatten(1, (-1, width)).mT.contiguous()
        query_BHND, key_BHND = (
            part_BDN.mT.contiguous().unsqueeze(1).expand_as(value_BHND) for part_BDN in (query_BDN, key_BDN)
        )
        mixed_BHND = F.scaled_dot_product_attention(query_BHND, key_BHND, value_BHND, scale=1.0)
        mixed_BCN = mixed_BHND.mT.flatten(1, 2)[:, :channels]
        return x_BCS + self.gamma * mixed_BCN.unflatten(2, x_BCS.shape[2:])


class ChannelAttention(nn.Module):
    """y = x + gamma * softmax(x x^T) x, x as channels by positions; gamma is learned and starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x_BCS: Tensor) -> Tensor:
        """Keep the shape (B, any channels, *size)."""
        return x_BCS + self.gamma * _mix_channels(x_BCS.flatten(2)).unflatten(2, x_BCS.shape[2:]).to(x_BCS.dtype)


def _mix_channels(x_BCN: Tensor) -> Tensor:
    """In float32 at least, under autocast too: sums over all positions leave the range of float16."""
    kind = x_BCN.device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _mix_channels(x_BCN)
    x_BCN = x_BCN.to(torch.promote_types(x_BCN.dtype, torch.float32))
    return (x_BCN @ x_BCN.mT).softmax(dim=-1) @ x_BCN


class DualAttention(nn.Module):
    """Position and channel attention side by side, each with two 3x3 convolutions behind it, added and normalised.

    y = norm(conv1(dropout(refine(position(x)) + refine'(channel(x))))), where refine is conv3, norm, ReLU, dropout,
    conv3, all of ``channels`` channels.

    Args:
        channels: of x and y.
        spatial_dims: 2 or 3.
        norm: "batch", "instance" or "group".
        dropout: rate at which whole channels are dropped, in training; the paper's code takes 0.5.

    Raises:
        ValueError: an argument outside these; at run time an input of another rank or other channels.
    """

    def __init__(self, channels: int, *, spatial_dims: int = 2, norm: Norm = "batch", dropout: float = 0.5) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"channels must be at least 1, got {channels}")
        self.channels = channels
        self.spatial_dims = spatial_dims

        def conv(kernel_size: int) -> nn.Module:
            return conv_layer(channels, channels, spatial_dims=spatial_dims, kernel_size=kernel_size)

        def refine() -> nn.Module:
            return nn.Sequential(
                conv(3),
                norm_layer(norm, channels, spatial_dims=spatial_dims),
                nn.ReLU(inplace=True),
                dropout_layer(dropout, spatial_dims=spatial_dims),
                conv(3),
            )

        self.position = PositionAttention(channels, spatial_dims=spatial_dims)
        self.refine_position = refine()
        self.channel = ChannelAttention()
        self.refine_channel = refine()
        self.proj = nn.Sequential(
            dropout_layer(dropout, spatial_dims=spatial_dims),
            conv(1),
            norm_layer(norm, channels, spatial_dims=spatial_dims),
        )
        init_conv_and_norm(self)

    def forward(self, x_BCS: Tensor) -> Tensor:
        """Keep the shape (B, channels, *size)."""
        if x_BCS.ndim != self.spatial_dims + 2 or x_BCS.shape[1] != self.channels:
            raise ValueError(
                f"input must be (batch, {self.channels} channels, {self.spatial_dims} spatial axes), "
                f"got shape {tuple(x_BCS.shape)}"
            )
        return self.proj(self.refine_position(self.position(x_BCS)) + self.refine_channel(self.channel(x_BCS)))
