"""Sessions: the same labels as PyTorch's run, from the same files, without PyTorch."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from rich.console import Console

import vision_gates
from vision_gates.datasets.base import Sample, Split
from vision_gates.engine.building import build_loader, load_run
from vision_gates.engine.data import resize
from vision_gates.engine.evaluation import load_best
from vision_gates.engine.run_directory import RunDirectory
from vision_gates.engine.segmenting import SegmentOptions, segment
from vision_gates.errors import ConfigError, DataError
from vision_gates.export import Session
from vision_gates.volumes.reading import read_labels, read_volume

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("onnxscript", reason="the [export] extra is not installed")
pytest.importorskip("onnxruntime", reason="the [export] extra is not installed")

NAMES = ("background", "kernel", "shell")
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115
CPU = SegmentOptions(device="cpu", report=False)


class OneImage(Split):
    """A file as the engine's evaluation reads it."""

    def __init__(self, path):
        self.names, self.path = [path.name], path

    def read(self, index):
        from vision_gates.datasets.images import read_image

        return Sample(read_image(self.path), 0, self.path.name)


def torch_logits(run, path):
    """Of a run on images, as an evaluation computes them."""
    config, info = load_run(run)
    model, _ = load_best(RunDirectory(run), config, info)
    config = config.model_copy(update={"task": config.task, "data": config.data.model_copy(update={"workers": 0})})
    batch = next(iter(build_loader(config, OneImage(path), info, train=False)))
    with torch.no_grad():
        return model.eval()(batch["image"])[0].numpy()


@pytest.fixture
def picture(tmp_path):
    """A grey image of 31 x 40."""
    path = tmp_path / "picture.png"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 255, (31, 40), dtype=np.uint8))
    return path


@pytest.mark.parametrize("kind", ["patches", "slices"])
def test_masks_of_a_volume_are_those_of_the_run(kind, exported, head, tmp_path):
    run, path = exported(kind)
    labels = Session(path, threads=1).segment_volume(head)
    (mask,) = segment(head, tmp_path / "torch.nii.gz", run, CPU, console=QUIET)
    expected = read_labels(mask)
    assert len(np.unique(expected.array)) > 1 and labels.geometry.differences(expected.geometry) == []
    assert (labels.array == expected.array).mean() >= 0.9999
    (mask,) = segment(head, tmp_path / "onnx.nii.gz", path, CPU, console=QUIET)  # tools/segment.py --checkpoint
    np.testing.assert_array_equal(read_labels(mask).array, labels.array)
    assert nibabel.load(mask).affine.tolist() == nibabel.load(head).affine.tolist()


def test_options_of_a_volume_are_those_of_segment(exported, head, tmp_path):
    run, path = exported("patches")
    options = CPU.model_copy(update={"overlap": 0.0, "mirror": True, "batch_size": 2, "report": True})
    steps = []
    labels = Session(path, threads=1).segment_volume(
        [read_volume(head)], overlap=0.0, mirror=True, batch_size=2, progress=lambda *step: steps.append(step)
    )
    (mask,) = segment(head, tmp_path / "torch" / "m.nii.gz", run, options, console=QUIET)
    assert (labels.array == read_labels(mask).array).mean() >= 0.9999
    assert steps[-1][0] == steps[-1][1] == len(steps) * 2 - steps[-1][1] % 2
    (again,) = segment(head, tmp_path / "onnx" / "m.nii.gz", path, options, console=QUIET)
    np.testing.assert_array_equal(read_labels(again).array, labels.array)
    pages = [(tmp_path / name / "m_report.html").read_text() for name in ("torch", "onnx")]
    assert "gate" in pages[0] and "attention gate" not in pages[1] and "kernel" in pages[1]


def test_classes_of_an_image(exported, picture):
    run, path = exported("classes")
    probabilities = Session(path, threads=1).classify(picture)
    expected = dict(zip(NAMES, np.exp(torch_logits(run, picture)).tolist(), strict=True))
    total = sum(expected.values())
    assert probabilities == pytest.approx({name: value / total for name, value in expected.items()}, rel=1e-4)
    assert list(probabilities.values()) == sorted(probabilities.values(), reverse=True)


def test_mask_of_an_image(exported, picture):
    run, path = exported("masks")
    labels = Session(path, threads=1).segment_image(picture)
    expected = torch_logits(run, picture).argmax(0)
    assert labels.shape == (31, 40) and labels.dtype == np.int64 and len(np.unique(expected)) > 1
    np.testing.assert_array_equal(labels, resize(expected, (31, 40), labels=True))


WITHOUT_TORCH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "timm", "torchvision", "monai"):
            raise AssertionError(f"{name} was imported")

