"""Semantic segmentation: any timm encoder with features, and any decoder of ``vision_gates.decoders``."""

from collections.abc import Mapping
from typing import Any

import timm
from torch import Tensor, nn

from vision_gates.decoders import create_decoder
from vision_gates.gates.padding import pad_to_multiple

__all__ = ["Segmenter", "create_segmenter"]


class Segmenter(nn.Module):
    """Logits at input size, for images of any height and width.

    Images are padded at the bottom and the right (edge pixels repeated) to a multiple of the encoder's coarsest stride,
    so that every pixel reaches the encoder, and the logits are cropped back.

    Args:
        encoder: a timm model built with ``features_only=True``.
        decoder: maps (features, image) to logits of the image's size; see ``vision_gates.decoders``.
        num_classes: channels of the logits.
    """

    def __init__(self, encoder: Any, decoder: nn.Module, *, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.num_classes = num_classes
        self.divisor: int = max(self.encoder.feature_info.reduction())

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes, H, W)."""
        height, width = x_BCHW.shape[-2:]
        x_BCHW = pad_to_multiple(x_BCHW, (self.divisor, self.divisor))
        logits_BCHW = self.decoder(self.encoder(x_BCHW), x_BCHW)
        return logits_BCHW[..., :height, :width]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's blocks in the backward pass instead of keeping their activations."""
        self._encoder_model().set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """The encoder's parameters without weight decay, under their names here."""
        model = self._encoder_model()
        names = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
        return {f"{self._encoder_prefix()}{name}" for name in names}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for layer-wise learning-rate decay: the encoder's, then the decoder as the last.

        Raises:
            ValueError: the encoder's features do not keep its layer structure (timm's flattened networks).
        """
        model = self._encoder_model()
        if not hasattr(model, "group_matcher"):
            raise ValueError(
                f"layer decay needs an encoder that keeps its layers, {type(model).__name__} does not: "
                "set optim.layer_decay to null"
            )
        prefix = self._encoder_prefix().replace(".", r"\.")
        matcher = model.group_matcher(coarse=coarse)

        def moved(pattern: str) -> str:
            return "|".join(f"^{prefix}{part.removeprefix('^')}" for part in pattern.split("|"))

        blocks = matcher["blocks"]
        moved_blocks = [(moved(blocks), None)] if isinstance(blocks, str) else [(moved(p), to) for p, to in blocks]
        return dict(stem=moved(matcher["stem"]), blocks=[*moved_blocks, (r"^decoder", (99999,))])

    def _encoder_model(self) -> Any:
        return getattr(self.encoder, "model", self.encoder)  # timm's feature getter wraps the model whole

    def _encoder_prefix(self) -> str:
        return "encoder.model." if self._encoder_model() is not self.encoder else "encoder."


def create_segmenter(
    encoder: str,
    *,
    num_classes: int,
    decoder: Mapping[str, Any] | None = None,
    in_chans: int = 3,
    pretrained: bool = False,
    drop_path_rate: float = 0.0,
    **encoder_options: Any,
) -> Segmenter:
    """Build a :class:`Segmenter` from names.

    Args:
        encoder: any timm model with ``features_only``, ours (``vg_*``) or timm's.
        num_classes: channels of the logits, background included.
        decoder: ``{"type": ..., option: value}``; None is ``{"type": "pyramid"}``.
        in_chans: channels of the image.
        pretrained: load the encoder's weights.
        drop_path_rate: stochastic depth of the encoder, where it has it.
        encoder_options: further arguments of ``timm.create_model``, for example ``out_indices``.

    Raises:
        ValueError: the encoder has no feature pyramid, or the decoder's type or an option is unknown.
    """
    if drop_path_rate:
        encoder_options["drop_path_rate"] = drop_path_rate
    try:
        features: Any = timm.create_model(
            encoder, features_only=True, pretrained=pretrained, in_chans=in_chans, **encoder_options
        )
    except RuntimeError as error:
        if "features_only" in str(error):
            raise ValueError(f"encoder {encoder!r} gives no feature pyramid (timm: {error}): choose another") from error
        raise
    built = create_decoder(
        decoder or {"type": "pyramid"},
        encoder_channels=features.feature_info.channels(),
        encoder_reductions=features.feature_info.reduction(),
        in_chans=in_chans,
        num_classes=num_classes,
    )
    return Segmenter(features, built, num_classes=num_classes)
