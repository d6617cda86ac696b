"""Segmentation decoders, one file each, on any feature pyramid of timm's ``features_only`` encoders.

A decoder is a module in this folder that names its class ``Decoder``::

    Decoder(*, encoder_channels, encoder_reductions, in_chans, num_classes, **options)
    Decoder.forward(features, image) -> logits (B, num_classes, H, W)  # features: list of (B, C_i, H / r_i, W / r_i)

The file's name is the decoder's ``type`` in configurations; a new file needs no entry anywhere.
"""

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

__all__ = ["available_decoders", "create_decoder"]

_FIXED = ("encoder_channels", "encoder_reductions", "in_chans", "num_classes")


def available_decoders() -> list[str]:
    """Types that :func:`create_decoder` knows."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def create_decoder(
    config: Mapping[str, Any],
    *,
    encoder_channels: Sequence[int],
    encoder_reductions: Sequence[int],
    in_chans: int,
    num_classes: int,
) -> nn.Module:
    """Build the decoder that ``config["type"]`` names; its other keys are the decoder's options.

    Args:
        config: for example ``{"type": "pyramid", "channels": 64}``.
        encoder_channels: channels of each encoder level, finest first.
        encoder_reductions: stride of each encoder level in pixels.
        in_chans: channels of the image.
        num_classes: channels of the logits.

    Raises:
        ValueError: an unknown type or option; names the nearest known one.
    """
    options = dict(config)
    kind = options.pop("type", None)
    names = available_decoders()
    if kind not in names:
        raise ValueError(f"decoder type {kind!r} is unknown{_nearest(str(kind), names)}; known: {', '.join(names)}")
    decoder_cls = importlib.import_module(f"{__name__}.{kind}").Decoder
    known = [name for name in inspect.signature(decoder_cls).parameters if name not in _FIXED]
    for name in options:
        if name not in known:
            raise ValueError(
                f"decoder {kind!r} has no option {name!r}{_nearest(name, known)}; known: {', '.join(known)}"
            )
    return decoder_cls(
        encoder_channels=encoder_channels,
        encoder_reductions=encoder_reductions,
        in_chans=in_chans,
        num_classes=num_classes,
        **options,
    )


def _nearest(name: str, names: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
