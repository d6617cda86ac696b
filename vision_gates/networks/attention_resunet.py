"""Attention-ResUNet: a residual U-Net whose skip connections all pass additive attention gates, in 2-D.

Paper: Attention-ResUNet (fetal head segmentation in ultrasound), arXiv 2604.18148; released as a notebook,
https://github.com/Ammar-ss/Attention-ResUnet; written from the paper and from facts of the notebook, nothing copied.
Suffixes: B batch, C channels, H W height and width.
"""

from collections.abc import Sequence

from timm.models import FeatureInfo, checkpoint
from torch import Tensor, nn

from vision_gates.decoders.residual_attention import ResidualAttentionDecoder, ResidualBlock
from vision_gates.gates.attention_gate import Norm
from vision_gates.segmenter import Segmenter

__all__ = ["ResidualUNetEncoder", "build"]


class ResidualUNetEncoder(nn.Module):
    """One residual block a level, max-pooling by 2 between levels: a feature pyramid at strides 1, 2, 4, ...

    ``feature_info`` describes the levels as timm's ``features_only`` encoders do.

    Args:
        in_channels: channels of the image.
        widths: channels of each level, finest first.
        norm: "batch", "instance" or "group".
    """

    def __init__(self, *, in_channels: int, widths: Sequence[int], norm: Norm = "batch") -> None:
        super().__init__()
        self.feature_info = FeatureInfo(
            [dict(num_chs=width, reduction=2**i, module=f"blocks.{i}") for i, width in enumerate(widths)],
            out_indices=tuple(range(len(widths))),
        )
        self.grad_checkpointing = False
        self.pool = nn.MaxPool2d(2)
        self.blocks = nn.ModuleList(
            ResidualBlock(fine, coarse, norm=norm)
            for fine, coarse in zip([in_channels, *widths[:-1]], widths, strict=True)
        )

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass instead of keeping their activations."""
        self.grad_checkpointing = enable

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        """Map images (B, in_channels, H, W) to features (B, width, H / 2^i, W / 2^i), finest first."""
        features: list[Tensor] = []
        for block in self.blocks:
            x_BCHW = self.pool(features[-1]) if features else x_BCHW
            features.append(checkpoint(block, x_BCHW) if self.grad_checkpointing else block(x_BCHW))
        return features


def build(
    *,
    in_channels: int = 1,
    num_classes: int = 2,
    widths: Sequence[int] = (64, 128, 256, 512, 1024),
    norm: Norm = "batch",
) -> Segmenter:
    """Build Attention-ResUNet: images (B, in_channels, H, W) of any size to logits (B, num_classes, H, W).

    The defaults are the paper's network, with two classes for its one sigmoid. It has 32,786,670 parameters, by hand:

    - A residual block from i to o channels has 10 i o + 9 o^2 + 6 o: two 3x3 convolutions and the shortcut's 1x1, three
      normalisations. The encoder's five, 1 -> 64 -> 128 -> 256 -> 512 -> 1024, have 19,546,368.
    - A decoder level of width w has 8 w^2 + w (transposed convolution), w^2 + 3.5 w + 3 (gate) and 29 w^2 + 6 w (block
      from 2 w). The four have 38 (64^2 + 128^2 + 256^2 + 512^2) + 10.5 (64 + 128 + 256 + 512) + 12 = 13,240,172.
    - The classifier has 65 a class, 130.

    The paper claims 14.7 M, which its layers do not give: it is the size of the encoder's last block alone, 14,686,208.
    Its Dice of 99.3 is no target to reproduce either: the notebook does not fill the contours that the data set has for
    masks but inverts them, so that nearly the whole image is foreground.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits, background included.
        widths: channels of each level, finest first; two or more.
        norm: "batch", "instance" or "group"; group normalisation suits batches of one.

    Raises:
        ValueError: fewer than two widths, a number below 1, or an unknown norm.
    """
    widths = tuple(widths)
    if len(widths) < 2 or min(widths) < 1:
        raise ValueError(f"widths must be two or more positive channel counts, got {list(widths)}")
    if min(in_channels, num_classes) < 1:
        raise ValueError(f"in_channels and num_classes must be at least 1, got {in_channels} and {num_classes}")
    encoder = ResidualUNetEncoder(in_channels=in_channels, widths=widths, norm=norm)
    decoder = ResidualAttentionDecoder(
        encoder_channels=encoder.feature_info.channels(),
        encoder_reductions=encoder.feature_info.reduction(),
        in_chans=in_channels,
        num_classes=num_classes,
        widths=widths[:-1],
        norm=norm,
        gate_share=0.5,
        relu_after_sum=True,
        gate_image=False,
    )
    return Segmenter(encoder, decoder, num_classes=num_classes)
