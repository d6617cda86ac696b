"""What an exported network has to be told about, beside its numbers: everything between a file and a labelled result.

The same JSON stands in the ONNX file's metadata, under the key "vision_gates", and in a file beside it.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vision_gates.errors import ConfigError
from vision_gates.volumes.info import VolumeInfo

__all__ = ["AXES", "METADATA_KEY", "ImageInfo", "Sidecar", "sidecar_path"]

METADATA_KEY = "vision_gates"
AXES = {2: ("height", "width"), 3: ("depth", "height", "width")}
"""Names of the spatial axes of a network's input; a network for volumes calls their x, y and z so."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ImageInfo(_Frozen):
    """How an image file becomes a network's input: resized, scaled to 0..1, normalised."""

    size: tuple[int, int] = Field(description="height and width that images are resized to")
    mean: tuple[float, ...] | None = Field(description="of each channel, in 0..1; none: every image has its own")
    std: tuple[float, ...] | None = Field(description="as mean")
    unknown_transforms: tuple[str, ...] = Field(
        default=(), description="further transforms of the run's evaluation, which only the run itself can apply"
    )


class Sidecar(_Frozen):
    """An exported network: what goes in, what comes out, where it is from."""

    format: Literal["vision-gates-onnx-1"] = "vision-gates-onnx-1"
    task: Literal["classification", "segmentation"]
    spatial_dims: Literal[2, 3] = Field(description="axes of the input after batch and channels")
    in_chans: int
    input_size: tuple[int, ...] = Field(description="the size it was exported for; axes that are not dynamic have it")
    dynamic_axes: tuple[str, ...] = Field(default=("batch",), description="of the input, which may have any size")
    precision: Literal["float32", "float16"] = Field(
        default="float32", description="of weights and products; input and output are float32 in any case"
    )
    class_names: tuple[str, ...] = Field(default=(), description="in label order; none: labels have numbers only")
    images: ImageInfo | None = Field(default=None, description="how image files are read")
    volumes: VolumeInfo | None = Field(
        default=None, description="how volumes are read: orientation, spacing, normalisation, windows and their overlap"
    )
    batch_size: int = Field(default=1, description="windows at a time")
    model: dict[str, Any] = Field(default_factory=dict, description="name, options and decoder of the network")
    licence: str | None = Field(default=None, description="of the network's code and published weights")
    source: str | None = Field(default=None, description="paper or code of the network")
    run: str | None = Field(default=None, description="the training run")
    opset: int = 18
    versions: dict[str, str] = Field(default_factory=dict, description="of what exported it")
    created: str | None = Field(default=None, description="time of the export, UTC")

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the input's axes after batch and channels."""
        return AXES[self.spatial_dims]

    def to_json(self) -> str:
        """Text that :meth:`from_json` reads."""
        return json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, *, source: str | Path) -> "Sidecar":
        """The inverse of :meth:`to_json`.

        Raises:
            ConfigError: the text is another one; ``source`` is the file that is to blame.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            key = " ".join(".".join(map(str, fault["loc"])).split())[:200]
            raise ConfigError(f"{source}: its description does not fit this version ({key}: {fault['msg']})") from error


def sidecar_path(path: str | Path) -> Path:
    """OUT.onnx -> OUT.json."""
    return Path(path).with_suffix(".json")
