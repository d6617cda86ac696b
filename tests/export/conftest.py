"""Runs that were never trained: what a session needs to agree on is the same with random weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from vision_gates.config import parse_config, save_config
from vision_gates.engine.building import RunInfo, build_model
from vision_gates.engine.checkpoint import write_checkpoint
from vision_gates.engine.exporting import export
from vision_gates.engine.run_directory import RunDirectory, to_json
from vision_gates.volumes.info import VolumeInfo
from vision_gates.volumes.preprocessing import ChannelPlan, Preprocessing

NAMES = ("background", "kernel", "shell")


def write_run(place: Path, raw: dict, info: RunInfo) -> Path:
    """A run directory with random weights."""
    config, run = parse_config(raw, [], source="test.yaml"), RunDirectory(place)
    torch.manual_seed(1)
    model = build_model(config, info)
    for module in model.modules():  # as fresh, a classifier's logits are all but equal
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d | torch.nn.Conv3d):
            module.weight.data.mul_(2)
    place.mkdir()
    save_config(config, run.config)
    run.info.write_text(to_json(info.to_dict()))
    write_checkpoint(run.checkpoints, "best", weights=model.state_dict(), state={}, about={})
    return place


def volume_run(place: Path, *, dims: int) -> Path:
    """A run on volumes: patches of a 3-D network, or slices with neighbours of a 2-D one."""
    raw = {
        "task": {"type": "segmentation"},
        "data": {"type": "volumes", "root": "anywhere", "mode": f"{dims}d", "batch_size": 3},
        "model": {"name": "attention_unet", "options": {"widths": [4, 8], "norm": "instance"}},
        "trainer": {"device": "cpu"},
    }
    view = VolumeInfo(
        preprocessing=Preprocessing(spacing=(1.5, 1.5, 2.0), channels=(ChannelPlan(kind="zscore", nonzero=True),)),
        spatial_dims=dims,
        patch_size=(16, 24, 16)[:dims],
        neighbours=3 - dims,
        slice_axis=2 if dims == 3 else 1,
        mirror=dims == 2,
        channel_names=("MRI",),
    )
    info = RunInfo(NAMES, view.in_chans, None, None, None, {}, {}, volumes=view)
    return write_run(place, raw, info)


def image_run(
    place: Path,
    *,
    task: str,
    mean: tuple[float, ...] | None = (0.4,),
    augment: list | None = None,
    root: str | Path = "anywhere",
) -> Path:
    """A run on grey images of 24 x 32."""
    data = {"type": "image_folder"} if task == "classification" else {"type": "image_mask_folder", "num_classes": 3}
    raw = {
        "task": {"type": task},
        "data": data | {"root": str(root), "image_size": [24, 32]},
        "model": {
            "name": "vg_hornet_atto",
            "options": {"dims": [8], "depths": [1], "orders": [2], "filter_sizes": [None]},
        },
        "trainer": {"device": "cpu"},
        "augment": {"eval": augment or []},
    }
    if task == "segmentation":
        raw["model"]["options"]["out_indices"] = [0]
        raw["model"]["decoder"] = {"type": "pyramid", "channels": 8}
    return write_run(place, raw, RunInfo(NAMES, 1, mean, None if mean is None else (0.3,), None, {}, {}))


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def head(tmp_path_factory) -> Path:
    """The middle of nilearn's MNI152 template, 2 mm, axes not in RAS order."""
    datasets = pytest.importorskip("nilearn.datasets")
    nibabel = pytest.importorskip("nibabel")
    image = datasets.load_mni152_template(resolution=2)
    array = np.asarray(image.dataobj, dtype=np.float32)[24:56, 36:68, 24:48]
    affine = np.diag((-2.0, 2.0, 2.0, 1.0))
    path = tmp_path_factory.mktemp("head") / "head.nii.gz"
    nibabel.save(nibabel.Nifti1Image(array[::-1], affine), path)
    return path


RUNS = {
    "slices": lambda place: volume_run(place, dims=2),
    "patches": lambda place: volume_run(place, dims=3),
    "classes": lambda place: image_run(place, task="classification"),
    "masks": lambda place: image_run(place, task="segmentation", mean=None),
    "flipped": lambda place: image_run(place, task="classification", augment=[{"HorizontalFlip": {"p": 1.0}}]),
}


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Callable[..., tuple[Path, Path]]:
    """``exported(kind, ...)``: a run and its network as ONNX, made once; options as of ``export``."""
    done: dict[tuple, tuple[Path, Path]] = {}

    def make(kind: str, **options) -> tuple[Path, Path]:
        key = (kind, *sorted(options.items()))
        if key not in done:
            folder = tmp_path_factory.mktemp(kind)
            run = RUNS[kind](folder / "run")
            export(run, folder / "network.onnx", **options)
            done[key] = run, folder / "network.onnx"
        return done[key]

    return make


@pytest.fixture
def run_with_data(tmp_path) -> Path:
    """A run on images, and its data."""
    cv2 = pytest.importorskip("cv2")
    for split in ("train", "val"):
        for label, name in enumerate(NAMES):
            for number in range(2):
                path = tmp_path / "data" / split / name / f"{name}{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                noise = np.random.default_rng(number).integers(0, 90, (20, 30), dtype=np.uint8)
                cv2.imwrite(str(path), noise + np.uint8(80 * label))
    return image_run(tmp_path / "run", task="classification", root=tmp_path / "data")
