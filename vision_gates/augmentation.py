"""2-D augmentation pipelines: a list of albumentations transforms from a configuration, checked and built.

albumentations 2.0 only warns about an argument it does not know and then ignores it; here that is an error which names
the nearest valid one. A pipeline draws all its random numbers from one generator, set anew for each sample.
"""

import difflib
import inspect
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vision_gates.errors import ConfigError

__all__ = ["build_pipeline", "run_pipeline"]


def _albumentations() -> Any:
    """albumentations, imported on first use (it takes seconds) and kept from asking the network for its version."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    import albumentations

    return albumentations


def _build(entry: Mapping[str, Any], key: str) -> Any:
    """One transform from ``{Name: {argument: value}}``; compositions such as OneOf hold a list under ``transforms``."""
    library = _albumentations()
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ConfigError(f"{key}: one transform as {{Name: {{argument: value}}}} is needed, found {entry!r}")
    ((name, arguments),) = entry.items()
    key = f"{key}.{name}"
    bases = (library.BasicTransform, library.BaseCompose)
    known = {n: c for n, c in vars(library).items() if inspect.isclass(c) and issubclass(c, bases)}
    if name not in known:
        near = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.0)[0]
        raise ConfigError(f"{key}: albumentations has no such transform; nearest: {near}")
    if arguments is not None and not isinstance(arguments, Mapping):
        raise ConfigError(f"{key}: arguments as {{argument: value}} are needed, found {arguments!r}")
    arguments = dict(arguments or {})
    valid = [p for p in inspect.signature(known[name].__init__).parameters if p not in ("self", "args", "kwargs")]
    for argument in arguments:
        if argument not in valid:
            near = difflib.get_close_matches(str(argument), valid, n=1, cutoff=0.0)[0]
            raise ConfigError(
                f"{key}.{argument}: unknown argument; nearest: {near}; {name} takes: {', '.join(sorted(valid))}"
            )
    if isinstance(arguments.get("transforms"), Sequence):
        arguments["transforms"] = [_build(e, f"{key}.transforms.{i}") for i, e in enumerate(arguments["transforms"])]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            return known[name](**arguments)
        except (ValueError, TypeError, AssertionError, UserWarning) as error:
            lines = [line.strip() for line in str(error).splitlines()]
            reason = " ".join(lines)
            if len(lines) > 2:  # pydantic's report: a head line, then for each fault its place and its reason
                argument, reason = lines[1].split(".")[0], lines[2].split(" [type=")[0].removeprefix("Input ")
                key, reason = f"{key}.{argument}", f"{reason}, found {arguments.get(argument)!r}"
            raise ConfigError(f"{key}: {reason}") from error


def build_pipeline(entries: Sequence[Mapping[str, Any]], *, key: str) -> Any | None:
    """The pipeline of a configuration list such as ``[{HorizontalFlip: {p: 0.5}}]``.

    Args:
        entries: One mapping a transform, name to arguments (None for none).
        key: Dotted key of the list, for messages, e.g. "augment.train".

    Returns:
        An ``albumentations.Compose``, or None for an empty list.

    Raises:
        ConfigError: An unknown transform or argument, or an argument of the wrong type.
    """
    if not entries:
        return None
    transforms = [_build(entry, f"{key}.{i}") for i, entry in enumerate(entries)]
    return _albumentations().Compose(transforms)


def run_pipeline(
    pipeline: Any, image_HWC: np.ndarray, mask_HW: np.ndarray | None, *, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Run a pipeline on one sample; the result is a function of the arguments alone.

    Intensities outside 0..1 (floating-point images: MR, CT, raw detectors) are mapped to 0..1 before and back after,
    because many transforms clip to that range.

    Args:
        pipeline: From ``build_pipeline``.
        image_HWC: (H, W, C) float32, any number of channels.
        mask_HW: (H, W) int64 labels or None; interpolated by nearest neighbour.
        seed: Seed of everything random in it.

    Returns:
        The image, (H', W', C) float32, and the mask, (H', W') int64 or None.
    """
    # One generator for the whole pipeline. Compose.set_random_seed would give every transform a generator with the
    # same seed, so that, say, a horizontal and a vertical flip would always happen together.
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
    low, high = float(image_HWC.min()), float(image_HWC.max())
    rescale = low < 0.0 or high > 1.0
    if rescale:
        image_HWC = (image_HWC - np.float32(low)) / np.float32(max(high - low, 1e-12))
    inputs = {"image": image_HWC}
    if mask_HW is not None:
        # OpenCV warps neither int64 nor int32; float32 holds every label below 2^24 and nearest-neighbour keeps it.
        small = 0 <= mask_HW.min() and mask_HW.max() <= 255
        inputs["mask"] = mask_HW.astype(np.uint8 if small else np.float32)
    result = pipeline(**inputs)
    image_HWC = np.asarray(result["image"], dtype=np.float32)
    if image_HWC.ndim == 2:
        image_HWC = image_HWC[..., None]
    if rescale:
        image_HWC = image_HWC * np.float32(max(high - low, 1e-12)) + np.float32(low)
    return image_HWC, None if mask_HW is None else np.asarray(result["mask"]).astype(np.int64)
