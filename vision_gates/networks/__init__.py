"""Whole segmentation networks, one file each: what a paper describes from image to logits.

A network is a module in this folder with a function ``build``::

    build(*, in_channels, num_classes, **options) -> nn.Module
    module(image) -> logits (B, num_classes, *size of the image)  # training: or a list of such, finest level first

The file's name is the network's name in configurations, the first line of its docstring says what it is; a new file
needs no entry anywhere. Encoders of timm's under a decoder of choice are the matter of ``vision_gates.segmenter``.
"""

import difflib
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

__all__ = ["available_networks", "create_network", "describe_network", "network_options"]

_FIXED = ("in_channels", "num_classes")


def available_networks() -> list[str]:
    """Names that :func:`create_network` knows."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def create_network(name: str, *, in_channels: int, num_classes: int, **options: Any) -> nn.Module:
    """Build the network called ``name``.

    Args:
        name: for example "agunet".
        in_channels: channels of the image.
        num_classes: channels of the logits, background included.
        options: further arguments of the network's ``build``.

    Raises:
        ValueError: an unknown name or option, with the nearest known one; or a value that ``build`` refuses.
    """
    known = network_options(name)
    for option in options:
        if option not in known:
            raise ValueError(
                f"network {name!r} has no option {option!r}{_nearest(option, known)}; known: {', '.join(known)}"
            )
    network: nn.Module = _build_function(name)(in_channels=in_channels, num_classes=num_classes, **options)
    return network


def network_options(name: str) -> list[str]:
    """Options of a network: arguments of its ``build`` and, where that takes any, of the class that it returns.

    Raises:
        ValueError: an unknown name.
    """
    build = _build_function(name)
    parameters = inspect.signature(build).parameters
    names = [key for key, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    if len(names) < len(parameters):
        names += inspect.signature(typing.get_type_hints(build)["return"]).parameters
    return [key for key in dict.fromkeys(names) if key not in _FIXED]


def describe_network(name: str) -> str:
    """What a network is: the first line of its module's docstring.

    Raises:
        ValueError: an unknown name.
    """
    return (inspect.getdoc(_module(name)) or name).partition("\n")[0]


def _module(name: str) -> Any:
    names = available_networks()
    if name not in names:
        raise ValueError(f"network {name!r} is unknown{_nearest(name, names)}; known: {', '.join(names)}")
    return importlib.import_module(f"{__name__}.{name}")


def _build_function(name: str) -> Callable[..., nn.Module]:
    build: Callable[..., nn.Module] = _module(name).build
    return build


def _nearest(name: str, names: Sequence[str]) -> str:
    match = difflib.get_close_matches(name, names, n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
