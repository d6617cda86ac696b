"""EAR-U-Net: EfficientNet-B4 under a residual decoder with attention gates on every skip and on the image, in 2-D.

Paper: EAR-U-Net (liver segmentation in CT), arXiv 2110.01014; code of the same authors in
https://github.com/ZhangXY-123/Model (no licence); written from the paper and from facts of the code, nothing copied.
"""

from vision_gates.gates.attention_gate import Norm
from vision_gates.segmenter import Segmenter, create_segmenter

__all__ = ["build"]


def build(
    *,
    in_channels: int = 1,
    num_classes: int = 2,
    encoder: str = "efficientnet_b4",
    pretrained: bool = False,
    channels: int = 32,
    max_channels: int = 512,
    norm: Norm = "batch",
) -> Segmenter:
    """Build EAR-U-Net: images (B, in_channels, H, W) of any size to logits (B, num_classes, H, W).

    The defaults are the paper's network, widths 512, 256, 128, 64, 32 from coarse to fine, but for its deepest level:
    timm's features of stride 32 are the 448 channels before EfficientNet's last 1x1 convolution, the released code
    takes the 1792 after it. It has 26,150,065 parameters, by hand:

    - Encoder: EfficientNet-B4's 19,341,616, less 1,793,000 (classifier), 806,400 (the last 1x1 convolution and its
      normalisation) and 864 (two of the stem's three input channels): 16,741,352.
    - A decoder level of width w on a skip of s channels, from u channels, has 4 u w + 19 w^2 + 11 s w + s^2 +
      7 (s + w) + 3: transposed convolution, gate and residual block. With u, w, s from (448, 512, 160) over
      (512, 256, 56), (256, 128, 32) and (128, 64, 24) to (64, 32, 1) the five have 9,408,647.
    - The classifier has 33 a class, 66.

    Args:
        in_channels: channels of the image.
        num_classes: channels of the logits, background included. The released code puts a sigmoid on each of two
            classes that exclude each other; here they are logits for a softmax.
        encoder: any timm model with ``features_only``.
        pretrained: load the encoder's weights; the released code trains from scratch.
        channels: width at full resolution; it doubles from level to level, up to ``max_channels``.
        max_channels: the largest width.
        norm: of the decoder, "batch", "instance" or "group".

    Raises:
        ValueError: the encoder has no feature pyramid, a width below 1, or an unknown norm.
    """
    decoder = {
        "type": "residual_attention",
        "channels": channels,
        "max_channels": max_channels,
        "norm": norm,
        "gate_share": 1.0,
        "relu_after_sum": False,
        "gate_image": True,
    }
    return create_segmenter(
        encoder, num_classes=num_classes, decoder=decoder, in_chans=in_channels, pretrained=pretrained
    )
