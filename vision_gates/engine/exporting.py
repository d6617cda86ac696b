"""What ``vision-gates export`` does: a run, or a model by name, as ONNX with its pipeline, checked beforehand."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from vision_gates.config import RunConfig
from vision_gates.datasets.base import load_splits
from vision_gates.engine.building import RunInfo, build_loader, load_run
from vision_gates.engine.evaluation import load_best
from vision_gates.engine.run_directory import RunDirectory
from vision_gates.errors import ConfigError, UserError
from vision_gates.export.onnx import Exported, to_onnx
from vision_gates.export.sidecar import ImageInfo
from vision_gates.networks import available_networks
from vision_gates.volumes.windows import fill_windows, plan_windows, windows

__all__ = ["export"]

_SAMPLES = 2  # real inputs that are compared


@dataclass
class _Subject:
    """A network, and what its file shall say about it."""

    model: nn.Module
    in_chans: int
    size: tuple[int, ...]
    about: dict[str, Any]
    samples: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def export(
    source: str | Path,
    out: str | Path,
    *,
    size: Sequence[int] | None = None,
    dynamic: bool = True,
    half: bool = False,
    opset: int = 18,
    pretrained: bool = False,
) -> tuple[Exported, list[str]]:
    """Write OUT.onnx and OUT.json; compare them with PyTorch on random inputs and, of a run, on its own data.

    Args:
        source: run directory, whose best weights are taken, or the name of a classifier in timm's registry.
        out: the file.
        size: of the network's input, without channels; by default that of the run's images or windows.
        dynamic, half, opset: see :func:`to_onnx`.
        pretrained: of a model by name, take its published weights; else they are random.

    Returns:
        The file, and remarks on it, a line each.

    Raises:
        UserError: no such run or model, an option that cannot be used, or a result that differs from PyTorch's.
    """
    path = Path(source)
    if path.is_dir():
        subject = _run(path)
    elif timm.is_model(str(source)):
        subject = _classifier(str(source), pretrained=pretrained)
    else:
        near = get_close_matches(str(source), timm.list_models(), n=1)
        raise ConfigError(
            f"{source}: neither a run directory nor a model" + (f"; did you mean {near[0]}?" if near else "")
        )
    if size is not None and len(size) != len(subject.size):
        raise ConfigError(f"size={tuple(size)}: {len(subject.size)} numbers are needed, as in {subject.size}")
    done = to_onnx(
        subject.model,
        out,
        input_size=(subject.in_chans, *(subject.size if size is None else size)),
        dynamic=dynamic,
        half=half,
        opset=opset,
        about=subject.about,
        samples=subject.samples if size is None else {},
    )
    return done, subject.notes


def _run(path: Path) -> _Subject:
    config, info = load_run(path)
    model, weights = load_best(RunDirectory(path), config, info)
    views = info.segments
    size = tuple(views.patch_size) if views is not None else tuple(getattr(config.data, "image_size", ()))
    images = None
    if info.volumes is None:
        transforms = tuple(next(iter(entry)) for entry in config.augment.eval)
        images = ImageInfo(size=(size[0], size[1]), mean=info.mean, std=info.std, unknown_transforms=transforms)
    about: dict[str, Any] = {
        "task": config.task.type,
        "class_names": info.class_names,
        "images": images,
        "volumes": views,
        "batch_size": config.data.batch_size,
        "model": config.model.model_dump(mode="json", include={"name", "options", "decoder"}),
        "run": path.resolve().name,
    } | _origin(config.model.name)
    subject = _Subject(model, info.in_chans, size, about, notes=[f"weights: {weights}"])
    try:
        subject.samples = _real_inputs(config, info)
    except (UserError, OSError) as error:  # the data may be elsewhere by now
        subject.notes.append(f"compared on random inputs alone: the run's own data cannot be read ({error})")
    return subject


def _real_inputs(config: RunConfig, info: RunInfo) -> dict[str, NDArray[np.float32]]:
    """Some inputs of the network from the run's validation data, by the names of their files."""
    split = load_splits(config.data).val
    alone = config.model_copy(update={"data": config.data.model_copy(update={"workers": 0, "batch_size": 1})})
    found = {}
    loader = cast(Iterable[dict[str, Any]], build_loader(alone, split, info, train=False))
    for batch in islice(loader, _SAMPLES):
        x_BCS, name = batch["image"].numpy(), str(batch["name"][0])
        if info.volumes is not None:
            x_BCS = _window(x_BCS, info)
        found[name] = np.ascontiguousarray(x_BCS, dtype=np.float32)
    return found


def _window(image_1CXYZ: NDArray[np.float32], info: RunInfo) -> NDArray[np.float32]:
    """The window in the middle of a prepared volume, (1, in_chans, *patch_size)."""
    assert info.volumes is not None
    viewed, _ = info.volumes.viewed(image_1CXYZ[0])
    plan = plan_windows(viewed.shape, **info.volumes.windows(num_classes=len(info.class_names), batch_size=1))
    places = windows(plan)
    batch = np.zeros((1, plan.in_channels, *plan.window), dtype=np.float32)
    fill_windows(plan, viewed, [places[len(places) // 2]], batch)
    return batch if plan.slice_axis is None else batch.squeeze(2 + plan.slice_axis)


def _classifier(name: str, *, pretrained: bool) -> _Subject:
    torch.manual_seed(0)
    try:
        model: Any = timm.create_model(name, pretrained=pretrained)
    except RuntimeError as error:  # there are none, or they are not at hand
        raise ConfigError(f"{name}: {' '.join(str(error).split())}") from error
    config = model.pretrained_cfg
    channels, height, width = config["input_size"]
    images = ImageInfo(size=(height, width), mean=tuple(config["mean"]), std=tuple(config["std"]))
    about = {"task": "classification", "images": images, "model": {"name": name}} | _origin(name)
    notes = [f"weights: {'published' if pretrained else 'random'}"]
    return _Subject(model, channels, (height, width), about, notes=notes)


def _origin(name: str) -> dict[str, Any]:
    """Licence and source of a network, as far as timm's registry knows them; whole networks are under the package's."""
    if name in available_networks():
        return {"licence": "apache-2.0"}
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return {"licence": config.license, "source": config.origin_url} if config is not None else {}
