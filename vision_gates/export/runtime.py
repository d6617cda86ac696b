"""Exported networks in ONNX Runtime, from files to labels, with NumPy and the readers of images and volumes alone.

What is done before and after the network is the code that training, ``tools/evaluate.py`` and ``tools/segment.py`` run.
"""

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vision_gates.errors import ConfigError, DataError, UserError
from vision_gates.export.sidecar import METADATA_KEY, Sidecar

if TYPE_CHECKING:
    from vision_gates.volumes.info import VolumeInfo
    from vision_gates.volumes.reading import Volume
    from vision_gates.volumes.windows import InferencePlan

__all__ = ["Session", "VolumeLabeller", "first_line", "needs", "open_session"]


def needs(package: str) -> Any:
    """Import a package of the extra ``export``; `ConfigError` if it is not installed."""
    # ONNX Runtime reports to Microsoft unless told not to before its import (its Privacy.md).
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"this needs {package}: pip install 'vision-gates[export]'") from error


def open_session(path: str | Path, *, threads: int | None = None, device: str = "cpu") -> Any:
    """An ``onnxruntime.InferenceSession``.

    Args:
        path: of the ONNX file.
        threads: of the processor; None leaves them to ONNX Runtime.
        device: "cpu"; "cuda" or "cuda:1", which needs the package onnxruntime-gpu; "auto": a GPU if it can be used.

    Raises:
        ConfigError: onnxruntime or the device is missing, or the file is missing or no ONNX file.
    """
    runtime = needs("onnxruntime")
    if not Path(path).is_file():
        raise ConfigError(f"{path}: there is no such file")
    on_gpu = "CUDAExecutionProvider" in runtime.get_available_providers()
    if device.startswith("cuda") and not on_gpu:
        raise ConfigError(
            f"device={device}: ONNX Runtime finds no GPU here (pip install onnxruntime-gpu); use device=cpu"
        )
    providers: list[Any] = ["CPUExecutionProvider"]
    if on_gpu and device != "cpu":
        providers.insert(0, ("CUDAExecutionProvider", {"device_id": int(device.partition(":")[2] or 0)}))
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # of ONNX Runtime's own types, which share no base
        raise ConfigError(f"{path}: cannot be loaded as ONNX: {first_line(error)}") from error


