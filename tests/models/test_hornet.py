"""HorNet against the official implementation: parameter counts, checkpoint conversion, outputs; and its own errors."""

import importlib.util
import json
import re

import numpy as np
import pytest
import timm
import torch
from torch import nn

from vision_gates.models.hornet import checkpoint_filter_fn

# Those of the two tiny networks and of base_7x7 are the official implementation's, the others are our own.
PARAMETERS = {
    "vg_hornet_atto": 841_688,
    "vg_hornet_tiny_7x7": 22_409_512,
    "vg_hornet_tiny_gf": 22_991_848,
    "vg_hornet_small_7x7": 49_528_264,
    "vg_hornet_small_gf": 50_401_768,
    "vg_hornet_base_7x7": 87_256_680,
    "vg_hornet_base_gf": 88_421_352,
    "vg_hornet_base_gf_img384": 92_099_560,
    "vg_hornet_large_7x7": 194_542_504,
    "vg_hornet_large_gf": 196_289_512,
    "vg_hornet_large_gf_img384": 201_806_824,
}


def test_every_variant_is_counted():
    assert set(PARAMETERS) == set(timm.list_models("vg_hornet_*"))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("fixture", ["hornet_tiny_7x7", "hornet_tiny_gf"])
def test_official_checkpoint_gives_official_output(fixture, golden_folder):
    facts = json.loads((golden_folder / f"{fixture}.json").read_text())
    spec = importlib.util.spec_from_file_location("golden_weights", golden_folder / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    official = {key: torch.from_numpy(weights.tensor_for(key, tuple(shape))) for key, shape in facts["state"].items()}
    model = timm.create_model(f"vg_{fixture}").eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == facts["params"]
    model.load_state_dict(checkpoint_filter_fn({"model": official}, model), strict=True)
    expected = torch.from_numpy(np.load(golden_folder / f"{fixture}.npz")["output"])
    with torch.inference_mode():
        output = model(torch.from_numpy(weights.image_for(fixture, tuple(facts["input_shape"]))))
    assert (output - expected).abs().max() <= 2e-4 * expected.abs().max()


def official_names(model: nn.Module) -> dict[str, torch.Tensor]:
    """Our state dict under the official names, written independently of the conversion under test."""
    result = {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        if parts[0] == "stem":
            key = f"downsample_layers.0.{parts[1]}.{parts[2]}"
        elif parts[0] == "stages" and parts[2] == "downsample":
            key = f"downsample_layers.{parts[1]}.{parts[3]}.{parts[4]}"
        elif parts[0] == "stages":
            rest = ".".join(parts[4:])
            for ours, theirs in {
                "gnconv.spatial_filter.local_conv": "gnconv.dwconv.dw",
                "gnconv.spatial_filter": "gnconv.dwconv",
                "gnconv.widen": "gnconv.pws",
                "mlp.fc": "pwconv",
            }.items():
                rest = rest.replace(ours, theirs)
            if re.search(r"gnconv\.(proj|pws).*weight", rest):
                value = value[:, :, None, None]
            key = f"stages.{parts[1]}.{parts[3]}.{rest}"
        elif parts[0] == "head_norm":
            key = f"norm.{parts[1]}"
        result[key] = value
    return result


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
@pytest.mark.parametrize("name", [name for name in PARAMETERS if "large" not in name])
def test_every_size_converts_strictly(name, wrapper):
    with torch.device("meta"):
        model = timm.create_model(name)
    official = {f"module.{key}": value for key, value in official_names(model).items()}
    converted = checkpoint_filter_fn({wrapper: official} if wrapper else official, model)
    model.load_state_dict(converted, strict=True)


@pytest.mark.parametrize("name", ["vg_hornet_atto", "vg_hornet_tiny_gf"])
def test_conversion_moves_every_value_to_its_place(name):
    source, target = (timm.create_model(name, depths=(1, 1, 2, 1)) for _ in range(2))
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    target.load_state_dict(checkpoint_filter_fn(official_names(source), target), strict=True)
    for (key, value), loaded in zip(source.state_dict().items(), target.state_dict().values(), strict=True):
        assert torch.equal(loaded, value), key


def test_official_names_are_the_official_ones(golden_folder):
    for fixture in ("hornet_tiny_7x7", "hornet_tiny_gf"):
        with torch.device("meta"):
            model = timm.create_model(f"vg_{fixture}")
        state = json.loads((golden_folder / f"{fixture}.json").read_text())["state"]
        assert {key: list(value.shape) for key, value in official_names(model).items()} == state


def test_spectra_of_another_resolution():
    """At the size that the target's spectra are of, resizing at loading or at every forward is the same function."""
    small, large = ((None, None, (14, 8), (7, 4)), (None, None, (24, 13), (12, 7)))
    source = timm.create_model("vg_hornet_tiny_gf", depths=(1, 1, 1, 1), layer_scale=1.0, filter_sizes=small)
    target = timm.create_model("vg_hornet_tiny_gf", depths=(1, 1, 1, 1), layer_scale=1.0, filter_sizes=large)
    target.load_state_dict(checkpoint_filter_fn(official_names(source), target), strict=True)
    with torch.no_grad():
        image = torch.randn(1, 3, 384, 384)
        torch.testing.assert_close(target.eval()(image), source.eval()(image))


def test_normalises_after_pooling():
    model = timm.create_model("vg_hornet_atto", depths=(1, 1, 1, 1), num_classes=5).eval()
    nn.init.normal_(model.head_norm.weight)
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, 64, 96))
        pooled = nn.functional.layer_norm(features.mean((2, 3)), (128,), model.head_norm.weight, eps=1e-6)
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), pooled)
        assert "head_norm.weight" not in timm.create_model("vg_hornet_atto", features_only=True).state_dict()


def test_initial_values():
    model = timm.create_model("vg_hornet_tiny_gf", depths=(1, 1, 1, 1))
    for key, value in model.state_dict().items():
        if key.endswith(("gamma1", "gamma2")):
            assert (value == 1e-6).all(), key
        elif key.endswith("bias"):
            assert (value == 0).all(), key
        elif value.ndim == 1:
            assert (value == 1).all(), key
        else:
            assert abs(value.std().item() - 0.02) < 2e-3 and abs(value.mean().item()) < 3e-3, key


def test_whole_network_in_half_precision():
    """With layer scales of 1, so that the branches count; the contract test's are 1e-6."""
    model = timm.create_model("vg_hornet_tiny_gf", depths=(1, 1, 1, 1), layer_scale=1.0, num_classes=9).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    image = torch.randn(2, 3, 70, 101)
    with torch.no_grad():
        single = model(image)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model(image)
        half = model.bfloat16()(image.bfloat16())
        exact = model.float().double()(image.double())  # the weights of the bfloat16 network
    assert (half.double() - exact).abs().max() < 0.1 * exact.abs().max()
    assert (mixed.double() - single.double()).abs().max() < 0.1 * single.abs().max()


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (33, 97)])
def test_any_size(size):
    model = timm.create_model("vg_hornet_tiny_gf", depths=(1, 1, 1, 1), num_classes=4).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(dims=(32, 64, 96)), "one entry a stage, got 3, 4, 4 and 4"),
        (dict(dims=(32, 64, 96, 120)), r"multiple of 2\^\(order-1\) = 16 for order 5, got 120"),
        (dict(kernel_size=8), "kernel_size must be odd"),
        (dict(filter_sizes=(None, None, (0, 8), None)), "size must be two positive numbers"),
    ],
)
def test_says_what_is_wrong(options, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("vg_hornet_atto", **options)
