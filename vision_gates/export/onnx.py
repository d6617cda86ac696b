"""Networks to ONNX: a graph for any batch and, where the network allows, any image size, checked in ONNX Runtime.

The exporter is PyTorch's (``torch.onnx.export(dynamo=True)``). Input and output are float32 also where weights and
products are float16. The file appears under its name when it has passed the check, or not at all.
"""

import contextlib
import copy
import io
import logging
import os
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import vision_gates
from vision_gates.errors import ConfigError, UserError
from vision_gates.export.pooling import PoolingAsProducts
from vision_gates.export.regions import write_out
from vision_gates.export.runtime import first_line, needs, open_session
from vision_gates.export.sidecar import AXES, METADATA_KEY, Sidecar, sidecar_path
from vision_gates.kernels.launching import single_nodes

__all__ = ["LIMITS", "OPSETS", "Difference", "Exported", "ParityError", "to_onnx"]

OPSETS = range(18, 24)
LIMITS = {"float32": 1e-4, "float16": 1e-2}
"""Largest difference from PyTorch in float32 that passes, relative to the largest output."""

# What a graph of open size is traced with: no axis is like another, or 1, or so small that a level of the network
# becomes a single position, since the trace would take any of these for a rule.
_TRACED = {2: (608, 736), 3: (96, 160, 128)}
_BATCH = 2


class ParityError(UserError):
    """The exported network computes something else than PyTorch."""


@dataclass(frozen=True)
class Difference:
    """Of ONNX Runtime's result from PyTorch's, on one input."""

    name: str
    shape: tuple[int, ...]
    largest: float
    relative: float

    def __str__(self) -> str:
        size = " x ".join(map(str, self.shape))
        return f"{self.name} {size}: max |difference| {self.largest:.2e}, relative {self.relative:.2e}"


@dataclass(frozen=True)
class Exported:
    """What an export gave: the file, the description in it, and how it was checked."""

    path: Path
    about: Sidecar
    differences: tuple[Difference, ...]
    nodes: int
    seconds: float


def to_onnx(
    model: nn.Module,
    path: str | Path,
    *,
    input_size: Sequence[int],
    dynamic: bool = True,
    half: bool = False,
    opset: int = OPSETS[0],
    about: Mapping[str, Any] | None = None,
    samples: Mapping[str, NDArray[np.float32]] | None = None,
) -> Exported:
    """Write a network as ONNX, compare ONNX Runtime's results with PyTorch's, and write what it is beside it.

    All networks of this package take any batch and any height and width (and depth) in ONNX, too. An encoder of timm's
    that is built for one size stays so: ``Exported.about.dynamic_axes`` says which axes are open.

    Args:
        model: maps (B, *input_size) to logits, in evaluation mode; it is left as it is. On any device.
        path: of the file, which is replaced; its description goes to the same name with ``.json``.
        input_size: (C, H, W), of volumes (C, D, H, W): the size of a graph without dynamic axes, and of the check.
        dynamic: leave the spatial axes open where the network allows; False fixes them.
        half: weights and products in float16: half the size, and on GPUs about twice the speed. Where ONNX Runtime has
            no float16 operator, as for most on CPUs, it converts there and back.
        opset: of ONNX, 18 to 23.
        about: fields of :class:`Sidecar` that a network does not know of itself, such as ``class_names``.
        samples: name to an input (B, C, *size), real ones, that are compared besides random ones.

    Returns:
        The description and the differences.

    Raises:
        ConfigError: an argument that cannot be used, a network that cannot be exported, or a package that is missing.
        ParityError: a result differs by more than :data:`LIMITS`; no file is left.
    """
    began = time.perf_counter()
    path = Path(path)
    _check(path, input_size, opset)
    for package in ("onnx", "onnxscript", "onnxruntime"):
        needs(package)
    precision = "float16" if half else "float32"
    spatial_dims = len(input_size) - 1
    reference = _prepared(model)
    network = _Float32Ends(copy.deepcopy(reference).half()) if half else reference
    graph, opened = _traced(network, tuple(input_size), dynamic=dynamic, opset=opset)
    sidecar = Sidecar.model_validate(
        {"task": "segmentation" if _is_dense(graph) else "classification"}
        | dict(about or {})
        | dict(
            spatial_dims=spatial_dims,
            in_chans=input_size[0],
            input_size=tuple(input_size[1:]),
            dynamic_axes=("batch", *(AXES[spatial_dims] if opened else ())),
            precision=precision,
            opset=opset,
            versions=_versions(),
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),  # noqa: UP017 (Python 3.10 has no UTC)
        )
    )
    _tidy(graph, sidecar)
    writing = path.with_name(f".{path.name}.writing")
    try:
        graph.save(str(writing), external_data=False)
        try:
            differences = _compare(reference, writing, sidecar, samples or {})
        except ParityError as error:
            raise ParityError(f"{path}: {error}; not written") from error
        worst = max(differences, key=lambda difference: difference.relative)
        if not worst.relative <= LIMITS[precision]:  # NaN does not pass
            raise ParityError(f"{path}: differs from PyTorch by more than {LIMITS[precision]:g}: {worst}; not written")
        described = sidecar_path(path)
        writing_json = described.with_name(f".{described.name}.writing")
        writing_json.write_text(sidecar.to_json(), encoding="utf-8")
        os.replace(writing, path)
        os.replace(writing_json, described)
    finally:
        writing.unlink(missing_ok=True)
    nodes = len(list(graph.model.graph))
    return Exported(path, sidecar, tuple(differences), nodes, time.perf_counter() - began)


