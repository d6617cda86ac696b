"""Every family as ONNX: small networks, one graph for any batch and size, the same logits as PyTorch's."""

import json

import numpy as np
import onnx
import pytest
import timm
import torch
from torch import nn

import vision_gates
from vision_gates.errors import ConfigError
from vision_gates.export import to_onnx
from vision_gates.export.onnx import OPSETS, ParityError
from vision_gates.export.runtime import open_session
from vision_gates.networks import available_networks, create_network
from vision_gates.segmenter import create_segmenter

pytest.importorskip("onnxscript", reason="the [export] extra is not installed")
pytest.importorskip("onnxruntime", reason="the [export] extra is not installed")

_ONE_STAGE = dict(dims=(16,), depths=(1,))
CLASSIFIERS = {
    "vig": ("vg_vig_atto", dict(depth=1, embed_dim=32, num_heads=2)),
    "vig_h": ("vg_vig_h_atto", dict(num_heads=(2,), **_ONE_STAGE)),
    "convit": ("vg_convit_atto", dict(depth=2, local_depth=1, embed_dim=32)),
    "hornet": ("vg_hornet_atto", dict(orders=(2,), filter_sizes=(None,), **_ONE_STAGE)),
    "hornet_gf": ("vg_hornet_atto", dict(orders=(2,), filter_sizes=((7, 5),), **_ONE_STAGE)),
    "attention_unet": ("vg_attention_unet_atto", dict(widths=(8, 16, 16))),
}
# Each network in one form here; tools/export_table.py has all of them, at their real sizes.
TWO_D_ONLY = {"attention_resunet": {}, "ear_unet": dict(encoder="resnet10t", max_channels=32)}
NETWORKS = [(name, 2 if name in (*TWO_D_ONLY, "attention_unet") else 3) for name in available_networks()]


def classifier(family, **options):
    name, arguments = CLASSIFIERS[family]
    return timm.create_model(name, num_classes=5, **arguments, **options)


def network(name, dims):
    options = TWO_D_ONLY.get(name, dict(spatial_dims=dims))
    widths = {} if name == "ear_unet" else dict(widths=(8, 16))
    return create_network(name, in_channels=1, num_classes=3, **options, **widths)


def assert_any_size(model, done, in_chans, sizes):
    """ONNX Runtime's logits are PyTorch's at sizes that no level divides and at larger ones than any before."""
    session = open_session(done.path, threads=1)
    for number, size in enumerate(sizes):
        x = torch.randn(1 + number, in_chans, *size)
        with torch.no_grad():
            expected = model.eval()(x).numpy()
        (result,) = session.run(None, {"image": x.numpy()})
        assert result.shape == expected.shape
        assert np.abs(result - expected).max() <= 1e-4 * np.abs(expected).max(), size


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_classifiers(family, tmp_path):
    model = classifier(family)
    done = to_onnx(model, tmp_path / "model.onnx", input_size=(3, 32, 48))
    assert done.about.dynamic_axes == ("batch", "height", "width") and done.about.task == "classification"
    assert [d.shape for d in done.differences] == [(1, 3, 32, 48), (3, 3, 32, 48), (1, 3, 43, 63)]
    assert_any_size(model, done, 3, [(33, 47), (64, 16), (176, 272)])
    assert done.nodes < 600, "tokens must not be unrolled"


@pytest.mark.parametrize(("name", "dims"), NETWORKS)
def test_networks(name, dims, tmp_path):
    model, size = network(name, dims), (24, 32) if dims == 2 else (12, 16, 8)
    done = to_onnx(model, tmp_path / "model.onnx", input_size=(1, *size))
    assert done.about.dynamic_axes[1:] == (("height", "width") if dims == 2 else ("depth", "height", "width"))
    assert done.about.task == "segmentation" and done.about.spatial_dims == dims
    assert_any_size(model, done, 1, [(17, 41), (72, 40)] if dims == 2 else [(13, 9, 22), (20, 24, 28)])


def test_a_segmenter(tmp_path):
    options = dict(dims=(8, 16), depths=(1, 1), orders=(1, 2), filter_sizes=(None, None), out_indices=(0, 1))
    decoder = {"type": "residual_attention", "channels": 8}
    model = create_segmenter("vg_hornet_atto", num_classes=3, in_chans=2, decoder=decoder, **options)
    done = to_onnx(model, tmp_path / "model.onnx", input_size=(2, 32, 48))
    assert_any_size(model, done, 2, [(33, 47), (80, 72)])


@pytest.mark.parametrize(
    "head",
    ["UPerHead", *(pytest.param(name, marks=pytest.mark.slow) for name in ("FCNHead", "SegformerHead", "ASPPHead"))],
)
def test_heads_of_mmseg(head, tmp_path):
    pytest.importorskip("mmseg", reason="the [mmseg] extra is not installed")
    decoder = {"type": "mmseg", "head": {"type": head, "channels": 8}}
    model = create_segmenter("test_resnet", num_classes=3, in_chans=2, decoder=decoder)
    done = to_onnx(model, tmp_path / "model.onnx", input_size=(2, 32, 48))
    assert done.about.dynamic_axes == ("batch", "height", "width")
    assert_any_size(model, done, 2, [(33, 47), (160, 96)])


