"""Augmentation of whole batches of slices or patches, on the device that trains.

What MONAI's transforms do sample by sample in the workers takes 15 ms of a core and slice of 256 x 256; a GPU that
trains on 1,500 of these a second would need more than twenty cores. Here the samples of a batch are transformed
together, each by its own random numbers. The steps and their usual ranges are nnU-Net's (Isensee et al., Nature Methods
2021, arXiv 1904.08128, supplement 4), written as tensor operations.

A step is a class: its fields are the keys of the configuration, its call transforms a batch.
"""

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from vision_gates.errors import ConfigError

__all__ = ["STEPS", "BatchAugmentation", "build_batch_augmentation"]


def _ordered(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError("the first number must not be above the second")
    return value


Probability = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[tuple[float, float], AfterValidator(_ordered)]
PositiveRange = Annotated[tuple[Annotated[float, Field(gt=0)], Annotated[float, Field(gt=0)]], AfterValidator(_ordered)]


class _Batch:
    """What a step works on.

    Attributes:
        image: (B, C, *spatial) float32.
        target: (B, *spatial) integers.
        size: of a sample when all is done; before `Spatial` samples are wider.
        spacing: millimetres between voxels.
        modalities: channels that have their own random numbers; C is a multiple, neighbouring slices share them.
        rng: of parameters.
        generator: of noise, on the device.
    """

    def __init__(
        self,
        image: Tensor,
        target: Tensor,
        *,
        size: tuple[int, ...],
        spacing: tuple[float, ...],
        modalities: int,
        seed: int,
    ) -> None:
        self.image, self.target = image, target
        self.size, self.spacing, self.modalities = size, spacing, modalities
        self.rng = np.random.default_rng(seed)
        self.generator = torch.Generator(image.device).manual_seed(int(self.rng.integers(2**31)))

    def numbers(self, values: NDArray[Any]) -> Tensor:
        """Numbers on the device, to be multiplied with images: (B,) or (B, modalities) to (B, 1 or C, 1, ...)."""
        values = values[:, None] if values.ndim == 1 else np.tile(values, self.image.shape[1] // values.shape[1])
        tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(self.image.device)
        return tensor.reshape(*values.shape, *(1,) * (self.image.ndim - 2))

    def draw(self, prob: float, limits: tuple[float, float], *, neutral: float) -> NDArray[Any]:
        """A number for every modality of the samples that are chosen, the neutral one for others: (B, modalities)."""
        shape = (len(self.image), self.modalities)
        chosen = self.rng.random((shape[0], 1)) < prob
        return np.where(chosen, self.rng.uniform(*limits, shape), neutral)


class Step(BaseModel):
    """One transform; ``prob`` is the share of the samples that it changes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prob: Probability = 0.2

    def __call__(self, batch: _Batch) -> None:
        """Change the batch in place."""
        raise NotImplementedError


class Spatial(Step):
    """Rotation, zoom, shear, shift, mirroring and elastic deformation in one interpolation.

    Image: linear, labels: nearest neighbour; beyond the sample are zeros. Angles are those in millimetres.

    Attributes:
        rotate: degrees, at most, either way; in 3-D about each axis, or three numbers.
        scale: factor of sizes, the same along all axes.
        stretch: further factor of each axis by itself, at most 1 + stretch and at least 1 / (1 + stretch).
        shear: at most.
        shift: of the sample's side, at most, either way.
        flip: axes that are mirrored, each in half of the samples, ``prob`` or not.
        elastic: voxels that a place is moved by, as the standard deviation of a smooth random field.
        elastic_cells: of that field along an axis; more make it rougher.
        elastic_prob: share of the samples that are deformed.
    """

    prob: Probability = 0.7
    rotate: float | tuple[float, float, float] = 0.0
    scale: PositiveRange = (1.0, 1.0)
    stretch: float = Field(default=0.0, ge=0)
    shear: float = Field(default=0.0, ge=0)
    shift: float = Field(default=0.0, ge=0)
    flip: tuple[int, ...] = ()
    elastic: float = Field(default=0.0, ge=0)
    elastic_cells: int = Field(default=5, ge=2)
    elastic_prob: Probability = 0.2

    def __call__(self, batch: _Batch) -> None:
        """Move the batch's voxels, cut to the final size."""
        image, rng = batch.image, batch.rng
        have, want = np.array(image.shape[2:], dtype=float), np.array(batch.size, dtype=float)
        matrices, shifts = self._affine(rng, len(image), want, np.array(batch.spacing))
        # grid_sample speaks of places from -1 to 1, x first, of both the wide sample and the result.
        theta = matrices * want / have[:, None]
        theta = np.concatenate([theta, (2 * shifts / have)[:, :, None]], axis=2)
        theta = np.concatenate([theta[:, ::-1, -2::-1], theta[:, ::-1, -1:]], axis=2)
        grid = F.affine_grid(
            torch.from_numpy(np.ascontiguousarray(theta, dtype=np.float32)).to(image.device),
            [len(image), 1, *batch.size],
            align_corners=False,
        )
        chosen = rng.random(len(image)) < self.elastic_prob
        if self.elastic > 0 and chosen.any():
            grid = grid + self._field(batch, chosen, have)
        batch.image = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        labels = batch.target.to(torch.float32).unsqueeze(1)
        moved = F.grid_sample(labels, grid, mode="nearest", padding_mode="zeros", align_corners=False)
        batch.target = moved.squeeze(1).to(batch.target.dtype)

    def _affine(
        self, rng: np.random.Generator, count: int, size: NDArray[Any], spacing: NDArray[Any]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """From a place in the result to one in the sample, both in voxels from the centre: (B, D, D) and (B, D)."""
        dims = len(size)
        chosen = rng.random(count) < self.prob
        matrices = np.broadcast_to(np.eye(dims), (count, dims, dims)).copy()
        limits = np.radians(np.broadcast_to(self.rotate, 1 if dims == 2 else 3))
        angles = rng.uniform(-limits, limits, (count, len(limits)))
        for angle, (a, b) in zip(angles.T, [(0, 1)] if dims == 2 else [(1, 2), (0, 2), (0, 1)], strict=True):
            turn = np.broadcast_to(np.eye(dims), (count, dims, dims)).copy()
            turn[:, a, a] = turn[:, b, b] = np.cos(angle)
            turn[:, a, b], turn[:, b, a] = -np.sin(angle), np.sin(angle)
            matrices = matrices @ turn
        skew = np.broadcast_to(np.eye(dims), (count, dims, dims)).copy()
        off = ~np.eye(dims, dtype=bool)
        skew[:, off] = rng.uniform(-self.shear, self.shear, (count, off.sum()))
        low, high = np.log(self.scale)
        zoom = rng.uniform(low, high, (count, 1)) + rng.uniform(-1, 1, (count, dims)) * math.log1p(self.stretch)
        matrices = matrices @ skew / np.exp(zoom)[:, None, :]
        matrices = matrices * spacing / spacing[:, None]  # from voxels to millimetres, and back
        shifts = rng.uniform(-self.shift, self.shift, (count, dims)) * size
        matrices = np.where(chosen[:, None, None], matrices, np.eye(dims))
        shifts = np.where(chosen[:, None], shifts, 0.0)
        signs = np.ones((count, dims))
        signs[:, list(self.flip)] = rng.choice([-1.0, 1.0], (count, len(self.flip)))
        return matrices * signs[:, None, :], shifts

    def _field(self, batch: _Batch, chosen: NDArray[np.bool_], have: NDArray[Any]) -> Tensor:
        count, dims = len(chosen), len(batch.size)
        cells = batch.rng.normal(size=(count, dims, *(self.elastic_cells,) * dims)) * self.elastic
        cells *= chosen.reshape(-1, *(1,) * (dims + 1)) * (2 / have).reshape(dims, *(1,) * dims)
        coarse = torch.from_numpy(cells[:, ::-1].astype(np.float32)).to(batch.image.device)
        mode = "bicubic" if dims == 2 else "trilinear"
        return F.interpolate(coarse, size=batch.size, mode=mode, align_corners=True).movedim(1, -1)


class Noise(Step):
    """Gaussian noise; ``std`` is drawn from 0 to the given one."""

    std: float = Field(default=0.1, ge=0)

    def __call__(self, batch: _Batch) -> None:
        """Add noise."""
        std = batch.numbers(batch.draw(self.prob, (0.0, self.std), neutral=0.0))
        noise = torch.empty_like(batch.image).normal_(generator=batch.generator)
        batch.image = torch.addcmul(batch.image, noise, std)


class Blur(Step):
    """Gaussian blur; ``sigma`` in voxels."""

    sigma: PositiveRange = (0.5, 1.0)

    def __call__(self, batch: _Batch) -> None:
        """Convolve axis by axis."""
        image, dims = batch.image, batch.image.ndim - 2
        sigmas = batch.draw(self.prob, self.sigma, neutral=1e-3)  # so narrow that nothing happens
        sigmas = np.tile(sigmas, image.shape[1] // sigmas.shape[1]).ravel()
        radius = math.ceil(3 * self.sigma[1])
        taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigmas[:, None]) ** 2)
        taps /= taps.sum(axis=1, keepdims=True)
        weight = torch.from_numpy(taps.astype(np.float32)).to(image.device)
        convolve = F.conv2d if dims == 2 else F.conv3d
        flat = image.reshape(1, -1, *image.shape[2:])
        for axis in range(dims):
            shape = [1] * dims
            shape[axis] = 2 * radius + 1
            edges = [0] * (2 * dims)
            edges[2 * (dims - 1 - axis)] = edges[2 * (dims - 1 - axis) + 1] = radius
            padded = F.pad(flat, edges, mode="replicate")
            flat = convolve(padded, weight.reshape(-1, 1, *shape), groups=flat.shape[1])
        batch.image = flat.reshape(image.shape)


class Brightness(Step):
    """Intensities times a factor, and plus an offset."""

    factor: PositiveRange = (0.75, 1.25)
    offset: float = Field(default=0.0, ge=0)

    def __call__(self, batch: _Batch) -> None:
        """Multiply and add."""
        factor = batch.numbers(batch.draw(self.prob, self.factor, neutral=1.0))
        offset = batch.numbers(batch.draw(self.prob, (-self.offset, self.offset), neutral=0.0))
        batch.image = torch.addcmul(offset, batch.image, factor)


class Contrast(Step):
    """Distance from the sample's mean times a factor, within the range of intensities that was there."""

    factor: PositiveRange = (0.75, 1.25)

    def __call__(self, batch: _Batch) -> None:
        """Stretch or press together."""
        axes = tuple(range(2, batch.image.ndim))
        mean = batch.image.mean(dim=axes, keepdim=True)
        low, high = batch.image.amin(dim=axes, keepdim=True), batch.image.amax(dim=axes, keepdim=True)
        factor = batch.numbers(batch.draw(self.prob, self.factor, neutral=1.0))
        batch.image = torch.lerp(mean, batch.image, factor).clamp(low, high)


class BiasField(Step):
    """Intensities above the sample's lowest times a smooth random field, as of a receiver coil.

    Attributes:
        strength: standard deviation of the field's logarithm.
        cells: of the field along an axis.
    """

    strength: float = Field(default=0.2, ge=0)
    cells: int = Field(default=4, ge=2)

    def __call__(self, batch: _Batch) -> None:
        """Multiply by the field."""
        image, dims = batch.image, batch.image.ndim - 2
        shape = (len(image), batch.modalities, *(self.cells,) * dims)
        coarse = batch.rng.normal(size=shape) * self.strength
        coarse *= (batch.rng.random(len(image)) < self.prob).reshape(-1, *(1,) * (dims + 1))
        field = torch.from_numpy(coarse.astype(np.float32)).to(image.device)
        mode = "bicubic" if dims == 2 else "trilinear"
        field = F.interpolate(field, size=image.shape[2:], mode=mode, align_corners=True).exp()
        low = image.amin(dim=tuple(range(2, image.ndim)), keepdim=True)
        repeats = image.shape[1] // batch.modalities
        batch.image = torch.addcmul(low, image - low, field.repeat(1, repeats, *(1,) * dims))


class LowResolution(Step):
    """As if taken with larger voxels: made smaller by ``factor`` (nearest neighbour) and larger again (linear)."""

    factor: PositiveRange = (0.5, 1.0)

    def __call__(self, batch: _Batch) -> None:
        """Resample the chosen samples, one at a time, as each has its own size in between."""
        image, rng = batch.image, batch.rng
        factors = rng.uniform(*self.factor, len(image))
        mode = "bilinear" if image.ndim == 4 else "trilinear"
        result = list(image.unbind(0))
        for index in np.flatnonzero(rng.random(len(image)) < self.prob):
            small = [max(1, round(side * float(factors[index]))) for side in image.shape[2:]]
            coarse = F.interpolate(image[index : index + 1], size=small, mode="nearest-exact")
            result[index] = F.interpolate(coarse, size=image.shape[2:], mode=mode, align_corners=False)[0]
        batch.image = torch.stack(result)


class Gamma(Step):
    """Power of the intensities, taken from 0 to 1 within the sample; mean and deviation stay as they were.

    Attributes:
        gamma: the exponent.
        invert: share of the changed samples whose intensities are turned round for it.
    """

    gamma: PositiveRange = (0.7, 1.5)
    invert: Probability = 0.25

    def __call__(self, batch: _Batch) -> None:
        """Bend the scale of intensities."""
        axes = tuple(range(2, batch.image.ndim))
        exponents = batch.draw(self.prob, self.gamma, neutral=1.0)
        turned = batch.rng.random((len(exponents), 1)) < self.invert
        sign = batch.numbers(np.where(turned & (exponents != 1.0), -1.0, 1.0))
        image = batch.image * sign
        std, mean = torch.std_mean(image, dim=axes, keepdim=True, correction=0)
        low, high = image.amin(dim=axes, keepdim=True), image.amax(dim=axes, keepdim=True)
        span = (high - low).clamp_min(1e-7)
        bent = ((image - low) / span).pow(batch.numbers(exponents))
        new_std, new_mean = torch.std_mean(bent, dim=axes, keepdim=True, correction=0)
        batch.image = ((bent - new_mean) * (std / new_std.clamp_min(1e-7)) + mean) * sign


STEPS: dict[str, type[Step]] = {
    step.__name__: step for step in (Spatial, Noise, Blur, Brightness, Contrast, BiasField, LowResolution, Gamma)
}


class BatchAugmentation:
    """Steps in order; each call is a function of its arguments alone.

    Args:
        steps: transforms.
        size: of a sample when all is done.
        spacing: millimetres between its voxels; None: equal along all axes.
        modalities: of the channels; the others are neighbouring slices of these.
    """

    margin: ClassVar[float] = 0.125  # on each side, of samples that `Spatial` turns

    def __init__(
        self,
        steps: Sequence[Step],
        *,
        size: Sequence[int],
        spacing: Sequence[float] | None = None,
        modalities: int = 1,
    ) -> None:
        self.steps, self.size, self.modalities = tuple(steps), tuple(size), modalities
        self.spacing = (1.0,) * len(self.size) if spacing is None else tuple(spacing)

    @property
    def sample_size(self) -> tuple[int, ...]:
        """What samples have to be cut to."""
        if not any(isinstance(step, Spatial) for step in self.steps):
            return self.size
        return tuple(side + 2 * math.ceil(self.margin * side) for side in self.size)

    def __call__(self, image: Tensor, target: Tensor, *, seed: int) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            image: (B, C, *sample_size) float32.
            target: (B, *sample_size) integers.
            seed: of everything random.

        Returns:
            (B, C, *size) and (B, *size).
        """
        if not self.steps:
            return image, target
        batch = _Batch(image, target, size=self.size, spacing=self.spacing, modalities=self.modalities, seed=seed)
        for step in self.steps:
            step(batch)
        return batch.image, batch.target


def build_batch_augmentation(
    steps: Sequence[Mapping[str, Mapping[str, Any] | None]],
    *,
    size: Sequence[int],
    spacing: Sequence[float] | None = None,
    modalities: int = 1,
    key: str = "augment.batch",
) -> BatchAugmentation:
    """Build the steps of a configuration, each ``{Name: {field: value}}`` with a name of `STEPS`.

    Raises:
        ConfigError: an unknown step or field, a value out of range, `Spatial` not first, an axis that is not there.
    """
    built: list[Step] = []
    for step in steps:
        ((name, fields),) = step.items()
        if name not in STEPS:
            near = difflib.get_close_matches(name, STEPS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(f"{key}: there is no {name!r}; {hint}({', '.join(STEPS)})")
        try:
            made = STEPS[name].model_validate(dict(fields or {}))
        except ValidationError as error:
            first = error.errors()[0]
            field, own = ".".join(map(str, first["loc"])), ", ".join(STEPS[name].model_fields)
            reason = (
                f"it has {own}" if first["type"] == "extra_forbidden" else f"{first['msg']}, got {first['input']!r}"
            )
            raise ConfigError(f"{key}: {name}.{field}: {reason}") from error
        if isinstance(made, Spatial):
            if built:
                raise ConfigError(f"{key}: Spatial must be the first step, and there can be only one")
            if any(not 0 <= axis < len(size) for axis in made.flip):
                raise ConfigError(f"{key}: Spatial.flip: axes 0 to {len(size) - 1} are there, got {list(made.flip)}")
            if len(size) == 2 and not isinstance(made.rotate, float):
                raise ConfigError(f"{key}: Spatial.rotate: one number is needed for slices, got {list(made.rotate)}")
        built.append(made)
    return BatchAugmentation(built, size=size, spacing=spacing, modalities=modalities)
