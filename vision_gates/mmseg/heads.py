"""vision_gates' gated decoders as decode heads of mmsegmentation.

mmseg's dropout and ``conv_seg`` take the place of the decoder's classifier; what remains of the decoder is
``decoder``. A head sees no image, unless the backbone gives it as the first level (``out_image=True``).
"""

from collections.abc import Sequence
from typing import Any

from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.registry import MODELS
from torch import Tensor, nn

from vision_gates.decoders.attention_unet import AttentionUNetDecoder
from vision_gates.decoders.residual_attention import ResidualAttentionDecoder
from vision_gates.errors import ConfigError
from vision_gates.gates.attention_gate import GateStyle, Norm

__all__ = ["AttentionGateHead", "ResidualAttentionHead"]


class _DecoderHead(BaseDecodeHead):
    """A decoder of vision_gates between mmseg's levels and its ``conv_seg``."""

    def __init__(
        self,
        decoder_cls: type[nn.Module],
        in_channels: Sequence[int],
        *,
        strides: Sequence[int] | None,
        with_image: bool,
        decoder_options: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        name = type(self).__name__
        in_channels = list(in_channels) if isinstance(in_channels, Sequence) else [in_channels]
        levels = in_channels[1:] if with_image else in_channels
        strides = [4 * 2**i for i in range(len(levels))] if strides is None else list(strides)
        if len(strides) != len(levels):
            raise ConfigError(f"{name}.strides={strides}: {len(levels)} are needed, one a level (the image has none)")
        for key in ("input_transform", "out_channels"):
            if kwargs.pop(key, None) is not None:
                raise ConfigError(f"{name}.{key}: this head takes all levels and gives one channel a class; remove it")
        try:
            decoder: Any = decoder_cls(
                encoder_channels=levels,
                encoder_reductions=strides,
                in_chans=in_channels[0],
                num_classes=1,
                **decoder_options,
            )
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error
        kwargs.setdefault("in_index", list(range(len(in_channels))))
        super().__init__(
            in_channels=in_channels,
            channels=decoder.classifier.in_channels,
            input_transform="multiple_select",
            **kwargs,
        )
        decoder.classifier = nn.Identity()
        self.decoder, self.with_image = decoder, with_image

    def forward(self, inputs: Sequence[Tensor]) -> Tensor:
        """Map levels, finest first, to logits (B, num_classes, H, W) at the size of the first one."""
        levels = self._transform_inputs(inputs)
        # A decoder ends at the size of what it takes for the image.
        features = levels[1:] if self.with_image else levels
        return self.cls_seg(self.decoder(features, levels[0]))


@MODELS.register_module()
class AttentionGateHead(_DecoderHead):
    """Attention U-Net's decoder: every level passes a gate that the coarser state controls (arXiv 1804.03999).

    Args:
        in_channels: channels of each level, finest first; with ``detail_channels`` the image's come first.
        num_classes: channels of the logits.
        strides: of the levels in pixels, without the image; None: 4, 8, 16, ...
        channels: width at the finest level; it doubles from level to level, up to ``max_channels``.
        max_channels: the largest width.
        detail_channels: width at full resolution, half that at 1/2, which two convolutions make of the image; needs a
            backbone with ``out_image=True``. 0: logits at the finest level.
        style: of the gates, "grid" (the paper's), "additive" or "concat".
        kwargs: of mmseg's ``BaseDecodeHead``: ``loss_decode``, ``ignore_index``, ``in_index``, ``dropout_ratio`` ...

    Raises:
        ConfigError: levels, widths or an option that the decoder cannot use.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        strides: Sequence[int] | None = None,
        channels: int = 32,
        max_channels: int = 256,
        detail_channels: int = 0,
        style: GateStyle = "grid",
        **kwargs: Any,
    ) -> None:
        options = dict(channels=channels, max_channels=max_channels, detail_channels=detail_channels, style=style)
        super().__init__(
            AttentionUNetDecoder,
            in_channels,
            strides=strides,
            with_image=detail_channels > 0,
            decoder_options=options,
            **kwargs,
        )


@MODELS.register_module()
class ResidualAttentionHead(_DecoderHead):
    """Residual U-Net decoder with gated skips: Attention-ResUNet (arXiv 2604.18148), EAR-U-Net (arXiv 2110.01014).

    Args:
        in_channels: channels of each level, finest first; with ``gate_image`` the image's come first.
        num_classes: channels of the logits.
        strides: of the levels in pixels, without the image; None: 4, 8, 16, ...
        channels: width at the finest level, which is the image with ``gate_image``; it doubles from level to level, up
            to ``max_channels``.
        max_channels: the largest width.
        norm: "batch" as in the papers (mmengine's ``sync_bn`` applies); "group" or "instance".
        gate_share: inner width of a gate as a share of its skip's channels.
        relu_after_sum: of the residual blocks: true in Attention-ResUNet, false in EAR-U-Net.
        gate_image: the image is the finest skip connection; needs a backbone with ``out_image=True``.
        kwargs: of mmseg's ``BaseDecodeHead``.

    Raises:
        ConfigError: levels, widths or an option that the decoder cannot use.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        strides: Sequence[int] | None = None,
        channels: int = 32,
        max_channels: int = 256,
        norm: Norm = "batch",
        gate_share: float = 0.5,
        relu_after_sum: bool = True,
        gate_image: bool = False,
        **kwargs: Any,
    ) -> None:
        options = dict(
            channels=channels,
            max_channels=max_channels,
            norm=norm,
            gate_share=gate_share,
            relu_after_sum=relu_after_sum,
            gate_image=gate_image,
        )
        super().__init__(
            ResidualAttentionDecoder,
            in_channels,
            strides=strides,
            with_image=gate_image,
            decoder_options=options,
            **kwargs,
        )
