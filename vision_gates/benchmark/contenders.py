"""Who can be timed, by name: models of timm, networks of this package, MONAI's, and code in a file."""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import timm
from torch import nn

import vision_gates  # noqa: F401  (registers the vg_* models)
from vision_gates.errors import ConfigError
from vision_gates.networks import available_networks, create_network

__all__ = ["FAMILIES", "IN_CHANS", "check_name", "create"]

FAMILIES: dict[str, tuple[tuple[str, ...], ...]] = {
    "vig": (("vg_vig_tiny", "deit_tiny_patch16_224"),),
    "convit": (("vg_convit_tiny", "convit_tiny"), ("vg_convit_small", "convit_small")),
    "hornet": (("vg_hornet_tiny_7x7", "convnext_tiny"),),
    "attention_unet": (("network:attention_unet", "monai:AttentionUnet"),),
}
"""Of each family what is compared with what; the last of a group is the peer."""

IN_CHANS = {2: 3, 3: 1}
"""Channels of the input, by the number of its axes: photographs, and MRI or CT."""

_CLASSES = 2  # of segmentation networks
_WIDTHS = (32, 64, 128, 256, 512)


def check_name(name: str, dims: int) -> None:
    """Raise ConfigError, with the nearest known name, unless ``create`` can build it for inputs of ``dims`` axes."""
    kind, _, rest = name.rpartition(":")
    if kind == "hf-hub":
        return
    if kind == "network":
        known, known_to_us = available_networks(), "network"
    elif kind == "monai":
        known, known_to_us = list(_MONAI), "network of MONAI"
        if importlib.util.find_spec("monai") is None:
            raise ConfigError(f"{name}: MONAI is not installed; pip install 'vision_gates[volumes]'")
    elif kind:
        if not Path(kind).is_file():
            raise ConfigError(f"{name}: there is no file {kind}; code in a file is named FILE.py:FUNCTION")
        return
    else:
        known, known_to_us = timm.list_models(), "model"
        if dims != 2:
            raise ConfigError(f"{name}: timm's models take images; dims=3 is for network:NAME and monai:NAME")
    if rest not in known:
        near = difflib.get_close_matches(rest, known, n=1, cutoff=0.0)[0]
        raise ConfigError(f"no {known_to_us} {rest!r}; nearest: {near}")


def create(name: str, size: int, dims: int) -> nn.Module:
    """Build a network with random weights.

    Args:
        name: a model of timm; ``network:NAME`` of this package or ``monai:NAME``, segmentation networks that get equal
            widths, 32 to 512; or ``FILE.py:FUNCTION``, which is called without arguments.
        size: pixels along each axis of the input.
        dims: axes of the input, 2 or 3.
    """
    kind, _, rest = name.rpartition(":")
    if kind == "network":
        options = {"spatial_dims": dims, "widths": _WIDTHS, "deep_supervision": "none"}
        return create_network(rest, in_channels=IN_CHANS[dims], num_classes=_CLASSES, **options)
    if kind == "monai":
        return _MONAI[rest](dims)
    if kind and kind != "hf-hub":
        return _from_file(Path(kind), rest)
    try:
        return timm.create_model(name, img_size=size)
    except TypeError:  # convolutional and hierarchical models take any size as they are
        return timm.create_model(name)


def _monai_attention_unet(dims: int) -> nn.Module:
    from monai.networks.nets.attentionunet import AttentionUnet

    return AttentionUnet(dims, IN_CHANS[dims], _CLASSES, channels=_WIDTHS, strides=(2,) * (len(_WIDTHS) - 1))


_MONAI: dict[str, Callable[[int], nn.Module]] = {"AttentionUnet": _monai_attention_unet}


def _from_file(path: Path, function: str) -> nn.Module:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, f"{path} is no Python file"
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, function)()
