"""Attention U-Net's decoder on any encoder: every skip connection passes a gate that the coarser level controls.

Paper: Attention U-Net, arXiv 1804.03999; written from the paper. The encoder is whatever timm offers, so the image
itself, at 1/1 and 1/2, stands in for the fine levels that most encoders lack.
Suffixes: B batch, C channels, H W height and width.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from vision_gates.decoders._layers import check_levels, conv_norm_act, resize
from vision_gates.gates import AttentionGate
from vision_gates.gates.attention_gate import GateStyle
from vision_gates.kernels.upsample_concat import upsample_concat

__all__ = ["AttentionUNetDecoder"]


class AttentionUNetDecoder(nn.Module):
    """Coarse to fine: gate the level's features by the state so far, join both, two convolutions.

    The gates' maps are the outputs of the submodules ``gates.*.map``, coarse to fine, for forward hooks.

    Args:
        encoder_channels: channels of each encoder level, finest first.
        encoder_reductions: stride of each level; levels may repeat a stride (plain ViG).
        in_chans: channels of the image.
        num_classes: channels of the logits.
        style: of the gates, "grid" (the paper's), "additive" or "concat"; see :class:`AttentionGate`.
        channels: width at the finest encoder level; it doubles from level to level, up to ``max_channels``.
        max_channels: the largest width.
        detail_channels: width at full resolution, half that of the level at 1/2; 0 leaves both out and upsamples the
            logits instead.

    Raises:
        ValueError: fewer than two encoder levels, levels that are not ordered from fine to coarse, a width below 4, or
            an unknown style.
    """

    def __init__(
        self,
        *,
        encoder_channels: Sequence[int],
        encoder_reductions: Sequence[int],
        in_chans: int,
        num_classes: int,
        style: GateStyle = "grid",
        channels: int = 32,
        max_channels: int = 256,
        detail_channels: int = 16,
    ) -> None:
        super().__init__()
        check_levels(encoder_reductions, fewest=2)
        if min(channels, max_channels) < 4 or detail_channels < 0 or 0 < detail_channels < 4:
            raise ValueError(
                "channels and max_channels must be at least 4 and detail_channels 0 or at least 4, "
                f"got {channels}, {max_channels} and {detail_channels}"
            )
        widths = [min(channels * 2**i, max_channels) for i in range(len(encoder_channels))]
        self.centre = _double_conv(encoder_channels[-1], widths[-1])
        # What the gates let through, and what the state becomes there, coarse to fine; the image's levels come last.
        skips = list(zip(encoder_channels[:-1], widths[:-1], strict=True))[::-1]
        self.details: nn.ModuleList | None = None
        if detail_channels:
            half, full = 2 * detail_channels, detail_channels
            self.details = nn.ModuleList([conv_norm_act(in_chans, half, stride=2), conv_norm_act(in_chans, full)])
            skips += [(half, half), (full, full)]
        self.gates, self.convs = nn.ModuleList(), nn.ModuleList()
        state = widths[-1]
        for skip, width in skips:
            self.gates.append(AttentionGate(skip, state, style=style, norm="group"))
            self.convs.append(_double_conv(skip + state, width))
            state = width
        self.classifier = nn.Conv2d(state, num_classes, kernel_size=1)

    def forward(self, features: list[Tensor], image: Tensor) -> Tensor:
        """Map features, finest first, and the image (B, in_chans, H, W) to logits (B, num_classes, H, W)."""
        state = self.centre(features[-1])
        skips = features[-2::-1]
        if self.details is not None:
            skips = [*skips, *(detail(image) for detail in self.details)]
        for skip, gate, conv in zip(skips, self.gates, self.convs, strict=True):
            gated = gate(skip, state)
            state = conv(upsample_concat(gated, state.to(gated.dtype)))
        return resize(self.classifier(state), image)


def _double_conv(in_chans: int, out_chans: int) -> nn.Sequential:
    return nn.Sequential(conv_norm_act(in_chans, out_chans), conv_norm_act(out_chans, out_chans))


Decoder = AttentionUNetDecoder