def pixelwise():
    """Five classes from the mean over a convolution's results: what takes no time to export."""
    return nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def test_a_graph_of_one_size(tmp_path):
    model = pixelwise()
    done = to_onnx(model, tmp_path / "model.onnx", input_size=(3, 32, 48), dynamic=False)
    assert done.about.dynamic_axes == ("batch",)
    (image,) = onnx.load(done.path).graph.input
    assert [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim] == ["batch", 3, 32, 48]
    assert_any_size(model, done, 3, [(32, 48), (32, 48)])


def test_an_encoder_of_one_size_stays_so(tmp_path):
    model = timm.create_model("test_vit", num_classes=3, dynamic_img_size=False)
    size = model.pretrained_cfg["input_size"]
    assert to_onnx(model, tmp_path / "model.onnx", input_size=size).about.dynamic_axes == ("batch",)


def test_half_precision(tmp_path):
    model = classifier("hornet").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    half = to_onnx(model, tmp_path / "half.onnx", input_size=(3, 32, 48), half=True)
    graph = onnx.load(half.path).graph
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {onnx.TensorProto.FLOAT}
    weights = [w for w in graph.initializer if w.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)]
    large = [w for w in weights if np.prod(w.dims) > 64]
    assert large and all(w.data_type == onnx.TensorProto.FLOAT16 for w in large)
    assert half.about.precision == "float16" and 1e-6 < half.differences[0].relative < 1e-2
    assert model.training and all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("opset", [OPSETS[-1]])
def test_opsets(opset, tmp_path):
    done = to_onnx(pixelwise(), tmp_path / "model.onnx", input_size=(3, 32, 48), opset=opset)
    assert {o.domain: o.version for o in onnx.load(done.path).opset_import}[""] == opset == done.about.opset


def test_what_the_file_says_about_itself(tmp_path):
    samples = {"a real one": np.ones((2, 3, 40, 40), np.float32)}
    about = dict(class_names=("a", "b", "c", "d", "e"), licence="mit", model={"name": "hornet"})
    done = to_onnx(pixelwise(), tmp_path / "model.onnx", input_size=(3, 32, 48), about=about, samples=samples)
    model = onnx.load(done.path)
    onnx.checker.check_model(model, full_check=True)
    (inside,) = [json.loads(p.value) for p in model.metadata_props if p.key == "vision_gates"]
    assert inside == json.loads((tmp_path / "model.json").read_text())
    assert inside["class_names"] == list(about["class_names"]) and inside["licence"] == "mit"
    assert inside["versions"]["vision_gates"] == vision_gates.__version__ and inside["versions"]["torch"]
    assert done.differences[-1].name == "a real one" and "max |difference|" in str(done.differences[-1])
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node), "places in the source code"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.json", "model.onnx"]


class Unstable(nn.Module):
    """Gives another result in every call: what no graph can do."""

    def __init__(self):
        super().__init__()
        self.conv, self.calls = nn.Conv2d(1, 2, 1), 0

    def forward(self, x):
        self.calls += 1
        return self.conv(x) * self.calls


def test_a_result_that_differs_leaves_no_file(tmp_path):
    (tmp_path / "model.onnx").write_text("an older one")
    with pytest.raises(ParityError, match=r"model.onnx: differs from PyTorch by more than 0.0001: .*; not written$"):
        to_onnx(Unstable(), tmp_path / "model.onnx", input_size=(1, 8, 8))
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "an older one"


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (nn.Conv2d(1, 2, 1), dict(opset=17), r"^opset=17: is not supported; choose one from 18 to 23$"),
        (nn.Conv2d(1, 2, 1), dict(opset=99), "opset=99"),
        (nn.Conv2d(1, 2, 1), dict(input_size=(8, 8)), r"^input_size=\(8, 8\): "),
        (nn.Conv2d(1, 2, 1), dict(path="model.pt"), "must end in .onnx"),
        (nn.Conv2d(1, 2, 1), dict(path="missing/model.onnx"), "there is no folder"),
        (Branching(), dict(), r"^Branching cannot be exported for an input of \(1, 8, 8\): "),
    ],
)
def test_what_cannot_be_exported(model, changes, message, tmp_path):
    arguments = dict(path="model.onnx", input_size=(1, 8, 8)) | changes
    with pytest.raises(ConfigError, match=message) as caught:
        to_onnx(model, tmp_path / arguments.pop("path"), **arguments)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package(package, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ConfigError, match=rf"^this needs {package}: pip install 'vision-gates\[export\]'$"):
        to_onnx(nn.Conv2d(1, 2, 1), tmp_path / "model.onnx", input_size=(1, 8, 8))
