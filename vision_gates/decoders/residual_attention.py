"""Residual U-Net decoder with gated skip connections, on any encoder; with ``gate_image`` the image is a skip too.

Papers: Attention-ResUNet, arXiv 2604.18148, and EAR-U-Net, arXiv 2110.01014; written from the papers and from facts of
their released code, nothing copied. The two networks themselves are in ``vision_gates.networks``.
Suffixes: B batch, C channels, H W height and width.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_gates.decoders._layers import check_levels, resize
from vision_gates.gates import AttentionGate
from vision_gates.gates.attention_gate import Norm, norm_layer

__all__ = ["ResidualAttentionDecoder", "ResidualBlock"]


class ResidualBlock(nn.Module):
    """Twice convolution 3x3, normalisation, ReLU, beside a shortcut: 1x1 and normalised where the width changes.

    Args:
        in_chans: channels in.
        out_chans: channels out.
        norm: "batch", "instance" or "group".
        relu_after_sum: the second ReLU follows the sum (ResNet, Attention-ResUNet) or precedes it (EAR-U-Net).
    """

    def __init__(self, in_chans: int, out_chans: int, *, norm: Norm = "batch", relu_after_sum: bool = True) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            nn.Conv2d(in_chans, out_chans, kernel_size=3, padding=1, bias=False),
            norm_layer(norm, out_chans, spatial_dims=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(out_chans, out_chans, kernel_size=3, padding=1, bias=False),
            norm_layer(norm, out_chans, spatial_dims=2),
        )
        self.shortcut: nn.Module = nn.Identity()
        if in_chans != out_chans:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_chans, out_chans, kernel_size=1, bias=False), norm_layer(norm, out_chans, spatial_dims=2)
            )
        self.relu_after_sum = relu_after_sum

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map (B, in_chans, H, W) to (B, out_chans, H, W)."""
        if self.relu_after_sum:
            return F.relu(self.convs(x_BCHW) + self.shortcut(x_BCHW))
        return F.relu(self.convs(x_BCHW)) + self.shortcut(x_BCHW)


class ResidualAttentionDecoder(nn.Module):
    """Coarse to fine: bring the state up, gate the level's features by it, join both, one residual block.

    The state comes up by a transposed convolution whose kernel and stride are the ratio of the two levels' strides: the
    papers' 2x2 between levels an octave apart, a 1x1 convolution between levels of one stride (plain ViG), 4x4 from a
    stem of stride 4 to the image. Where that misses the finer level's size, it is interpolated. In the concatenation
    the gated skip comes first, as in Attention-ResUNet; EAR-U-Net's order permutes the block's weights, no more.

    The gates' maps are the outputs of the submodules ``gates.*.map``, coarse to fine, for forward hooks.

    Args:
        encoder_channels: channels of each encoder level, finest first.
        encoder_reductions: stride of each level; levels may repeat a stride.
        in_chans: channels of the image.
        num_classes: channels of the logits.
        channels: width at the finest level, which is the image with ``gate_image``; it doubles from level to level, up
            to ``max_channels``.
        max_channels: the largest width.
        widths: of each level but the coarsest, finest first, instead of ``channels`` and ``max_channels``.
        norm: "batch" as in the papers; "group" suits batches of a few large images; or "instance".
        gate_share: inner width of a gate as a share of its skip's channels: 0.5 in Attention-ResUNet, 1 in EAR-U-Net.
        relu_after_sum: of the residual blocks: true in Attention-ResUNet, false in EAR-U-Net.
        gate_image: the image is the finest skip connection, gated like the others (EAR-U-Net). Without it the logits
            are interpolated from the finest encoder level.

    Raises:
        ValueError: one encoder level alone (with ``gate_image`` none), levels that are not ordered from fine to coarse,
            a width below 1 or another number of ``widths``, a ``gate_share`` that is not positive, an unknown norm.
    """

    def __init__(
        self,
        *,
        encoder_channels: Sequence[int],
        encoder_reductions: Sequence[int],
        in_chans: int,
        num_classes: int,
        channels: int = 32,
        max_channels: int = 256,
        widths: Sequence[int] | None = None,
        norm: Norm = "batch",
        gate_share: float = 0.5,
        relu_after_sum: bool = True,
        gate_image: bool = True,
    ) -> None:
        super().__init__()
        check_levels(encoder_reductions, fewest=1 if gate_image else 2)
        if gate_image:
            encoder_channels, encoder_reductions = [in_chans, *encoder_channels], [1, *encoder_reductions]
        *skips, state = encoder_channels
        if widths is None:
            widths = [min(channels * 2**i, max_channels) for i in range(len(skips))]
        if len(widths) != len(skips) or min(widths) < 1:
            raise ValueError(f"{len(skips)} widths of at least 1 are needed, one a skip connection, got {list(widths)}")
        if gate_share <= 0:
            raise ValueError(f"gate_share must be positive, got {gate_share}")
        self.gate_image = gate_image
        self.ups, self.gates, self.blocks = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        levels = list(zip(skips, widths, pairwise(encoder_reductions), strict=True))
        for skip, width, (fine, coarse) in reversed(levels):
            inner = max(round(gate_share * skip), 1)
            self.ups.append(_up_conv(state, width, scale=max(round(coarse / fine), 1)))
            self.gates.append(AttentionGate(skip, width, inter_channels=inner, style="additive", norm=norm))
            self.blocks.append(ResidualBlock(skip + width, width, norm=norm, relu_after_sum=relu_after_sum))
            state = width
        self.classifier = nn.Conv2d(state, num_classes, kernel_size=1)

    def forward(self, features: list[Tensor], image: Tensor) -> Tensor:
        """Map features, finest first, and the image (B, in_chans, H, W) to logits (B, num_classes, H, W)."""
        *skips, state = [image, *features] if self.gate_image else features
        for skip, up, gate, block in zip(reversed(skips), self.ups, self.gates, self.blocks, strict=True):
            state = resize(up(state), skip)
            state = block(torch.cat([gate(skip, state), state], dim=1))
        return resize(self.classifier(state), image)


def _up_conv(in_chans: int, out_chans: int, *, scale: int) -> nn.ConvTranspose2d:
    conv = nn.ConvTranspose2d(in_chans, out_chans, kernel_size=scale, stride=scale)
    # Each output sums in_chans products. PyTorch counts scale^2 * out_chans and starts the state near zero, beside a
    # skip connection of full size.
    nn.init.normal_(conv.weight, std=in_chans**-0.5)
    return conv


Decoder = ResidualAttentionDecoder
