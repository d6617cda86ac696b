"""AGUNet and DAUNet: U-Nets with a multi-scale input, and attention gates or dual attention, in 2-D and 3-D.

Paper: Meningioma segmentation in T1-weighted MRI leveraging global context and attention mechanisms, arXiv 2101.07715.
Code of the same author for other organs: https://github.com/dbouget/ct_mediastinal_structures_segmentation; written
from the paper and from facts about that code, nothing copied. Not followed are its position attention without trained
weights, its channel attention (see vision_gates.gates.dual_attention), and its Dice loss, which sums one class more
than it divides by and so is 0, without a gradient, long before the segmentation is right.
Suffixes: B batch, C channels, S the two or three spatial axes.
"""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vision_gates.gates import AttentionGate, DualAttention
from vision_gates.gates.attention_gate import Norm, conv_layer, init_conv_and_norm, norm_layer, resize
from vision_gates.models._unet import UNet, double_conv

__all__ = ["AGUNet", "DAUNet"]


class MultiScaleEncoder(nn.Module):
    """Blocks of two convolutions with max-pooling between them; all levels but the finest also see the image, shrunk.

    The image is average-pooled to the level's size, brought to the level's width by a 3x3 convolution and ReLU, and
    concatenated with the features before the level's block. The centre, as in the author's code, sees features alone.
    """

    def __init__(
        self,
        in_channels: int,
        widths: Sequence[int],
        *,
        spatial_dims: int,
        norm: Norm,
        multi_scale_input: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(2) if spatial_dims == 2 else nn.MaxPool3d(2)
        self.shrink = nn.AvgPool2d(2) if spatial_dims == 2 else nn.AvgPool3d(2)
        self.images = nn.ModuleDict()  # keyed by level, as the blocks are
        self.blocks = nn.ModuleDict()
        channels = in_channels
        for level, width in enumerate(widths, start=1):
            if multi_scale_input and 1 < level < len(widths):
                self.images[str(level)] = nn.Sequential(
                    conv_layer(in_channels, width, spatial_dims=spatial_dims, kernel_size=3), nn.ReLU(inplace=True)
                )
                channels += width
            self.blocks[str(level)] = double_conv(
                channels, width, spatial_dims=spatial_dims, norm=norm, dropout=dropout
            )
            channels = width

    def forward(self, image_BCS: Tensor) -> list[Tensor]:
        """Map the image to the levels' features, finest first, the centre last."""
        features: list[Tensor] = []
        x_BCS = image_BCS
        for level, block in self.blocks.items():
            if features:
                x_BCS = self.pool(x_BCS)
            if level in self.images:
                image_BCS = self.shrink(image_BCS)
                x_BCS = torch.cat([self.images[level](image_BCS), x_BCS], dim=1)
            x_BCS = block(x_BCS)
            features.append(x_BCS)
        return features


def _double_size(in_channels: int, out_channels: int, *, spatial_dims: int) -> nn.Module:
    """A transposed convolution of kernel 3 and stride 2 whose result is exactly twice as large."""
    layer = nn.ConvTranspose2d if spatial_dims == 2 else nn.ConvTranspose3d
    return layer(in_channels, out_channels, kernel_size=3, stride=2, padding=1, output_padding=1)


class AGUNet(UNet):
    """Logits at input size from a U-Net whose skip connections pass through attention gates at every level.

    Levels count from 1, the finest, to ``len(widths)``, the centre; each halves the size of the one before. In the
    decoder, a transposed convolution, normalisation and ReLU double the size; the result is the gating signal of the
    skip connection of that size (`AttentionGate` of style "concat") and is then concatenated with it. The author's code
    stops halving an axis at four positions; here every axis is halved at every level.

    The defaults have 7,085,300 parameters in 3-D (2,380,820 in 2-D), the paper's loss at every level
    (``deep_supervision="separate"``) and its multi-scale input; the paper's widths are not known to us.

    Any input size works: inputs are padded at the far ends (edge values repeated) to a multiple of ``divisor``,
    2 ** (levels - 1), and the logits are cropped back. Only a centre of a single position is refused where the
    normalisation has no second value there: with "instance", and with "batch" when training on a batch of one.

    The map of each gate is the output of the submodule ``gates.<level>.map``, (B, 1, *size of the padded skip
    connection), for forward hooks.

    Args:
        spatial_dims: 2 or 3.
        in_channels: channels of the image.
        num_classes: channels of the logits.
        widths: channels of each level, finest first; two or more.
        norm: "batch", "instance" or "group".
        deep_supervision: "none" classifies the finest decoder level. "separate" classifies every one and brings the
            logits to input size: in training mode forward returns the list of all levels' logits, finest first, each
            for a loss of its own; in eval mode the finest level's tensor alone.
        multi_scale_input: let every level between the finest and the centre see the image at its size.
        dropout: rate at which the convolution blocks drop whole channels, in training.

    Raises:
        ValueError: an argument outside these; at run time an input of another rank, of other channels, or whose centre
            cannot be normalised.
    """

    supervisions: ClassVar[tuple[str, ...]] = ("none", "separate")

    def __init__(
        self,
        *,
        spatial_dims: int = 3,
        in_channels: int = 1,
        num_classes: int = 2,
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        norm: Norm = "batch",
        deep_supervision: Literal["none", "separate"] = "separate",
        multi_scale_input: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            num_classes=num_classes,
            widths=widths,
            norm=norm,
            deep_supervision=deep_supervision,
        )
        self.encoder = MultiScaleEncoder(
            in_channels,
            widths,
            spatial_dims=spatial_dims,
            norm=norm,
            multi_scale_input=multi_scale_input,
            dropout=dropout,
        )
        self.up, self.gates, self.decoder = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        for level, (width, coarser) in enumerate(zip(widths, widths[1:], strict=False), start=1):
            self.up[str(level)] = nn.Sequential(
                _double_size(coarser, width, spatial_dims=spatial_dims),
                norm_layer(norm, width, spatial_dims=spatial_dims),
                nn.ReLU(inplace=True),
            )
            self.gates[str(level)] = AttentionGate(width, width, spatial_dims=spatial_dims, style="concat", norm=norm)
            self.decoder[str(level)] = double_conv(
                2 * width, width, spatial_dims=spatial_dims, norm=norm, dropout=dropout
            )
        self.make_heads()
        init_conv_and_norm(self)

    def forward_features(self, x_BCS: Tensor) -> list[Tensor]:
        """Map images (B, in_channels, *size) to the decoder's outputs, finest first, at padded size / 1, 2, 4 ..."""
        *skips, x_BCS = self.encoder(self.padded(x_BCS))
        decoded: list[Tensor] = []
        for level, skip_BCS in reversed([*zip(self.decoder, skips, strict=True)]):
            up_BCS = self.up[level](x_BCS)
            x_BCS = self.decoder[level](torch.cat([up_BCS, self.gates[level](skip_BCS, up_BCS)], dim=1))
            decoded.insert(0, x_BCS)
        return decoded


class DAUNet(UNet):
    """Logits at input size from a U-Net with dual attention, over positions and over channels, at its centre.

    Levels, sizes, ``forward`` and the arguments not named here are those of :class:`AGUNet`; skip connections are
    plain. In the decoder, a transposed convolution doubles the size, and [guide,] skip connection and result are
    concatenated, normalised and rectified before the level's block. The defaults have 14,940,890 parameters in 3-D
    (5,126,138 in 2-D).

    Attention guiding hands the output of the dual attention to every decoder level: a 1x1 convolution to the level's
    width, interpolated linearly to its size. The author's code up-samples it by transposed convolutions of kernel 3 and
    stride 2, 4, 8 ..., which leave ever more positions without any of it.

    Args:
        spatial_dims, in_channels, num_classes, widths, norm, deep_supervision, multi_scale_input, dropout: as in
            :class:`AGUNet`.
        attention_guiding: concatenate the dual attention's output at every decoder level.
        attention_dropout: rate at which the dual attention drops whole channels, in training.

    Raises:
        ValueError: as in :class:`AGUNet`.
    """

    supervisions: ClassVar[tuple[str, ...]] = ("none", "separate")

    def __init__(
        self,
        *,
        spatial_dims: int = 3,
        in_channels: int = 1,
        num_classes: int = 2,
        widths: Sequence[int] = (16, 32, 64, 128, 256),
        norm: Norm = "batch",
        deep_supervision: Literal["none", "separate"] = "separate",
        multi_scale_input: bool = True,
        attention_guiding: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.5,
    ) -> None:
        super().__init__(
            spatial_dims=spatial_dims,
            in_channels=in_channels,
            num_classes=num_classes,
            widths=widths,
            norm=norm,
            deep_supervision=deep_supervision,
        )
        self.encoder = MultiScaleEncoder(
            in_channels,
            widths,
            spatial_dims=spatial_dims,
            norm=norm,
            multi_scale_input=multi_scale_input,
            dropout=dropout,
        )
        self.attention = DualAttention(widths[-1], spatial_dims=spatial_dims, norm=norm, dropout=attention_dropout)
        self.guides, self.up = nn.ModuleDict(), nn.ModuleDict()
        self.join, self.decoder = nn.ModuleDict(), nn.ModuleDict()
        for level, (width, coarser) in enumerate(zip(widths, widths[1:], strict=False), start=1):
            if attention_guiding:
                self.guides[str(level)] = conv_layer(widths[-1], width, spatial_dims=spatial_dims)
            self.up[str(level)] = _double_size(coarser, width, spatial_dims=spatial_dims)
            joined = (3 if attention_guiding else 2) * width
            self.join[str(level)] = nn.Sequential(
                norm_layer(norm, joined, spatial_dims=spatial_dims), nn.ReLU(inplace=True)
            )
            self.decoder[str(level)] = double_conv(joined, width, spatial_dims=spatial_dims, norm=norm, dropout=dropout)
        self.make_heads()
        init_conv_and_norm(self)

    def forward_features(self, x_BCS: Tensor) -> list[Tensor]:
        """Map images (B, in_channels, *size) to the decoder's outputs, finest first, at padded size / 1, 2, 4 ..."""
        *skips, centre_BCS = self.encoder(self.padded(x_BCS))
        x_BCS = attended_BCS = self.attention(centre_BCS)
        decoded: list[Tensor] = []
        for level, skip_BCS in reversed([*zip(self.decoder, skips, strict=True)]):
            parts = [skip_BCS, self.up[level](x_BCS)]
            if level in self.guides:
                parts.insert(0, resize(self.guides[level](attended_BCS), skip_BCS.shape[2:]))
            x_BCS = self.decoder[level](self.join[level](torch.cat(parts, dim=1)))
            decoded.insert(0, x_BCS)
        return decoded