sys.modules["torch"] = None  # not installed
sys.meta_path.insert(0, Blocked())
import json, numpy as np
from vision_gates.export import Session
volume, image, head, picture, out = sys.argv[1:]
labels = Session(volume, threads=1).segment_volume(head)
from vision_gates.volumes.writing import write_labels
write_labels(out, labels.array, labels.geometry, names=Session(volume).class_names)
print(json.dumps(Session(image, threads=1).classify(picture)))
"""


def test_without_torch(exported, head, picture, tmp_path):
    (_, volume), (_, image) = exported("patches"), exported("classes")
    arguments = [volume, image, head, picture, tmp_path / "mask.nii.gz"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(vision_gates.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    expected = Session(volume, threads=1).segment_volume(head)
    np.testing.assert_array_equal(read_labels(tmp_path / "mask.nii.gz").array, expected.array)
    assert json.loads(done.stdout) == pytest.approx(Session(image, threads=1).classify(picture))


def test_arrays(exported):
    _, path = exported("classes")
    session = Session(path, threads=1)
    x = np.random.default_rng(0).standard_normal((2, 1, 40, 33))
    logits = session.predict(x)
    assert logits.shape == (2, session.num_classes) == (2, 3) and logits.dtype == np.float32
    np.testing.assert_allclose(session.predict(x[1:])[0], logits[1], rtol=1e-4, atol=1e-5)
    for wrong in ((2, 3, 40, 33), (1, 40, 33), (1, 1, 8, 40, 33)):
        with pytest.raises(DataError, match=r"network.onnx: takes \(batch, 1, height, width\), got \("):
            session.predict(np.zeros(wrong))


def test_another_size_for_a_graph_of_one(exported, picture):
    _, path = exported("classes", dynamic=False)
    session = Session(path, threads=1)
    assert sum(session.classify(picture).values()) == pytest.approx(1)
    message = r"^\S+network.onnx: takes \(batch, 1, 24, 32\), got \(1, 1, 25, 32\); a network exported without --fixed "
    with pytest.raises(DataError, match=message) as caught:
        session.predict(np.zeros((1, 1, 25, 32)))
    assert "\n" not in str(caught.value)


def test_what_a_session_refuses(exported, head, picture, tmp_path, monkeypatch):
    (_, volume), (_, image), (_, flipped) = exported("patches"), exported("classes"), exported("flipped")
    colour = tmp_path / "colour.tif"
    pytest.importorskip("tifffile").imwrite(colour, np.zeros((20, 24, 5), np.uint8))
    cases = [
        (ConfigError, "is a network for segmentation, not for classification", lambda: Session(volume).classify(head)),
        (ConfigError, "trained on images, not on volumes", lambda: Session(image).segment_volume(head)),
        (ConfigError, "evaluates images after HorizontalFlip", lambda: Session(flipped).classify(picture)),
        (DataError, r"colour.tif: \d+ channels, the network was trained on 1", lambda: Session(image).classify(colour)),
        (DataError, "2 channels for a model of 1", lambda: Session(volume).segment_volume([head, head])),
        (ConfigError, "there is no such file", lambda: Session(tmp_path / "missing.onnx")),
        (ConfigError, "cannot be loaded as ONNX", lambda: Session(picture)),
        (ConfigError, "device=cuda: ONNX Runtime finds no GPU", lambda: Session(image, device="cuda")),
        (ConfigError, "trained on images", lambda: segment(head, tmp_path / "m.nii.gz", image, CPU, console=QUIET)),
        (
            ConfigError,
            "precision=bf16: an exported network has its own",
            lambda: segment(
                head, tmp_path / "m.nii.gz", volume, CPU.model_copy(update={"precision": "bf16"}), console=QUIET
            ),
        ),
    ]
    for kind, message, call in cases:
        with pytest.raises(kind, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match=r"^this needs onnxruntime: pip install 'vision-gates\[export\]'$"):
        Session(image)


def test_files_of_others(exported, tmp_path):
    _, path = exported("classes")
    model = onnx.load(path)
    (entry,) = model.metadata_props
    entry.value = entry.value.replace('"in_chans": 1', '"in_chans": "many"')
    onnx.save(model, tmp_path / "later.onnx")
    with pytest.raises(ConfigError, match=r"later.onnx: its description does not fit this version \(in_chans: "):
        Session(tmp_path / "later.onnx")
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "foreign.onnx")
    with pytest.raises(ConfigError, match="foreign.onnx: was not exported by vision_gates"):
        Session(tmp_path / "foreign.onnx")
    shutil.copy(path, tmp_path / "alone.onnx")  # without its JSON file
    assert Session(tmp_path / "alone.onnx").about == Session(path).about