def _check(path: Path, input_size: Sequence[int], opset: int) -> None:
    if path.suffix.lower() != ".onnx":
        raise ConfigError(f"{path}: the file's name must end in .onnx")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: there is no folder {path.parent}; make it first")
    if len(input_size) not in (3, 4) or min(input_size) < 1:
        raise ConfigError(
            f"input_size={tuple(input_size)}: (channels, height, width) or (channels, depth, height, width)"
        )
    if opset not in OPSETS:
        raise ConfigError(f"opset={opset}: is not supported; choose one from {OPSETS[0]} to {OPSETS[-1]}")


class _Float32Ends(nn.Module):
    """A network in float16 whose input and output are float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.half()).float()


def _prepared(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in float32 and evaluation mode."""
    network = copy.deepcopy(model).cpu().float().eval()
    for module in network.modules():
        # PyTorch's translation of a 3-D convolution without a bias makes up a bias of a wrong shape.
        if isinstance(module, nn.Conv3d) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros_like(module.weight[:, 0, 0, 0, 0]))
    return network


def _traced(network: nn.Module, input_size: tuple[int, ...], *, dynamic: bool, opset: int) -> tuple[Any, bool]:
    """The ONNX program, and whether its spatial axes are open."""
    channels, *size = input_size
    if dynamic:
        # A network of one size refuses another, or the trace finds that its axes are not open: it says so in many ways.
        with contextlib.suppress(Exception):
            return _export(network, (_BATCH, channels, *_TRACED[len(size)]), opened=True, opset=opset), True
    try:
        return _export(network, (_BATCH, *input_size), opened=False, opset=opset), False
    except Exception as error:
        what = f"{type(network).__name__} cannot be exported for an input of {input_size}"
        raise ConfigError(f"{what}: {first_line(error)}") from error


def _export(network: nn.Module, shape: tuple[int, ...], *, opened: bool, opset: int) -> Any:
    """The ONNX program of a trace with an input of this shape; its batch is open, and its size if ``opened``."""
    open_axes = {axis: torch.export.Dim.DYNAMIC for axis in (range(len(shape)) if opened else (0,)) if axis != 1}
    with _quiet(), torch.no_grad():
        with single_nodes() as functions:
            with PoolingAsProducts():
                program = torch.export.export(network, (torch.zeros(shape),), dynamic_shapes=(open_axes,), strict=False)
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=["image"],
                output_names=["logits"],
                optimize=False,  # its search for patterns grows with the square of the graph
                verbose=False,
            )
        write_out(exported.model, functions, opset=opset)
    if len(exported.model.graph.outputs) != 1:
        raise ValueError(f"it gives {len(exported.model.graph.outputs)} results, not logits alone")
    return exported


