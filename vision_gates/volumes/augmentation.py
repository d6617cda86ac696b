"""Augmentation of volumes and slices: MONAI's random transforms, from a configuration, repeatable sample by sample."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vision_gates.errors import ConfigError

__all__ = ["VolumePipeline", "build_volume_pipeline"]

_SPATIAL = "monai.transforms.spatial.dictionary"
_INTENSITY = "monai.transforms.intensity.dictionary"


def build_volume_pipeline(
    steps: Sequence[Mapping[str, Mapping[str, Any] | None]], *, key: str = "augment.train"
) -> "VolumePipeline":
    """Build MONAI transforms from a configuration.

    A step is ``{Name: {argument: value}}`` with the name of a random spatial or intensity transform without the "d" of
    its dictionary form (``RandAffine``, ``RandGaussianNoise``). ``keys`` is not given: spatial transforms get image and
    label, interpolated linearly and by the nearest neighbour, intensity transforms the image.

    Args:
        steps: the transforms, in order.
        key: where they stand in the configuration, for messages.

    Raises:
        ConfigError: an unknown name or an argument that the transform does not take.
    """
    if not steps:
        return VolumePipeline([], spatial=False)
    try:
        import monai.transforms as library
    except ImportError as error:
        raise ConfigError(f"{key}: needs monai: pip install 'vision-gates[volumes]'") from error
    known: dict[str, Any] = {
        name[:-1]: kind
        for name, kind in vars(library).items()
        if inspect.isclass(kind) and name.startswith("Rand") and name.endswith("d")
        if kind.__module__ in (_SPATIAL, _INTENSITY)
    }
    transforms, spatial = [], False
    for step in steps:
        ((name, arguments),) = step.items()
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"{key}: MONAI has no random transform {name!r}; {hint}({', '.join(sorted(known))})")
        kind, options = known[name], dict(arguments or {})
        parameters = inspect.signature(kind).parameters
        unknown = [option for option in options if option not in parameters or option == "keys"]
        if unknown:
            raise ConfigError(f"{key}: {name} has no argument {unknown[0]!r}; it has {', '.join(list(parameters)[1:])}")
        is_spatial = kind.__module__ == _SPATIAL
        if is_spatial and "mode" in parameters:
            options.setdefault("mode", ("bilinear", "nearest"))
        if is_spatial and "padding_mode" in parameters:
            options.setdefault("padding_mode", "border")
        try:
            transforms.append(kind(keys=("image", "label") if is_spatial else ("image",), **options))
        except (TypeError, ValueError, AssertionError) as error:
            raise ConfigError(f"{key}: {name} with {options}: {' '.join(str(error).split())}") from error
        spatial = spatial or (is_spatial and "Flip" not in name and "90" not in name)
    return VolumePipeline(transforms, spatial=spatial)


class VolumePipeline:
    """Transforms in order; each call is a function of its arguments alone.

    Attributes:
        spatial: whether one of them moves voxels by other than flips, so that what lies beyond a patch comes in.
    """

    def __init__(self, transforms: Sequence[Any], *, spatial: bool) -> None:
        self.transforms = list(transforms)
        self.spatial = spatial

    def __call__(
        self, image: NDArray[np.float32], labels: NDArray[Any], *, seed: int
    ) -> tuple[NDArray[np.float32], NDArray[Any]]:
        """Augment one sample.

        Args:
            image: (C, *spatial).
            labels: (*spatial).
            seed: of everything random.
        """
        if not self.transforms:
            return image, labels
        import torch

        states = np.random.SeedSequence(seed).generate_state(len(self.transforms))
        data = {"image": torch.from_numpy(image), "label": torch.from_numpy(labels.astype(np.float32))[None]}
        with _without_metadata():
            for transform, state in zip(self.transforms, states, strict=True):
                transform.set_random_state(seed=int(state))
                data = transform(data)
        changed = np.asarray(data["label"])[0].round().astype(labels.dtype)
        return np.ascontiguousarray(np.asarray(data["image"]), dtype=np.float32), changed


@contextmanager
def _without_metadata() -> Any:
    # MONAI would carry affines and a history along, half of the time of small patches.
    from monai.data.meta_obj import get_track_meta, set_track_meta

    before = get_track_meta()
    set_track_meta(False)
    try:
        yield
    finally:
        set_track_meta(before)