class Session:
    """A network that ``to_onnx`` or ``tools/export_onnx.py`` wrote, with its description.

    Args:
        path: OUT.onnx; the JSON file beside it is for readers and not needed.
        threads: of the processor; None leaves them to ONNX Runtime.
        device: "cpu"; "cuda" with the package onnxruntime-gpu; "auto".

    Attributes:
        about: the description.

    Raises:
        ConfigError: onnxruntime is missing, or the file is not such a network.
    """

    def __init__(self, path: str | Path, *, threads: int | None = None, device: str = "cpu") -> None:
        self.path = Path(path)
        self._session = open_session(path, threads=threads, device=device)
        try:
            text = self._session.get_modelmeta().custom_metadata_map.get(METADATA_KEY)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: damaged: its description is no UTF-8 ({error.reason})") from error
        if text is None:
            raise ConfigError(f"{path}: was not exported by vision_gates: it says nothing about its input and labels")
        self.about = Sidecar.from_json(text, source=path)

    @property
    def num_classes(self) -> int:
        """Channels of the logits."""
        return int(self._session.get_outputs()[0].shape[1])

    @property
    def class_names(self) -> tuple[str, ...]:
        """In label order; numbers where the network came without names."""
        return self.about.class_names or tuple(map(str, range(self.num_classes)))

    def predict(self, x_BCS: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Map images (B, C, H, W), of volumes (B, C, D, H, W), as the network was trained on them, to logits.

        Raises:
            DataError: the network takes other channels or another size.
        """
        about = self.about
        taken = dict(zip(("batch", *about.axes), ("batch", *about.input_size), strict=True))
        expected = [axis if axis in about.dynamic_axes else size for axis, size in taken.items()]
        expected.insert(1, about.in_chans)
        fits = len(x_BCS.shape) == len(expected) and all(
            isinstance(size, str) or size == found for size, found in zip(expected, x_BCS.shape, strict=True)
        )
        if not fits:
            sizes = ", ".join(map(str, expected))
            fixed = set(about.axes) - set(about.dynamic_axes)
            remedy = "; a network exported without --fixed takes other sizes" if fixed else ""
            raise DataError(f"{self.path}: takes ({sizes}), got {tuple(x_BCS.shape)}{remedy}")
        try:
            (logits,) = self._session.run(None, {"image": np.ascontiguousarray(x_BCS, dtype=np.float32)})
        except Exception as error:  # of ONNX Runtime's own types
            raise UserError(f"{self.path}: fails on {tuple(x_BCS.shape)}: {first_line(error)}") from error
        return logits

    def classify(self, path: str | Path) -> dict[str, float]:
        """The probability of every class for an image file, the largest first.

        Raises:
            DataError: the file is no image, or has other channels; ConfigError: this is no network for image files.
        """
        self._check_task("classification")
        logits_K = self.predict(self.read_image(path)[None])[0].astype(np.float64)
        odds_K = np.exp(logits_K - logits_K.max())
        probabilities = (odds_K / odds_K.sum()).tolist()
        return dict(sorted(zip(self.class_names, probabilities, strict=True), key=lambda item: -item[1]))

    def segment_image(self, path: str | Path) -> NDArray[np.int64]:
        """The label of every pixel of an image file, (H, W) at the file's size.

        Raises:
            As :meth:`classify`.
        """
        from vision_gates.datasets.images import read_image, resize

        self._check_task("segmentation")
        labels_HW = self.predict(self.read_image(path)[None])[0].argmax(axis=0)
        return resize(labels_HW, read_image(Path(path)).shape[:2], labels=True)

    def segment_volume(
        self,
        source: "str | Path | Volume | Sequence[str | Path | Volume]",
        *,
        overlap: float | None = None,
        mirror: bool | None = None,
        batch_size: int | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> "Volume":
        """The label of every voxel of a volume, on the grid of its file; ``write_labels`` writes it.

        Args:
            source: a file, a DICOM folder or a volume that was read; of a network for several channels one each.
            overlap: of neighbouring windows, 0 to 1; by default as in the run.
            mirror: average the mirror images, too; by default as in the run.
            batch_size: windows at a time; by default as in the run.
            progress: called with the number of windows done and of all.

        Raises:
            DataError: a volume that cannot be read, or that does not fit the network; ConfigError: this is no network
                for volumes, or an option that cannot be used.
        """
        from vision_gates.volumes.preprocessing import prepare, restore_labels
        from vision_gates.volumes.reading import Volume, read_volume

        several = source if isinstance(source, Sequence) and not isinstance(source, str) else [source]
        volumes = [one if isinstance(one, Volume) else read_volume(one) for one in several]
        labeller = self.labeller(overlap=overlap, mirror=mirror, batch_size=batch_size)
        prepared = prepare(labeller.info.preprocessing, volumes)
        labels = labeller.predict(prepared.image, progress=progress)
        return Volume(restore_labels(labels, prepared.geometry, prepared.source), prepared.source, volumes[0].source)

    def labeller(
        self, *, overlap: float | None = None, mirror: bool | None = None, batch_size: int | None = None
    ) -> "VolumeLabeller":
        """What labels prepared volumes; options as of :meth:`segment_volume`.

        Raises:
            ConfigError: this is no network for volumes.
        """
        info = self.about.volumes
        if info is None:
            raise ConfigError(f"{self.path}: its network was trained on images, not on volumes")
        changes = {"overlap": overlap, "mirror": mirror}
        info = info.model_copy(update={key: value for key, value in changes.items() if value is not None})
        return VolumeLabeller(self, info, batch_size=batch_size or self.about.batch_size)

    def read_image(self, path: str | Path) -> NDArray[np.float32]:
        """An image file as the network sees it, (C, H, W).

        Raises:
            As :meth:`classify`.
        """
        from vision_gates.datasets.images import normalise, read_image, resize, set_channels, to_float

        info, channels, path = self.about.images, self.about.in_chans, Path(path)
        if info is None:
            raise ConfigError(f"{self.path}: says nothing about image files; give predict() an array")
        if info.unknown_transforms:
            names = ", ".join(info.unknown_transforms)
            raise ConfigError(f"{self.path}: its run evaluates images after {names}; give predict() an array")
        image = read_image(path)
        if (image.shape[2], channels) in ((1, 3), (3, 1)):
            image = set_channels(image, 1 if channels == 1 else 3, path)
        if image.shape[2] != channels:
            raise DataError(f"{path}: {image.shape[2]} channels, the network was trained on {channels}")
        image_HWC = normalise(resize(to_float(image), info.size), info.mean, info.std)
        return np.ascontiguousarray(image_HWC.transpose(2, 0, 1), dtype=np.float32)

    def _check_task(self, task: str) -> None:
        if self.about.task != task:
            raise ConfigError(f"{self.path}: is a network for {self.about.task}, not for {task}")


class VolumeLabeller:
    """A network in ONNX Runtime that labels whole volumes, window by window, as the engine's ``VolumePredictor``.

    Args:
        session: logits of windows.
        info: what its windows are.
        batch_size: windows at a time.
    """

    def __init__(self, session: Session, info: "VolumeInfo", *, batch_size: int) -> None:
        self.session, self.info, self.batch_size = session, info, batch_size

    def predict(
        self, image_CXYZ: NDArray[np.float32], *, progress: Callable[[int, int], None] | None = None
    ) -> NDArray[Any]:
        """Map (C, X, Y, Z), its axes in RAS order, to labels (X, Y, Z)."""
        from vision_gates.volumes.blending import label_windows

        viewed, back = self.info.viewed(image_CXYZ)
        return back(label_windows(self.session.predict, viewed, self._plan(viewed.shape), progress=progress))

    def plan(self, shape: Sequence[int]) -> "InferencePlan":
        """What ``predict`` will do with an image (C, X, Y, Z), and the memory that it takes."""
        viewed, _ = self.info.viewed(np.broadcast_to(np.uint8(0), tuple(shape)))
        return self._plan(viewed.shape)

    def _plan(self, shape: Sequence[int]) -> "InferencePlan":
        from vision_gates.volumes.windows import plan_windows

        return plan_windows(
            shape, **self.info.windows(num_classes=self.session.num_classes, batch_size=self.batch_size)
        )


def first_line(error: Exception) -> str:
    """What a library says went wrong, without the lines on where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