def _is_dense(graph: Any) -> bool:
    return len(graph.model.graph.outputs[0].shape) > 2


def _tidy(graph: Any, about: Sidecar) -> None:
    """Fold constants, drop what nobody reads, name the axes, and put the description in."""
    import onnx_ir.passes.common as passes
    from onnxscript import optimizer

    model = graph.model
    with _quiet():
        optimizer.fold_constants(model, onnx_shape_inference=False)
        for clean in (
            passes.CommonSubexpressionEliminationPass(),
            passes.LiftConstantsToInitializersPass(),
            passes.DeduplicateInitializersPass(),
            passes.RemoveUnusedNodesPass(),
            passes.RemoveUnusedFunctionsPass(),
            passes.ClearMetadataAndDocStringPass(),  # traces of the source code, with its paths
        ):
            clean(model)
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None  # in the trace's symbols; whoever loads the graph infers shapes anew
    _name_axes(model.graph.inputs[0], ("batch", "channels", *about.axes))
    _name_axes(model.graph.outputs[0], ("batch", "classes", *about.axes))
    model.metadata_props[METADATA_KEY] = about.to_json()
    model.producer_name, model.producer_version = "vision_gates", vision_gates.__version__


def _name_axes(value: Any, names: Sequence[str]) -> None:
    from onnx_ir import Shape

    value.shape = Shape(
        [size if isinstance(size, int) else name for size, name in zip(value.shape, names, strict=False)]
    )


def _compare(
    model: nn.Module, path: Path, about: Sidecar, samples: Mapping[str, NDArray[np.float32]]
) -> list[Difference]:
    """Of the file's results from the network's, on random inputs and on samples."""
    rng = np.random.default_rng(0)
    shapes = {"random": (1, *about.input_size), "random batch": (3, *about.input_size)}
    if len(about.dynamic_axes) > 1:
        shapes["random, another size"] = (1, *_another_size(model, about))
    inputs = {
        name: rng.standard_normal((batch, about.in_chans, *size), dtype=np.float32)
        for name, (batch, *size) in shapes.items()
    }
    session = open_session(path, threads=torch.get_num_threads())
    differences = []
    for name, x in {**inputs, **samples}.items():
        try:
            with torch.inference_mode():
                expected = model(torch.from_numpy(x)).numpy()
        except (AssertionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"{type(model).__name__} fails on {name} {x.shape}: {first_line(error)}") from error
        try:
            (result,) = session.run(None, {session.get_inputs()[0].name: x})
        except Exception as error:  # ONNX Runtime has a type for each of its status codes
            raise ParityError(
                f"ONNX Runtime fails on {name} {x.shape}, for one size (--fixed, dynamic=False) it may not: "
                f"{first_line(error)}"
            ) from error
        if result.shape != expected.shape:
            raise ParityError(f"gives {result.shape} for {name} {x.shape}, PyTorch {expected.shape}")
        largest = float(np.abs(result - expected).max())
        scale = float(np.abs(expected).max())
        differences.append(Difference(name, x.shape, largest, largest / scale if scale else largest))
    return differences


def _another_size(model: nn.Module, about: Sidecar) -> tuple[int, ...]:
    """A little larger; of a network that takes multiples of its patches alone, the next of 32."""
    larger = tuple(size + size // 4 + 3 for size in about.input_size)
    try:
        with torch.inference_mode():
            model(torch.zeros(1, about.in_chans, *larger))
    except (AssertionError, RuntimeError, ValueError):
        return tuple((size + 31) // 32 * 32 for size in larger)
    return larger


def _versions() -> dict[str, str]:
    packages = ("torch", "timm", "onnx", "onnxscript", "onnxruntime")
    return {"vision_gates": vision_gates.__version__} | {name: version(name) for name in packages}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on itself; what matters raises."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
